"""A run that begins with another drafter's weights: one that was trained for the source, say, learns what NVFP4 writes.

Shapes: W draft vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import read_taps
from m27quant.drafters.batch import Parameters
from m27quant.drafters.eagle3 import LAYER
from m27quant.errors import CheckpointError, escape
from m27quant.runtime.speculative.config import DFlashSettings, Eagle3Settings, read_dflash, read_eagle3
from m27quant.runtime.speculative.load import DrafterOptions, read_drafter
from m27quant.runtime.speculative.rope import read_rope
from m27quant.runtime.speculative.taps import choose_taps
from m27quant.runtime.speculative.weights import DrafterTensors, draft_to_target

TABLES = ("d2t", "t2d")


@dataclass(frozen=True, slots=True)
class Start:
    """A drafter that a run begins with."""

    name: str
    """The folder's."""
    values: dict[str, Any]
    """Its sizes, named as in `TrainOptions`, and `rms_norm_eps`."""
    weights: Parameters
    """F32, by the trainer's names."""
    tokens_W: Tensor | None
    """EAGLE3: int64, ascending: what each row of its head stands for."""

    @property
    def digest(self) -> str:
        """SHA-256 of weights and vocabulary."""
        hashed = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            hashed.update(name.encode())
            hashed.update(byte_view(tensor.contiguous()))
        if self.tokens_W is not None:
            hashed.update(byte_view(self.tokens_W.contiguous()))
        return hashed.hexdigest()


def read_start(folder: Path, kind: str, target: M2Config) -> Start:
    """The drafter in `folder`, in any layout that can be run.

    Raises:
        CheckpointError: as `load_drafter`; of another kind; with parts that the training of its kind does not have.
    """
    config, tensors, faults = read_drafter(folder, target, DrafterOptions())
    if config.kind != kind:
        _refuse(folder, f"is a drafter of kind {config.kind}, expected: {kind}")
    stated = read_taps(config, target.num_hidden_layers, faults)
    if stated is None:
        _refuse(folder, "states no taps")
    taps = choose_taps(stated, target.num_hidden_layers, None).hidden_states
    settings: DFlashSettings | Eagle3Settings
    if kind == "dflash":
        settings = read_dflash(config, target.vocab_size)
        own = {"block_size": settings.block_size, "mask_token": settings.mask_token_id}
    else:
        renamed = any("midlayer." in info.name for info in tensors.values())
        settings = read_eagle3(config, set(tensors), renamed)
        own = {"draft_vocab_size": config.draft_vocab_size}
    _refuse_what_is_not_trained(folder, settings, set(tensors))
    read = DrafterTensors(config, tensors, len(taps), torch.float32, torch.device("cpu"))
    names = {name: _own_name(kind, name) for name in tensors if name not in TABLES and "inv_freq" not in name}
    weights = {own_name: read[name] for name, own_name in names.items()}
    sizes, tokens = settings.sizes, None
    if kind == "eagle3":
        tokens = (
            draft_to_target(read, target.vocab_size) if "d2t" in read else torch.arange(target.vocab_size)
        )
        if not bool((tokens.diff() > 0).all()):
            _refuse(folder, "has a d2t whose tokens do not ascend")
    return Start(
        folder.resolve().name,
        own | {
            "num_layers": sizes.num_hidden_layers, "taps": taps, "intermediate_size": config.intermediate_size,
            "num_heads": sizes.num_attention_heads, "num_kv_heads": sizes.num_key_value_heads,
            "head_dim": sizes.head_dim, "rope_theta": sizes.rope.theta, "rms_norm_eps": sizes.rms_norm_eps,
        },
        weights,
        tokens,
    )  # fmt: skip


def _own_name(kind: str, name: str) -> str:
    return name.replace("layers.0.", LAYER, 1) if kind == "eagle3" else name


def _refuse_what_is_not_trained(
    folder: Path, settings: DFlashSettings | Eagle3Settings, tensors: set[str]
) -> None:
    """Whatever the training would leave out or compute in another way."""
    rope = settings.sizes.rope
    plain = read_rope({"rope_theta": rope.theta}, settings.sizes.head_dim)
    if rope.factor != 1 or not torch.equal(rope.inv_freq, plain.inv_freq):
        _refuse(folder, "turns by a rope_scaling")
    if isinstance(settings, DFlashSettings):
        if any(rule.window is not None or rule.causal for rule in settings.attention):
            _refuse(folder, "has layers with a window or causal ones")
        foreign = sorted(tensors & {"embed_tokens.weight", "lm_head.weight", *TABLES})
    else:
        for name in ("norm_before_residual", "norm_output", "fc_norm", "input_norm"):
            if getattr(settings, name):
                _refuse(folder, f"has {name}")
        if settings.logit_scale != 1:
            _refuse(folder, "has a logit_scale")
        foreign = sorted(tensors & {"embed_tokens.weight"})
        if "lm_head.weight" not in tensors:
            _refuse(folder, "has no head of its own")
    if foreign:
        _refuse(folder, f"has a {foreign[0]} of its own")


def _refuse(folder: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{escape(folder)} {what}, which cannot be trained on",
        hint="leave --init-from out, or name another drafter",
    )
