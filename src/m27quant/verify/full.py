"""Level full: all weights streamed once, their shards hashed, and compared with the source where one is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.source import Source
from m27quant.progress import Progress, ProgressCallback
from m27quant.verify.collect import Findings
from m27quant.verify.same_config import compare_configs
from m27quant.verify.stream import Visitor, stream
from m27quant.verify.view import View
from m27quant.verify.weights import Values, ValueVisitor, compare_hashes, reported_hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """What the checkpoint was made from, as the user names it."""

    model: str
    """A local folder, or a Hub id: org/name or org/name@revision; FP8 or BF16."""
    revision: str | None = None
    offline: bool = False
    token: str | None = None

    def open(self) -> Source:
        """Read its config, index and headers.

        Raises:
            M27Error: as `locate` and `Source` do.
        """
        return Source(locate(self.model, revision=self.revision, offline=self.offline, token=self.token))


def check_full(
    view: View, found: Findings, source: SourceModel | None, progress: ProgressCallback
) -> dict[str, Any]:
    """Check every byte of the weights; facts `weights`, `hashed_shards` and `source`.

    Raises:
        CheckpointError: a damaged source, or a file that shrinks while it is read.
        EnvironmentFault: a file that cannot be read, a Hub that cannot be reached.
    """
    if source is None:
        return _stream(view, found, None, progress)
    with source.open() as opened:
        return _stream(view, found, opened, progress)


def _stream(view: View, found: Findings, source: Source | None, progress: ProgressCallback) -> dict[str, Any]:
    values = Values(view, found)
    hashes = reported_hashes(view, found)
    comparison = None
    if source is not None:
        from m27quant.verify.source import Both, Comparison, SourceVisitor

        comparison = Comparison(view, source, found)
        if not comparison.same_model():
            comparison = None
        elif view.config is not None:
            compare_configs(view.config, source.config, found)

    def visitor() -> Visitor:
        if comparison is None:
            return ValueVisitor(values)
        return Both(ValueVisitor(values), SourceVisitor(comparison))

    actual = stream(view, visitor, hashed=hashes, progress=progress)
    compare_hashes(hashes, actual, found)
    values.nibbles.report(found)
    facts: dict[str, Any] = {"weights": values.facts(), "hashed_shards": len(actual)}
    if comparison is not None:
        comparison.compare_late()
        facts["source"] = comparison.finish()
    progress(Progress(stage="verify", fraction=1.0))
    return facts
