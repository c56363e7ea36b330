"""Checkpoints that nvidia-modelopt itself exports verify without an error, and warnings on them are true ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.checkpoint.config import ARCHITECTURE
from m27quant.recipes import load_recipe
from m27quant.verify.findings import Severity
from tests.checkpoints import read_tensors
from tests.faults.corruptions import edit_json
from tests.oracles import modelopt_model as oracle
from tests.quantize.models import Model, tiny_model
from tests.verify.conftest import RECIPES, SIDECARS

# modelopt says that it was not tested with this transformers; torch and it deprecate things of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

ROUTER_IN_BF16 = "M27-D003"
"""transformers holds the router in BF16, and so modelopt exports it."""


@pytest.fixture(scope="module")
def model(repository: Path) -> Model:
    return tiny_model(repository)


@pytest.mark.parametrize("recipe", ["fp8_kv", "fp8_kv_cast"])
def test_modelopts_export(model: Model, tmp_path: Path, recipe: str) -> None:
    section = load_recipe(RECIPES[recipe]).modelopt()["quantize"]
    network = oracle.build(model.raw_config, model.tensors)
    out = oracle.export(oracle.quantize(network, section, oracle.unpadded(model.rows)), tmp_path / "out")
    for name in SIDECARS:
        if name != "tokenizer_config.json":  # ours would say GPT2Tokenizer, as the original's does
            shutil.copy(model.folder / name, out / name)
    # the oracle's class has a name of its own, and transformers' class defaults are for the real tokenizer
    edit_json(
        out / "config.json", lambda config: config.update(architectures=[ARCHITECTURE], eos_token_id=2040)
    )
    assert len(read_tensors(out)) > 1600
    findings = verify_checkpoint(out).findings
    loud = [(f.check.code, f.message) for f in findings if f.severity is not Severity.NOTE]
    assert [code for code, _ in loud if code != ROUTER_IN_BF16] == [], loud
