"""Drafters beside their target: good ones of every layout, and every single fault under its own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.errors import CheckpointError
from m27quant.verify.checks import CHECKS
from m27quant.verify.collect import Findings
from m27quant.verify.drafter import check_drafter
from m27quant.verify.findings import Severity
from tests import drafter_files as d
from tests.faults.corruptions import HOSTILE_NAMES
from tests.faults.drafters import FAULTS, Fault
from tests.verify.conftest import SMALL

GOOD = {
    "DFlash": (d.dflash, {"M27-R028", "M27-R029"}, [2, 5, 9]),
    "DFlash, speculators": (d.dflash_speculators, {"M27-R028", "M27-R029"}, [2, 5, 9]),
    "EAGLE3, midlayer": (d.eagle3, {"M27-R028"}, [2, 6, 9]),
    "EAGLE3, layers.0": (lambda: d.eagle3("layers.0"), {"M27-R028"}, [2, 6, 9]),
    "EAGLE3, speculators": (d.eagle3_speculators, {"M27-R028", "M27-R026"}, [2, 6, 9]),
}
"""Maker, what is said of it (of SGLang, or of an embedding of its own), the hidden states that it sees."""


def target() -> M2Config:
    return parse_config(SMALL.config(fp8=False))


@pytest.mark.parametrize(("make", "said", "seen"), GOOD.values(), ids=GOOD)
def test_good_ones(tmp_path: Path, make: object, said: set[str], seen: list[int]) -> None:
    folder = d.write_drafter(tmp_path / "drafter", *make())  # type: ignore[operator]  # one of the makers
    found = Findings()
    facts = check_drafter(folder, target(), found)
    assert found.codes() == said
    assert facts["hidden_states"] == seen


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults(tmp_path: Path, fault: Fault) -> None:
    config, tensors = fault.good()
    fault.edit(config, tensors)
    folder = d.write_drafter(tmp_path / "drafter", config, tensors)
    fault.files(folder)
    quick, full = Findings(), Findings()
    check_drafter(folder, target(), quick, values=False)
    check_drafter(folder, target(), full)
    findings = full.finish()
    assert any(f.check.code == fault.code and fault.words in f.message for f in findings), [
        (f.check.code, f.message) for f in findings
    ]
    assert {f.check.code for f in findings if f.severity is Severity.ERROR} <= {fault.code}
    assert (fault.code in quick.codes()) is fault.quick
    assert all(f.message.isprintable() and len(f.message) < 1000 for f in findings)


def test_every_check_of_drafters_is_made_to_find_something() -> None:
    assert {f.code for f in FAULTS.values()} == {code for code in CHECKS if code.startswith("M27-R")}


def test_beside_a_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = d.write_drafter(tmp_path / "drafter", *d.dflash())
    result = verify_checkpoint(checkpoints["fp8_kv"], level="quick", engine="vllm", drafter=folder)
    assert [f.check.code for f in result.findings] == []
    assert result.facts["drafter"]["kind"] == "dflash"
    assert "M27-R005" in result.checks_run
    assert not any(
        c.startswith("M27-R") for c in verify_checkpoint(checkpoints["fp8_kv"], level="quick").checks_run
    )


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        check_drafter(tmp_path / "nowhere", target(), Findings())


def test_shards_with_an_index(tmp_path: Path) -> None:
    config, tensors = d.dflash()
    folder = d.write_drafter(tmp_path / "drafter", config, tensors)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = Findings()
    assert check_drafter(folder, target(), found)["kind"] == "dflash"
    assert "M27-R001" not in found.codes()


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_hostile_names_are_printed_escaped(tmp_path: Path, name: str) -> None:
    config, tensors = d.dflash()
    tensors[name] = d.zeros("F32", 1)
    config["architectures"] = ["DFlashDraftModel", name]
    found = Findings()
    check_drafter(d.write_drafter(tmp_path / "drafter", config, tensors), target(), found)
    assert all(f.message.isprintable() for f in found.finish())


@pytest.mark.parametrize("value", [None, True, -1, 2**70, "x", [], {}, 1.5, [[1]], {"a": []}])
@pytest.mark.parametrize("make", [d.dflash, d.eagle3, d.eagle3_speculators])
def test_any_value_anywhere_in_the_config(tmp_path: Path, make: object, value: object) -> None:
    config, tensors = make()  # type: ignore[operator]  # one of the makers
    folder = d.write_drafter(tmp_path / "drafter", config, tensors)
    places = [config, *(v for v in config.values() if isinstance(v, dict))]
    for place in places:
        for key in list(place):
            good = place[key]
            place[key] = value
            (folder / "config.json").write_text(json.dumps(config))
            check_drafter(folder, target(), Findings())
            place[key] = good
