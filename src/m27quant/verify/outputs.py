"""`--outputs`: a checkpoint proven by running it, with the kernels that this machine would use.

Loaded once as `m27quant run` does; then experts against their weights, ranges and source, texts against what the
source writes, and a drafter at work.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m27quant.checkpoint.hub import Location, locate
from m27quant.checkpoint.quantized import QuantizedSource, same_model
from m27quant.checkpoint.source import Source
from m27quant.errors import EnvironmentFault, UsageError, escape
from m27quant.kernels.dispatch import choose
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runtime.api import LLM
from m27quant.runtime.load import MakeDrafter, load_llm
from m27quant.runtime.options import Activations, KvCacheDtype, RunOptions
from m27quant.runtime.probe import PROBE
from m27quant.runtime.speculative.choose import NGRAM, make_named
from m27quant.runtime.speculative.load import DrafterOptions
from m27quant.verify.collect import Findings
from m27quant.verify.drafting import check_drafting
from m27quant.verify.products import check_products
from m27quant.verify.smoke import Answer, Question, ask, questions
from m27quant.verify.text_health import Health, health, spurious_spaces
from m27quant.verify.tokenizer_class import check_tokenizer_class

PROBE_TOKENS = 512
MAX_SPACES, MAX_REPETITION, MAX_BROKEN = 0.01, 0.2, 0.01
"""By how much a text may have more of these than the source's; see `text_health`."""
SICK_SPACES, SICK_REPETITION, SICK_BROKEN = 0.05, 0.95, 0.05
"""What is too much without a source to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputsOptions:
    """How to run the checkpoint; the command's options have the same names."""

    prompts: Path | None = None
    """JSON lines as `run --input` takes them, in place of the built-in prompts."""
    max_tokens: int = 128
    """Of each answer."""
    num_experts: int = 4
    """Of each layer, the most used ones."""
    activations: Activations = "auto"
    kv_cache_dtype: KvCacheDtype = "auto"
    device: str = "auto"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for counts below 1."""
        if self.max_tokens < 1 or self.num_experts < 1:
            raise UsageError(
                f"max_tokens {self.max_tokens}, num_experts {self.num_experts}: at least 1 of each is needed"
            )

    def run_options(self) -> RunOptions:
        """As `run` would load it."""
        return RunOptions(
            activations=self.activations, kv_cache_dtype=self.kv_cache_dtype, device=self.device,
            max_memory=self.max_memory,
        )  # fmt: skip


def check_outputs(
    checkpoint: Path,
    source: Source | None,
    drafter: str | None,
    options: OutputsOptions,
    found: Findings,
    *,
    progress: ProgressCallback = ignore,
) -> dict[str, Any]:
    """Run the checkpoint; reports findings, returns the figures.

    Args:
        checkpoint: NVFP4, without errors that keep it from being loaded.
        source: what it was made from; compared with where it is given.
        drafter: a folder or Hub id, or `ngram`.
        options: how.
        found: for what is wrong.
        progress: called with snapshots.

    Raises:
        CheckpointError: what cannot be loaded.
        EnvironmentFault: it does not fit into memory, or the device is not there.
        UsageError: a prompts file without prompts; a checkpoint without tokenizer.
    """
    check_tokenizer_class(checkpoint, found)
    make = None if drafter is None else _maker(drafter, checkpoint)
    with QuantizedSource(Location(checkpoint)) as opened:
        if source is not None:
            same_model(opened.config, source.config)
        opened.check_layout(input_scales=False)
        llm = load_llm(opened, options.run_options(), make_drafter=make, progress=_loading(progress))
        facts = _products(llm, opened, source, options, found, progress)
    asked = questions(llm, options.prompts)
    with llm.without_drafter():
        answers = ask(llm, asked, options.max_tokens)
    progress(Progress(stage="answers", fraction=0.7))
    if drafter is not None:
        probe = llm.encode(PROBE)[:PROBE_TOKENS]
        prompts = [question.token_ids for question in asked]
        facts["drafter"] = check_drafting(llm, "drafter", prompts, probe, options.max_tokens, found)
        progress(Progress(stage="drafter", fraction=0.85))
    del llm
    gc.collect()  # the source wants the room
    theirs, reason = (None, None) if source is None else _of_source(source, asked, options)
    if reason is not None:
        facts["source_not_run"] = reason
    _judge(answers, theirs, found)
    facts["texts"] = asdict(_health(answers)) | {"num_texts": len(answers)}
    if theirs is not None:
        facts["source_texts"] = asdict(_health(theirs))
    facts["answers"] = [_answer(answer) for answer in answers]
    progress(Progress(stage="answers", fraction=1.0))
    return facts


def _maker(drafter: str, checkpoint: Path) -> MakeDrafter:
    where = drafter if drafter == NGRAM else locate(drafter).folder
    return make_named(where, DrafterOptions(), checkpoint)


def _loading(progress: ProgressCallback) -> Callable[[int, int], None]:
    return lambda done, total: progress(
        Progress(stage="loading", fraction=0.3 * done / total, layer=done, num_layers=total)
    )


def _products(
    llm: LLM,
    checkpoint: Source,
    source: Source | None,
    options: OutputsOptions,
    found: Findings,
    progress: ProgressCallback,
) -> dict[str, Any]:
    choice = choose("nvfp4_moe", llm.model.device)
    kernel = f"{choice.backend} ({choice.reason})"
    activations = llm.options.activations
    layers = check_products(
        llm.model,
        checkpoint,
        source,
        llm.encode(PROBE)[:PROBE_TOKENS],
        found,
        activations=activations,
        num_experts=options.num_experts,
        kernel=f"the {choice.backend} kernel with {activations.upper()} activations",
        progress=lambda layer: progress(
            Progress(stage="experts", fraction=0.3 + 0.2 * (layer + 1) / len(llm.model.layers), layer=layer)
        ),
    )
    return {
        "kernel": kernel,
        "activations": activations,
        "kv_cache": str(llm.engine.cache.shape.dtype).removeprefix("torch."),
        "device": str(llm.model.device),
        "layers": [asdict(layer) for layer in layers],
    }


def _of_source(
    source: Source, asked: list[Question], options: OutputsOptions
) -> tuple[list[Answer] | None, str | None]:
    """The source's answers to the same questions, or why there are none."""
    try:
        settings = RunOptions(device=options.device, max_memory=options.max_memory)
        llm = load_llm(source, settings)
    except EnvironmentFault as fault:
        return None, fault.message
    return ask(llm, asked, options.max_tokens), None


def _judge(answers: list[Answer], theirs: list[Answer] | None, found: Findings) -> None:
    passed = {a.question.name: a.failed for a in theirs} if theirs is not None else {}
    for answer in answers:
        name = escape(answer.question.name)
        if answer.result.error is not None:
            found.add("M27-O005", f"{name}: {escape(answer.result.error)}", found=answer.result.finish_reason)
        for want in answer.failed:
            by_source = theirs is not None and want not in passed.get(answer.question.name, [want])
            found.add(
                "M27-O006" if by_source else "M27-O007",
                f"{name}: no {want} in {len(answer.result.token_ids)} tokens"
                + (", the source gives it" if by_source else ""),
                expected=want, found=_beginning(answer.result.text),
            )  # fmt: skip
    _judge_health(answers, _health(answers), None if theirs is None else _health(theirs), found)


def _judge_health(answers: list[Answer], ours: Health, source: Health | None, found: Findings) -> None:
    examples = [place for a in answers for place in spurious_spaces(a.result.text)]
    signs = (
        ("spurious spaces per word", ours.spurious_spaces, "spurious_spaces", MAX_SPACES, SICK_SPACES),
        ("repeated 8-grams", ours.repetition, "repetition", MAX_REPETITION, SICK_REPETITION),
        (
            "characters that are no UTF-8",
            ours.broken_characters,
            "broken_characters",
            MAX_BROKEN,
            SICK_BROKEN,
        ),
    )
    for what, share, name, more, sick in signs:
        limit = sick if source is None else getattr(source, name) + more
        if share > limit:
            shown = f", such as {escape(repr(examples[0]))}" if name == "spurious_spaces" and examples else ""
            than = "" if source is None else f"; the source has {getattr(source, name):.1%}"
            found.add(
                "M27-O008" if source is not None else "M27-O009",
                f"{share:.1%} {what}{shown}{than}",
                expected=f"at most {limit:.1%}", found=f"{share:.1%}",
            )  # fmt: skip


def _health(answers: list[Answer]) -> Health:
    return health([a.result.text for a in answers], [a.result.token_ids for a in answers])


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "name": answer.question.name,
        "text": answer.result.text,
        "finish_reason": answer.result.finish_reason,
        "failed": answer.failed,
    }


def _beginning(text: str) -> str:
    return escape(repr(text), 60)
