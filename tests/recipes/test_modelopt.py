"""nvidia-modelopt as the oracle: what it makes of a recipe file is what we make of it."""

from __future__ import annotations

import copy
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from m27quant.errors import RecipeError
from m27quant.recipes import ALIASES, BUILTIN, load_recipe, loader
from m27quant.recipes.imports import library_root
from m27quant.recipes.resolve import Rule, fates
from m27quant.recipes.schema import Entry
from m27quant.recipes.strict_yaml import Place
from tests.oracles import modelopt_sweep
from tests.recipes.common import EXPERTS, KV, MODELOPTS, parsed, recipe_text

# modelopt says that it was not tested with this transformers; torch and it deprecate things of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS, EXPERTS_PER_LAYER, HIDDEN, INTER = 2, 3, 32, 16
COLLECTION = sorted(p.stem for p in (Path(str(library_root())) / "general/ptq").glob("*.yaml"))
SUPPORTED = {
    "nvfp4_experts_only-kv_fp8": "fp8",
    "nvfp4_experts_only-kv_fp8_cast": "fp8_cast",
    "nvfp4_experts_only-kv_fp8_layerwise": "fp8",
    "nvfp4_experts_only-kv_fp8_layerwise_offload": "fp8",
    # For a model whose only MLPs are experts these say the same.
    "nvfp4_mlp_only-kv_fp8": "fp8",
    "nvfp4_mlp_only-kv_fp8_cast": "fp8_cast",
    "nvfp4_mlp_only-novit-kv_fp8": "fp8",
    "nvfp4_experts_only_mse-kv_fp8_cast": "fp8_cast",
    "nvfp4_mlp_only_mse-kv_fp8_cast": "fp8_cast",
}
REFUSED = {
    "nvfp4_experts_only_input_scale1-kv_fp8_cast": "NVFP4 with constant_amax is not supported for experts",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            self.add_module(f"{name}_proj", nn.Linear(HIDDEN, HIDDEN, bias=False))
        self.q_norm = nn.RMSNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_norm(self.q_proj(x)), self.k_proj(x), self.v_proj(x)
        if hasattr(self, "k_bmm_quantizer"):
            q, k, v = self.q_bmm_quantizer(q), self.k_bmm_quantizer(k), self.v_bmm_quantizer(v)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INTER, bias=False)
        self.w2 = nn.Linear(INTER, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, INTER, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """Top-1 routing with per-expert modules under the official names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS_PER_LAYER, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS_PER_LAYER))
        self.gate.top_k, self.gate.num_experts = 1, EXPERTS_PER_LAYER  # modelopt raises them to calibrate all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(self.gate.top_k, -1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = (weight * (chosen == index)).sum(-1)
            if share.any():
                rows = share > 0
                result[rows] += expert(x[rows]) * share[rows].unsqueeze(-1)
        return result


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.block_sparse_moe = Attention(), MoE()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Model(nn.Module):
    """M2's module names at a size that modelopt quantizes in a blink."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(64, HIDDEN)
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


MODULES = tuple(
    name for name, m in Model().named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.RMSNorm)
)
LINEARS = tuple(name for name, m in Model().named_modules() if isinstance(m, nn.Linear | nn.Embedding))


@pytest.fixture(scope="module")
def mtq() -> Iterator[Any]:
    """modelopt.torch.quantization, with our attention known to it as it knows those of transformers."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    class QuantAttention(Attention):
        def _setup(self) -> None:
            for name in "qkvp":
                self.add_module(f"{name}_bmm_quantizer", TensorQuantizer())

    mtq.register(original_cls=Attention, quantized_cls=QuantAttention)
    yield mtq
    mtq.unregister(Attention)


@pytest.fixture(scope="module")
def prepared(mtq: Any) -> nn.Module:
    """The model with modelopt's quantizers in place and no entry applied."""
    model = Model()
    mtq.replace_quant_module(model)
    return model


def quantizers(model: nn.Module) -> dict[str, Any]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def as_json(value: object) -> Any:
    """Without the difference of lists and tuples."""
    return json.loads(json.dumps(value))


def kind(quantizer: Any) -> str:
    """Format of a modelopt quantizer, from its live attributes."""
    blocks = dict(quantizer.block_sizes or {})
    if quantizer.num_bits == (2, 1) and blocks == {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}:
        return "other" if quantizer._dynamic else "nvfp4"
    if quantizer.num_bits == (2, 1) and blocks == {-1: 16, "type": "static", "scale_bits": (4, 3)}:
        return "other" if quantizer._dynamic else "nvfp4_static"
    if quantizer.num_bits == (4, 3) and not blocks and quantizer.axis is None:
        return "fp8_cast" if quantizer._use_constant_amax else "fp8"
    return "other"


@pytest.mark.parametrize("name", MODELOPTS)
def test_a_builtin_file_is_a_modelopt_recipe_as_it_is(name: str, mtq: Any) -> None:
    from modelopt.recipe import load_recipe as modelopt_load

    file = Path(loader.__file__).parent / f"{name}.yaml"
    theirs = modelopt_load(file)
    ours = load_recipe(name)
    assert theirs.recipe_type.value == "ptq"
    assert theirs.description == ours.description
    assert as_json(theirs.quantize.model_dump(exclude_unset=True)) == as_json(ours.modelopt()["quantize"])
    assert theirs.quantize.algorithm["moe_calib_experts_ratio"] == 1.0


@pytest.mark.parametrize("name", COLLECTION)
def test_a_recipe_of_the_collection_is_read_as_modelopt_reads_it(name: str, mtq: Any, tmp_path: Path) -> None:
    """Imports and all: our reading, printed as YAML, is to modelopt the very recipe that it reads itself."""
    from modelopt.recipe import load_recipe as modelopt_load

    try:
        ours = load_recipe(f"general/ptq/{name}")
    except RecipeError as error:
        assert name not in SUPPORTED
        assert "is not supported" in error.message  # noqa: PT017 - both ways are right, each for its names
        return
    file = tmp_path / f"{name}.yaml"
    file.write_text(ours.modelopt_yaml())
    theirs, again = modelopt_load(f"general/ptq/{name}"), modelopt_load(file)
    assert again.quantize.quant_cfg == theirs.quantize.quant_cfg
    ignored = {"algorithm"}  # `max` and `{method: max}` are one
    assert again.quantize.model_dump(exclude=ignored) == theirs.quantize.model_dump(exclude=ignored)


@pytest.mark.parametrize("name", COLLECTION)
def test_each_recipe_of_the_collection_is_supported_or_refused_by_name(name: str) -> None:
    if name in SUPPORTED:
        resolved = load_recipe(f"general/ptq/{name}").resolve(LINEARS)
        assert resolved.kv_cache == SUPPORTED[name]
        assert resolved.quantized == tuple(m for m in LINEARS if ".experts." in m)
        assert "where modelopt would calibrate on routed tokens only" in resolved.notices[0]
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"general/ptq/{name}").resolve(LINEARS)
    assert REFUSED.get(name, "") in caught.value.message
    assert caught.value.message.startswith("modelopt_recipes/")


def test_every_experts_only_recipe_is_judged() -> None:
    judged = {*SUPPORTED, *REFUSED}
    assert {name for name in COLLECTION if "experts_only" in name} <= judged
    assert set(ALIASES) <= set(COLLECTION)


ON_ANY_DEVICE = tuple(name for name in MODELOPTS if "gptq" not in name)
"""modelopt's gptq quantizes inputs while it sums their Hessians, which its NVFP4 does on GPUs alone."""


@pytest.mark.parametrize("name", [*ON_ANY_DEVICE, *(f"general/ptq/{name}" for name in SUPPORTED)])
def test_modelopt_quantizes_with_our_file_what_we_say(
    name: str, mtq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole `mtq.quantize` with the file's own section: quantizers on, formats, KV cache, coverage."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    monkeypatch.setattr(tensor_quantizer, "static_blockwise_fp4_fake_quant", modelopt_sweep.fake_quantize)
    recipe = load_recipe(name)
    resolved = recipe.resolve(LINEARS)
    section = recipe.modelopt()["quantize"]
    section["algorithm"] |= {"layerwise": {"enable": False}}  # its layerwise pass needs a transformers model
    model = Model()
    ids = torch.randint(0, 64, (64,))
    mtq.quantize(model, section, forward_loop=lambda m: m(ids))
    found = quantizers(model)
    on = {n for n, q in found.items() if q.is_enabled}
    expected = {f"{m}.{k}" for m in resolved.quantized for k in ("input_quantizer", "weight_quantizer")}
    cache = {n for n in found if n.endswith(("k_bmm_quantizer", "v_bmm_quantizer"))}
    assert len(cache) == 2 * LAYERS
    assert on == expected | (cache if resolved.kv_cache else set())
    weights = {kind(found[n]) for n in expected if n.endswith("weight_quantizer")}
    assert weights == {"nvfp4" if resolved.algorithm == "max" else "nvfp4_static"}
    assert {kind(found[n]) for n in expected if n.endswith("input_quantizer")} == {"nvfp4"}
    assert {kind(found[n]) for n in on - expected} == ({resolved.kv_cache} if resolved.kv_cache else set())
    if name in BUILTIN:  # moe_calib_experts_ratio 1.0: every expert saw every token
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            amax = {
                float(found[f"{prefix}.{e}.{w}.input_quantizer"].amax) for e in range(3) for w in ("w1", "w3")
            }
            assert len(amax) == 1
    scaled = {n for n in cache if getattr(found[n], "_amax", None) is not None}
    assert scaled == (cache if resolved.kv_cache == "fp8" else set())


WORDS = st.sampled_from(
    [
        *(
            "*",
            "?",
            ".",
            "q",
            "0",
            "1",
            "[01]",
            "[!0]",
            "[kv]",
            "k_",
            "_proj",
            "model",
            ".layers.",
            "self_attn",
        ),
        *("block_sparse_moe", ".experts.", ".w1", ".w[23]", "gate", "lm_head", "embed_tokens", "quantizer"),
        *("bmm_quantizer", "weight_quantizer", "input_quantizer", "output_quantizer"),
    ]
)
PATTERNS = st.lists(WORDS, min_size=1, max_size=5).map("".join)
CFGS = st.sampled_from(
    [
        None,
        {"num_bits": 8},
        {"num_bits": [4, 3]},
        {"num_bits": [4, 3], "use_constant_amax": True},
        {"num_bits": [4, 3], "axis": 0},
        {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}},
        {"num_bits": [2, 1], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [4, 3]}},
    ]
)
CLASSES = st.sampled_from([None, None, None, "nn.Linear", "nn.Embedding", "nn.Conv2d"])


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    entry: dict[str, Any] = {"quantizer_name": draw(PATTERNS), "enable": draw(st.booleans())}
    cfg, parent_class = draw(CFGS), draw(CLASSES)
    return entry | ({"cfg": cfg} if cfg else {}) | ({"parent_class": parent_class} if parent_class else {})


@settings(max_examples=60, deadline=None)
@given(st.lists(entries(), min_size=1, max_size=6))
def test_any_list_of_entries_leaves_quantizers_as_modelopt_does(
    mtq: Any, prepared: nn.Module, rules: list[dict[str, Any]]
) -> None:
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

    model = copy.deepcopy(prepared)
    set_quantizer_by_cfg(model, copy.deepcopy(rules))
    place = Place("r.yaml", 1, library=True)  # of the library: a pattern may match nothing
    blocks = fates([Rule(Entry.model_validate(rule), place) for rule in rules], LINEARS)
    ours = {f"{m}.{b.quantizer}": (b.enabled, b.format.kind) for b in blocks for m in b.modules}
    theirs = {name: (q.is_enabled, kind(q)) for name, q in quantizers(model).items()}
    assert set(ours) == set(theirs)
    del ours["model.embed_tokens.input_quantizer"]  # modelopt locks it; we refuse recipes that aim at it
    for name, (enabled, form) in ours.items():
        assert theirs[name][0] == enabled, name
        if enabled:
            assert theirs[name][1] == form, name


@given(PATTERNS)
def test_a_pattern_matches_nothing_where_fnmatch_matches_nothing(pattern: str) -> None:
    blocks = fates([], MODULES)
    names = [f"{m}.{b.quantizer}" for b in blocks for m in b.modules]
    rule = Rule(Entry(quantizer_name=pattern, enable=False), Place("r.yaml", 1))
    try:
        after = fates([rule], MODULES)
    except RecipeError:
        hit = set()
    else:
        hit = {f"{m}.{b.quantizer}" for b in after if b.rule is rule for m in b.modules}
    assert hit == set(fnmatch.filter(names, pattern))


def test_the_section_alone_drives_modelopt(mtq: Any) -> None:
    """As `yaml.safe_load` gives it: nothing in the file needs modelopt's own loader."""
    from modelopt.torch.quantization.config import QuantizeConfig

    text = recipe_text(*EXPERTS, KV)
    section = parsed(text).modelopt()["quantize"]
    assert QuantizeConfig(**section).quant_cfg[1].cfg.num_bits == (2, 1)
