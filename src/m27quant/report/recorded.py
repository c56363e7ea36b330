"""quantization_report.json as it lies beside a checkpoint: a file like any other, believed only after a check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m27quant.checkpoint.source import check_link_stays_inside
from m27quant.checkpoint.strict_json import read_object
from m27quant.checkpoint.workspace import REPORT
from m27quant.errors import M27Error, escape
from m27quant.report.recorded_evaluation import Evaluated

PROJECTIONS = ("w1", "w2", "w3")
MAX_LIST = 16_384
MAX_BYTES = 64 * 2**20
"""A report of M2.7 has 6 MB."""

Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
Decibel = Annotated[float, Field(ge=-1e3, le=1e3)]
Scale = Annotated[float, Field(ge=0, le=3.5e38)]
Texts = Annotated[list[Text], Field(max_length=MAX_LIST)]
Scales = Annotated[list[Scale], Field(max_length=MAX_LIST)]
Projection = Literal["w1", "w2", "w3"]
Counts = Annotated[list[Count], Field(max_length=MAX_LIST)]


class _Part(BaseModel):
    """No conversions, no NaN; keys that a later version adds are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Named(_Part):
    """Who made it."""

    name: Text
    version: Text


class Origin(_Part):
    """Where the weights came from."""

    name: Text
    repo_id: Text | None = None
    commit: Text | None = None


class RecipeUsed(_Part):
    """By what recipe."""

    name: Text
    kv_cache: Text | None = None


class Calibration(_Part):
    """On what data the ranges rest."""

    datasets: Texts
    num_samples: Count
    num_tokens: Count
    seq_len: Count
    moe_calib: Text
    dropped_rows: Annotated[list[Count], Field(max_length=2**20)] = []


class Sizes(_Part):
    """Bytes of the tensors before and after."""

    source_bytes: Annotated[int, Field(ge=1, lt=2**62)]
    output_bytes: Annotated[int, Field(ge=1, lt=2**62)]


class Matrices(_Part):
    """One number for each expert, by projection."""

    w1: Scales
    w2: Scales
    w3: Scales


class Quality(_Part):
    """SQNR in dB of each expert, by projection; None where a matrix is all zero."""

    w1: Annotated[list[Decibel | None], Field(max_length=MAX_LIST)]
    w2: Annotated[list[Decibel | None], Field(max_length=MAX_LIST)]
    w3: Annotated[list[Decibel | None], Field(max_length=MAX_LIST)]


class OutputError(_Part):
    """The error of a projection's outputs, over their size: with error feedback, and under block maxima."""

    gptq: Scale
    max: Scale


class Layer(_Part):
    """One decoder layer's figures."""

    layer: Count
    sqnr_db: Quality
    weight_scale_2: Matrices
    input_scale: Matrices
    routed_tokens: Counts
    seen_tokens: Counts
    k_scale: Scale | None = None
    v_scale: Scale | None = None
    dead: Texts = []
    zero_range: Texts = []
    saturated_groups: Count = 0
    zero_groups: Count = 0
    tiny_groups: Count = 0
    output_error: Annotated[dict[Projection, OutputError], Field(max_length=3)] = {}

    @property
    def num_experts(self) -> int:
        """As many as have a token count."""
        return len(self.routed_tokens)

    @model_validator(mode="after")
    def _one_number_per_expert(self) -> Layer:
        rows = [self.seen_tokens]
        columns = (self.sqnr_db, self.weight_scale_2, self.input_scale)
        sizes = {len(row) for row in rows} | {len(getattr(c, p)) for c in columns for p in ("w1", "w2", "w3")}
        if sizes != {self.num_experts}:
            raise ValueError("lists of different lengths for the same experts")
        return self


class Recorded(_Part):
    """The whole report, as far as it is shown."""

    schema_version: Literal[1]
    producer: Named
    source: Origin
    recipe: RecipeUsed
    calibration: Calibration
    summary: Sizes
    notices: Texts
    layers: Annotated[list[Layer], Field(min_length=1, max_length=4096)]
    evaluation: Evaluated | None = None
    """What `m27quant eval --write-card` has added."""

    @model_validator(mode="after")
    def _layers_in_order(self) -> Recorded:
        if [layer.layer for layer in self.layers] != list(range(len(self.layers))):
            raise ValueError("layers out of order")
        if len({layer.num_experts for layer in self.layers}) != 1:
            raise ValueError("layers with different numbers of experts")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, experts)."""
        return len(self.layers), self.layers[0].num_experts


def read_recorded(folder: Path) -> tuple[Recorded | None, str | None]:
    """(the report, None), or (None, why there is none that can be shown)."""
    path = folder / REPORT
    if not path.is_symlink() and not path.exists():
        return None, f"There is no {REPORT} beside this checkpoint."
    try:
        check_link_stays_inside(folder, path)
        return Recorded.model_validate(read_object(path, MAX_BYTES)), None
    except M27Error as fault:
        return None, fault.message.replace(escape(path), REPORT)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return None, f"{REPORT} is not what it should be: {escape(f'{place}: ' * bool(place) + first['msg'])}"


def quality(recorded: Recorded) -> npt.NDArray[np.float64]:
    """SQNR in dB, [L, E, P]; NaN where a matrix is all zero."""
    rows = [[getattr(r.sqnr_db, p) for p in PROJECTIONS] for r in recorded.layers]
    return np.array(rows, np.float64).transpose(0, 2, 1)


def routed(recorded: Recorded) -> npt.NDArray[np.float64]:
    """Tokens that natural routing gave each expert, [L, E]."""
    return np.array([r.routed_tokens for r in recorded.layers], np.float64)
