"""Fields that no tensor's shape tells, against the source's config.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.verify.findings import Severity
from tests.faults.edits import config


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_theta", 123_456), ("rotary_dim", 16), ("rms_norm_eps", 1e-3), ("num_experts_per_tok", 1)],
)
def test_a_field_that_is_not_the_sources(
    field: str, value: float, folder: Path, checkpoints: dict[str, Path]
) -> None:
    source = str(checkpoints["fp8_kv"].parent / "source")
    config(field, value=value)(folder)
    result = verify_checkpoint(folder, level="full", source=source)
    errors = {f.check.code: f.message for f in result.findings if f.severity is Severity.ERROR}
    assert list(errors) == ["M27-W024"]
    assert field in errors["M27-W024"]
    assert "M27-W024" in result.checks_run
