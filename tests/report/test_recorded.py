"""quantization_report.json is believed only where it is what it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m27quant.report.recorded import read_recorded
from tests.report.pages import report_of

NAME = "quantization_report.json"
Spoil = Callable[[dict[str, Any]], object]


def written(folder: Path, content: object) -> Path:
    (folder / NAME).write_text(json.dumps(content))
    return folder


def test_a_good_report_is_read(tmp_path: Path) -> None:
    recorded, why = read_recorded(written(tmp_path, report_of(3, 4)))
    assert why is None
    assert recorded is not None
    assert recorded.shape == (3, 4)
    assert recorded.layers[2].sqnr_db.w2[3] is None


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    recorded, _ = read_recorded(written(tmp_path, report_of(1, 2, news={"deep": [1]})))
    assert recorded is not None


def test_its_absence_is_told(tmp_path: Path) -> None:
    assert read_recorded(tmp_path) == (None, f"There is no {NAME} beside this checkpoint.")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("layers"),
        lambda r: r.update(schema_version=2),
        lambda r: r.update(layers=[]),
        lambda r: r.update(notices="<script>"),
        lambda r: r["summary"].update(output_bytes=0),
        lambda r: r["summary"].update(output_bytes=True),
        lambda r: r["summary"].update(source_bytes=10**30),
        lambda r: r["layers"].reverse(),
        lambda r: r["layers"][1].update(routed_tokens=[1]),
        lambda r: r["layers"][1]["sqnr_db"]["w1"].append(1.0),
        lambda r: r["layers"][1]["sqnr_db"].update(w1=["20"] * 4),
        lambda r: r["layers"][1]["sqnr_db"].update(w1=[1e30] * 4),
        lambda r: r["layers"][1].update(k_scale=-1.0),
        lambda r: r["producer"].update(name="x" * 5000),
    ],
)
def test_anything_else_is_refused_with_its_reason(tmp_path: Path, spoil: Spoil) -> None:
    content = report_of(3, 4)
    spoil(content)
    recorded, why = read_recorded(written(tmp_path, content))
    assert recorded is None
    assert why is not None
    assert why.startswith(NAME)
    assert why.isprintable()


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"a":NaN}', b"\xff", b"[" * 100_000])
def test_no_bytes_give_a_traceback(tmp_path: Path, data: bytes) -> None:
    (tmp_path / NAME).write_bytes(data)
    recorded, why = read_recorded(tmp_path)
    assert recorded is None
    assert why is not None
    assert str(tmp_path) not in why


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    written(tmp_path, report_of(1, 2))
    (tmp_path / "inside" / NAME).symlink_to(tmp_path / NAME)
    recorded, why = read_recorded(tmp_path / "inside")
    assert recorded is None
    assert why is not None
