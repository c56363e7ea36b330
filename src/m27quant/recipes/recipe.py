"""A recipe as the rest of the house sees it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import ValidationError

from m27quant.errors import RecipeError, escape
from m27quant.recipes.algorithm import FULL_COVERAGE_METHODS, OWN_METHODS
from m27quant.recipes.resolve import ResolvedRecipe, Rule, resolve
from m27quant.recipes.schema import Calibration, MoeCalib, Quantize
from m27quant.recipes.strict_yaml import Place


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe: what to quantize (`quantize`, in modelopt's terms), on which data (`calibration`)."""

    name: str
    source: str
    """ "builtin", "modelopt_recipes/..." or the file it was read from."""
    description: str
    quantize: Quantize
    calibration: Calibration
    places: tuple[Place, ...]
    """Where each entry of `quantize.quant_cfg` is written."""

    @property
    def moe_calib(self) -> MoeCalib:
        return self.calibration.moe_calib

    @property
    def notices(self) -> tuple[str, ...]:
        """Where m27quant does otherwise than modelopt would with the same file."""
        asked_full = self.quantize.algorithm.moe_calib_experts_ratio == 1.0
        if asked_full and self.moe_calib == "natural":
            return (
                "the recipe asks for moe_calib_experts_ratio 1.0, but calibration is on routed tokens only",
            )
        if not asked_full and "moe_calib" not in self.calibration.model_fields_set:
            return (
                "the recipe sets no moe_calib_experts_ratio: m27quant calibrates every expert on every "
                "token, where modelopt would calibrate on routed tokens only",
            )
        return ()

    def resolve(self, module_names: Iterable[str]) -> ResolvedRecipe:
        """Decide for every module of a model.

        Args:
            module_names: linear modules by their official names, without `.weight`; embeddings and norms may
                be among them.

        Raises:
            RecipeError: a pattern matches nothing, or asks for what m27quant does not write.
        """
        method = self.quantize.algorithm.method
        if method in FULL_COVERAGE_METHODS and self.moe_calib == "natural":
            raise RecipeError(
                f"algorithm `{method}` needs every expert to see every token, calibration is on routed tokens only",
                hint="calibrate with `moe_calib: full` (--moe-calib full), or choose another recipe",
            )
        rules = [Rule(e, p) for e, p in zip(self.quantize.quant_cfg, self.places, strict=True)]
        return resolve(
            rules,
            module_names,
            name=self.name,
            algorithm=method,
            moe_calib=self.moe_calib,
            notices=self.notices,
        )

    def with_calibration(self, **changes: Any) -> Recipe:
        """Return the recipe with fields of `calibration` replaced (None leaves one), checked as in a file."""
        values = {k: getattr(self.calibration, k) for k in self.calibration.model_fields_set}
        values |= {k: v for k, v in changes.items() if v is not None}
        try:
            calibration = Calibration.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise RecipeError(f"calibration.{field}: {first['msg']}") from None
        return dataclasses.replace(self, calibration=calibration)

    def canonical(self) -> dict[str, Any]:
        """Return all that bears on the result, as JSON values; equal for a name, its alias and a copy."""
        entries = [e.model_dump(mode="json", exclude_defaults=True) for e in self.quantize.quant_cfg]
        return {
            "quant_cfg": entries,
            "algorithm": self.quantize.algorithm.method,
            "calibration": self.calibration.model_dump(mode="json"),
        }

    def modelopt(self) -> dict[str, Any]:
        """Return what nvidia-modelopt takes of this recipe: `metadata` and `quantize`, nothing else.

        Raises:
            RecipeError: modelopt has no such algorithm.
        """
        if (method := self.quantize.algorithm.method) in OWN_METHODS:
            raise RecipeError(
                f"recipe '{escape(self.name)}': nvidia-modelopt has no algorithm `{method}`, it is m27quant's own",
                hint="its nearest relative in modelopt is `mse`: "
                "m27quant recipe show nvfp4_experts_only_mse-fp8_kv --modelopt",
            )
        return {
            "metadata": {"recipe_type": "ptq", "description": self.description},
            "quantize": _lists(self.quantize.model_dump(exclude_unset=True)),
        }

    def modelopt_yaml(self) -> str:
        """Return `modelopt()` as a file that `modelopt.recipe.load_recipe` reads."""
        return yaml.safe_dump(self.modelopt(), sort_keys=False, width=100, allow_unicode=True)

    def fingerprint(self) -> str:
        """Return the SHA-256 of `canonical()` in hexadecimal."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _lists(value: Any) -> Any:
    """YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
