"""On-policy data: the target itself answers prompts, many at a time, into shards that survive a crash."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import m27quant
from m27quant.calib.data import parse_dataset
from m27quant.drafters.data_folder import DataFolder, check_free
from m27quant.drafters.prompts import Prompts
from m27quant.drafters.states import fingerprint_of
from m27quant.drafters.text_data import Cut, open_source
from m27quant.errors import UsageError, escape
from m27quant.llm import load
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runtime.api import LLM
from m27quant.runtime.generation import SamplingParams, derived_seed
from m27quant.runtime.options import RunOptions
from m27quant.runtime.sequence import Sequence as Running

AHEAD = 2
"""So many times the answers that are worked on are queued: a slot that falls free is taken at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What is generated."""

    num_samples: int = 1000
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=128))
    """Its seed is not looked at: each sample has its own, from `seed` and its number."""
    cut: Cut = field(default_factory=Cut)
    """How prompts are made."""
    seed: int = 0
    shard_size: int = 256
    """Samples of a shard."""

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the field that cannot be."""
        for name in ("num_samples", "shard_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataResult:
    """What was made."""

    folder: Path
    num_samples: int
    num_failed: int
    """Prompts without an answer: empty ones, or longer than the context."""
    num_tokens: int
    """Of answers."""
    num_new: int
    """Samples that this run made."""
    tokens_per_s: float | None
    """Of this run."""


def generate_drafter_data(
    target: str | Path,
    datasets: Sequence[str | Path],
    out: str | Path,
    options: DataOptions | None = None,
    *,
    run_options: RunOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    check: bool = True,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    loading: Callable[[int, int], None] = lambda done, total: None,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
) -> DataResult:
    """Let `target` answer prompts into a data folder that `train_drafter` learns from.

    A sample follows from options, seed and its number alone (with the invariant kernels that a CPU uses), whatever
    runs beside it; a run that was killed and resumed leaves the same bytes as one that was not.

    Args:
        target: a folder or Hub id, as `m27quant.load` takes it.
        datasets: where prompts come from, in turns: files (JSON lines, Parquet, text) or Hub ids.
        out: the folder to make.
        options: what is generated.
        run_options: how the target is run; its seed is not looked at.
        resume: go on with unfinished data.
        overwrite: replace data that are there.
        command: the command line, for the manifest.
        check: as `m27quant.load`.
        revision: as `m27quant.load`.
        offline: as `m27quant.load`.
        token: as `m27quant.load`.
        say: takes one line about each thing that was decided.
        loading: called with layers loaded and layers in all.
        progress: called as samples come.
        stop: called between steps; may raise `Interrupted`.

    Raises:
        UsageError: no data set, nothing in one, or flags and settings that do not go with what is in `out`.
        CheckpointError: a target or a data set that is damaged; a row that is no prompt.
        OutputError: `out` holds other files, or another run is writing.
        EnvironmentFault: disk, memory, network.
    """
    options, run_options = options or DataOptions(), run_options or RunOptions()
    if not datasets:
        raise UsageError("no data set to take prompts from", hint="name one with --dataset")
    for name in datasets:
        parse_dataset(str(name))  # a slip is heard of before the target is loaded
    check_free(Path(out), resume=resume, overwrite=overwrite)
    reach: dict[str, Any] = {"revision": revision, "offline": offline, "token": token}
    llm = load(target, run_options, check=check, alone=True, say=say, progress=loading, **reach)
    sources = [
        open_source(
            str(name), llm.tokenizer, vocab_size=llm.model.config.vocab_size, cut=options.cut,
            most_rows=options.num_samples, offline=offline, token=token,
        )
        for name in datasets
    ]  # fmt: skip
    sampling = llm.generation.complete(replace(options.sampling, seed=None), llm.model.config.vocab_size)
    prompts = Prompts(sources, options.num_samples, options.seed, again=not sampling.is_greedy)
    if len(prompts) < options.num_samples:
        say(f"the data sets hold {len(prompts)} prompts, {options.num_samples} were asked for; greedy answers "
            "to the same prompt are the same, so there are no more")  # fmt: skip
    prompts.check(stop)
    description = {
        "command": command,
        "version": m27quant.__version__,
        "target_name": str(target),
        "target": _target(llm, fingerprint_of(target, **reach)),
        "datasets": [dataclasses.asdict(source.origin) for source in sources],
        "settings": {
            "num_samples": len(prompts), "seed": options.seed, "shard_size": options.shard_size,
            **dataclasses.asdict(options.cut), **_plain(sampling),
        },
    }  # fmt: skip
    with DataFolder(
        Path(out), description, len(prompts), options.shard_size, resume=resume, overwrite=overwrite
    ) as data:
        return _generate(llm, prompts, sampling, data, options, say, progress, stop)


def _generate(
    llm: LLM,
    prompts: Prompts,
    sampling: SamplingParams,
    data: DataFolder,
    options: DataOptions,
    say: Callable[[str], None],
    progress: ProgressCallback,
    stop: Callable[[], None],
) -> DataResult:
    missing = data.missing()
    waiting: dict[int, tuple[int, Running]] = {}
    queue = iter(missing)
    total, done, tokens = len(prompts), len(prompts) - len(missing), 0
    begun = time.monotonic()
    while True:
        stop()
        while len(waiting) < AHEAD * llm.options.max_num_seqs and (index := next(queue, None)) is not None:
            seeded = replace(sampling, seed=derived_seed(options.seed, index))
            sequence = llm.submit(prompts[index], seeded)
            waiting[sequence.number] = index, sequence
        if not waiting:
            break
        llm.step()
        for number in [n for n, (_, s) in waiting.items() if s.finish_reason is not None]:
            index, sequence = waiting.pop(number)
            if sequence.error is not None:
                say(f"sample {index} has no answer: {escape(sequence.error)}")
            data.add(index, None if sequence.error is not None else _row(llm, index, sequence))
            tokens, done = tokens + sequence.num_output, done + 1
        seconds = time.monotonic() - begun
        progress(Progress(stage="samples", fraction=done / total, tokens_per_s=tokens / seconds))
    shards = data.shards.values()
    return DataResult(
        folder=data.out,
        num_samples=sum(shard["samples"] for shard in shards),
        num_failed=sum(shard["failed"] for shard in shards),
        num_tokens=sum(shard["tokens"] for shard in shards),
        num_new=len(missing),
        tokens_per_s=tokens / (time.monotonic() - begun) if tokens else None,
    )


def _row(llm: LLM, index: int, sequence: Running) -> dict[str, Any]:
    """One line of a shard; the prompt's text has its special tokens."""
    result = llm.result(sequence)
    prompt = sequence.tokens[: sequence.num_prompt]
    tokenizer = llm.tokenizer
    return {
        "id": str(index),
        "prompt_token_ids": prompt,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "prompt": tokenizer.decode(prompt, skip_special_tokens=False) if tokenizer else None,
        "text": result.text if tokenizer else None,
    }


def _target(llm: LLM, fingerprint: str) -> dict[str, Any]:
    """The target, and how it is run as far as that changes its answers."""
    return {
        "fingerprint": fingerprint,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "activations": llm.options.activations,
        "kv_cache_dtype": str(llm.engine.cache.shape.dtype).removeprefix("torch."),
        "invariant": llm.model.invariant,
    }


def _plain(sampling: SamplingParams) -> Mapping[str, Any]:
    """What of the sampling has an effect on token ids."""
    fields = dataclasses.asdict(sampling)
    for name in ("seed", "logprobs", "skip_special_tokens"):
        del fields[name]
    return fields | {"stop": list(sampling.stop_strings), "stop_token_ids": list(sampling.stop_token_ids)}
