"""A drafter's tensors: compared with what its config implies, then read; and what it borrows from its target.

Shapes: V tokens of the target, W draft vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import DrafterConfig, expected_tensors
from m27quant.checkpoint.drafter_weights import read_tensor
from m27quant.checkpoint.header import TensorInfo
from m27quant.errors import CheckpointError, escape
from m27quant.runtime.speculative.decoder import LayerWeights, Shared

HINT = "take a drafter that was trained for this target"
FLOATS = ("BF16", "F16", "F32")


class DrafterTensors:
    """The tensors that the kind and its config imply, no others; read when asked for, in the dtype to compute with."""

    def __init__(
        self,
        c: DrafterConfig,
        tensors: dict[str, TensorInfo],
        num_taps: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Compare names and shapes with what is expected; raises `CheckpointError`."""
        self.infos, self.dtype, self.device, self.nbytes = tensors, dtype, device, 0
        expected = dict(expected_tensors(c, num_taps)) | dict(_optional(c, tensors, num_taps))
        for name in sorted(expected.keys() - tensors.keys()):
            raise CheckpointError(
                f"drafter: tensor '{name}' is missing, expected: {list(expected[name])}", hint=HINT
            )
        unknown = sorted(n for n in tensors.keys() - expected.keys() if not n.endswith("rotary_emb.inv_freq"))
        if unknown:
            raise CheckpointError(
                f"drafter: tensor '{escape(tensors[unknown[0]].name)}' is not one of {c.kind}'s", hint=HINT
            )
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                what = f"shape {list(tensors[name].shape)}, expected: {list(shape)}"
                if name == "fc.weight":
                    what += f" for {num_taps} taps of {c.target_hidden_size}"
                raise CheckpointError(f"drafter: tensor '{escape(tensors[name].name)}' has {what}", hint=HINT)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"drafter: tensor '{escape(info.name)}' is {info.dtype}, expected: BF16",
                hint="store it in BF16",
            )
        tensor = read_tensor(info).to(self.device, self.dtype)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"drafter: tensor '{escape(info.name)}' holds NaN or Inf", hint="download the drafter again"
            )
        self.nbytes += tensor.nbytes
        return tensor

    def layer(self, n: int, qk_norms: bool) -> LayerWeights:
        """One decoder layer's weights."""
        prefix = f"layers.{n}."
        attention = ["q_proj", "k_proj", "v_proj", "o_proj", *(["q_norm", "k_norm"] if qk_norms else [])]
        places = {f"self_attn.{name}": name for name in attention}
        places |= {f"mlp.{name}": name for name in ("gate_proj", "up_proj", "down_proj")}
        places |= {name: name for name in ("input_layernorm", "post_attention_layernorm")}
        return LayerWeights(**{name: self[f"{prefix}{place}.weight"] for place, name in places.items()})


def _optional(
    c: DrafterConfig, tensors: Iterable[str], num_taps: int
) -> Iterable[tuple[str, tuple[int, ...]]]:
    """What a drafter may have beside what it must have, as far as it has it."""
    present = set(tensors)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "lm_head.weight": (c.draft_vocab_size, c.hidden_size),
        "d2t": (c.draft_vocab_size,),
        "t2d": (c.vocab_size,),
    }
    yield from ((name, shape) for name, shape in shapes.items() if name in present)
    if c.kind == "eagle3":
        if "input_norm.weight" in present:
            yield "input_norm.weight", (num_taps * c.target_hidden_size,)
        if any(name.startswith("fc_norm.") for name in present):
            for k in range(num_taps):
                yield f"fc_norm.{k}.weight", (c.target_hidden_size,)


def shared_weights(
    c: DrafterConfig, w: DrafterTensors, target: M2Config, embed_VD: Tensor, head_VD: Tensor
) -> Shared:
    """Embedding and head, own or the target's, and what the head's rows stand for."""
    reduced = c.draft_vocab_size < c.vocab_size
    embed = w["embed_tokens.weight"] if "embed_tokens.weight" in w else embed_VD.to(w.device, w.dtype)
    if len(embed) < target.vocab_size and "embed_tokens.weight" in w:  # padding tokens that it never saw
        embed = torch.cat((embed, embed.new_zeros(target.vocab_size - len(embed), embed.shape[1])))
    if "lm_head.weight" in w:
        head = w["lm_head.weight"]
    elif c.kind == "eagle3" and not reduced and c.raw.get("tie_word_embeddings") is True:
        head = embed
    elif reduced or c.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"drafter: lm_head.weight is missing; the target's head has {target.vocab_size} tokens of "
            f"{target.hidden_size}, the drafter needs {c.draft_vocab_size} of {c.hidden_size}",
            hint="export the drafter with its head",
        )
    else:
        head = head_VD[: c.draft_vocab_size].to(w.device, w.dtype)
    if not reduced and "d2t" not in w:
        return Shared(embed, head, None)
    if "d2t" not in w:
        raise CheckpointError(
            f"drafter: draft_vocab_size is {c.draft_vocab_size} of {c.vocab_size} tokens, but there is no d2t",
            hint="export the drafter with its d2t",
        )
    return Shared(embed, head, draft_to_target(w, target.vocab_size))


def draft_to_target(w: DrafterTensors, vocab_size: int) -> Tensor:
    """int64 [W] of tokens, from d2t's offsets; checked against t2d."""
    offsets = read_tensor(w.infos["d2t"])
    if offsets.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(
            f"drafter: d2t is {w.infos['d2t'].dtype}, expected: I64", hint="export it again"
        )
    tokens = offsets.long() + torch.arange(len(offsets))
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise CheckpointError(
            f"drafter: d2t: row {row} leads to token {int(tokens[row])}, expected: 0 to {vocab_size - 1}",
            hint="d2t holds offsets; where it holds ids, subtract the row numbers",
        )
    distinct = len(set(tokens.tolist()))
    if distinct != len(tokens):
        raise CheckpointError(
            f"drafter: d2t: {len(tokens) - distinct} rows lead to a token that another row has",
            hint="d2t holds offsets; where it holds ids, subtract the row numbers",
        )
    if "t2d" in w:
        marked = read_tensor(w.infos["t2d"]).bool().nonzero()[:, 0]
        if not torch.equal(marked, tokens.sort().values):
            raise CheckpointError(
                f"drafter: t2d marks {len(marked)} tokens, d2t leads to {len(tokens)}, and they differ",
                hint="export the drafter again: one of the two belongs to another",
            )
    return tokens.to(w.device)
