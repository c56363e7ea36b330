"""What a recipe may say: modelopt's PTQ recipe, typed strictly, plus a `calibration` section of ours.

`metadata` and `quantize` are nvidia-modelopt's, field for field (modelopt.recipe.config and
modelopt.torch.quantization.config, 0.47), so that one file drives both.  `calibration` is optional: modelopt
has no such section, and what a recipe leaves out is the default here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from m27quant.recipes.algorithm import Algorithm
from m27quant.recipes.strict_model import Strict, closest

MAX_RULES = 256
MAX_PATTERN = 256

MoeCalib = Literal["full", "natural"]


def _tuple(value: object) -> object:
    """YAML has lists only; frozen models hold tuples."""
    return tuple(value) if isinstance(value, list) else value


def _bits(value: object) -> object:
    """`e4m3` is modelopt's other spelling of (4, 3)."""
    if isinstance(value, str) and (match := re.fullmatch(r"[Ee]([0-9])[Mm]([0-9])", value)):
        return int(match[1]), int(match[2])
    return _tuple(value)


Bits = Annotated[int | tuple[int, int] | str, BeforeValidator(_bits)]
Axes = Annotated[int | tuple[int, ...] | None, BeforeValidator(_tuple)]

_BLOCK_KEYS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")


def _block_sizes(value: object) -> object:
    if not isinstance(value, dict):
        return value
    for key, size in value.items():
        if isinstance(key, str) and key not in _BLOCK_KEYS:
            near = closest(key, list(_BLOCK_KEYS))
            hint = (
                f"did you mean `{near}`?"
                if near
                else f"known keys: an axis such as -1, {', '.join(_BLOCK_KEYS)}"
            )
            raise PydanticCustomError("recipe_unknown_key", "unknown key `{key}`", {"key": key, "hint": hint})
        if isinstance(key, int) and isinstance(size, int) and size < 1:
            raise PydanticCustomError(
                "recipe_block_size", "a block holds at least one element, not {size}", {"size": size}
            )
    return {key: _bits(size) if key == "scale_bits" else size for key, size in value.items()}


BlockSizes = Annotated[dict[int | str, Any] | None, BeforeValidator(_block_sizes)]


class Attributes(Strict):
    """How one quantizer quantizes: modelopt's QuantizerAttributeConfig."""

    enable: bool = True
    num_bits: Bits = 8
    effective_bits: Annotated[float, Field(gt=0, le=16)] | None = None
    axis: Axes = None
    fake_quant: bool = True
    unsigned: bool = False
    narrow_range: bool = False
    learn_amax: Literal[False] = False
    type: Literal["static", "dynamic"] = "static"
    block_sizes: BlockSizes = None
    bias: dict[int | str, Any] | None = None
    trt_high_precision_dtype: Literal["Float", "Half", "BFloat16"] = "Float"
    calibrator: Literal["max", "histogram"] = "max"
    rotate: bool | dict[str, Any] = False
    pass_through_bwd: bool = True
    backend: str | None = None
    backend_extra_args: dict[str, Any] | None = None
    use_constant_amax: bool = False
    constant_amax: Annotated[float, Field(gt=0)] | None = None


def _one_or_many(value: object) -> str:
    return "many" if isinstance(value, list | tuple) else "one"


Cfg = Annotated[
    Annotated[Attributes, Tag("one")]
    | Annotated[tuple[Attributes, ...], BeforeValidator(_tuple), Tag("many")],
    Discriminator(_one_or_many),
]


class Entry(Strict):
    """One line of the ordered list: a pattern over quantizer names, and what it does to them."""

    quantizer_name: str = Field(min_length=1, max_length=MAX_PATTERN)
    parent_class: str | None = None
    cfg: Cfg | None = None
    enable: bool = True

    @model_validator(mode="after")
    def _instructs(self) -> Self:
        if not {"cfg", "enable"} & self.model_fields_set:
            raise PydanticCustomError(
                "recipe_no_instruction", "`{p}` says neither `cfg` nor `enable`", {"p": self.quantizer_name}
            )
        if isinstance(self.cfg, Attributes):
            if not self.cfg.model_fields_set:
                raise PydanticCustomError(
                    "recipe_empty_cfg", "`{p}` has an empty `cfg`", {"p": self.quantizer_name}
                )
            if "enable" in self.cfg.model_fields_set:
                raise PydanticCustomError(
                    "recipe_enable_in_cfg",
                    "`{p}` sets `enable` inside `cfg`, which modelopt ignores",
                    {"p": self.quantizer_name, "hint": "write `enable` beside `cfg`"},
                )
        return self


class Quantize(Strict):
    """modelopt's QuantizeConfig: later entries win."""

    quant_cfg: Annotated[tuple[Entry, ...], BeforeValidator(_tuple)] = Field(
        min_length=1, max_length=MAX_RULES
    )
    algorithm: Algorithm = Algorithm(method="max")
    effective_bits: Annotated[float, Field(gt=0, le=16)] | None = None


class Metadata(Strict):
    """modelopt's recipe metadata."""

    recipe_type: Literal["ptq"]
    description: str = ""


class Dataset(Strict):
    """Where calibration rows come from: a Hub dataset, or a local JSONL, Parquet or text file."""

    path: str = Field(min_length=1, max_length=1024)
    config: str | None = None
    revision: str | None = None
    splits: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = Field(default=("train",), min_length=1)
    """Each split gives an equal part of this data set's rows."""
    field: str | None = None
    """The column to read; None finds `input_ids`, `messages` or `text`."""
    chat: Literal["template", "join"] = "template"
    """Chat rows go through the chat template, or their contents are joined by newlines, as modelopt does."""
    weight: int = Field(default=1, ge=1, le=1_000_000)
    """Rows of this data set relative to the others'."""


DEFAULT_DATASETS = (
    Dataset(path="abisee/cnn_dailymail", config="3.0.0", field="article"),
    Dataset(
        path="nvidia/Nemotron-Post-Training-Dataset-v2",
        splits=("stem", "chat", "math", "code"),
        field="messages",
        chat="join",
    ),
)


class Calibration(Strict):
    """The data that the scales are measured on; defaults are those of modelopt's hf_ptq."""

    datasets: Annotated[tuple[Dataset, ...], BeforeValidator(_tuple)] = Field(
        default=DEFAULT_DATASETS, min_length=1, max_length=64
    )
    num_samples: int = Field(default=1024, ge=1, le=10_000_000)
    seq_len: int = Field(default=512, ge=1, le=1_048_576)
    moe_calib: MoeCalib = "full"
    """`full`: every expert sees every token.  `natural`: routed tokens only, amax shared across experts."""


class RecipeFile(Strict):
    """A whole recipe, after its imports are resolved."""

    metadata: Metadata
    quantize: Quantize
    calibration: Calibration = Calibration()
