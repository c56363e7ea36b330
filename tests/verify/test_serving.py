"""How engines spread a model, what it takes, and which of their known faults concern it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.checkpoint.header import TensorInfo
from m27quant.cli import verify_options as cli
from m27quant.errors import UsageError
from m27quant.verify.checks import CHECKS
from m27quant.verify.collect import Findings
from m27quant.verify.engines import ENGINES, Engine
from m27quant.verify.engines_data import ATTENTION, BACKENDS, GPUS, KNOWN
from m27quant.verify.findings import Severity
from m27quant.verify.inventory import expected_tensors
from m27quant.verify.serving import STRICT, Serving, check_serving, memory, pick, tensor_parallel_sizes
from m27quant.verify.view import View
from tests.faults.serving import MISFITS, Misfit
from tests.verify.sparse import M27

FP8_SCHEME = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
SCALE = "model.layers.0.self_attn.k_proj.k_scale"
BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}


def m27() -> M2Config:
    raw = M27.config(fp8=False) | {"max_position_embeddings": 204_800}
    return parse_config(raw)


def view(config: M2Config | None = None) -> View:
    """The official sizes with an FP8 cache whose scales are stored."""
    tensor = TensorInfo(SCALE, "F32", (), Path("a.safetensors"), 0, 4)
    return View(Path(), {SCALE: tensor}, config=config or m27(), section=FP8_SCHEME)


def test_sizes_that_work_for_every_backend() -> None:
    assert tensor_parallel_sizes(m27(), STRICT) == [1, 2, 4, 8, 24]


def test_sizes_that_work_for_backends_that_pad() -> None:
    assert tensor_parallel_sizes(m27()) == [1, 2, 4, 8, 16, 24, 48]


@pytest.mark.parametrize("tp", [3, 6, 12, 32, 64])
def test_sizes_that_never_work(tp: int) -> None:
    found = Findings()
    check_serving(view(), found, Serving(tp=tp))
    assert found.codes() == {"M27-V001"}


def test_other_sizes_of_the_model() -> None:
    c = dataclasses.replace(m27(), num_attention_heads=24, num_key_value_heads=3, intermediate_size=768)
    assert tensor_parallel_sizes(c, STRICT) == [1, 3, 6, 12]
    assert tensor_parallel_sizes(c) == [1, 3, 6, 12, 24]


@pytest.mark.parametrize("gpu", [None, *GPUS])
def test_the_sizes_that_are_listed_are_those_that_no_error_forbids(gpu: str | None) -> None:
    """Without a GPU and where a backend pads, all of them; elsewhere those that need no padding."""
    small = dataclasses.replace(m27(), num_attention_heads=8, num_key_value_heads=2, intermediate_size=64)
    for c in (m27(), small):
        pads = gpu is None or pick("vllm", GPUS[gpu]).needs == 16
        works = []
        for tp in range(1, 65):
            found = Findings()
            check_serving(view(c), found, Serving(gpu=gpu, tp=tp), ("vllm",))
            works += [] if found.codes() & {"M27-V001", "M27-V002"} else [tp]
        assert works == (tensor_parallel_sizes(c) if pads else tensor_parallel_sizes(c, STRICT))


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_misfits(misfit: Misfit) -> None:
    found = Findings()
    check_serving(view(), found, misfit.serving, (misfit.engine,))
    findings = found.finish()
    assert any(f.check.code == misfit.code and misfit.words in f.message for f in findings), [
        f.message for f in findings
    ]
    assert {f.check.code for f in findings if f.severity is Severity.ERROR} <= {misfit.code}


def test_every_check_of_serving_is_made_to_find_something() -> None:
    assert {m.code for m in MISFITS.values()} == {code for code in CHECKS if code.startswith("M27-V")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("gpu", "tp"), [("b200", 2), ("b300", 1), ("gb200", 4), ("h200", 2), ("h100", 4)])
def test_ways_that_work(gpu: str, tp: int, engine: Engine) -> None:
    found = Findings()
    check_serving(view(), found, Serving(gpu=gpu, tp=tp, context=204_800), (engine,))
    assert not [f.message for f in found.finish() if f.severity is Severity.ERROR]


def test_one_gpu_holds_what_the_inventory_says() -> None:
    """tp 1: every tensor but the KV scales, once; scalar scales included."""
    c = m27()
    total = 0
    for spec in expected_tensors(c):
        size = BYTES[spec.dtype]
        for n in spec.shape:
            size *= n
        total += size if not spec.name.endswith(("k_scale", "v_scale")) else 0
    assert memory(c, 1, 1, 1, fp8_cache=True).weights == total


def test_sharding_divides_all_but_router_and_norms() -> None:
    c = m27()
    whole, eighth = (memory(c, tp, tp, 1, fp8_cache=True) for tp in (1, 8))
    router_and_norms = c.num_hidden_layers * 4 * 256 * 3073 + 2 * (2 * c.num_hidden_layers + 1) * 3072
    scalars = c.num_hidden_layers * c.num_local_experts * 24
    kept = router_and_norms + scalars
    assert (whole.weights - kept) / 8 == eighth.weights - kept
    assert eighth.cache_per_token == whole.cache_per_token / 8 == 62 * 2 * 128


def test_the_cache_is_repeated_beyond_the_number_of_its_heads() -> None:
    c = m27()
    assert memory(c, 24, 24, 1, fp8_cache=True).cache_per_token == 62 * 2 * 128
    assert memory(c, 2, 2, 1, fp8_cache=False).cache_per_token == 62 * 2 * 4 * 128 * 2


def test_padding_backends_cost_memory() -> None:
    c = m27()
    bare, padded = (memory(c, 16, 16, 1, fp8_cache=True, pads_to=n) for n in (1, 64))
    assert padded.weights - bare.weights == 62 * 256 * 3 * (128 - 96) * 3072 * 9 // 16


def test_experts_in_parallel_are_whole() -> None:
    c = m27()
    by_tensor, by_expert = memory(c, 8, 8, 1, fp8_cache=True), memory(c, 8, 1, 8, fp8_cache=True)
    scalars = 62 * 24 * (256 - 32)
    assert by_tensor.weights - by_expert.weights == scalars


@pytest.mark.parametrize(
    ("engine", "gpu", "moe", "attention"),
    [
        ("vllm", "b200", "flashinfer_trtllm", "FLASHINFER"),
        ("vllm", "rtx-pro-6000", "flashinfer_cutlass", "FLASHINFER"),
        ("vllm", "h200", "marlin", "FLASH_ATTN"),
        ("sglang", "b300", "flashinfer_trtllm_routed", "trtllm_mha"),
        ("sglang", "gb10", "flashinfer_cutlass", "flashinfer"),
        ("sglang", "h100", "marlin", "fa3"),
    ],
)
def test_backends_that_are_picked(engine: Engine, gpu: str, moe: str, attention: str) -> None:
    facts = check_serving(view(), Findings(), Serving(gpu=gpu, tp=4), (engine,))[engine]
    assert (facts["moe_backend"], facts["attention_backend"]) == (moe, attention)


def test_data_parallel_experts_take_a_backend_that_exchanges_tokens() -> None:
    facts = check_serving(view(), Findings(), Serving(gpu="b200", tp=1, ep=8), ("vllm",))["vllm"]
    assert facts["moe_backend"] == "flashinfer_cutedsl"


def test_a_size_is_chosen_where_none_is_given() -> None:
    for gpu, context, tp in (
        ("b200", None, 1),
        ("h100", None, 2),
        ("h100", 204_800, 4),
        ("b300", 204_800, 1),
    ):
        facts = check_serving(view(), Findings(), Serving(gpu=gpu, context=context), ("vllm",))["vllm"]
        assert facts["tensor_parallel"] == tp, (gpu, context)


def test_vllm_keeps_a_cache_in_bf16_whose_scheme_is_not_static() -> None:
    v = view()
    v.section = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    facts = check_serving(v, Findings(), Serving(tp=1))
    assert (
        facts["vllm"]["cache_per_gpu_bytes_per_token"] == 2 * facts["sglang"]["cache_per_gpu_bytes_per_token"]
    )


def test_every_gpu_has_a_backend_and_an_attention_in_every_engine() -> None:
    for gpu in GPUS.values():
        for engine in ENGINES:
            assert pick(engine, gpu, all_to_all=True) in BACKENDS[engine]
            assert gpu.sm in ATTENTION[engine]
    assert tuple(GPUS) == cli.GPUS
    assert {known.code for known in KNOWN} <= set(CHECKS)
    assert all(set(CHECKS[known.code].engines) == {known.engine} for known in KNOWN)


def test_nothing_is_said_of_serving_unless_it_is_asked(checkpoints: dict[str, Path]) -> None:
    good = checkpoints["fp8_kv"]
    plain = verify_checkpoint(good, level="quick")
    assert not any(code.startswith("M27-V") for code in plain.checks_run)
    assert not any(name.startswith("serving") for name in plain.facts)
    asked = verify_checkpoint(good, level="quick", engine="vllm", serving=Serving(gpu="b200", tp=1))
    assert asked.ok
    assert "M27-V001" in asked.checks_run
    assert "serving_vllm" in asked.facts
    assert "serving_sglang" not in asked.facts


@pytest.mark.parametrize("options", [{"gpu": "a100"}, {"tp": 0}, {"ep": -1}, {"context": 2**40}])
def test_impossible_wishes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Serving(**options)  # type: ignore[arg-type]  # that is the test
