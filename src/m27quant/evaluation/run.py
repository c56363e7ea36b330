"""The one way through an evaluation: open, read the text, compute side by side, estimate, judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from m27quant.calib.data import Sequences, load_sequences, parse_dataset
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.evaluation.limits import Limits, failures
from m27quant.evaluation.lockstep import Measured, measure
from m27quant.evaluation.measures import Measures
from m27quant.evaluation.models import Model, labels, open_candidate, open_reference
from m27quant.evaluation.result import TOP, Evaluation
from m27quant.evaluation.serving import check_server, measure_tasks
from m27quant.evaluation.tasks import TaskOptions, plan_tasks
from m27quant.evaluation.texts import Row, Texts, measure_texts
from m27quant.evaluation.writing import make_prompts
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.recipes.schema import Calibration
from m27quant.runtime.device import pick_device


def evaluate(
    candidates: str | Path | Sequence[str | Path],
    *,
    reference: str | Path,
    dataset: str | Path,
    num_samples: int = 64,
    seq_len: int = 512,
    activations: Sequence[str] = ("auto",),
    kv_cache_dtypes: Sequence[str] = ("auto",),
    seed: int = 0,
    num_prompts: int = 32,
    max_tokens: int = 64,
    tasks: TaskOptions | None = None,
    base_url: str | None = None,
    limits: Limits | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure how far candidates' next-token distributions are from those of the model that they were made from.

    All models are computed layer by layer, side by side: none has to fit into memory.

    Args:
        candidates: NVFP4 checkpoints (others, too): folders or Hub ids, `org/name[@revision]`.
        reference: what they were made from; computed in F32 from its weights, nothing else is rounded.
        dataset: a text file, cut into windows; rows of JSON lines or Parquet, a window each; or a Hub id.
        num_samples: windows at most.
        seq_len: tokens of a window at most.
        activations: modes of candidates: nvfp4 (W4A4), bf16 (W4A16), auto (nvfp4 where there are input scales).
        kv_cache_dtypes: fp8, bf16, auto (what config.json declares); each goes with each of `activations`.
        seed: of the draws that intervals and tests are made from; other than 0 it also shuffles the rows.
        num_prompts: beginnings of windows behind which every model that fits into memory writes; 0: no texts.
        max_tokens: of each text.
        tasks: of lm-eval, through the builtin server for each model that fits into memory; None: none.
        base_url: of a server in OpenAI's form that has the only candidate, for the tasks.
        limits: what may be found at most; what is beyond is in the result's `failures`.
        device: auto, cpu, cuda or cuda:INDEX.
        max_memory: bytes to stay within while a model writes; None: most of what is free.
        offline: ask nobody but this machine.
        token: the Hub's access token.
        say: takes one line about each thing that was decided.
        progress: called as the work goes on.
        stop: called between experts; may raise `Interrupted`.

    Raises:
        UsageError: no candidate, one that is named twice, a text too short, a mode that there is not.
        CheckpointError: a damaged checkpoint or data set, not one model, a reference whose logits are not finite.
        EnvironmentFault: memory, disk, network, device.
    """
    names = [str(candidates)] if isinstance(candidates, str | Path) else [str(name) for name in candidates]
    _check_names(names)
    if num_prompts < 0 or max_tokens < 1:
        raise UsageError(f"num_prompts {num_prompts}, max_tokens {max_tokens}: at least 0 and 1")
    limits, where = limits or Limits(), pick_device(device)
    with ExitStack() as opened:
        first = open_reference(str(reference), locate(str(reference), offline=offline, token=token))
        opened.enter_context(first.source)
        models = []
        for name in names:
            location = locate(name, offline=offline, token=token)
            model = open_candidate(name, location, first, activations, kv_cache_dtypes)
            opened.enter_context(model.source)
            models.append(model)
        plan = None
        if tasks is not None:
            plan = plan_tasks(tasks, echoes=base_url is not None)
            check_server(base_url, models)
        sequences, windows = read_windows(
            str(dataset), first, num_samples, seq_len, seed=seed, offline=offline, token=token, say=say
        )
        measured = measure(
            first, models, windows, device=where, num_likeliest=TOP, progress=progress, stop=stop
        )
        _refuse_non_finite(str(reference), measured)
        texts = _texts(
            first, models, windows, num_prompts, max_tokens,
            seed=seed, device=where, max_memory=max_memory, progress=progress, stop=stop,
        )  # fmt: skip
        reference_tasks, row_tasks = None, None
        if plan is not None:
            reference_tasks, row_tasks = measure_tasks(
                first, models, plan, base_url=base_url, device=where, max_memory=max_memory, stop=stop,
                progress=lambda done: progress(Progress(stage="tasks", fraction=done)),
            )  # fmt: skip
    measures = Measures(measured, seed)
    modes = [(model, precision) for model in models for precision in model.precisions]
    rows = tuple(
        measures.row(model, precision, label, sums)
        for (model, precision), label, sums in zip(modes, labels(models), measured.rows, strict=True)
    )
    pairs = measures.pairs(rows)
    if texts is not None:
        rows = texts.beside(rows)
        pairs += texts.pairs
    if row_tasks is not None:
        rows = tuple(replace(row, tasks=found) for row, found in zip(rows, row_tasks, strict=True))
    num_tokens = sum(len(ids) for ids in windows)
    return Evaluation(
        reference=str(reference),
        reference_perplexity=measures.reference_perplexity(),
        dataset=sequences.sources,
        digest=sequences.digest,
        num_windows=len(windows),
        num_tokens=num_tokens,
        seq_len=seq_len,
        seed=seed,
        candidates=rows,
        pairs=pairs,
        reference_health=None if texts is None else texts.reference_health,
        reference_tasks=reference_tasks,
        failures=tuple(failures(rows, limits, num_tokens)),
    )


def _refuse_non_finite(reference: str, measured: Measured) -> None:
    if bad := int((~measured.reference.finite).sum()):
        raise CheckpointError(
            f"{escape(reference)}: {bad:,} of {len(measured.reference.finite):,} tokens get NaN or infinite "
            "logits: nothing can be compared with it",
            hint="`m27quant inspect` shows the reference; is it whole?",
        )


def _texts(
    reference: Model, models: Sequence[Model], windows: Sequence[torch.Tensor], num_prompts: int, max_tokens: int,
    *, seed: int, device: torch.device, max_memory: int | None, progress: ProgressCallback, stop: Callable[[], None],
) -> Texts | None:  # fmt: skip
    """What the models write behind the windows' beginnings; None where no text was asked for."""
    if num_prompts == 0:
        return None
    folder = reference.source.folder
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    modes = zip(labels(models), ((m, p) for m in models for p in m.precisions), strict=True)
    return measure_texts(
        reference.source,
        [Row(model.name, label, model.source, precision) for label, (model, precision) in modes],
        make_prompts(windows, tokenizer, num_prompts, longest=reference.source.config.max_position_embeddings),
        max_tokens=max_tokens, seed=seed, device=device, max_memory=max_memory, stop=stop,
        progress=lambda done: progress(Progress(stage="texts", fraction=done)),
    )  # fmt: skip


def read_windows(
    dataset: str,
    reference: Model,
    num_samples: int,
    seq_len: int,
    *,
    seed: int = 0,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Sequences, list[torch.Tensor]]:
    """The data in tokens of the reference's tokenizer: int64 [length], 2 to `seq_len` tokens each.

    Raises:
        UsageError: a window too long, or no data that two tokens could be taken from.
        CheckpointError: damaged data.
        EnvironmentFault: data that are not to be had.
    """
    config = reference.source.config
    if not 2 <= seq_len <= config.max_position_embeddings or num_samples < 1:
        raise UsageError(
            f"--seq-len {seq_len}, --num-samples {num_samples}: a window needs 2 to "
            f"{config.max_position_embeddings} tokens, and there must be one"
        )
    plan = Calibration(datasets=(parse_dataset(dataset),), num_samples=num_samples, seq_len=seq_len)
    sequences, notices = load_sequences(
        plan,
        reference.source.folder,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        seed=seed,
        offline=offline,
        token=token,
    )
    for line in notices:
        say(line)
    windows = [ids for ids in torch.split(sequences.ids, list(sequences.lengths)) if len(ids) > 1]
    if not windows:
        raise UsageError(
            f"--dataset {escape(dataset)}: no window holds two tokens", hint="name a longer text"
        )
    return sequences, windows


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise UsageError("nothing to evaluate", hint="name a candidate")
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UsageError(f"{escape(twice)} is named twice", hint="name every candidate once")
