"""An NVFP4 checkpoint, read like a source: located by index and headers, checked before a tensor is read."""

from __future__ import annotations

from typing import Any

from m27quant.checkpoint import names
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.layout import PLAIN, plain_tensors, raise_for, stop_early, tensor_problem
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, escape

SCALARS = ((), (1,))
"""Shapes of a tensor that holds one number; modelopt writes the first."""


class QuantizedSource(Source):
    """A checkpoint with experts in NVFP4 and the rest in BF16 or F32, whoever made it."""

    def _read_config(self) -> tuple[M2Config, dict[str, Any]]:
        path = self.folder / "config.json"
        raw = read_object(path)
        plain = {key: value for key, value in raw.items() if key != "quantization_config"}
        return parse_config(plain, escape(path)), raw

    @property
    def declares_fp8_kv(self) -> bool:
        """True where config.json asks for an FP8 cache."""
        section = self.raw_config.get("quantization_config")
        return isinstance(section, dict) and section.get("kv_cache_scheme") is not None

    @property
    def has_input_scales(self) -> bool:
        """True where the experts' inputs have scales, so that W4A4 can be computed."""
        return f"{names.expert(0, 0, 'w1')}.input_scale" in self.tensors

    def check_layout(self, *, input_scales: bool) -> None:
        """Compare headers with config.json; `input_scales` says whether those are needed.

        Raises:
            CheckpointError: the first mismatches of missing, mistyped or misshapen tensors.
        """
        problems: list[str] = []
        for name, dtypes, shape in plain_tensors(self.config):
            problems += tensor_problem(self, name, dtypes, shape)
            stop_early(problems)
        for layer in range(self.config.num_hidden_layers):
            for projection, size in names.attention_shapes(self.config).items():
                problems += tensor_problem(self, f"{names.attention(layer)}.{projection}.weight", PLAIN, size)
            for scale in (names.k_scale(layer), names.v_scale(layer)):
                problems += self._scalar_problem(scale) if scale in self.tensors else []
            for expert in range(self.config.num_local_experts):
                problems += self._expert_problems(layer, expert, input_scales)
                stop_early(problems)
        raise_for(problems)

    def _expert_problems(self, layer: int, expert: int, input_scales: bool) -> list[str]:
        problems: list[str] = []
        for projection, shape in names.expert_shapes(self.config).items():
            for spec in names.nvfp4_specs(names.expert(layer, expert, projection), shape):
                if spec.shape:
                    problems += tensor_problem(self, spec.name, (spec.dtype,), spec.shape)
                elif input_scales or not spec.name.endswith(".input_scale"):
                    problems += self._scalar_problem(spec.name)
        return problems

    def _scalar_problem(self, name: str) -> list[str]:
        info = self.tensors.get(name)
        shape = info.shape if info is not None and info.shape in SCALARS else ()
        return tensor_problem(self, name, ("F32",), shape)


def open_checkpoint(location: Location) -> Source:
    """An FP8 or BF16 source, or an NVFP4 checkpoint, by what its config.json says.

    Raises:
        CheckpointError: a file that is unreadable or damaged.
        EnvironmentFault: a file that cannot be read.
    """
    section = read_object(location.folder / "config.json").get("quantization_config")
    plain = section is None or (isinstance(section, dict) and section.get("quant_method") == "fp8")
    return Source(location) if plain else QuantizedSource(location)


def same_model(ours: M2Config, theirs: M2Config) -> None:
    """Raise `CheckpointError` where two config.json do not describe one model, naming the first field."""
    for field in M2Config.__dataclass_fields__:
        if field != "weight_block_size" and (a := getattr(ours, field)) != (b := getattr(theirs, field)):
            raise CheckpointError(
                f"{field} is {a} in the checkpoint and {b} in its source: not one model",
                hint="name the model that the checkpoint was made from",
            )
