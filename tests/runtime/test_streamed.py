"""The streamed forward pass over NVFP4 checkpoints against the same model unpacked by other code, in F32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m27quant import quantize_checkpoint
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import QuantizedSource, same_model
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError
from m27quant.runtime.streamed import Precision, StreamedModel, fake_quantize_fp8, logits, make_batches
from tests.checkpoints import read_tensors, write_checkpoint, write_rows
from tests.tolerance import LOGIT_ATOL, sqnr_db

EXPERT = "model.layers.1.block_sparse_moe.experts.2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with experts in NVFP4 and calibrated KV scales."""
    home = tmp_path_factory.mktemp("streamed")
    model = write_checkpoint(home / "fp8")
    quantize_checkpoint(str(model), home / "nvfp4", dataset=str(write_rows(home / "rows.jsonl")))
    return home / "nvfp4"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(256, (60,), generator=torch.Generator().manual_seed(3))


def unpacked(weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """NVFP4 to F32 with numpy, from the format's description."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
    codes = weight.numpy()
    values = np.empty((codes.shape[0], 2 * codes.shape[1]), dtype=np.float32)
    values[:, 0::2], values[:, 1::2] = table[codes & 15], table[codes >> 4]
    blocks = scale.float().numpy() * scale_2.numpy()
    return torch.from_numpy(values * np.repeat(blocks, 16, axis=1))


def plain_copy(checkpoint: Path, folder: Path) -> Path:
    """The same model without quantization: every expert in F32."""
    tensors = read_tensors(checkpoint)
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(("_scale", "_scale_2")):
            continue
        if tensor.dtype == torch.uint8:
            module = name.removesuffix(".weight")
            tensor = unpacked(tensor, tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"])
        plain[name] = tensor
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    return write_checkpoint(folder, tensors=plain, config=config)


def ours(checkpoint: Path, ids: torch.Tensor, **precision: Any) -> torch.Tensor:
    with QuantizedSource(Location(checkpoint)) as source:
        source.check_layout(input_scales=True)
        return logits(source, ids, precision=Precision(**precision))


def test_w4a16_is_the_unpacked_model(nvfp4: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    with Source(Location(plain_copy(nvfp4, tmp_path / "plain"))) as source:
        expected = logits(source, ids)
    found = ours(nvfp4, ids)
    assert float((found - expected).abs().max()) <= LOGIT_ATOL
    assert float(found.std()) > 0.5


def test_each_rounding_costs_something(nvfp4: Path, ids: torch.Tensor) -> None:
    exact = ours(nvfp4, ids)
    found = {
        sqnr_db(exact, ours(nvfp4, ids, activations=activations, kv_cache=kv_cache))
        for activations, kv_cache in (("nvfp4", "fp8"), ("nvfp4", "bf16"), ("bf16", "fp8"))
    }
    assert len(found) == 3
    assert all(10 < value < 40 for value in found)


def test_w4a4_is_one_quantized_product_after_another(nvfp4: Path) -> None:
    """One expert against the products of numbers that the codes stand for."""
    from m27quant.kernels.nvfp4_quantize import reference

    tensors = read_tensors(nvfp4)
    w1, w2, w3 = (
        unpacked(*(tensors[f"{EXPERT}.{p}.{t}"] for t in ("weight", "weight_scale", "weight_scale_2")))
        for p in ("w1", "w2", "w3")
    )
    h = torch.randn(9, w1.shape[1])
    x = reference.fake_quantize(h, tensors[f"{EXPERT}.w1.input_scale"])
    gate = x @ w1.T
    act = reference.fake_quantize(gate * gate.sigmoid() * (x @ w3.T), tensors[f"{EXPERT}.w2.input_scale"])
    with QuantizedSource(Location(nvfp4)) as source:
        batches = make_batches([torch.arange(4)], 8)
        precision = Precision(activations="nvfp4")
        model = StreamedModel(source, batches, precision=precision, device=CPU)
        found = model.load_expert(1, 2)(h)
    assert torch.allclose(found, act @ w2.T, atol=1e-5)


def test_sequences_do_not_see_each_other(nvfp4: Path, ids: torch.Tensor) -> None:
    sequences = [ids[:20], ids[20:27], ids[27:]]
    with QuantizedSource(Location(nvfp4)) as source:
        alone = torch.cat([logits(source, s) for s in sequences])
        for batch_tokens in (1, 27, 1000):
            batches = make_batches(sequences, batch_tokens)
            model = StreamedModel(source, batches, device=CPU)
            for layer in range(source.config.num_hidden_layers):
                model.layer(layer)
            head = model.head()
            together = torch.cat([head(batch.x) for batch in batches])
            assert float((alone - together).abs().max()) <= LOGIT_ATOL
    assert [b.lengths for b in make_batches(sequences, 27)] == [(20, 7), (33,)]


def test_fp8_saturates_and_rounds_to_nearest() -> None:
    x = torch.tensor([1000.0, -1000.0, 1.0625, 1.1875, 0.0, 2.0**-11])
    assert fake_quantize_fp8(x, torch.tensor(1.0)).tolist() == [448.0, -448.0, 1.0, 1.25, 0.0, 0.0]
    assert fake_quantize_fp8(x[:1], torch.tensor(4.0)).tolist() == [1024.0]
    assert fake_quantize_fp8(x.bfloat16(), torch.tensor(1.0)).dtype == torch.bfloat16


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor in the shard that holds it, or take it away from shard and index."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = folder / content["weight_map"][name]
    tensors = load_file(shard)
    if value is None:
        del tensors[name], content["weight_map"][name]
        index.write_text(json.dumps(content))
    else:
        tensors[name] = value
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        ("w1.weight", None, "w1.weight' is missing"),
        ("w1.weight", torch.zeros(8, 8, dtype=torch.uint8), "config.json implies"),
        ("w2.weight_scale", torch.zeros(144, 5), "is F32, expected F8_E4M3"),
        ("w3.weight_scale_2", torch.ones(2), "has shape"),
        ("w3.input_scale", None, "w3.input_scale' is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    nvfp4: Path, tmp_path: Path, tensor: str, value: torch.Tensor | None, says: str
) -> None:
    folder = Path(shutil.copytree(nvfp4, tmp_path / "bad"))
    change(folder, f"{EXPERT}.{tensor}", value)
    with QuantizedSource(Location(folder)) as source, pytest.raises(CheckpointError, match=says):
        source.check_layout(input_scales=True)


def test_weight_only_checkpoints_need_no_input_scales(nvfp4: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    folder = Path(shutil.copytree(nvfp4, tmp_path / "w4a16"))
    for name in read_tensors(folder):
        if name.endswith(".input_scale"):
            change(folder, name, None)
    with QuantizedSource(Location(folder)) as source:
        assert not source.has_input_scales
        source.check_layout(input_scales=False)
        assert torch.equal(logits(source, ids), ours(nvfp4, ids))


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        ("w1.weight_scale_2", torch.tensor(torch.nan), "NaN or Inf"),
        ("w1.input_scale", torch.tensor(0.0), "input_scale' is 0.0"),
    ],
)
def test_scales_that_nothing_can_be_computed_with(
    nvfp4: Path, tmp_path: Path, ids: torch.Tensor, tensor: str, value: torch.Tensor, says: str
) -> None:
    folder = Path(shutil.copytree(nvfp4, tmp_path / "bad"))
    change(folder, f"{EXPERT}.{tensor}", value)
    with pytest.raises(CheckpointError, match=says):
        ours(folder, ids, activations="nvfp4")


def test_two_models_are_told_apart(nvfp4: Path, repository: Path) -> None:
    with (
        QuantizedSource(Location(nvfp4)) as source,
        Source(Location(repository / "examples/tiny-m27")) as other,
    ):
        assert source.declares_fp8_kv
        same_model(source.config, source.config)
        with pytest.raises(CheckpointError, match="hidden_size is 144 in the checkpoint and 272"):
            same_model(source.config, other.config)
