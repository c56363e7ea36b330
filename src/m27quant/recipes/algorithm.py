"""How a recipe chooses scales and rounds: modelopt's algorithms by their names, and one of m27quant's own."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from m27quant.recipes.strict_model import Strict

Method = Literal["max", "mse", "awmse", "gptq"]
METHODS: tuple[Method, ...] = ("max", "mse", "awmse", "gptq")
OWN_METHODS: tuple[Method, ...] = ("awmse",)
"""m27quant's, which modelopt does not have."""
FULL_COVERAGE_METHODS: tuple[Method, ...] = ("awmse", "gptq")
"""Those that pack by statistics of inputs over all tokens."""
DAMPING = 0.01
"""Share of a Hessian's mean diagonal: what error feedback tries first, here and in modelopt."""


class Layerwise(Strict):
    """modelopt's layer-by-layer calibration; m27quant always works so, with its own journal."""

    enable: bool = False
    get_qdq_activations_from_prev_layer: bool = False
    checkpoint_dir: str | None = None
    save_every: int = Field(default=1, ge=1)
    calib_mutates_weights: bool = True


class Algorithm(Strict):
    """How scales are chosen.

    `max`: exact maxima.  `mse` with `fp8_scale_sweep`: activations by maxima, each block scale of a weight by the
    least squared error.  `awmse`, which modelopt does not have: the same with each error weighted by the second moment
    of its input channel.  `gptq`: error feedback by the Hessian of the inputs; modelopt's keeps block scales from
    maxima, m27quant's takes the best ones.
    """

    method: Method
    fp8_scale_sweep: bool | None = None
    perc_damp: float | None = None
    block_size: Annotated[int, Field(ge=16)] | None = None
    """Of modelopt's `gptq`, as is `fused`: how it goes about it, nothing that bears on m27quant's bytes."""
    fused: bool = False
    moe_calib_experts_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    layerwise: Layerwise = Layerwise()
    distributed_sync: bool | None = True
    sync_expert_weight_amax: Literal[False] = False
    skip_forward_without_activation_calib: bool = False
    shared_states: None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: object) -> object:
        """Refuse another algorithm by its name, before its options look like unknown keys."""
        if isinstance(data, list):
            raise PydanticCustomError(
                "recipe_algorithm",
                "a chain of algorithms is not supported",
                {"hint": "m27quant runs `max`, `mse`, `awmse` or `gptq`"},
            )
        if not isinstance(data, dict):
            data = {"method": data}
        method = data.get("method")
        if "method" in data and method not in METHODS:
            raise PydanticCustomError(
                "recipe_algorithm",
                "algorithm `{method}` is not supported",
                {
                    "method": "null" if method is None else method,
                    "hint": "m27quant calibrates with `max`, `mse`, `awmse` or `gptq`",
                },
            )
        return data

    @field_validator("layerwise", mode="before")
    @classmethod
    def _null_layerwise(cls, value: object) -> object:
        return {} if value is None else value

    @model_validator(mode="after")
    def _sweep_of_e4m3(self) -> Self:
        if self.method == "mse" and not self.fp8_scale_sweep:
            raise PydanticCustomError(
                "recipe_multiplier_search",
                "`mse` without `fp8_scale_sweep: true` is not supported",
                {"hint": "modelopt then tries multiples of each maximum; m27quant finds the best E4M3 scale"},
            )
        if self.method != "mse" and self.fp8_scale_sweep is not None:
            raise PydanticCustomError(
                "recipe_sweep_without_mse",
                "`fp8_scale_sweep` goes with `method: mse`",
                {"hint": "remove it, or choose `mse`"},
            )
        return self

    @model_validator(mode="after")
    def _feedback(self) -> Self:
        given = {"perc_damp", "block_size", "fused"} & self.model_fields_set
        if self.method != "gptq" and given:
            raise PydanticCustomError(
                "recipe_feedback_without_gptq",
                "`{key}` goes with `method: gptq`",
                {"key": min(given), "hint": "remove it, or choose `gptq`"},
            )
        if self.perc_damp not in (None, DAMPING):
            raise PydanticCustomError(
                "recipe_damping",
                "`perc_damp: {damping}` is not supported",
                {"damping": f"{self.perc_damp:g}", "hint": f"m27quant begins with {DAMPING}; remove it"},
            )
        return self

    @model_validator(mode="after")
    def _full_precision_inputs(self) -> Self:
        # modelopt's `gptq` has it on in its layerwise mode, unless told otherwise
        asked = "get_qdq_activations_from_prev_layer" in self.layerwise.model_fields_set
        implied = self.method == "gptq" and not asked
        if self.layerwise.enable and (implied or self.layerwise.get_qdq_activations_from_prev_layer):
            raise PydanticCustomError(
                "recipe_qdq_activations",
                "`layerwise.get_qdq_activations_from_prev_layer: true` is not supported",
                {"hint": "m27quant propagates full-precision activations, as modelopt's max does by default"},
            )
        return self
