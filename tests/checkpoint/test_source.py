"""A source by name: what the index says, read byte for byte, by many threads, and told apart by content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.source import INDEX, Source
from m27quant.errors import CheckpointError, M27Error
from tests.checkpoint.common import check_fault, outcome
from tests.checkpoints import Shape, random_tensors, stored, write_checkpoint
from tests.faults import corruptions as c

SHAPE = Shape(num_hidden_layers=1, num_local_experts=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", SHAPE)


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_every_tensor_bit_for_bit(good: Path) -> None:
    expected = stored(random_tensors(SHAPE))
    with Source(Location(good)) as source:
        assert set(source.tensors) == set(expected)
        assert source.total_bytes == sum(t.numel() * t.element_size() for t in expected.values())
        for name, tensor in expected.items():
            read = source.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert bits(read) == bits(tensor)
        assert source.warnings == []
        assert check_layout(source) == []


def test_rows(good: Path) -> None:
    name = "model.embed_tokens.weight"
    with Source(Location(good)) as source:
        whole = source.read(name)
        for begin, end in ((0, 1), (3, 7), (255, 256), (0, 256), (5, 5)):
            assert bits(source.read_rows(name, begin, end)) == bits(whole[begin:end])


def test_many_threads(good: Path) -> None:
    with Source(Location(good)) as source, ThreadPoolExecutor(8) as pool:
        names = list(source.tensors) * 4
        found = list(pool.map(source.read, names))
        for name, tensor in zip(names, found, strict=True):
            assert bits(tensor) == bits(source.read(name))


def test_a_tensor_that_is_not_there(good: Path) -> None:
    with (
        Source(Location(good)) as source,
        pytest.raises(CheckpointError, match=r"tensor 'gone\\x1b' is missing"),
    ):
        source.read("gone\x1b")


def test_a_single_file(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "single"
    write_checkpoint(folder, SHAPE, num_shards=1)
    c.shards(folder)[0].rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    with Source(Location(folder)) as source, Source(Location(good)) as other:
        assert set(source.tensors) == set(other.tensors)
        assert check_layout(source) == []


def test_bf16_with_and_without_exemptions(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bf16", SHAPE, fp8=False)
    with Source(Location(folder)) as source:
        assert check_layout(source) == []
    mixed = stored(random_tensors(SHAPE))
    plain = stored(random_tensors(SHAPE), fp8=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    mixed[name] = plain[name]
    del mixed[name + "_scale_inv"]
    config = SHAPE.config()
    write_checkpoint(tmp_path / "mixed", SHAPE, tensors=mixed, config=config)
    with (
        Source(Location(tmp_path / "mixed")) as source,
        pytest.raises(CheckpointError, match=r"q_proj\.weight' is BF16"),
    ):
        check_layout(source)
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.self_attn.q_proj"]
    write_checkpoint(tmp_path / "exempt", SHAPE, tensors=mixed, config=config)
    with Source(Location(tmp_path / "exempt")) as source:
        assert check_layout(source) == []


IDENTITY: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda f: None, True),
    "time stamps": (lambda f: [p.touch() for p in f.iterdir()], True),
    "config": (c.config(rope_theta=7), False),
    "config spacing": (c.edit_spacing("config.json"), False),
    "a value": (c.fill("lm_head.weight", b"\x00\x00", at=3), False),
    "header": (c.add_tensor_named("stray"), False),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_identity(name: str, good: Path, model: Path) -> None:
    change, same = IDENTITY[name]
    change(model)
    with Source(Location(good)) as source, Source(Location(model)) as other:
        assert (source.identity() == other.identity()) == same


def test_large_shards_are_sampled_evenly(tmp_path: Path) -> None:
    """A fine-tune that changes a sixteenth of a large shard, in one place, is still another source."""
    shape = Shape(num_hidden_layers=1, num_local_experts=2, vocab_size=8192)
    folder = write_checkpoint(tmp_path / "large", shape, num_shards=1)
    size = c.shards(folder)[0].stat().st_size
    assert size > 4_000_000
    with Source(Location(folder)) as source:
        before = source.identity()
        for begin in range(0, 8192, 1024):
            original = c.shards(folder)[0].read_bytes()
            c.fill("lm_head.weight", b"\x80\x3f", at=begin * 144, count=1024 * 144)(folder)
            assert source.identity() != before, begin
            c.shards(folder)[0].write_bytes(original)
        assert source.identity() == before


NAMES = st.text(max_size=12) | st.sampled_from(
    [
        "model-00000-of-00005.safetensors",
        "../x.safetensors",
        "/x.safetensors",
        "C:\\x.safetensors",
        "\x00",
        ".",
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([c.EXPERT, "lm_head.weight", "x"]) | st.text(max_size=6), NAMES, min_size=1
    )
)
def test_any_weight_map(good: Path, tmp_path: Path, weight_map: dict[str, str]) -> None:
    folder = tmp_path / "linked"
    if not folder.exists():
        shutil.copytree(good, folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    source = outcome(lambda: Source(Location(folder)))
    if isinstance(source, M27Error):
        check_fault(source)
    else:
        assert {n: i.path.name for n, i in source.tensors.items()} == weight_map


def test_config_and_layout_of_any_size_are_checked_in_no_time(model: Path) -> None:
    """4096 layers of 16384 experts are 200 million tensors that are not there."""
    c.config(num_hidden_layers=4096, num_local_experts=16384)(model)
    with Source(Location(model)) as source, pytest.raises(CheckpointError, match=r"and 9[0-9] more"):
        check_layout(source)


@pytest.mark.parametrize("fp8", [True, False])
def test_names_of_transformers_in_memory(fp8: bool, tmp_path: Path) -> None:
    renamed = {
        n.replace(".block_sparse_moe.", ".mlp."): t for n, t in stored(random_tensors(SHAPE), fp8).items()
    }
    folder = write_checkpoint(tmp_path / "renamed", SHAPE, fp8=fp8, tensors=renamed)
    with Source(Location(folder)) as source, pytest.raises(CheckpointError, match="in-memory names, `mlp`"):
        check_layout(source)
