"""How far one layer is, for whoever listens."""

from __future__ import annotations

import time

import torch

from m27quant.calib.activations import Chunk
from m27quant.job import Job
from m27quant.progress import Progress
from m27quant.runtime.host_memory import rss_bytes


class Reporter:
    """Progress within a layer, in the share of its arithmetic."""

    def __init__(self, job: Job, layer: int, started: float, calibrated: float = 1.0) -> None:
        """`calibrated` is the share of the layer's time after which packing alone is left."""
        c = job.source.config
        self._job, self._layer, self._started = job, layer, started
        attention = 2.0 * c.hidden_size * (c.q_size + c.kv_size)
        experts = 2.0 * c.num_local_experts * c.hidden_size * c.intermediate_size
        self._attention_share = attention / (attention + experts)
        self._expert_bytes = job.source.total_bytes / c.num_hidden_layers / c.num_local_experts
        self._ticks = 0
        self._calibrated = calibrated

    def attention(self, chunk: Chunk) -> None:
        self._job.stop()
        done = (chunk.end - self._job.first_token) / self._job.num_tokens
        seen = self._job.sequences.num_tokens * done
        self._send(
            "attention", self._calibrated * self._attention_share * done, tokens=seen, source_bytes=0.0
        )

    def packed(self, share: float) -> None:
        self._send(
            "pack",
            self._calibrated + (1 - self._calibrated) * share,
            tokens=0.0,
            source_bytes=share * self._expert_bytes * self._job.source.config.num_local_experts,
        )

    def expert(self, index: int) -> None:
        self._job.stop()
        self._ticks += 1
        total = self._job.source.config.num_local_experts * len(self._job.chunks)
        done = self._ticks / total
        share = self._attention_share + (1 - self._attention_share) * done
        seen = self._job.sequences.num_tokens * done
        self._send(
            "experts", self._calibrated * share, tokens=seen, source_bytes=(index + 1) * self._expert_bytes
        )

    def _send(self, stage: str, share: float, *, tokens: float, source_bytes: float) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        layers = self._job.source.config.num_hidden_layers
        on_gpu = self._job.device.type == "cuda"
        resident = rss_bytes()
        self._job.memory.trim(resident)
        self._job.progress(
            Progress(
                stage=stage,
                fraction=(self._layer + share) / layers,
                layer=self._layer,
                num_layers=layers,
                tokens_per_s=tokens / elapsed,
                bytes_per_s=source_bytes / elapsed if source_bytes else None,
                rss_bytes=resident,
                device_bytes=torch.cuda.max_memory_allocated(self._job.device) if on_gpu else None,
            )
        )
