"""The second moments of experts' inputs, as matrices: what error feedback (GPTQ) packs by.

The squared error of a matrix' outputs, for an error E in its weights, is tr(E H E^T) with H the sum of x x^T over its
inputs x.  Where they are taken from:

* w1 and w3 of all experts read the MoE's input: one H [D, D] a layer, over all tokens.
* w2 reads its expert's activation: an H [I, I] per expert over its routed tokens, and SMOOTHING_TOKENS times the mean
  of x^2 over all tokens on its diagonal, so that an expert that hardly any token came to does not go by chance.

Sums are exact (`gram.py`).  Experts come in groups, each over all tokens, so only a group's sums are in memory; they
go to a file once the group is done, from which an expert is packed: by any rank, out of all ranks' files.

Shapes: E experts, T tokens of a chunk, D hidden, I intermediate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from m27quant.calib.gram import Gram, gram_bytes, num_sums, piece_bytes, symmetric
from m27quant.calib.moments import SMOOTHING_TOKENS
from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.durable import fault_point, pwrite_all, raise_for_os_error
from m27quant.checkpoint.header import pread_exactly
from m27quant.errors import escape
from m27quant.kernels.dispatch import choose
from m27quant.kernels.nvfp4_gptq import Factor, factorize

FACTORIZING = {"cpu-native": 4}
OTHERWISE_FACTORIZING = 8
"""Matrices in F64 beside each other while one is factorized, by the backend that does it."""


class Hessians:
    """Sums over this rank's tokens: of the MoE's input in memory, of experts' activations in a file."""

    def __init__(self, config: M2Config, device: torch.device, path: Path) -> None:
        """`path` is a file of one's own, which is gone when this is left.

        Raises:
            EnvironmentFault: no space, no permission.
        """
        self._channels, self._device, self._path = config.intermediate_size, device, path
        self.inputs = Gram(config.hidden_size, device)
        self._open: dict[int, Gram] = {}
        self._spare: list[Gram] = []
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._fd, 0, hessians_on_disk(config)[1])
        except OSError as fault:
            raise_for_os_error(fault, path)

    def add_inputs(self, h_TD: torch.Tensor) -> None:
        """A chunk of the MoE's input: once, not for every expert."""
        self.inputs.add(h_TD)

    def add(self, expert: int, routed_h: torch.Tensor, act: torch.Tensor, routed_act: torch.Tensor) -> None:
        """A chunk through one expert: its activation on routed tokens is looked at."""
        if expert not in self._open:
            self._open[expert] = self._spare.pop() if self._spare else Gram(self._channels, self._device)
        self._open[expert].add(routed_act)

    def done(self, experts: Sequence[int]) -> None:
        """These have seen all tokens: to the file with their sums.  Who had no token has zeros there."""
        for expert in experts:
            gram = self._open.pop(expert, None)
            if gram is None:
                continue
            sums = gram.whole().cpu()
            try:
                pwrite_all(self._fd, byte_view(sums), expert * sums.nbytes)
                fault_point("hessians-spilled")
            except OSError as fault:
                raise_for_os_error(fault, self._path)
            gram.clear()
            self._spare.append(gram)

    def finish(self) -> torch.Tensor:
        """All experts are done: the file is for others to read, memory goes back; the whole sums of the MoE's input."""
        self._spare.clear()
        os.close(self._fd)
        self._fd = -1
        inputs = self.inputs.whole()
        del self.inputs
        return inputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._path.unlink(missing_ok=True)


class LayerHessians:
    """One layer's Hessians over all ranks' tokens, factorized when they are asked for."""

    def __init__(
        self,
        inputs_whole: torch.Tensor,
        config: M2Config,
        device: torch.device,
        files: Iterable[Path],
        mean_squares_EI: torch.Tensor,
    ) -> None:
        """Sums of the MoE's input, the files of all ranks' `Hessians`, and each activation's mean square, F64.

        Raises:
            CalibrationError: sums that no damping makes positive.
            EnvironmentFault: a file cannot be opened.
        """
        self._channels, self._device = config.intermediate_size, device
        self._mean_squares_EI = mean_squares_EI
        self._inputs = factorize(symmetric(inputs_whole, config.hidden_size))
        self._last: tuple[int, Factor] | None = None
        self._files = ExitStack()
        self._opened = []
        with ExitStack() as opened:
            for path in files:
                try:
                    self._opened.append((opened.enter_context(path.open("rb")).fileno(), path))
                except OSError as fault:
                    raise_for_os_error(fault, path)
            self._files = opened.pop_all()

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()

    def factor(self, expert: int, projection: str) -> Factor:
        """Of the inputs of one matrix; raises `CalibrationError` as `factorize` does."""
        if projection != "w2":
            return self._inputs
        if self._last is None or self._last[0] != expert:
            self._last = None  # before the next one is made
            self._last = expert, factorize(self.activations(expert))
        return self._last[1]

    def activations(self, expert: int) -> torch.Tensor:
        """The smoothed sum over one expert's routed tokens, F64 [I, I]."""
        total = torch.zeros(2, num_sums(self._channels), dtype=torch.int64)
        part = torch.empty_like(total)
        for fd, path in self._opened:
            pread_exactly(fd, byte_view(part), expert * part.nbytes, escape(path))
            total += part
        hessian_II = symmetric(total, self._channels)
        hessian_II.diagonal().add_(SMOOTHING_TOKENS * self._mean_squares_EI[expert])
        return hessian_II.to(self._device)


def hessians_on_disk(config: M2Config) -> tuple[int, int]:
    """Bytes of one rank's sums: of the MoE's input, and of all experts' activations."""
    D, I = config.hidden_size, config.intermediate_size  # noqa: E741
    return 16 * num_sums(D), 16 * num_sums(I) * config.num_local_experts


def hessian_bytes(config: M2Config, device: torch.device) -> tuple[int, int]:
    """What calibration and packing take at most beside everything else; of it for each expert of a group."""
    D, I = config.hidden_size, config.intermediate_size  # noqa: E741
    calibrating = gram_bytes(D) + piece_bytes(max(D, I), device)
    beside = FACTORIZING.get(choose("nvfp4_gptq", device).backend, OTHERWISE_FACTORIZING)
    packing = 8 * max(beside * D * D, D * D + beside * I * I)
    return max(calibrating, packing), gram_bytes(I)
