"""Exclude lists as the engines read them: which modules vLLM 0.33 and SGLang 0.5 would take for NVFP4.

Both match the list against their own module names: vLLM's experts are `model.layers.N.mlp.experts`, SGLang's
`model.layers.N.block_sparse_moe.experts`.  The router is never quantized in either, the head by vLLM alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal

from m27quant.errors import escape
from m27quant.verify.collect import Findings
from m27quant.verify.view import View

Engine = Literal["vllm", "sglang"]
Answer = Literal["excluded", "quantized", "mixed"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang")
SHOWN = {"vllm": "vLLM", "sglang": "SGLang"}
QKV = ("q_proj", "k_proj", "v_proj")
EXPERTS = {"vllm": "mlp.experts", "sglang": "block_sparse_moe.experts"}
MAX_COMPARISONS = 1_000_000
"""Entries times layers; M2.7 has 125 x 62."""


class ExcludeList:
    """One engine's reading of an exclude list."""

    def __init__(self, engine: Engine, patterns: list[str]) -> None:
        self.engine = engine
        self.patterns = list(_vllm_patterns(patterns)) if engine == "vllm" else patterns
        self._names = set(self.patterns)
        # a name cannot match another name as a glob
        self._globs = [p for p in self.patterns if "*" in p or (engine == "vllm" and set(p) & set("?["))]
        if engine == "sglang":  # its globs know the star alone
            self._globs = [p.replace("[", "[[]").replace("?", "[?]") for p in self._globs]

    def module(self, prefix: str) -> Answer:
        """What the engine makes of the module that it calls `prefix`.

        "mixed" where it refuses: q, k and v are one matrix there and must have one answer.
        """
        parent, _, leaf = prefix.rpartition(".")
        if leaf == "qkv_proj":
            named = {f"{parent}.{shard}" in self._names for shard in QKV}
            if len(named) == 2:
                return "mixed"
            if named == {True}:
                return "excluded"
        matches = self._vllm(prefix) if self.engine == "vllm" else self._sglang(prefix)
        return "excluded" if matches else "quantized"

    def _vllm(self, prefix: str) -> bool:
        """By exact name (of an expert, too), by substring, by glob."""
        if "experts" in prefix and any("experts" in p and prefix in p for p in self.patterns):
            return True
        return any(p in prefix for p in self.patterns) or any(fnmatchcase(prefix, p) for p in self._globs)

    def _sglang(self, prefix: str) -> bool:
        """By name or glob of the whole prefix or of one part of it."""
        parts = {prefix, *prefix.split(".")}
        return bool(parts & self._names) or any(fnmatchcase(part, p) for p in self._globs for part in parts)


def _vllm_patterns(patterns: list[str]) -> Iterator[str]:
    """vLLM reads `x*` as `x` and `x.*`."""
    for pattern in patterns:
        if len(pattern) >= 2 and pattern[-1] == "*" and pattern[-2] != ".":
            yield from (pattern[:-1], pattern[:-1] + ".*")
        else:
            yield pattern


def exclude_list(section: dict[str, Any] | None, hf_quant: dict[str, Any] | None) -> object:
    """The list that engines use: config.json's, else hf_quant_config.json's."""
    if section is not None:
        for key in ("ignore", "modules_to_not_convert", "exclude_modules"):
            if section.get(key) is not None:
                return section[key]
        return []
    return [] if hf_quant is None else hf_quant.get("exclude_modules") or []


def check_engines(view: View, found: Findings, engines: tuple[Engine, ...] = ENGINES) -> None:
    """Simulate the exclude list for every module of the model."""
    if view.config is None or (view.section is None and view.hf_quant is None):
        return
    patterns = exclude_list(view.section, view.hf_quant)
    layers = view.config.num_hidden_layers
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        found.add("M27-E006", "the exclude list is not a list of module names", file="config.json")
        return
    if len(patterns) * layers > MAX_COMPARISONS:
        found.add(
            "M27-E006",
            f"an exclude list of {len(patterns):,} entries for {layers} layers",
            file="config.json",
        )
        return
    for pattern in patterns:
        if pattern.startswith("re:"):
            found.add(
                "M27-E005",
                f"'{escape(pattern)}' is a regular expression, which never matches",
                file="config.json",
            )
    answers = {engine: _simulate(ExcludeList(engine, patterns), layers) for engine in engines}
    _report(answers, view, found)


def _simulate(excluded: ExcludeList, layers: int) -> dict[str, Answer]:
    """Module name in the checkpoint -> what the engine makes of it."""
    answers: dict[str, Answer] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for projection in ("qkv_proj", "o_proj"):
            answers[f"{prefix}.self_attn.{projection}"] = excluded.module(f"{prefix}.self_attn.{projection}")
        answers[f"{prefix}.block_sparse_moe.experts"] = excluded.module(
            f"{prefix}.{EXPERTS[excluded.engine]}"
        )
    if excluded.engine == "vllm":
        answers["lm_head"] = excluded.module("lm_head")
    return answers


def _report(answers: dict[Engine, dict[str, Answer]], view: View, found: Findings) -> None:
    for module in next(iter(answers.values()), {}) | {"lm_head": "quantized"}:
        by_answer: dict[str, list[str]] = {}
        for engine, of_engine in answers.items():
            if module in of_engine:
                by_answer.setdefault(of_engine[module], []).append(SHOWN[engine])
        for answer, engines in by_answer.items():
            who = " and ".join(engines)
            takes = "takes" if len(engines) == 1 else "take"
            if module.endswith(".experts"):
                if answer == "excluded" and ".weight" not in view.excused:
                    found.add(
                        "M27-E001", f"{who} {takes} '{module}' for unquantized: the exclude list matches it",
                        tensor=module, expected="quantized", found=answer,
                    )  # fmt: skip
            elif answer == "mixed":
                found.add(
                    "M27-E004", f"{who} {takes} a part of '{module}' for NVFP4: not all of q, k and v are excluded",
                    tensor=module, expected="excluded", found=answer,
                )  # fmt: skip
            elif answer == "quantized":
                code = "M27-E003" if module == "lm_head" else "M27-E002"
                found.add(
                    code, f"{who} {takes} '{module}' for NVFP4: the exclude list does not match it",
                    tensor=module, expected="excluded", found=answer,
                )  # fmt: skip
