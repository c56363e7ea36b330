"""What can be set in training a drafter.  None is the preset's value, or what suits the target."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from m27quant.errors import UsageError

Kind = Literal["dflash", "eagle3"]
KINDS = ("dflash", "eagle3")
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "wsd", "constant"),
    "dtype": ("bf16", "f32"),
    "layout": ("plain", "speculators"),
}
DFLASH_ONLY = ("num_layers", "block_size", "train_block_sizes", "mask_token", "anchors_per_seq", "loss_gamma")
EAGLE3_ONLY = ("draft_vocab_size", "num_steps")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a drafter is made, trained and kept.

    Raises:
        UsageError: a value out of its bounds.
    """

    preset: str | None = None
    init_from: str | None = None
    """A drafter, folder or Hub id, whose sizes and weights the run begins with."""
    # The drafter.
    num_layers: int | None = None
    """DFlash: decoder layers.  EAGLE3 has one."""
    taps: tuple[int, ...] | None = None
    """Hidden states of the target: 0 is the embedding, n the output of layer n - 1 counted from 0."""
    block_size: int | None = None
    """DFlash: slots of a block, the anchor's included."""
    train_block_sizes: tuple[int, ...] | None = None
    """DFlash: sizes that steps alternate between, so that one drafter serves them all; None is the block size."""
    mask_token: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    draft_vocab_size: int | None = None
    """EAGLE3: tokens that it knows, the most frequent ones of the data."""
    # The loss.
    anchors_per_seq: int | None = None
    """DFlash: blocks of a sequence that are learned in one step."""
    loss_decay: float | None = None
    """DFlash: slot k weighs decay**(k-1).  EAGLE3: step j weighs decay**j."""
    loss_gamma: float | None = None
    """DFlash, instead of `loss_decay`: slot k weighs exp(-(k-1)/gamma)."""
    num_steps: int | None = None
    """EAGLE3: steps of the training-time test."""
    loss: float | None = None
    """Share of distillation from the target's distribution; the rest is cross-entropy with the token it chose."""
    # The training.
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    """Sequences of one rank at a time."""
    grad_accumulation: int = 1
    lr: float | None = None
    adam_lr: float = 4e-3
    """With Muon: the rate of what is not a matrix, and of the head."""
    optimizer: str = "adamw"
    weight_decay: float | None = None
    """Of matrices."""
    warmup: float = 0.04
    """Share of the steps; from 1 on, steps."""
    schedule: str = "cosine"
    clip: float | None = None
    """Largest norm of the gradient."""
    dtype: str = "bf16"
    max_length: int = 4096
    seed: int = 0
    # Measuring and keeping.
    heldout: str | None = None
    """A share of the data, or a file or folder of other data; None holds nothing out."""
    eval_every: int | None = None
    eval_samples: int = 32
    save_every: int | None = None
    """Steps between two states on disk; None is as often as costs a fiftieth of the time."""
    resume: bool = False
    overwrite: bool = False
    force_unlock: bool = False
    # The target and the machine.
    activations: str = "auto"
    """Of an NVFP4 target's experts; with `kv_cache_dtype`, as in `RunOptions`: it changes what is learned from."""
    kv_cache_dtype: str = "auto"
    revision: str | None = None
    offline: bool = False
    token: str | None = field(default=None, repr=False)
    device: str = "auto"
    cache_size: int | None = None
    """Bytes of the target's states kept on disk; 0 computes all of them anew."""
    # The result.
    layout: str = "plain"
    """DFlash: z-lab's, EAGLE3: SpecForge's; or "speculators" """

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # also where it is not a number
                raise UsageError(f"{name} must be at least {least}, got {value}")
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not value <= most:
                raise UsageError(f"{name} must be at most {most}, got {value}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be above 0 and finite, got {value}")
        for first, second in EXCLUSIVE:
            if getattr(self, first) not in (None, False) and getattr(self, second) not in (None, False):
                raise UsageError(f"{first} and {second} exclude each other", hint="choose one of them")
        if self.eval_every is not None and self.heldout is None:
            raise UsageError("eval_every measures held-out data, and none is held out", hint="set heldout")

    def given(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        default = {f.name: f.default for f in fields(self) if f.name != "token"}
        return {name: getattr(self, name) for name, value in default.items() if getattr(self, name) != value}


EXCLUSIVE = (
    ("steps", "epochs"),
    ("loss_decay", "loss_gamma"),
    ("resume", "overwrite"),
    ("preset", "init_from"),
)
LEAST: dict[str, float] = {
    "num_layers": 1, "block_size": 2, "mask_token": 0, "intermediate_size": 1, "num_heads": 1, "num_kv_heads": 1,
    "head_dim": 2, "draft_vocab_size": 1, "anchors_per_seq": 1, "num_steps": 1, "loss": 0, "steps": 1,
    "batch_size": 1, "grad_accumulation": 1, "weight_decay": 0, "warmup": 0, "max_length": 4, "seed": 0,
    "eval_every": 1, "eval_samples": 1, "save_every": 1, "cache_size": 0,
}  # fmt: skip
MOST: dict[str, float] = {"loss": 1, "loss_decay": 1, "weight_decay": 1}
POSITIVE = ("loss_decay", "loss_gamma", "epochs", "lr", "adam_lr", "clip", "rope_theta")
