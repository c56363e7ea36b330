"""What Prometheus reads at /metrics: names as vLLM has them, with our prefix.

The engine's thread counts, the event loop's writes them out; a figure that is a step behind another does no harm.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from m27quant.runtime.api import LLM
from m27quant.runtime.sequence import Sequence as Running

PREFIX = "m27quant:"
TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Histogram:
    """Counts per bucket, and the sum; bounds are inclusive upper ones."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times `value`."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else bound}"}} {below}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {below}"


Metric = tuple[str, str, str, float | Mapping[str, float] | Histogram]
"""Name, kind, meaning, and a value: alone, by labels, or a histogram."""


class Metrics:
    """All that is counted."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(TTFT_S)
        self.inter_token_latency = Histogram(TOKEN_S)
        self.request_latency = Histogram(REQUEST_S)
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.preemptions = 0
        self.finished_requests: Counter[str] = Counter()
        self.responses: Counter[tuple[str, int]] = Counter()
        """By path and HTTP status."""
        self.num_drafts = self.draft_tokens = 0
        self.accepted_per_position: list[int] = []

    def tokens(self, sequence: Running, count: int, seconds: float, *, first: bool) -> None:
        """A step gave a sequence so many tokens, so long after the ones before."""
        if not count:
            return
        if first:
            self.time_to_first_token.observe(seconds)
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += sequence.timing.num_reused
        else:
            self.inter_token_latency.observe(seconds / count, count)
        self.output_tokens += count

    def finished(self, sequence: Running, *, failed: bool = False) -> None:
        """A sequence ended, for whatever reason."""
        timing = sequence.timing
        reason = "error" if failed else sequence.finish_reason or "error"
        self.finished_requests[reason] += 1
        self.preemptions += timing.num_preemptions
        if reason in ("stop", "length") and timing.finished is not None:
            self.request_latency.observe(timing.finished - timing.arrived)
        for accepted, drafted in zip(timing.accepted, timing.drafted, strict=False):
            self._drafts_of_step(accepted, drafted)

    def _drafts_of_step(self, accepted: int, drafted: int) -> None:
        self.num_drafts += drafted > 0
        self.draft_tokens += drafted
        missing = accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for position in range(accepted):
            self.accepted_per_position[position] += 1

    def text(self, llm: LLM, model: str) -> str:
        """Prometheus' text format, version 0.0.4."""
        lines: list[str] = []
        for name, kind, meaning, values in (*self._engine(llm, model), *self._counts()):
            lines += [f"# HELP {PREFIX}{name} {meaning}", f"# TYPE {PREFIX}{name} {kind}"]
            if isinstance(values, Histogram):
                lines += values.lines(PREFIX + name)
            elif isinstance(values, Mapping):
                lines += [f"{PREFIX}{name}{{{labels}}} {value}" for labels, value in sorted(values.items())]
            else:
                lines.append(f"{PREFIX}{name} {values}")
        return "\n".join([*lines, ""])

    def _engine(self, llm: LLM, model: str) -> Iterable[Metric]:
        """What is now."""
        scheduler = llm.engine.scheduler
        used = 1 - scheduler.blocks.num_free / scheduler.blocks.num_blocks
        return (
            ("model_info", "gauge", "The model that is served.", {f'model_name="{_label(model)}"': 1}),
            ("num_requests_running", "gauge", "Answers in the engine.", len(scheduler.running)),
            ("num_requests_waiting", "gauge", "Answers that wait.", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "gauge", "Blocks of the KV cache in use, 1 is all.", used),
        )

    def _counts(self) -> Iterable[Metric]:
        """What was, since the start."""
        # copies: the engine's thread may add a key meanwhile
        reasons, responses, accepted = (
            dict(self.finished_requests),
            dict(self.responses),
            [*self.accepted_per_position],
        )
        return (
            ("num_preemptions_total", "counter", "Answers put back for want of blocks.", self.preemptions),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("prefix_cache_queries_total", "counter", "Tokens of prompts looked up in the cache.", self.prompt_tokens),
            ("prefix_cache_hits_total", "counter", "Of these the ones that were there.", self.cached_tokens),
            ("generation_tokens_total", "counter", "Tokens of answers.", self.output_tokens),
            ("request_success_total", "counter", "Answers by how they ended.",
             {f'finished_reason="{reason}"': n for reason, n in reasons.items()}),
            ("http_requests_total", "counter", "Responses by path and status.",
             {f'path="{path}",status="{status}"': n for (path, status), n in responses.items()}),
            ("spec_decode_num_drafts_total", "counter", "Steps of an answer that verified drafts.", self.num_drafts),
            ("spec_decode_num_draft_tokens_total", "counter", "Tokens drafted.", self.draft_tokens),
            ("spec_decode_num_accepted_tokens_total", "counter", "Of these accepted.", sum(accepted)),
            ("spec_decode_num_accepted_tokens_per_pos_total", "counter", "Accepted, by place in the draft.",
             {f'position="{position}"': n for position, n in enumerate(accepted)}),
            ("time_to_first_token_seconds", "histogram", "From arrival to the first token.", self.time_to_first_token),
            ("inter_token_latency_seconds", "histogram", "Between tokens, which share the time of their step.",
             self.inter_token_latency),
            ("e2e_request_latency_seconds", "histogram", "From arrival to the last token.", self.request_latency),
        )  # fmt: skip


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
