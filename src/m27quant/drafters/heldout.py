"""What drafters are measured on: prompts, and the text that does follow them where there is one."""

from __future__ import annotations

from collections.abc import Sequence

from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.drafters.samples import Sample, read_samples
from m27quant.drafters.text_data import Cut, RowSource, TextSource, open_source


def heldout_samples(
    dataset: str,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    prompt_tokens: int,
    max_tokens: int,
    most: int,
    offline: bool = False,
    token: str | None = None,
) -> list[Sample]:
    """Prompts, and up to `max_tokens` of what follows them, to measure drafters with.

    Of text: pieces at even distances, `prompt_tokens` of each the prompt.  Of rows: a prompt and its answer where it
    has one (a data folder's samples, chats), else the prompt alone; rows of text as pieces from their beginnings.

    Args:
        dataset: a data folder, a file (JSON lines, Parquet, text) or a Hub id.
        tokenizer: the target's.
        vocab_size: token ids are below it.
        prompt_tokens: of pieces of text.
        max_tokens: behind a prompt.
        most: samples; fewer where there are no more.
        offline: do not ask the Hub.
        token: for the Hub.

    Raises:
        UsageError: nothing in it, or text without a tokenizer.
        CheckpointError: damaged; file and line are named.
        EnvironmentFault: not to be had.
    """
    folder = existing(dataset)
    if folder is not None and folder.is_dir():
        samples = read_samples(folder, vocab_size=vocab_size)
        return [_behind_prompt(sample, max_tokens) for sample in _evenly(samples, most)]
    cut = Cut(prompt_tokens=(prompt_tokens, prompt_tokens), beginnings=0)
    source = open_source(
        dataset, tokenizer, vocab_size=vocab_size, cut=cut, most_rows=most, offline=offline, token=token
    )
    if isinstance(source, TextSource):
        return source.pieces(prompt_tokens, max_tokens, most)
    assert isinstance(source, RowSource)
    return [sample for sample in source.samples(prompt_tokens, max_tokens) if sample.num_prompt]


def _behind_prompt(sample: Sample, max_tokens: int) -> Sample:
    return sample.cut(sample.num_prompt + max_tokens)


def _evenly(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, at even distances."""
    count = min(most, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]
