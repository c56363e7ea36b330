"""From a preset, options and the target's sizes to everything a training run is fixed by.

Taps are hidden states of the target throughout: 0 is the embedding, n the output of layer n - 1 counted from 0; the
files' `target_layer_ids` and nested `eagle_aux_hidden_state_layer_ids` are one less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import MAX_TAPS, default_taps
from m27quant.drafters.options import DFLASH_ONLY, EAGLE3_ONLY, KINDS, Kind, TrainOptions
from m27quant.errors import UsageError

DEFAULTS: dict[str, dict[str, Any]] = {
    "dflash": {
        "num_layers": 3, "block_size": 16, "anchors_per_seq": 512, "loss_decay": 0.85, "loss": 0.0,
        "epochs": 6.0, "clip": 1.0,
    },
    "eagle3": {
        "num_layers": 1, "draft_vocab_size": 32000, "num_steps": 7, "loss_decay": 0.8, "loss": 1.0,
        "epochs": 10.0, "clip": 0.5,
    },
}  # fmt: skip
"""z-lab's paper and SpecForge (arXiv:2602.06036, arXiv:2503.01840)."""
RATES = {
    ("dflash", "adamw"): 6e-4,
    ("eagle3", "adamw"): 1e-4,
    ("dflash", "muon"): 0.02,
    ("eagle3", "muon"): 0.02,
}
WEIGHT_DECAY = {"adamw": 0.01, "muon": 0.1}
M27_LAYER = {"num_heads": 24, "num_kv_heads": 8, "head_dim": 128, "intermediate_size": 8192}
PRESETS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "l3h5": (
        "dflash",
        M27_LAYER | {
            "num_layers": 3, "taps": (3, 17, 31, 44, 58), "block_size": 16, "mask_token": 200063,
            "intermediate_size": 9216, "loss_decay": 0.85,
        },
    ),
    "dflash-b8": (
        "dflash",
        M27_LAYER | {
            "num_layers": 5, "taps": (2, 17, 31, 45, 60), "block_size": 8, "mask_token": 200054, "loss_gamma": 4.0,
        },
    ),
    "eagle3-32k": ("eagle3", M27_LAYER | {"taps": (2, 31, 59), "draft_vocab_size": 32000}),
}  # fmt: skip
"""Of MiniMax-M2.7: MirecX' L3H5 (`target_layer_ids` [2, 16, 30, 43, 57]), z-lab's shape with blocks of 8, and the head
that SpecForge makes for M2 (hidden states [2, 31, 59])."""
EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A drafter's sizes, named as in config.json."""

    kind: Kind
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    vocab_size: int
    num_target_layers: int
    hidden_states: tuple[int, ...]
    block_size: int = 0
    mask_token_id: int = 0
    draft_vocab_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is learned."""

    anchors_per_seq: int = 0
    block_sizes: tuple[int, ...] = ()
    num_steps: int = 0
    loss_decay: float | None = None
    loss_gamma: float | None = None
    soft: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything but the data that the result depends on; `steps` or `epochs` is None."""

    shape: Shape
    objective: Objective
    steps: int | None
    epochs: float | None
    batch_size: int
    grad_accumulation: int
    optimizer: str
    lr: float
    adam_lr: float
    weight_decay: float
    warmup: float
    schedule: str
    clip: float
    dtype: str
    max_length: int
    seed: int

    def document(self) -> dict[str, Any]:
        """Flat, for fingerprint and log."""
        found = asdict(self)
        flat = {**found.pop("shape"), **found.pop("objective"), **found}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def resolve(
    kind: str, options: TrainOptions, target: M2Config, start: Mapping[str, Any] | None = None
) -> Recipe:
    """Fill what the options leave open: from the preset, then from the kind's defaults, then from the target.

    `start` has the sizes of the drafter that the run begins with; only its block size may be changed.

    Raises:
        UsageError: an option or preset of the other kind, or a value that the target or `start` does not allow.
    """
    if kind not in KINDS:
        raise UsageError(f"no such kind of drafter: {kind!r}", hint=f"choose one of {', '.join(KINDS)}")
    _refuse_foreign(kind, options)
    chosen = DEFAULTS[kind] | _preset(kind, options.preset)
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    if given["loss_gamma"] is not None:
        chosen.pop("loss_decay", None)
    if given["loss_decay"] is not None:
        chosen.pop("loss_gamma", None)
    if given["steps"] is not None:
        chosen.pop("epochs")
    if "loss_gamma" in chosen:
        chosen.pop("loss_decay", None)
    chosen |= start or {}
    chosen |= {name: value for name, value in given.items() if value is not None}
    for name, value in (start or {}).items():
        if chosen[name] != value and name != "block_size":
            raise UsageError(
                f"{name} {chosen[name]}: the drafter to begin with has {value}", hint="leave the option out"
            )
    shape = _shape(kind, chosen, options, target)  # type: ignore[arg-type]  # checked above
    if chosen["max_length"] > target.max_position_embeddings:
        if options.max_length != TrainOptions.max_length:
            raise UsageError(
                f"max_length {options.max_length} is more than the target's {target.max_position_embeddings} positions"
            )
        chosen["max_length"] = target.max_position_embeddings
    weight_decay = chosen.get("weight_decay")
    return Recipe(
        shape=shape,
        objective=Objective(
            anchors_per_seq=chosen.get("anchors_per_seq", 0),
            block_sizes=_block_sizes(chosen, shape),
            num_steps=chosen.get("num_steps", 0),
            loss_decay=chosen.get("loss_decay"),
            loss_gamma=chosen.get("loss_gamma"),
            soft=chosen["loss"],
        ),
        lr=chosen.get("lr", RATES[kind, options.optimizer]),
        weight_decay=WEIGHT_DECAY[options.optimizer] if weight_decay is None else weight_decay,
        steps=chosen.get("steps"),
        epochs=chosen.get("epochs"),
        **{name: chosen[name] for name in AS_GIVEN},
    )


AS_GIVEN = (
    "batch_size", "grad_accumulation", "optimizer", "adam_lr", "warmup", "schedule", "clip", "dtype", "max_length",
    "seed",
)  # fmt: skip


def _refuse_foreign(kind: str, options: TrainOptions) -> None:
    foreign = DFLASH_ONLY if kind == "eagle3" else EAGLE3_ONLY
    for name in foreign:
        if getattr(options, name) is not None and not (name == "num_layers" and options.num_layers == 1):
            other = "dflash" if kind == "eagle3" else "eagle3"
            raise UsageError(f"{name} is an option of {other}, not of {kind}", hint="leave it out")
    if options.optimizer == "adamw" and options.adam_lr != TrainOptions.adam_lr:
        raise UsageError("adam_lr goes with the optimizer muon", hint="set lr")


def _preset(kind: str, name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        raise UsageError(f"no such preset: {name!r}", hint=f"choose one of {', '.join(PRESETS)}")
    of_kind, values = PRESETS[name]
    if of_kind != kind:
        raise UsageError(f"the preset {name} is of {of_kind}, not of {kind}", hint="choose another")
    return values


def _shape(kind: Kind, chosen: dict[str, Any], options: TrainOptions, target: M2Config) -> Shape:
    head_dim = chosen.get("head_dim", target.head_dim)
    kv_heads = chosen.get("num_kv_heads", target.num_key_value_heads)
    heads = chosen.get("num_heads", max(1, target.hidden_size // head_dim // kv_heads) * kv_heads)
    if heads % kv_heads:
        raise UsageError(f"num_heads {heads} cannot be divided among num_kv_heads {kv_heads}")
    if head_dim % 2:
        raise UsageError(f"head_dim is {head_dim}; a head that is rotated has an even one")
    states = _taps(kind, chosen.get("taps"), target.num_hidden_layers)
    shape: dict[str, Any] = {}
    if kind == "dflash":
        mask = chosen.get("mask_token", target.vocab_size - 1)
        if mask >= target.vocab_size:
            raise UsageError(
                f"mask_token {mask} is no row of the target's embedding of {target.vocab_size} tokens",
                hint="choose one that no text holds",
            )
        shape = {"block_size": chosen["block_size"], "mask_token_id": mask}
    else:
        wanted = chosen["draft_vocab_size"]
        if wanted > target.vocab_size and options.draft_vocab_size is not None:
            raise UsageError(
                f"draft_vocab_size {wanted} is more than the target's {target.vocab_size} tokens"
            )
        shape = {"draft_vocab_size": min(wanted, target.vocab_size)}
    return Shape(
        kind=kind,
        hidden_size=target.hidden_size,
        intermediate_size=chosen.get("intermediate_size", 3 * target.hidden_size),
        num_hidden_layers=chosen["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=chosen.get("rms_norm_eps", EPS),
        rope_theta=float(chosen.get("rope_theta", target.rope_theta)),
        max_position_embeddings=target.max_position_embeddings,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_hidden_layers,
        hidden_states=states,
        **shape,
    )


def _taps(kind: Kind, taps: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """Hidden states; without a choice those that z-lab's and SpecForge's drafters read."""
    if taps is None and kind == "eagle3":
        taps = default_taps(layers)
    elif taps is None:  # z-lab's five, from the second layer to the fourth last
        spread = {2 + round(i * (layers - 4) / 4) for i in range(5)}
        taps = tuple(sorted(tap for tap in spread if 1 <= tap < layers))
    shown = ", ".join(map(str, taps))
    if not taps or len(taps) > MAX_TAPS or list(taps) != sorted(set(taps)):
        raise UsageError(
            f"taps {shown} are not ascending", hint="choose other taps: engines read them in ascending order"
        )
    if not all(1 <= tap < layers for tap in taps):
        raise UsageError(
            f"taps {shown}: a target of {layers} layers has hidden states 1 to {layers - 1} to tap",
            hint="0 is the embedding, n the output of layer n - 1; engines do not hand out the last",
        )
    if kind == "eagle3" and len(taps) != 3:
        raise UsageError(f"taps {shown}: an EAGLE3 head reads three hidden states")
    return taps


def _block_sizes(chosen: dict[str, Any], shape: Shape) -> tuple[int, ...]:
    """Sizes that steps alternate between, the largest first: it is what held-out data are measured with."""
    given = chosen.get("train_block_sizes") or ((shape.block_size,) if shape.block_size else ())
    sizes = tuple(sorted(set(given), reverse=True))
    for size in sizes:
        if not 2 <= size <= shape.block_size:
            raise UsageError(
                f"a training block of {size} slots: a drafter of block size {shape.block_size} serves 2 to that",
            )
    return sizes
