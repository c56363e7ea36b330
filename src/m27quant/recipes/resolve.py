"""From an ordered list of quantizer patterns to one decision per module, with modelopt's semantics.

modelopt gives every linear module an `input_quantizer`, a `weight_quantizer` and an idle `output_quantizer`,
and every attention module four `*_bmm_quantizer`s, then applies the entries in order: an entry with `cfg`
replaces what was there, one without only switches on or off.  Here quantizers of one fate are kept as one
block, so that 48,000 modules cost about as much as nine; a pattern that reads digits splits blocks.

What m27quant cannot write is refused, naming module, pattern and what can be had.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from m27quant.errors import RecipeError, escape
from m27quant.recipes.algorithm import Method
from m27quant.recipes.formats import (
    FP8,
    FP8_CAST,
    MODELOPT_DEFAULT,
    NVFP4,
    NVFP4_STATIC,
    SUPPORTED,
    Format,
    format_of,
)
from m27quant.recipes.patterns import Pattern
from m27quant.recipes.schema import Entry, MoeCalib
from m27quant.recipes.strict_model import closest
from m27quant.recipes.strict_yaml import Place

KVCache = Literal["fp8", "fp8_cast"]

_EXPERT = re.compile(r".*\.block_sparse_moe\.experts\.[0-9]+\.w[123]")
_ATTENTION = re.compile(r".*\.self_attn\.[qkvo]_proj")
_INDEX = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_BMM = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "p_bmm_quantizer")
_PARENT_CLASSES = ["nn.Linear", "nn.Embedding"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the list and where it is written."""

    entry: Entry
    place: Place

    def __str__(self) -> str:
        return f"pattern `{escape(self.entry.quantizer_name)}`"


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """What happens to each module of one model."""

    name: str
    quantized: tuple[str, ...]
    """Linear modules in NVFP4, weights and inputs, in the order given."""
    unquantized: tuple[str, ...]
    """Modules that keep their source bytes or become BF16."""
    kv_cache: KVCache | None
    """`fp8` has calibrated scales, `fp8_cast` none; None leaves the cache in BF16."""
    algorithm: Method
    """How block scales of weights are chosen."""
    moe_calib: MoeCalib
    notices: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Block:
    """Quantizers of one kind on modules of one structure, alike so far."""

    modules: list[str]
    quantizer: str
    parent_class: str | None
    enabled: bool
    format: Format = MODELOPT_DEFAULT
    rule: Rule | None = None

    @property
    def first(self) -> str:
        return f"{self.modules[0]}.{self.quantizer}"

    def split(self, pattern: Pattern) -> tuple[Block | None, Block | None]:
        """Return the parts of this block that match and that do not."""
        if not pattern.may_match(self.first):
            return None, self
        if not pattern.reads_digits:
            return (self, None) if pattern.matches(self.first) else (None, self)
        hit = [m for m in self.modules if pattern.matches(f"{m}.{self.quantizer}")]
        if len(hit) in (0, len(self.modules)):
            return (self, None) if hit else (None, self)
        chosen = set(hit)
        rest = [m for m in self.modules if m not in chosen]
        return self._with(hit), self._with(rest)

    def _with(self, modules: list[str]) -> Block:
        return Block(modules, self.quantizer, self.parent_class, self.enabled, self.format, self.rule)

    def apply(self, rule: Rule) -> None:
        self.enabled, self.rule = rule.entry.enable, rule
        if rule.entry.cfg is not None:
            self.format = format_of(rule.entry.cfg)


def resolve(
    rules: Iterable[Rule],
    module_names: Iterable[str],
    *,
    name: str,
    algorithm: Method,
    moe_calib: MoeCalib,
    notices: tuple[str, ...],
) -> ResolvedRecipe:
    """Apply `rules` to the modules of a model; see `Recipe.resolve`."""
    modules = tuple(dict.fromkeys(module_names))
    blocks = fates(rules, modules)
    experts = [b for b in blocks if _EXPERT.fullmatch(b.modules[0])]
    cache = [b for b in blocks if b.quantizer in ("k_bmm_quantizer", "v_bmm_quantizer")]
    _refuse_other_formats(experts, cache, algorithm)
    _refuse_other_modules([b for b in blocks if b not in experts and b not in cache])
    _refuse_half_experts(experts)
    quantized = {m for b in experts for m in b.modules}
    return ResolvedRecipe(
        name=name,
        quantized=tuple(m for m in modules if m in quantized),
        unquantized=tuple(m for m in modules if m not in quantized),
        kv_cache=_kv_cache(cache),
        algorithm=algorithm,
        moe_calib=moe_calib,
        notices=notices,
    )


def fates(rules: Iterable[Rule], modules: tuple[str, ...]) -> list[Block]:
    """Return every quantizer of `modules` in the state that modelopt would leave it in."""
    blocks = _quantizers(modules)
    for rule in rules:
        blocks = _apply(rule, blocks)
    return blocks


def _quantizers(modules: tuple[str, ...]) -> list[Block]:
    """Return modelopt's quantizers of these modules before any entry, grouped by structure."""
    groups: dict[str, list[str]] = {}
    attention: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(_INDEX.sub("0", module), []).append(module)
        if module.endswith(".self_attn.k_proj"):
            parent = module.removesuffix(".k_proj")
            attention.setdefault(_INDEX.sub("0", parent), []).append(parent)
    blocks = []
    for structure, members in groups.items():
        leaf = structure.rpartition(".")[2]
        # modelopt gives norms no quantizer; here they have idle ones, so that aiming at them can be refused.
        parent_class = None if "norm" in leaf else "nn.Embedding" if "embed" in leaf else "nn.Linear"
        for kind in ("input_quantizer", "weight_quantizer", "output_quantizer"):
            on = parent_class == "nn.Linear" and kind != "output_quantizer"
            on |= parent_class == "nn.Embedding" and kind == "weight_quantizer"
            blocks.append(Block(members, kind, parent_class, on))
    blocks += [Block(parents, kind, None, True) for parents in attention.values() for kind in _BMM]
    return blocks


def _apply(rule: Rule, blocks: list[Block]) -> list[Block]:
    try:
        pattern = Pattern(rule.entry.quantizer_name)
    except re.error as error:
        raise rule.place.error(f"{rule} is not a valid pattern: {error}") from None
    result: list[Block] = []
    matched = False
    for block in blocks:
        if rule.entry.parent_class not in (None, block.parent_class):
            result.append(block)
            continue
        hit, rest = block.split(pattern)
        if hit is not None:
            matched = True
            hit.apply(rule)
        result += [part for part in (hit, rest) if part is not None]
    # modelopt's own snippets are written for many architectures; a line of your own must mean something.
    if not matched and not rule.place.library:
        raise _matches_nothing(rule, blocks)
    return result


def _matches_nothing(rule: Rule, blocks: list[Block]) -> RecipeError:
    parent_class = rule.entry.parent_class
    if parent_class not in (None, *_PARENT_CLASSES):
        near = closest(parent_class, _PARENT_CLASSES)
        return rule.place.error(
            f"{rule} with parent_class `{escape(parent_class)}` matches nothing in this model",
            f"did you mean `{near}`?" if near else f"this model has {' and '.join(_PARENT_CLASSES)}",
        )
    wanted = re.sub(r"[*?\[\]]", "", rule.entry.quantizer_name)

    def likeness(name: str) -> tuple[int, float]:
        """How much of the pattern's text the name holds in order, and how little else."""
        matcher = difflib.SequenceMatcher(None, wanted, name, autojunk=False)
        return sum(part.size for part in matcher.get_matching_blocks()), matcher.ratio()

    near = max((b.first for b in blocks), key=likeness, default=None)
    return rule.place.error(
        f"{rule} matches nothing in this model",
        f"the closest name is {escape(near)}" if near else "the model has no modules",
    )


def _cannot(block: Block, what: str) -> RecipeError:
    """Build the refusal of what `block.rule` does to `block`."""
    message = f"{escape(block.first)}: {what}"
    if block.rule is None:
        hint = "begin quant_cfg with `quantizer_name: '*'`, `enable: false`"
        return RecipeError(f"{message} (no entry of quant_cfg reaches it)", hint=hint)
    return block.rule.place.error(f"{block.rule}: {message}", f"m27quant writes {SUPPORTED}")


def _refuse_other_formats(experts: list[Block], cache: list[Block], algorithm: Method) -> None:
    for block in experts:
        if block.enabled and block.quantizer == "output_quantizer":
            raise _cannot(block, "outputs of experts are not quantized")
        searched = algorithm != "max" and block.quantizer == "weight_quantizer"
        if block.enabled and searched and block.format is NVFP4:
            raise _cannot(
                block,
                f"`{algorithm}` chooses block scales of static blocks (`type: static`), these are dynamic",
            )
        if block.enabled and block.format is not (NVFP4_STATIC if searched else NVFP4):
            raise _cannot(block, f"{block.format.text} is not supported for experts")
    for block in cache:
        if block.enabled and block.format not in (FP8, FP8_CAST):
            raise _cannot(block, f"{block.format.text} is not supported for the KV cache")


def _refuse_other_modules(others: list[Block]) -> None:
    for block in others:
        if block.enabled:
            raise _cannot(block, f"{_role(block)} cannot be quantized, here to {block.format.text}")


def _role(block: Block) -> str:
    module = block.modules[0]
    leaf = module.rpartition(".")[2]
    if block.quantizer in _BMM:
        return "queries and attention probabilities"
    if _ATTENTION.fullmatch(module):
        return "attention"
    if "norm" in leaf:
        return "a norm"
    names = {"gate": "the router", "lm_head": "the head", "embed_tokens": "the embedding"}
    return names.get(leaf, "this module")


def _refuse_half_experts(experts: list[Block]) -> None:
    """All experts, all three matrices, weights and inputs, or a refusal that names both sides."""
    halves = [b for b in experts if b.quantizer != "output_quantizer"]
    on, off = [b for b in halves if b.enabled], [b for b in halves if not b.enabled]
    if not on:
        raise RecipeError("the recipe quantizes no expert of this model", hint=f"m27quant writes {SUPPORTED}")
    if not off:
        return
    left = off[0]
    same = next((b for b in on if b.modules[0] == left.modules[0]), None)
    if same is not None:
        kind = "weights only" if left.quantizer == "input_quantizer" else "inputs only"
        raise _cannot(left, f"is off while {same.quantizer} is on; {kind} is not supported")
    raise _cannot(
        left, f"is off while {escape(on[0].first)} is on; only some experts or matrices is not supported"
    )


def _kv_cache(cache: list[Block]) -> KVCache | None:
    states = {b.format.kind if b.enabled else None: b for b in cache}
    if len(states) > 1:
        one, other, *_ = states.values()
        raise _cannot(other, f"differs from {escape(one.first)}; K and V of all layers go alike")
    kind = next(iter(states), None)
    return kind if kind in ("fp8", "fp8_cast") else None
