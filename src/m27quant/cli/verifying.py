"""What `verify` and `report` have in common: from their options to a verification, with progress while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m27quant.cli import options as shared
from m27quant.cli.output import Output
from m27quant.cli.progress import show
from m27quant.errors import UsageError

if TYPE_CHECKING:
    from m27quant.checkpoint.hub import Location
    from m27quant.verify.findings import VerifyResult
    from m27quant.verify.full import SourceModel
    from m27quant.verify.logits import LogitsOptions
    from m27quant.verify.outputs import OutputsOptions
    from m27quant.verify.run import Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to check and how thoroughly; names are those of the options."""

    checkpoint: str
    quick: bool = False
    full: bool = False
    source: str | None = None
    logits: bool = False
    logits_options: Mapping[str, Any] = field(default_factory=dict)
    """Those of LogitsOptions alone that were given."""
    outputs: bool = False
    outputs_options: Mapping[str, Any] = field(default_factory=dict)
    """Those of OutputsOptions alone that were given."""
    computing: Mapping[str, Any] = field(default_factory=dict)
    """Those of both: activations, kv_cache_dtype, device."""
    engine: str | None = None
    gpu: str | None = None
    tp: int | None = None
    ep: int | None = None
    context: int | None = None
    drafter: Path | None = None
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    offline: bool = False
    token: shared.Token | None = None
    no_progress: bool = False

    @property
    def level(self) -> Level:
        """By its name in verify_checkpoint."""
        return "quick" if self.quick else "full" if self.full else "default"

    @property
    def secret(self) -> str | None:
        """The Hub token's text."""
        return self.token.reveal() if self.token else None


def given(**options: object) -> dict[str, object]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def check_request(asked: Request) -> None:
    """Whether the options go together.

    Raises:
        UsageError: they do not.
    """
    if asked.quick and asked.full:
        raise UsageError("--quick and --full exclude each other")
    for wanted, options, of in (
        (asked.logits, asked.logits_options, "--logits"),
        (asked.outputs, asked.outputs_options, "--outputs"),
        (asked.logits or asked.outputs, asked.computing, "--logits and --outputs"),
    ):
        if options and not wanted:
            option = next(iter(options)).replace("_", "-")
            raise UsageError(f"--{option} is of {of}, which is not given")
    if asked.quick and asked.outputs:
        raise UsageError(
            "--quick reads headers only, --outputs runs the checkpoint", hint="leave --quick out"
        )
    if asked.logits and (asked.source is None or "text" not in asked.logits_options):
        raise UsageError("--logits needs a model and a text", hint="add --source MODEL --text FILE")
    if asked.source is not None and not (asked.full or asked.logits or asked.outputs):
        raise UsageError(
            "--source is compared with all weights", hint="add --full, or --logits, or --outputs"
        )


def run(output: Output, asked: Request) -> tuple[Location, VerifyResult]:
    """Find the checkpoint and check it; a Hub id's commit is said.

    Raises:
        M27Error: as `find_checkpoint` and `verify_checkpoint` do, and where no check is left to be applied.
    """
    check_request(asked)
    from m27quant.verify.locate import find_checkpoint
    from m27quant.verify.run import verify_checkpoint
    from m27quant.verify.serving import Serving

    location = find_checkpoint(
        asked.checkpoint,
        headers_only=asked.quick,
        # with a source, --revision is that one's
        revision=None if asked.source else asked.revision,
        offline=asked.offline,
        token=asked.secret,
        say=output.status,
    )
    with show(output, enabled=not asked.quick and not asked.no_progress) as progress:
        result = verify_checkpoint(
            location,
            level=asked.level,
            engine=asked.engine,  # type: ignore[arg-type]  # checked by its parser
            select=asked.select,
            ignore=asked.ignore,
            source=_source(asked),
            progress=progress,
            serving=Serving(gpu=asked.gpu, tp=asked.tp, ep=asked.ep, context=asked.context),
            drafter=asked.drafter,
            logits=_logits(asked) if asked.logits else None,
            outputs=_outputs(asked) if asked.outputs else None,
        )
    if not result.checks_run:
        raise UsageError(
            "no check is left that this level and engine apply",
            hint="take fewer of --select, --ignore, --quick",
        )
    return location, dataclasses.replace(result, checkpoint=from_here(result.checkpoint))


def without_accepted(result: VerifyResult, baseline: Path) -> tuple[VerifyResult, int]:
    """The result without the findings that a file accepts, and how many those are."""
    from m27quant.verify.baseline import apply_baseline, read_baseline

    fresh, known = apply_baseline(result.findings, read_baseline(baseline))
    return dataclasses.replace(result, findings=fresh), len(known)


def _logits(asked: Request) -> LogitsOptions:
    from m27quant.verify.logits import LogitsOptions

    return LogitsOptions(**asked.computing, **asked.logits_options)


def _outputs(asked: Request) -> OutputsOptions:
    from m27quant.verify.outputs import OutputsOptions

    return OutputsOptions(**asked.computing, **asked.outputs_options)


def _source(asked: Request) -> SourceModel | None:
    if asked.source is None:
        return None
    from m27quant.verify.full import SourceModel

    return SourceModel(model=asked.source, revision=asked.revision, offline=asked.offline, token=asked.secret)


def from_here(checkpoint: str) -> str:
    """A folder below the working directory by its relative name, which is how CI systems find files."""
    path, here = Path(checkpoint), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else checkpoint
