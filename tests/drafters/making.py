"""Small batches for the drafters of `tests.runtime.speculative.makers`, and the derivation to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m27quant.drafters.batch import Batch, Shared
from m27quant.drafters.dflash import DFlashSpec
from m27quant.drafters.eagle3 import Eagle3Spec
from tests.runtime.speculative import makers as m
from tests.runtime.speculative import rederived as r

HIDDEN_STATES = (2, 5, 9)
EMBED, HEAD = m.target_weights()
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_theta",
)  # fmt: skip


def dflash_spec(config: dict[str, Any], **extra: Any) -> DFlashSpec:
    sizes = config.get("transformer_layer_config", config)
    taps = config.get("dflash_config", {}).get("target_layer_ids", [1, 4, 8])
    return DFlashSpec(
        **{key: sizes[key] for key in SIZES}, hidden_states=tuple(t + 1 for t in taps),
        block_size=config["block_size"], mask_token_id=m.VOCAB - 1, **extra,
    )  # fmt: skip


def eagle3_spec(config: dict[str, Any]) -> Eagle3Spec:
    return Eagle3Spec(
        **{key: config[key] for key in SIZES}, hidden_states=HIDDEN_STATES,
        draft_vocab_size=config["draft_vocab_size"],
    )  # fmt: skip


def heads(config: dict[str, Any]) -> r.Heads:
    return r.Heads(config, r.plain_inv_freq(config["head_dim"], config["rope_theta"]))


def shared(dtype: torch.dtype = torch.float64) -> Shared:
    return Shared(EMBED.to(dtype), HEAD.to(dtype))


def batch(
    lengths: tuple[int, ...],
    width: int,
    prompts: tuple[int, ...] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Sequences of these lengths, the first tokens of which are a prompt; the padding holds rubbish."""
    g, T = torch.Generator().manual_seed(seed), max(lengths)
    starts = torch.tensor(prompts or (1,) * len(lengths))[:, None]
    return Batch(
        ids_BT=torch.randint(m.VOCAB - 1, (len(lengths), T), generator=g),
        lengths_B=torch.tensor(lengths),
        loss_mask_BT=(torch.arange(T) >= starts).expand(len(lengths), T).clone(),
        taps_BTF=torch.randn(len(lengths), T, width, generator=g).to(dtype),
        final_BTD=torch.randn(len(lengths), T, m.D, generator=g).to(dtype),
    )


def wanting(tensors: m.Tensors, dtype: torch.dtype = torch.float64) -> m.Tensors:
    """Floating tensors as leaves that want a gradient, without what is not trained."""
    return {n: t.to(dtype).requires_grad_() for n, t in tensors.items() if n not in ("d2t", "t2d")}


def padded(x: Batch, more: int) -> Batch:
    """The same with more padding, of other rubbish."""
    pad = torch.nn.functional.pad
    return Batch(
        pad(x.ids_BT, (0, more), value=7), x.lengths_B, pad(x.loss_mask_BT, (0, more), value=True),
        pad(x.taps_BTF, (0, 0, 0, more), value=3.0), pad(x.final_BTD, (0, 0, 0, more), value=-2.0),
    )  # fmt: skip


def changed(x: Batch, field: str, sequence: int, position: int) -> Batch:
    """One token, or the features of one position, made others."""
    values = {name: getattr(x, name) for name in Batch.__slots__}
    tensor = values[field].clone()
    tensor[sequence, position] = (
        (tensor[sequence, position] + 1) % (m.VOCAB - 1)
        if field == "ids_BT"
        else tensor[sequence, position] + 1.5
    )
    return Batch(**(values | {field: tensor}))


def cross_entropy(logits: Tensor, token: int, teacher_logits: Tensor, soft: float) -> Tensor:
    """soft H(target, drafter) - (1 - soft) log drafter[token], one vocabulary entry after the other."""
    log_z = torch.logsumexp(logits, 0)
    p = torch.softmax(teacher_logits, 0)
    distilled = -sum((p[i] * (logits[i] - log_z) for i in range(len(logits))), torch.zeros(()))
    return soft * distilled - (1 - soft) * (logits[token] - log_z)
