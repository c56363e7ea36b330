"""A benchmark that nobody ran: figures that are easy to compute by hand."""

from __future__ import annotations

from typing import Any

from m27quant.bench.reading import Acceptance, Answer, Reading
from m27quant.bench.result import BenchResult, Cell
from m27quant.bench.sweep import recommend
from m27quant.drafters.metrics import AcceptanceStats

OPTIONS = {"max_tokens": 4096, "temperature": 0.0, "thinking": True, "seed": 42}
MACHINE: dict[str, Any] = {
    "m27quant": "1.2.3", "cpu": "A CPU", "cpus": 2, "gpus": [], "versions": {"torch": "2.0"},
    "device": "cpu", "activations": "bf16", "kv_cache_dtype": "float8_e4m3fn",
}  # fmt: skip


def cell(
    task: str, concurrency: int, setting: str | None, *, seconds: float, steps: list[int] | None = None
) -> Cell:
    """Two answers of ten tokens; a step takes 10 ms to verify and 2 ms to draft, 8 ms without drafts."""
    accepted = steps or [0] * 9
    stats = AcceptanceStats.of_steps(accepted, [3 if setting else 0] * len(accepted))
    timed = (0.002 * len(accepted), 0.010 * len(accepted)) if setting else (0.0, 0.008 * len(accepted))
    answer = Answer(
        prompt_tokens=5, output_tokens=10, finish_reason="stop", ttft_s=0.05, itl_s=0.004, source="runtime",
        stats=stats, draft_s=timed[0], verify_s=timed[1],
    )  # fmt: skip
    reading = Reading(
        answers=[answer, answer], seconds=seconds, acceptance=Acceptance("runtime", stats + stats)
    )
    return Cell.of(task, concurrency, setting, reading)


def example() -> BenchResult:
    """One task, two concurrencies, two settings: block 4 pays at 1, nothing pays at 8."""
    result = BenchResult(
        subject="./m27", drafter="./dflash", options=OPTIONS, machine=MACHINE, complete=True,
        cells=[
            cell("gsm8k", 1, None, seconds=2.0),
            cell("gsm8k", 1, "block 4", seconds=1.0, steps=[3, 1, 2]),
            cell("gsm8k", 1, "block 2", seconds=1.6, steps=[1, 1, 0, 0, 1]),
            cell("gsm8k", 8, None, seconds=0.5),
            cell("gsm8k", 8, "block 4", seconds=0.8, steps=[0, 1, 0, 0]),
        ],
    )  # fmt: skip
    result.advice = recommend(result.speeds(), {"block 4": "--num-draft-tokens 3"})
    return result
