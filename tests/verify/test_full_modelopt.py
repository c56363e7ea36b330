"""What nvidia-modelopt exports is proven against its source by exact re-quantization."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.checkpoint.config import ARCHITECTURE
from m27quant.recipes import load_recipe
from m27quant.verify.findings import Severity
from tests.faults.corruptions import edit_json
from tests.oracles import modelopt_model as oracle
from tests.quantize.models import tiny_model
from tests.verify.conftest import RECIPES, SIDECARS

# modelopt says that it was not tested with this transformers; torch and it deprecate things of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

ROUTER_IN_BF16 = "M27-D003"
"""transformers holds the router in BF16, and so modelopt exports it."""


def test_modelopts_export_is_proven(repository: Path, tmp_path: Path) -> None:
    model = tiny_model(repository)
    section = load_recipe(RECIPES["fp8_kv"]).modelopt()["quantize"]
    network = oracle.build(model.raw_config, model.tensors)
    out = oracle.export(oracle.quantize(network, section, oracle.unpadded(model.rows)), tmp_path / "out")
    for name in SIDECARS:
        if name != "tokenizer_config.json":  # ours would say GPT2Tokenizer, as the original's does
            shutil.copy(model.folder / name, out / name)
    edit_json(
        out / "config.json", lambda config: config.update(architectures=[ARCHITECTURE], eos_token_id=2040)
    )
    result = verify_checkpoint(out, level="full", source=str(model.folder))
    loud = [(f.check.code, f.message) for f in result.findings if f.severity is not Severity.NOTE]
    assert [code for code, _ in loud if code != ROUTER_IN_BF16] == [], loud
    facts = result.facts["source"]
    assert facts["exact"] == facts["matrices"] > 300
    assert facts["other_tensors_different"] == 0
