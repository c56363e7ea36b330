"""How drafters fare on one or several targets: what is accepted as they generate, and along held-out text.

Every target answers the same prompts.  Each drafter is walked through the answers (`walk`) and scored along the text
that does follow the prompts (`proxy`); differences to the first target are paired by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m27quant.checkpoint.hub import locate
from m27quant.drafters.compare import paired_difference
from m27quant.drafters.eval_plan import check_named, many, modes_of
from m27quant.drafters.evaluation import EvalOptions, EvalResult, EvalRow, TargetMode
from m27quant.drafters.heldout import heldout_samples
from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.drafters.proxy import Proxy, Trained, pooled, teacher_forced
from m27quant.drafters.samples import Sample, sample_of
from m27quant.drafters.states import TargetStates
from m27quant.drafters.walk import Text, repeated_share, walk
from m27quant.errors import UsageError, escape
from m27quant.llm import load
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runtime.api import LLM, GenerateResult
from m27quant.runtime.generation import SamplingParams, derived_seed
from m27quant.runtime.options import RunOptions
from m27quant.runtime.speculative.choose import NGRAM, make_named
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.load import DrafterOptions
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import Drafter
from m27quant.runtime.speculative.tree import num_candidates

TEXTS = 32
"""Whose hidden states are in memory at a time."""
TREE_TOPK, TREE_TOKENS = 4, 8
"""SGLang's flags for an EAGLE3 tree, of three steps."""


def evaluate_drafter(
    drafters: str | Path | Sequence[str | Path],
    targets: str | Path | Sequence[str | Path],
    dataset: str | Path,
    options: EvalOptions | None = None,
    *,
    activations: Sequence[str] = ("auto",),
    kv_cache_dtypes: Sequence[str] = ("auto",),
    run_options: RunOptions | None = None,
    command: str | None = None,
    check: bool = True,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    loading: Callable[[int, int], None] = lambda done, total: None,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Measure what targets accept of drafters.

    Args:
        drafters: folders or Hub ids of DFlash or EAGLE3 drafters, or `ngram`.
        targets: checkpoints, as `m27quant.load` takes them; differences are to the first one, run in its first mode.
        dataset: held-out text, JSON lines, Parquet, a data folder, or a Hub id.
        options: what is measured.
        activations: modes of NVFP4 targets, each with each of `kv_cache_dtypes`; others run as they are.
        kv_cache_dtypes: as `activations`.
        run_options: how targets are run otherwise.
        command: the command line, for cards.
        check: as `m27quant.load`.
        revision: of the targets.
        offline: as `m27quant.load`.
        token: as `m27quant.load`.
        say: takes one line about each thing that was decided.
        loading: called with layers loaded and layers in all.
        progress: called as the work goes on.
        stop: called between parts; may raise `Interrupted`.

    Raises:
        UsageError: no drafter, no target, no prompt, or settings that a drafter does not have.
        CheckpointError: a checkpoint or a data set that is damaged, a drafter that is not for the target.
        EnvironmentFault: memory, disk, network.
    """
    names, folders = many(drafters), many(targets)
    if not names or not folders:
        raise UsageError("nothing to measure", hint="name a drafter and a target")
    options, run_options = options or EvalOptions(), run_options or RunOptions()
    reach: dict[str, Any] = {"offline": offline, "token": token}
    located: dict[str, Any] = {"revision": revision, **reach}
    check_named(names, folders, str(dataset), options, located)
    plan = [
        (target, is_quantized, mode)
        for target in folders
        for is_quantized, mode in modes_of(target, activations, kv_cache_dtypes, located)
    ]
    rows: list[EvalRow] = []
    num_prompts, num_tokens, invariant = 0, 0, True
    for done, (target, is_quantized, mode) in enumerate(plan):
        progress(Progress(stage=f"target {done + 1}/{len(plan)}", fraction=done / len(plan)))
        llm = load(
            target, replace(run_options, **mode), check=check, alone=True, say=say, progress=loading, **located,
        )  # fmt: skip
        folder = locate(target, **located).folder
        measured = _Measured(llm, target, folder, is_quantized, str(dataset), options, reach, say, stop)
        for index, name in enumerate(names):
            stop()
            rows += measured.rows_of(name)
            progress(
                Progress(
                    stage=f"target {done + 1}/{len(plan)}",
                    fraction=(done + (index + 1) / len(names)) / len(plan),
                )
            )
        num_prompts, num_tokens = (
            len(measured.texts),
            sum(len(t.tokens) - t.num_prompt for t in measured.texts),
        )
        invariant &= llm.model.invariant
        del llm, measured
    return EvalResult(
        rows=tuple(_with_differences(rows)), dataset=str(dataset), num_prompts=num_prompts, num_tokens=num_tokens,
        options=options, invariant=invariant, command=command,
    )  # fmt: skip


class _Measured:
    """One target in one mode: its answers, and what it says of drafters."""

    def __init__(
        self, llm: LLM, target: str, folder: Path, is_quantized: bool, dataset: str, options: EvalOptions,
        reach: dict[str, Any], say: Callable[[str], None], stop: Callable[[], None],
    ) -> None:  # fmt: skip
        self.llm, self.folder, self.options, self.reach, self.say = llm, folder, options, reach, say
        self.stop = stop
        kv = str(llm.engine.cache.shape.dtype).removeprefix("torch.")
        short = {"float8_e4m3fn": "fp8", "bfloat16": "bf16", "float32": "f32"}
        self.mode = TargetMode(target, llm.options.activations, short.get(kv, kv), is_quantized)
        self.states = TargetStates(llm, "", cache_folder=None, cache_bytes=None)
        samples = heldout_samples(
            dataset, llm.tokenizer, vocab_size=llm.model.config.vocab_size, prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens, most=options.num_prompts, **reach,
        )  # fmt: skip
        self.samples = [sample.cut(llm.model.config.max_position_embeddings) for sample in samples]
        if not self.samples:
            raise UsageError(
                f"{escape(dataset)} holds no prompt", hint="name held-out text, or rows with prompts"
            )
        self.texts = self._answers()
        self.repeated = repeated_share(self.texts)
        self._lookups: dict[int, list[AcceptanceStats]] = {}

    def _answers(self) -> list[Text]:
        """What the target writes, which no drafter changes."""
        o, prompts = self.options, [sample.ids[: sample.num_prompt] for sample in self.samples]
        params = [
            SamplingParams(
                temperature=o.temperature, max_tokens=o.max_tokens, ignore_eos=o.ignore_eos,
                seed=derived_seed(o.seed, index),
            )
            for index in range(len(prompts))
        ]  # fmt: skip
        results: dict[int, GenerateResult] = {}
        for event in self.llm.stream(prompts, params):
            self.stop()
            if event.result is not None:
                results[event.index] = event.result
        failed = next((result for result in results.values() if result.error is not None), None)
        if failed is not None:
            raise UsageError(f"prompt {failed.index}: {failed.error}", hint="take shorter prompts")
        longest = self.llm.max_model_len
        return [
            Text(prompt + results[i].token_ids, len(prompt), min(longest, len(prompt) + o.max_tokens))
            for i, prompt in enumerate(prompts)
        ]

    def rows_of(self, name: str) -> list[EvalRow]:
        """One drafter in its settings."""
        if name == NGRAM:
            counts = self.options.num_draft_tokens or (NgramDrafter().num_draft_tokens,)
            return [self._row(name, "ngram", f"up to {n}", n, self._lookup(n), None) for n in counts]
        first = self._make(name, self._base(), self.say)
        settings = self._settings(first)
        made = [self._make(name, setting) for _, setting in settings]
        steps: list[list[AcceptanceStats]] = [[] for _ in settings]
        for begin in range(0, len(self.texts), TEXTS):
            texts = self.texts[begin : begin + TEXTS]
            answers = [sample_of("", t.tokens[:-1], []) for t in texts]  # the last token was never computed
            taps = [pair[0] for pair in self.states.of(answers, made[0].taps)]
            for found, drafter in zip(steps, made, strict=True):
                self.stop()
                found += walk(drafter, texts, taps)
        kind = "eagle3" if isinstance(first, Eagle3Drafter) else "dflash"
        proxies: dict[int, Proxy | None] = {}
        for drafter in made:
            if drafter.max_depth not in proxies:  # a tree's first path is its chain
                proxies[drafter.max_depth] = self._proxy(drafter)
        return [
            self._row(name, kind, label, drafter.num_draft_tokens, found, proxies[drafter.max_depth])
            for (label, _), drafter, found in zip(settings, made, steps, strict=True)
        ]

    def _base(self) -> DrafterOptions:
        """What every kind has."""
        return DrafterOptions(tap_offset=self.options.tap_offset, rope_theta=self.options.rope_theta)

    def _settings(self, drafter: Trained) -> list[tuple[str, DrafterOptions]]:
        """Labelled."""
        o, base = self.options, self._base()
        if not isinstance(drafter, Eagle3Drafter):
            most = drafter.num_draft_tokens
            counts = dict.fromkeys(min(n, most) for n in o.num_draft_tokens or (most,))
            return [(f"block of {n + 1}", replace(base, num_draft_tokens=n)) for n in counts]
        steps, topk = o.num_steps or drafter.num_steps, o.eagle_topk or TREE_TOPK
        settings = [(f"chain of {steps}", replace(base, num_steps=steps, eagle_topk=1))]
        if topk > 1:
            most = num_candidates(steps, topk) + 1
            for rows in dict.fromkeys(min(n, most) for n in o.num_draft_tokens or (TREE_TOKENS,)):
                tree = replace(base, num_steps=steps, eagle_topk=topk, num_draft_tokens=rows)
                settings.append((f"tree {steps}/{topk}/{rows}", tree))
        return settings

    def _make(
        self, name: str, setting: DrafterOptions, say: Callable[[str], None] = lambda line: None
    ) -> Trained:
        folder = locate(name, **self.reach).folder
        drafter: Drafter = make_named(folder, setting, self.folder, say)(self.llm.model)
        assert isinstance(drafter, Trained)
        return drafter

    def _lookup(self, num_drafts: int) -> list[AcceptanceStats]:
        """Prompt lookup on the answers."""
        if num_drafts not in self._lookups:
            none = [None] * len(self.texts)
            self._lookups[num_drafts] = walk(NgramDrafter(num_drafts), self.texts, none)
        return self._lookups[num_drafts]

    def _proxy(self, drafter: Trained) -> Proxy | None:
        parts = []
        for begin in range(0, len(self.samples), TEXTS):
            samples: list[Sample] = self.samples[begin : begin + TEXTS]
            taps = [pair[0] for pair in self.states.of(samples, drafter.taps)]
            self.stop()
            parts.append(teacher_forced(drafter, samples, taps, self.options.stride))
        return pooled(parts, self.options.stride)

    def _row(
        self, name: str, kind: str, setting: str, num_drafts: int, steps: list[AcceptanceStats],
        proxy: Proxy | None,
    ) -> EvalRow:  # fmt: skip
        return EvalRow(
            drafter=name, kind=kind, setting=setting, num_drafts=num_drafts, target=self.mode,
            per_prompt=tuple(steps), ngram=total(self._lookup(num_drafts)), repeated_8grams=self.repeated, proxy=proxy,
        )  # fmt: skip


def _with_differences(rows: Sequence[EvalRow]) -> Iterator[EvalRow]:
    """Each row with its difference to the first target's of the same drafter and setting."""
    first: dict[tuple[str, str], EvalRow] = {}
    for row in rows:
        before = first.setdefault((row.drafter, row.setting), row)
        if before is row:
            yield row
            continue
        proxy = None
        if row.proxy is not None and before.proxy is not None:
            proxy = paired_difference(row.proxy.runs, before.proxy.runs)
        yield replace(
            row, difference=paired_difference(row.per_prompt, before.per_prompt), proxy_difference=proxy
        )
