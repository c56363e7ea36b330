"""Level full: good checkpoints are proven, every fault of the weights is found under its own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.errors import UsageError
from m27quant.progress import Progress
from m27quant.verify import stream
from m27quant.verify.checks import CHECKS
from m27quant.verify.difference import swizzle, unswizzle
from m27quant.verify.findings import Severity, VerifyResult
from tests.checkpoints import write_checkpoint, write_rows
from tests.faults.weights import REPORT, SHAPE, WEIGHTS, WeightFault
from tests.verify.conftest import SIDECARS


@pytest.fixture(scope="module")
def pairs(fast_folder: Path, repository: Path) -> dict[str, tuple[Path, Path]]:
    """(source, quantized) from FP8 and from BF16.  Nobody may change them."""
    made = {}
    for kind in ("fp8", "bf16"):
        model = write_checkpoint(fast_folder / f"full-{kind}", SHAPE, fp8=kind == "fp8")
        for name in SIDECARS:
            shutil.copy(repository / "examples/tiny-m27" / name, model / name)
        rows = write_rows(fast_folder / "full.jsonl", vocab_size=SHAPE.vocab_size, rows=16)
        out = fast_folder / f"full-{kind}-nvfp4"
        quantize_checkpoint(str(model), out, recipe="nvfp4_experts_only-fp8_kv", dataset=str(rows))
        made[kind] = model, out
    return made


SUSPICIONS = {"M27-S018", "M27-S020", "M27-W008"}
"""What is suspect without a source, and proven with one under another code."""
SMALL = {"M27-W005", "M27-W007"}
"""Checks of the small tensors, which level default reads."""


def full(folder: Path, source: Path | None = None) -> VerifyResult:
    return verify_checkpoint(folder, level="full", source=None if source is None else str(source))


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_ours_is_proven(pairs: dict[str, tuple[Path, Path]], kind: str) -> None:
    source, out = pairs[kind]
    assert full(out).findings == ()
    result = full(out, source)
    assert result.findings == ()
    facts = result.facts["source"]
    matrices = SHAPE.num_hidden_layers * SHAPE.num_local_experts * 3
    assert facts["matrices"] == facts["exact"] == result.facts["weights"]["matrices"] == matrices
    assert facts["other_tensors_equal"] == SHAPE.num_hidden_layers * 10 + 3
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1]
    assert 18 < facts["sqnr_db"]["min"] <= facts["sqnr_db"]["mean"] < 22
    assert result.facts["weights"]["blocks_with_largest_code"] == 1
    assert result.facts["hashed_shards"] == result.facts["num_shards"]


@pytest.mark.parametrize("kept", ["sha256", "xxh3_128"])
def test_either_hash_of_the_report_finds_damage(
    pairs: dict[str, tuple[Path, Path]], kept: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pairs["fp8"][1], tmp_path / "checkpoint"))
    report = json.loads((folder / REPORT).read_text())
    assert all(
        len(entry["sha256"]) == 64 and len(entry["xxh3_128"]) == 32 for entry in report["shards"].values()
    )
    report["shards"] = {n: {kept: entry[kept].upper()} for n, entry in report["shards"].items()}
    (folder / REPORT).write_text(json.dumps(report))
    assert full(folder).findings == ()
    WEIGHTS["bit flip under the report"].change(folder)
    assert {f.check.code for f in full(folder).findings} == {"M27-W001"}


def test_the_sqnr_is_the_one_that_quantizing_reported(pairs: dict[str, tuple[Path, Path]]) -> None:
    source, out = pairs["fp8"]
    reported = json.loads((out / REPORT).read_text())["summary"]["sqnr_db"]
    found = full(out, source).facts["source"]["sqnr_db"]
    assert found["min"] == reported["worst"]["db"]
    assert found["mean"] == pytest.approx(reported["mean"], abs=0.001)


@pytest.mark.parametrize("fault", WEIGHTS.values(), ids=WEIGHTS)
def test_found_under_its_own_code(
    pairs: dict[str, tuple[Path, Path]], fault: WeightFault, tmp_path: Path
) -> None:
    source, out = pairs["fp8"]
    folder = Path(shutil.copytree(out, tmp_path / "checkpoint"))
    if not fault.report:
        (folder / REPORT).unlink()
    fault.change(folder)
    result = full(folder, source if fault.source else None)
    assert {f.check.code for f in result.findings} - SUSPICIONS == {fault.code} - SUSPICIONS
    assert any(fault.names in f.message for f in result.findings), [f.message for f in result.findings]
    default = verify_checkpoint(folder).findings
    assert {f.check.code for f in default if f.severity is Severity.ERROR} <= SUSPICIONS
    if fault.source:
        assert {f.check.code for f in full(folder).findings} <= SUSPICIONS


def test_another_recipe_is_a_note(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, out = pairs["fp8"]
    folder = Path(shutil.copytree(out, tmp_path / "checkpoint"))
    (folder / REPORT).unlink()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".weight") and tensor.dtype == torch.uint8:
                tensor[0, 0] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)
    result = full(folder, source)
    assert {f.check.code for f in result.findings} == {"M27-W017"}
    assert result.facts["source"]["exact"] == 0


def test_one_matrix_of_another_maximum_is_a_warning(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from m27quant.kernels import nvfp4_pack
    from tests.checkpoints import from_fp8
    from tests.faults.weights import W2, read, write

    source, out = pairs["fp8"]
    folder = Path(shutil.copytree(out, tmp_path / "checkpoint"))
    (folder / REPORT).unlink()
    tensors: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    weight = from_fp8(tensors[f"{W2}.weight"], tensors[f"{W2}.weight_scale_inv"])
    packed = nvfp4_pack.pack(weight, amax=weight.abs().max().float() * 0.9)
    for part, tensor in packed._asdict().items():
        write(folder, f"{W2}.{part}", tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert len(read(folder, f"{W2}.weight_scale_2")) == 4
    (finding,) = full(folder, source).findings
    assert (finding.check.code, finding.tensor) == ("M27-W023", f"{W2}.weight")


def test_a_source_of_another_size(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    import dataclasses

    other = write_checkpoint(tmp_path / "other", dataclasses.replace(SHAPE, num_local_experts=6))
    result = full(pairs["fp8"][1], other)
    assert [f.check.code for f in result.findings] == ["M27-W022"]
    assert "source" not in result.facts


@pytest.mark.parametrize("most_held", [0, 20_000])
def test_experts_that_do_not_arrive_in_one_piece(
    pairs: dict[str, tuple[Path, Path]], most_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m27quant.verify import experts

    monkeypatch.setattr(experts, "MOST_HELD", most_held)
    monkeypatch.setattr(stream, "RUN_BYTES", 1024)
    result = full(pairs["fp8"][1], pairs["fp8"][0])
    assert result.findings == ()
    assert result.facts["source"]["exact"] == result.facts["source"]["matrices"] == 24


def test_each_byte_is_read_once(pairs: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    out = pairs["fp8"][1]
    seen: list[tuple[str, int, int]] = []
    plain = stream.pread_exactly

    def counting(fd: int, view: memoryview, offset: int, shown: str) -> None:
        seen.append((shown, offset, len(view)))
        plain(fd, view, offset, shown)

    monkeypatch.setattr(stream, "pread_exactly", counting)
    result = full(out)
    assert sum(size for _, _, size in seen) == result.facts["total_bytes"]
    assert len({(name, offset) for name, offset, _ in seen}) == len(seen)


def test_progress_goes_from_0_to_1(
    pairs: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "REPORT_EVERY_S", 0.0)
    told: list[Progress] = []
    verify_checkpoint(pairs["fp8"][1], level="full", progress=told.append)
    fractions = [p.fraction for p in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert len(fractions) > 3


def test_swizzling_is_undone() -> None:
    scale = torch.arange(256 * 8).remainder(251).to(torch.uint8).view(256, 8)
    tiles = swizzle(scale).flatten()
    # row r, column c lies at tile (r // 128, c // 4), in it at (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    for r, c in ((0, 0), (1, 0), (32, 0), (33, 5), (127, 3), (128, 4), (255, 7)):
        at = (r // 128 * 2 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        assert tiles[at] == scale[r, c]
    assert torch.equal(unswizzle(swizzle(scale)), scale)


def test_checks_of_the_source_are_named_only_with_one(pairs: dict[str, tuple[Path, Path]]) -> None:
    source, out = pairs["fp8"]
    of_weights = {code for code in CHECKS if code.startswith("M27-W")} - SMALL
    default = set(verify_checkpoint(out).checks_run)
    assert not default & of_weights
    assert set(full(out).checks_run) - default == {code for code in of_weights if code < "M27-W010"}
    assert set(full(out, source).checks_run) - default == of_weights


def test_every_check_of_weights_is_made_to_find_something() -> None:
    # test_order.py, subtle.py, test_same_config.py, quantize/test_mse.py, test_awmse.py, test_gptq.py
    by_hand = {f"M27-W{number:03}" for number in (8, 17, *range(22, 29))} | SMALL
    assert {f.code for f in WEIGHTS.values()} | by_hand == {c for c in CHECKS if c.startswith("M27-W")}


def test_a_source_needs_level_full(pairs: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(UsageError, match="all weights"):
        verify_checkpoint(pairs["fp8"][1], source=str(pairs["fp8"][0]))
