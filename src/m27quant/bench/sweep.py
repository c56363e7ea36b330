"""Which setting pays on this machine: speed-up = tau * t_decode / (t_verify + t_draft), from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from m27quant.bench.result import Advice, Speed

WORTH = 1.02
"""A speed-up below it is within what two runs of the same differ by."""
CLEAR = 2.0
"""Standard errors by which a gain has to be clear of none."""


@dataclass(frozen=True, slots=True)
class _Mean:
    """A setting at one concurrency, all tasks together."""

    setting: str
    tau: float
    decode_s: float
    verify_s: float
    draft_s: float
    predicted: float
    measured: float
    error: float

    @classmethod
    def of(cls, setting: str, speeds: Sequence[Speed]) -> _Mean | None:
        """Tasks count alike; None where a figure was not measured."""
        complete = [s for s in speeds if s.predicted is not None]
        if len(complete) != len(speeds):
            return None
        return cls(
            setting,
            fmean(s.tau or 0.0 for s in speeds),
            fmean(s.decode_s or 0.0 for s in speeds),
            fmean(s.verify_s or 0.0 for s in speeds),
            fmean(s.draft_s or 0.0 for s in speeds),
            fmean(s.predicted or 0.0 for s in speeds),
            fmean(s.measured for s in speeds),
            math.hypot(*(s.error or 0.0 for s in speeds)) / len(speeds),
        )

    @property
    def pays(self) -> bool:
        """Both ways of telling say so, the formula and the tokens that came in a second, and noise does not."""
        return min(self.predicted, self.measured) >= WORTH and self.measured - CLEAR * self.error > 1

    @property
    def found(self) -> str:
        """What was measured, with its error where that is known."""
        error = f" +- {self.error:.2f}" if self.error else ""
        return f"measured {self.measured:.2f}{error} times the tokens/s"

    @property
    def sum(self) -> str:
        """The formula with its figures."""
        return (
            f"tau {self.tau:.2f} x {_ms(self.decode_s)} a step without drafts / "
            f"({_ms(self.verify_s)} to verify + {_ms(self.draft_s)} to draft) = {self.predicted:.2f} times"
        )


def recommend(speeds: Sequence[Speed], flags: Mapping[str, str] | None = None) -> list[Advice]:
    """The best setting at each concurrency, or the advice not to draft.

    A setting is recommended where the formula and the measured ratio of tokens/s both are at least `WORTH`, and the
    ratio is clear of its error; among those the formula chooses, as it holds for answers of any length.

    Args:
        speeds: settings, each beside the run without drafts.
        flags: for `m27quant run`, by setting.

    Returns:
        One piece of advice for each concurrency at which all four figures were measured.
    """
    found = []
    for concurrency in dict.fromkeys(s.concurrency for s in speeds):
        here = [s for s in speeds if s.concurrency == concurrency]
        names = dict.fromkeys(s.setting for s in here)
        means = [_Mean.of(name, [s for s in here if s.setting == name]) for name in names]
        known = [m for m in means if m is not None]
        if known:
            found.append(_advice(concurrency, known, flags or {}))
    return found


def _advice(concurrency: int, means: Sequence[_Mean], flags: Mapping[str, str]) -> Advice:
    best = max(means, key=lambda m: m.predicted)
    paying = [m for m in means if m.pays]
    if paying:
        best = max(paying, key=lambda m: m.predicted)
        return Advice(
            concurrency=concurrency,
            setting=best.setting,
            speedup=best.predicted,
            why=f"{best.sum}; {best.found}{_runner_up(best, means)}",
            flags=flags.get(best.setting),
        )
    why = f"{_reason(best)}: {best.sum}; {best.found}"
    return Advice(concurrency=concurrency, setting=None, speedup=best.predicted, why=why)


def _runner_up(best: _Mean, means: Sequence[_Mean]) -> str:
    others = sorted((m for m in means if m is not best), key=lambda m: -m.predicted)
    return f"; next {others[0].setting}: {others[0].predicted:.2f} times" if others else ""


def _reason(best: _Mean) -> str:
    """Why even the best setting does not pay, by what costs most."""
    if min(best.predicted, best.measured) >= WORTH:
        return f"{best.setting} may pay, but its gain is not clear of noise; --repeat tells more"
    if best.predicted >= WORTH:
        return f"{best.setting} would pay by its steps, but whole answers do not come faster"
    spent = best.verify_s + best.draft_s
    if best.draft_s >= best.decode_s:
        cause = "drafting takes longer than the token it is to save"
    elif best.verify_s >= best.tau * best.decode_s:
        cause = "verifying takes longer than decoding the same tokens one by one"
    else:
        cause = f"a step takes {spent / best.decode_s:.2f} times as long and gives {best.tau:.2f} tokens"
    return f"{best.setting} is the best and does not pay, as {cause}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
