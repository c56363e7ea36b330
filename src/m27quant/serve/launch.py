"""`plan_launch`: how vLLM or SGLang is to serve a checkpoint, checked before anything starts."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from m27quant.checkpoint.drafter_config import parse_drafter
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, FindingsError, UsageError, escape
from m27quant.serve.decide import FoundDrafter, decide
from m27quant.serve.decide import LaunchOptions as LaunchOptions
from m27quant.serve.detect import detect_gpus
from m27quant.serve.engines_data import VERSIONS, EngineVersion
from m27quant.serve.flags import MASTER, Choice, Setup, choose
from m27quant.serve.memory_fit import LEAST_CONTEXT
from m27quant.verify.collect import Findings
from m27quant.verify.configs import read_configs
from m27quant.verify.engines_data import GPUS, Gpu
from m27quant.verify.findings import Finding, VerifyResult
from m27quant.verify.locate import find_checkpoint
from m27quant.verify.refuse import refuse_errors
from m27quant.verify.run import verify_checkpoint
from m27quant.verify.serving import Serving
from m27quant.verify.view import View

KEY_VARIABLE = "M27QUANT_API_KEY"
AVOIDED = {"M27-V006", "M27-V008", "M27-V010", "M27-V011", "M27-R021", "M27-R028"}
"""Known faults that the flags avoid; of R021 a note says what is left."""
UNFIT = "not fit to be served"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command, and why it is so."""

    engine: EngineVersion
    setup: Setup
    model: str
    """Path or Hub id."""
    choices: tuple[Choice, ...]
    environment: dict[str, str]
    reasons: dict[str, str]
    """Of the environment's variables."""
    notes: tuple[str, ...]
    """What this engine's version cannot do, or does otherwise."""
    findings: tuple[Finding, ...]
    """Warnings and notes of the verification that the flags do not take care of."""
    result: VerifyResult

    def argv(self, key: str | None = None, *, model: str | None = None) -> list[str]:
        """The command as words; `key` takes the place of the variable that stands for it."""
        words = [*self.engine.program, model or self.model]
        for choice in self.choices:
            words.append(choice.flag.name)
            if choice.variable is not None:
                words.append(key if key is not None else f"${choice.variable}")
            elif choice.value is not None:
                words.append(choice.value)
        return words

    def shell(self) -> str:
        """The command for a POSIX shell, an option a line."""
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.setup.has_key and self.engine.key_variable is not None:
            lines.append(f'{self.engine.key_variable}="${KEY_VARIABLE}"')
        lines.append(shlex.join([*self.engine.program, self.model]))
        for choice in self.choices:
            value = "" if choice.value is None else f" {shlex.quote(choice.value)}"
            if choice.variable is not None:
                value = f' "${choice.variable}"'
            lines.append(f"  {choice.flag.name}{value}")
        return " \\\n".join(lines)

    def document(self) -> dict[str, Any]:
        """The same as plain data."""
        s = self.setup
        return {
            "engine": self.engine.name,
            "engine_version": self.engine.version,
            "checkpoint": escape(self.model, 4096),
            "gpu": s.gpu.name,
            "tensor_parallel": s.tp,
            "expert_parallel": s.ep,
            "nodes": s.nnodes,
            "command": self.argv(),
            "shell": self.shell(),
            "environment": [
                {"name": name, "value": value, "why": self.reasons.get(name)}
                for name, value in self.environment.items()
            ],
            "flags": [
                {
                    "name": c.flag.name,
                    "value": c.value if c.variable is None else f"${c.variable}",
                    "why": c.why,
                }
                for c in self.choices
            ],
            "context": s.fit.context,
            "memory": {
                "usable_bytes": s.fit.usable,
                "weight_bytes": s.fit.weights,
                "drafter_bytes": s.fit.drafter,
                "step_bytes": s.fit.steps,
                "cache_bytes_per_token": s.fit.cache_per_token,
                "cache_tokens": s.fit.tokens,
            },
            "notes": list(self.notes),
            "findings": [{"code": f.check.code, "severity": f.severity, "message": f.message} for f in self.findings],
        }  # fmt: skip


def plan_launch(
    checkpoint: str | os.PathLike[str],
    options: LaunchOptions,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Launch:
    """Decide every flag and check the checkpoint for this engine.

    Raises:
        FindingsError: verify finds errors, or the model does not fit; names them.
        UsageError: wishes that do not go together; no GPU was named or found.
        CheckpointError, EnvironmentFault: as `verify_checkpoint` does.
    """
    engine = VERSIONS[options.engine]
    location = find_checkpoint(
        os.fspath(checkpoint), headers_only=options.level == "quick", revision=options.revision,
        offline=options.offline, token=options.token, say=say,
    )  # fmt: skip
    view = View(folder=location.folder)
    read_configs(view, Findings())
    drafter = _drafter(options, say)
    if view.config is None:  # verify says why
        refuse_errors(_verify(location, options, Serving(), drafter), UNFIT)
        raise CheckpointError(f"{escape(location.folder)}: config.json is not usable")
    try:
        gpu, there = _gpu(options, say)
        setup, solved = decide(view, view.config, engine, gpu, there, options, drafter)
    except (UsageError, FindingsError):  # the checkpoint's own errors are named before
        refuse_errors(_verify(location, options, Serving(), drafter), UNFIT)
        raise
    serving = Serving(gpu=gpu.name, tp=setup.tp, ep=setup.ep, context=options.max_model_len)
    result = _verify(location, options, serving, drafter)
    refuse_errors(result, UNFIT, solved=solved)
    if not setup.fit.fits:
        raise FindingsError(
            f"M27-V004: {setup.fit.describe()} on each of {max(setup.tp, setup.ep or 1)} {gpu.name}, "
            f"where {setup.fit.wanted or min(setup.fit.limit, LEAST_CONTEXT):,} are wanted",
            hint="take more GPUs (--tp), a shorter --max-model-len, or more of the memory (--gpu-memory-utilization)",
        )
    launch = _launch(setup, engine, location, result, solved)
    if not launch.shell().replace("\n", "").isprintable() or "\n" in launch.model:
        raise UsageError(f"{escape(launch.model)}: a name that cannot be printed", hint="rename the folder")
    return launch


def _launch(
    setup: Setup, engine: EngineVersion, location: Location, result: VerifyResult, solved: set[str]
) -> Launch:
    speculation = setup.speculation
    return Launch(
        engine=engine,
        setup=setup,
        model=location.repo_id or os.path.abspath(location.folder),  # noqa: PTH100 - links stay as they are
        choices=tuple(choose(replace(setup, revision=location.commit if location.repo_id else None))),
        environment=dict(speculation.environment) if speculation else {},
        reasons=dict(speculation.reasons) if speculation else {},
        notes=tuple(_notes(setup)),
        findings=tuple(f for f in result.findings if f.check.code not in AVOIDED | solved),
        result=result,
    )


# -- what is there ---------------------------------------------------------------------------------


def _gpu(options: LaunchOptions, say: Callable[[str], None]) -> tuple[Gpu, int | None]:
    """The GPU, and how many this machine has where that was asked of it."""
    if options.gpu is not None:
        if options.gpu not in GPUS:
            raise UsageError(f"unknown gpu '{escape(options.gpu)}'", hint=f"one of: {', '.join(GPUS)}")
        return GPUS[options.gpu], None
    name, count = detect_gpus()
    say(f"GPUs of this machine: {count} {name}")
    return GPUS[name], count


def _drafter(options: LaunchOptions, say: Callable[[str], None]) -> FoundDrafter | None:
    """The drafter's config, as far as it can be read: verify says what is wrong with it."""
    if options.drafter is None:
        return None
    location = find_checkpoint(options.drafter, offline=options.offline, token=options.token, say=say)
    folder = location.folder
    if not folder.is_dir():
        raise CheckpointError(f"{escape(folder)}: no such folder", hint="name the drafter's folder")
    try:
        raw = read_object(folder / "config.json")
    except CheckpointError:
        return FoundDrafter(location, None, 0)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    return FoundDrafter(location, parse_drafter(raw, Findings()), size)


def _verify(
    location: Location, options: LaunchOptions, serving: Serving, drafter: FoundDrafter | None
) -> VerifyResult:
    return verify_checkpoint(
        location,
        level=options.level,
        engine=options.engine,
        serving=serving,
        drafter=None if drafter is None else drafter.location.folder,
    )


def _notes(setup: Setup) -> list[str]:
    notes = list(setup.speculation.notes) if setup.speculation else []
    if setup.has_key and setup.engine.key_variable is None:
        notes.append(f"{setup.engine.shown} takes its key as an argument: users of this machine can see it")
    if setup.nnodes > 1:
        notes.append(
            f"{setup.nnodes} machines: start it on each, with --node-rank 0 to {setup.nnodes - 1}"
            + (f"; {MASTER} stands for the address of machine 0" if setup.master is None else "")
        )
    return notes
