"""A training run from its plan: the steps that are left, what is told of them, what is kept, and the drafter."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from m27quant.drafters.batch import Shared
from m27quant.drafters.distributed import by_first
from m27quant.drafters.drafting import drafting_of
from m27quant.drafters.export import write_drafter
from m27quant.drafters.learn import Learner, StepReport
from m27quant.drafters.measure import measure
from m27quant.drafters.options import TrainOptions
from m27quant.drafters.prepare import Prepared
from m27quant.drafters.saving import Pace
from m27quant.drafters.state import LOG, Log, State, TrainingFolder, remove_folder
from m27quant.drafters.states import TargetStates
from m27quant.errors import EnvironmentFault, Interrupted, TrainingError, escape
from m27quant.progress import Progress, ProgressCallback
from m27quant.runtime.host_memory import rss_bytes
from m27quant.runtime.options import RunOptions
from m27quant.runtime.parallel import Ranks

DEFAULT_CACHE = 8 * 2**30
"""Bytes of the target's states on disk."""
STATES = "states"
LAST = 100
"""Steps whose mean is the final loss."""


def _run_options(options: TrainOptions, device: torch.device) -> RunOptions:
    return RunOptions(
        activations=options.activations,  # type: ignore[arg-type]  # RunOptions refuses others by name
        kv_cache_dtype=options.kv_cache_dtype,  # type: ignore[arg-type]
        device=str(device),
    )


class Run:
    """One process's part of a training."""

    def __init__(
        self,
        plan: Prepared,
        options: TrainOptions,
        folder: TrainingFolder,
        ranks: Ranks,
        device: torch.device,
        check: bool,
        progress: ProgressCallback,
        stop: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.options, self.folder, self.ranks = plan, options, folder, ranks
        self.progress, self.stop, self.say = progress, stop, say
        self.is_first = ranks.rank == 0
        recipe = plan.recipe
        self._cache = folder.private / STATES
        size = DEFAULT_CACHE if options.cache_size is None else options.cache_size
        self.states = TargetStates.open(
            plan.target, _run_options(options, device), cache_folder=self._cache if size else None,
            cache_bytes=size, check=check, revision=options.revision, offline=options.offline, token=options.token,
            say=say if self.is_first else lambda line: None,
        )  # fmt: skip
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[recipe.dtype]
        shared = Shared(
            self.states.embed.to(device, dtype).clone(), self.states.head.to(device, dtype).clone()
        )
        tokens_W = plan.start.tokens_W if plan.start else None
        self.drafting = drafting_of(recipe, plan.samples, shared, tokens_W)
        self.learner = Learner(plan, self.drafting, self.states, ranks, device, dtype)
        self.log = Log(folder.private / LOG)
        self.where = {
            "torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type,
        }  # fmt: skip
        self.pace = Pace(options.save_every)
        self.seconds = 0.0
        self.step = 0
        self.heldout: dict[str, Any] | None = None

    # -- the road -------------------------------------------------------------------------------

    def to_the_end(self, command: str | None) -> dict[str, Any]:
        """All steps that are left, and the drafter."""
        try:
            self._begin()
            while self.step < self.plan.steps:
                self._one_step()
            return self._finish(command)
        finally:
            self.states.close()

    def _begin(self) -> None:
        """Go on from the last state, if there is one."""
        found: list[State | None] = []

        def first_step() -> int:
            found.append(self.folder.load())
            return 0 if found[0] is None else found[0].step

        step = by_first(self.ranks, first_step)
        state = found[0] if found else self.folder.load() if step else None
        if step and (state is None or state.step != step):
            raise EnvironmentFault(
                f"rank {self.ranks.rank} does not see the state of step {step} in {escape(self.folder.out)}",
                hint="put OUT on a file system that all ranks share",
            )
        if state is not None:
            self.step, self.seconds = step, state.facts["seconds"]
            self.learner.optimizer.load_state(state.tensors)
        if self.is_first:
            self._tell_beginning(state)

    def _tell_beginning(self, state: State | None) -> None:
        before = self.log.keep(self.step)
        if not before:
            self.log.write("begin", 0, **self.plan.fingerprint, where=self.where)
        if state is not None:
            if state.facts["where"] != self.where:
                self.say(
                    f"notice: begun on {state.facts['where']}, resumed on {self.where}: last bits may differ"
                )
            self.say(f"resumed behind step {self.step} of {self.plan.steps}")
        for line in self.plan.describe():
            self.say(line)

    def _one_step(self) -> None:
        begun = time.monotonic()
        asked = self._asked_to_stop()
        report = self.learner.step(self.step, stop=0 if asked is None else asked.exit_code - 128)
        self._refuse_non_finite(report)
        self.step += 1
        self.seconds += (took := time.monotonic() - begun)
        if self.is_first:
            self._tell(report, took)
            self._evaluate_if_due()
        if report.stop:
            if self.is_first:
                self._save()
            raise asked or Interrupted(
                "another rank was stopped; what was finished is kept", signum=report.stop
            )
        if self.is_first and self.pace.is_due(self.step, self.plan.steps):
            self._save()

    def _asked_to_stop(self) -> Interrupted | None:
        try:
            self.stop()
        except Interrupted as fault:
            return fault
        return None

    def _refuse_non_finite(self, report: StepReport) -> None:
        if not report.is_finite:
            raise TrainingError(
                f"step {self.step + 1}: the {report.what_is_wrong} is not finite; nothing of this step was kept",
                hint="the state before it is in OUT/.m27quant; start anew with a lower --lr, or --dtype f32",
            )

    def _tell(self, report: StepReport, took: float) -> None:
        speed = report.tokens / took
        if report.is_empty:
            self.log.write("empty", self.step)
            self.say(f"notice: step {self.step}: no token of the batch can be drafted; nothing was learned")
            return
        self.log.write(
            "step", self.step, **report.to_json(), seconds=round(took, 4), tokens_per_s=round(speed, 1)
        )
        self.progress(
            Progress(
                stage=f"step {self.step}/{self.plan.steps}", fraction=self.step / self.plan.steps, tokens_per_s=speed,
                rss_bytes=rss_bytes(), loss=report.loss, accuracy=report.accuracy,
            )
        )  # fmt: skip

    def _evaluate_if_due(self) -> None:
        if not self.plan.heldout:
            return
        every = self.options.eval_every or max(1, self.plan.steps // 10)
        if self.step % every == 0 or self.step == self.plan.steps:
            found = measure(self.learner, self.plan.heldout[: self.options.eval_samples])
            self.log.write("eval", self.step, **found)
            self.heldout = found
            shown = ", ".join(f"{key} {found[key]:.3f}" for key in ("val_loss", "tau"))
            self.say(f"step {self.step}: held out: {shown}")

    def _save(self) -> None:
        facts = {"seconds": self.seconds, "where": self.where}
        with self.pace.timed():
            self.folder.save(self.step, facts, self.learner.optimizer.state())

    def _finish(self, command: str | None) -> dict[str, Any]:
        def write() -> dict[str, Any]:
            return write_drafter(
                self.plan, self.learner.optimizer.masters, self.drafting.tables(), self.log.read(), self.folder,
                layout=self.options.layout, command=command, last=LAST,
            )  # fmt: skip

        result = by_first(self.ranks, write)
        if self.is_first:
            remove_folder(self._cache)
        return result
