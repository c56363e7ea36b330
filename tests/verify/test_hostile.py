"""Whatever a checkpoint holds: findings or an error with an exit code, never a traceback, in bounded memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m27quant import verify_checkpoint
from m27quant.errors import M27Error
from m27quant.verify.findings import VerifyResult
from tests.checkpoints import Shape
from tests.faults import corruptions as c
from tests.verify.sparse import write_sparse

TINY = Shape(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, rotary_dim=4, num_local_experts=2, num_experts_per_tok=1, vocab_size=16,
)  # fmt: skip
FEW = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(width=64) | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("hostile") / "good", TINY)


@pytest.fixture
def broken(sparse: Path, tmp_path: Path) -> Path:
    """A folder that every example fills anew."""
    return Path(shutil.copytree(sparse, tmp_path / "broken"))


def verified(folder: Path) -> VerifyResult | M27Error:
    """What comes out; anything but a result or our own error fails the test."""
    try:
        result = verify_checkpoint(folder)
    except M27Error as fault:
        outcome: VerifyResult | M27Error = fault
    else:
        outcome = result
    if isinstance(outcome, M27Error):
        assert outcome.message.isprintable()
        assert outcome.exit_code in (3, 4)
        return outcome
    assert len(result.findings) < 200
    for finding in result.findings:
        assert finding.message.isprintable(), finding.message
        assert all(
            text is None or text.isprintable() for text in (finding.tensor, finding.file, finding.found)
        )
        assert all(example.isprintable() for example in finding.examples)
        assert len(finding.message) < 2000
    json.dumps(result.facts)
    return result


def shard(folder: Path) -> Path:
    return c.shards(folder)[0]


def test_the_sparse_checkpoint_has_the_right_names_and_empty_scales(sparse: Path) -> None:
    result = verified(sparse)
    assert isinstance(result, VerifyResult)
    assert {f.check.code for f in result.findings if f.severity == "error"} == {"M27-S002", "M27-W007"}


@FEW
@given(text=st.binary(max_size=300))
def test_bytes_for_a_header(broken: Path, text: bytes) -> None:
    c.join_shard(shard(broken), text, b"")
    verified(broken)


@FEW
@given(data=st.binary(max_size=300))
def test_bytes_for_any_file(broken: Path, data: bytes) -> None:
    for path in sorted(p for p in broken.iterdir() if p.is_file()):
        good = path.read_bytes()
        path.write_bytes(data)
        verified(broken)
        path.write_bytes(good)


@FEW
@given(header=st.dictionaries(st.text(max_size=30), values, max_size=6), buffer=st.binary(max_size=64))
def test_json_for_a_header(broken: Path, header: dict[str, Any], buffer: bytes) -> None:
    c.join_shard(shard(broken), header, buffer)
    verified(broken)


@FEW
@given(data=st.data())
def test_a_header_with_one_entry_changed(broken: Path, sparse: Path, data: st.DataObject) -> None:
    header, buffer = c.split_shard(shard(sparse))
    name = data.draw(st.sampled_from(sorted(header)))
    if name == "__metadata__":
        header[name] = data.draw(values)
    else:
        sizes = st.lists(st.integers(-1, 2**64), max_size=3)
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header[name][field] = data.draw(
            values | sizes | st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4"])
        )
    c.join_shard(shard(broken), header, buffer)
    verified(broken)


@FEW
@given(weight_map=values | st.dictionaries(st.text(max_size=40), st.text(max_size=40), max_size=5))
def test_anything_for_a_weight_map(broken: Path, weight_map: Any) -> None:
    (broken / c.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    verified(broken)


@FEW
@given(data=st.data())
def test_configs_with_one_field_changed(broken: Path, sparse: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(["config.json", "hf_quant_config.json", "generation_config.json"]))
    root = json.loads((sparse / file).read_text())
    place: Any = root
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values | st.integers(-2, 20_000))
    (broken / file).write_text(json.dumps(root))
    verified(broken)
    (broken / file).write_bytes((sparse / file).read_bytes())


@FEW
@given(tokenizer=values, config=values)
def test_anything_for_a_tokenizer(broken: Path, tokenizer: Any, config: Any) -> None:
    fields = {"added_tokens": tokenizer, "model": config}
    (broken / "tokenizer.json").write_text(json.dumps(fields))
    (broken / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": config, "chat_template": tokenizer})
    )
    verified(broken)


@pytest.mark.parametrize("name", c.HOSTILE_NAMES.values(), ids=c.HOSTILE_NAMES)
def test_hostile_names_are_printed_escaped(broken: Path, name: str) -> None:
    c.add_tensor(broken, name)
    result = verified(broken)
    assert isinstance(result, VerifyResult)
    (unknown,) = (f for f in result.findings if f.check.code == "M27-T009")
    assert unknown.tensor is not None
    assert len(unknown.tensor) < 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 4096, "num_local_experts": 16384},
        {"hidden_size": 2**20, "vocab_size": 2**24, "intermediate_size": 2**20},
        {"num_attention_heads": 4096, "head_dim": 4096, "rotary_dim": 4},
    ],
)
def test_a_config_that_promises_too_much_costs_nothing(broken: Path, fields: dict[str, int]) -> None:
    c.config(**fields)(broken)
    assert isinstance(verified(broken), VerifyResult)


def test_a_huge_index_is_not_read(broken: Path) -> None:
    c.huge_index(broken)
    result = verified(broken)
    assert isinstance(result, VerifyResult)
    assert "M27-C018" in {f.check.code for f in result.findings}
