"""How much an error of a weight counts: the second moment of its input channel, for every expert's matrices.

An error e_j in the weights of channel j adds (e_j x_j)^2 to the squared error of the output for an input x: on
average e_j^2 m_j with m_j = E[x_j^2], where errors of different channels are taken as independent.  Of an expert e

    m_e = (sum over e's routed tokens of x^2 + S * mean over all tokens of x^2) / (n_e + S)

with n_e routed tokens and S = SMOOTHING_TOKENS: what the expert will see decides, and an expert that routing hardly
visits goes by all tokens instead of by chance.  w1 and w3 read the MoE's input, w2 the expert's own activation; both
are known over all tokens, as in full coverage every expert sees every token.

A chunk's sums are F64, rounded to multiples of LOW, and added as whole numbers: exactly, so that neither the order of
chunks nor which rank had which can change a bit.

Shapes: E experts, T tokens of a chunk, C channels (D hidden of w1 and w3, I intermediate of w2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.names import EXPERT_PROJECTIONS

SMOOTHING_TOKENS = 256
"""As many tokens as this, of all experts' average kind, stand beside those that are routed to an expert."""
HIGH, LOW = 2.0**8, 2.0**-36
"""What the two whole numbers of a sum count; a channel whose values are all below 2**-18 counts as 0."""
LARGEST = 2.0**60
"""Of one chunk's sum: above it (values of more than ten million throughout) all is equal."""
PIECE_ROWS = {"cpu": 256, "cuda": 4096}
"""Rows whose F64 squares are in memory at a time."""


@dataclass(frozen=True, slots=True)
class ChannelWeights:
    """Of one layer's experts, F32, on the CPU."""

    w13: torch.Tensor
    """[E, D]."""
    w2: torch.Tensor
    """[E, I]."""

    def of(self, expert: int) -> dict[str, torch.Tensor]:
        """By projection; w1 and w3 share theirs."""
        return {p: (self.w2 if p == "w2" else self.w13)[expert] for p in EXPERT_PROJECTIONS}

    @property
    def sha256(self) -> str:
        """Of both, in this order, as they lie in memory."""
        digest = hashlib.sha256()
        for weights in (self.w13, self.w2):
            digest.update(byte_view(weights.contiguous()))
        return digest.hexdigest()


class Moments:
    """Sums of squares of one layer, over the chunks that were added."""

    def __init__(self, config: M2Config, device: torch.device) -> None:
        E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size  # noqa: E741
        self.sums = torch.zeros(2, D + E * D + 2 * E * I, dtype=torch.int64, device=device)
        """The whole numbers of all sums: add those of other ranks' chunks to them."""
        parts = torch.split(self.sums, [D, E * D, E * I, E * I], dim=1)
        self._all13_2D = parts[0]
        self._routed13_2ED = parts[1].view(2, E, D)
        self._all2_2EI, self._routed2_2EI = (part.view(2, E, I) for part in parts[2:])

    def add_inputs(self, h_TD: torch.Tensor) -> None:
        """A chunk of the MoE's input: once, not for every expert."""
        self._all13_2D += _whole(squares(h_TD))

    def add(self, expert: int, routed_h: torch.Tensor, act: torch.Tensor, routed_act: torch.Tensor) -> None:
        """A chunk through one expert: its input and activation on routed tokens, its activation on all."""
        self._routed13_2ED[:, expert] += _whole(squares(routed_h))
        self._all2_2EI[:, expert] += _whole(squares(act))
        self._routed2_2EI[:, expert] += _whole(squares(routed_act))

    def done(self, experts: Sequence[int]) -> None:
        """Nothing: all experts' sums are kept."""

    def mean_squares(self, num_tokens: int) -> torch.Tensor:
        """Of each expert's activation over all `num_tokens` tokens, F64 [E, I]."""
        return _value(self._all2_2EI) / num_tokens

    def weights(self, routed_tokens: Sequence[int], num_tokens: int) -> ChannelWeights:
        """The smoothed moments, of `routed_tokens` by expert among `num_tokens`."""
        n_E1 = torch.tensor(routed_tokens, dtype=torch.float64)[:, None]

        def smoothed(routed: torch.Tensor, everything: torch.Tensor) -> torch.Tensor:
            prior = _value(everything) * (SMOOTHING_TOKENS / num_tokens)
            return ((_value(routed) + prior) / (n_E1 + SMOOTHING_TOKENS)).float()

        return ChannelWeights(
            smoothed(self._routed13_2ED, self._all13_2D), smoothed(self._routed2_2EI, self._all2_2EI)
        )


def squares(x_TC: torch.Tensor) -> torch.Tensor:
    """Sum over rows of x * x, F64 [C]; rows that are NaN or Inf somewhere are left out."""
    total = _squares(x_TC)
    if bool(total.isfinite().all()):  # looking at the sums costs a tenth of looking at every value
        return total
    return _squares(x_TC[x_TC.isfinite().all(1)])


def _squares(x_TC: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(x_TC.shape[1], dtype=torch.float64, device=x_TC.device)
    for x in torch.split(x_TC, PIECE_ROWS[x_TC.device.type]):
        total += x.double().square_().sum(0)
    return total


def _whole(sums: torch.Tensor) -> torch.Tensor:
    """F64 sums as int64 [2, ...]: multiples of HIGH and, for what is left, of LOW."""
    sums = sums.clamp(max=LARGEST)
    high = (sums / HIGH).floor()
    return torch.stack((high, ((sums - high * HIGH) / LOW).round())).to(torch.int64)


def _value(whole: torch.Tensor) -> torch.Tensor:
    high_low = whole.cpu().double()
    return high_low[0] * HIGH + high_low[1] * LOW


def moments_bytes(config: M2Config, device: torch.device) -> int:
    """The most that `Moments` and what is made of them take at a time."""
    E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size  # noqa: E741
    sums = 2 * 8 * (D + E * D + 2 * E * I)
    pieces = 2 * 8 * PIECE_ROWS[device.type] * max(D, I)
    return 2 * sums + 4 * 8 * E * max(D, I) + 4 * E * (D + I) + pieces


def moments_on_disk(config: M2Config) -> int:
    """Bytes of one rank's sums."""
    E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size  # noqa: E741
    return 16 * (D + E * D + 2 * E * I)
