"""A checkpoint's next-token probabilities against its source's: right figures, faults that show, limits that hold."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import QuantizedSource
from m27quant.checkpoint.source import Source
from m27quant.cli.app import main
from m27quant.errors import CheckpointError, UsageError
from m27quant.runtime.streamed import Precision, logits
from m27quant.verify.collect import Findings
from m27quant.verify.comparison import Comparison, figures, report
from m27quant.verify.findings import VerifyResult
from m27quant.verify.logits import LogitsOptions, Windows, compare, read_windows

CPU = torch.device("cpu")
HALVED = "model.layers.1.block_sparse_moe.experts.2"
"""An expert that many tokens go to."""
MINOR = "model.layers.3.block_sparse_moe.experts.1"
"""One that counts for little: its fault drowns in the divergence of the whole."""
Record = Callable[[str, object], None]
EXACT = Precision()
SERVED = Precision("nvfp4", "fp8")


@pytest.fixture(scope="module")
def tiny(repository: Path) -> Path:
    return repository / "examples/tiny-m27"


@pytest.fixture(scope="module")
def nvfp4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-m27, calibrated on enough rows for its ranges to hold elsewhere; nobody may change it."""
    out = tmp_path_factory.mktemp("logits") / "nvfp4"
    rows = str(tiny / "calibration.jsonl")
    quantize_checkpoint(str(tiny), out, dataset=rows, num_samples=64, seq_len=256, device="cpu")
    return out


@pytest.fixture(scope="module")
def windows(tiny: Path) -> Windows:
    with Source(Location(tiny)) as source:
        return read_windows(LogitsOptions(text=tiny / "heldout.txt", num_samples=3, seq_len=128), source)


def against_source(
    tiny: Path, checkpoint: Path, windows: Windows, precision: Precision, **more: Any
) -> Comparison:
    with Source(Location(tiny)) as source, QuantizedSource(Location(checkpoint)) as ours:
        return compare(source, ours, windows, precision, device=CPU, **more)


@pytest.fixture(scope="module")
def served(tiny: Path, nvfp4: Path, windows: Windows) -> Comparison:
    return against_source(tiny, nvfp4, windows, SERVED)


def codes(result: Comparison) -> dict[str, str | None]:
    found = Findings()
    report(result, found)
    return {f.check.code: f.tensor for f in found.finish()}


def halved(nvfp4: Path, folder: Path, expert: str = HALVED) -> Path:
    """A copy in which every global scale of one expert is half of what it should be."""
    shutil.copytree(nvfp4, folder)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for projection in ("w1", "w2", "w3"):
        name = f"{expert}.{projection}.weight_scale_2"
        tensors = load_file(folder / weight_map[name])
        tensors[name] /= 2
        save_file(tensors, folder / weight_map[name], metadata={"format": "pt"})
    return folder


def test_a_good_checkpoint_is_within_the_limits(served: Comparison, record_property: Record) -> None:
    told = figures(served)
    for name in ("kl_mean", "kl_p99", "kl_max", "top1_agreement", "perplexity_source", "perplexity_ratio"):
        record_property(name, told[name])
    assert codes(served) == {}
    assert 0.002 < told["kl_mean"] < told["kl_p99"] < told["kl_max"]
    assert len(served.kl) == 3 * 128
    assert all(15 < value < 30 for value in served.layer_sqnr_db)
    assert len(served.layer_sqnr_db) == 8
    assert len(served.expert_sqnr_db) > 90


def test_one_expert_at_half_its_scale_is_seen_and_named(
    tiny: Path, nvfp4: Path, windows: Windows, served: Comparison, tmp_path: Path, record_property: Record
) -> None:
    found = against_source(tiny, halved(nvfp4, tmp_path / "halved"), windows, SERVED)
    growth = float(found.kl.mean() / served.kl.mean())
    record_property("kl_growth", round(growth, 3))
    record_property("sqnr_db", (found.expert_sqnr_db[1, 2], served.expert_sqnr_db[1, 2]))
    assert growth > 1.5
    assert found.layer_sqnr_db[:1] == served.layer_sqnr_db[:1]
    assert found.layer_sqnr_db[1] < served.layer_sqnr_db[1] - 1
    assert codes(found) == {"M27-L005": HALVED}
    assert {place for place, value in found.expert_sqnr_db.items() if value < 10} == {(1, 2)}


def test_an_expert_that_counts_for_little_is_named_all_the_same(
    tiny: Path, nvfp4: Path, windows: Windows, tmp_path: Path
) -> None:
    found = against_source(tiny, halved(nvfp4, tmp_path / "halved", MINOR), windows, SERVED)
    assert codes(found) == {"M27-L005": MINOR}


def test_less_rounding_is_nearer(tiny: Path, nvfp4: Path, windows: Windows, served: Comparison) -> None:
    w4a16 = against_source(tiny, nvfp4, windows, EXACT)
    assert float(w4a16.kl.mean()) < 0.8 * float(served.kl.mean())
    assert min(w4a16.expert_sqnr_db.values()) > min(served.expert_sqnr_db.values()) + 1


def test_a_model_against_itself(tiny: Path, windows: Windows) -> None:
    with Source(Location(tiny)) as source, Source(Location(tiny)) as again:
        result = compare(source, again, windows, EXACT, device=CPU)
    assert float(result.kl.abs().max()) == 0
    assert bool(result.same_top1.all())
    assert result.perplexity[0] == result.perplexity[1]
    assert {*result.layer_sqnr_db, *result.expert_sqnr_db.values()} == {math.inf}
    assert codes(result) == {}


def test_how_tokens_are_batched_does_not_matter(
    tiny: Path, nvfp4: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last bits of products; nothing is rounded here that could make more of them."""
    whole = against_source(tiny, nvfp4, windows, EXACT)
    monkeypatch.setattr("m27quant.runtime.divergence.LOGIT_ELEMENTS", 50_000)
    parts = against_source(tiny, nvfp4, windows, EXACT, batch_tokens=128)
    assert torch.allclose(whole.kl, parts.kl, rtol=1e-3, atol=1e-6)
    assert torch.equal(whole.same_top1, parts.same_top1)
    assert whole.perplexity == pytest.approx(parts.perplexity, rel=1e-6)


def test_figures_are_those_of_whole_forward_passes(
    tiny: Path, nvfp4: Path, windows: Windows, served: Comparison
) -> None:
    """Each window by each model alone, and the textbook's formulas."""
    with Source(Location(tiny)) as source, QuantizedSource(Location(nvfp4)) as ours:
        p = torch.cat([logits(source, ids) for ids in windows.ids]).double().log_softmax(-1)
        q = torch.cat([logits(ours, ids, precision=SERVED) for ids in windows.ids]).double().log_softmax(-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert float(kl.mean()) == pytest.approx(float(served.kl.mean()), rel=0.02)  # a code may flip
    assert figures(served)["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=0.1)
    assert served.perplexity[0] == pytest.approx(math.exp(F.nll_loss(p, windows.targets)), rel=1e-5)
    assert served.perplexity[1] == pytest.approx(math.exp(F.nll_loss(q, windows.targets)), rel=2e-3)


def test_windows_cover_the_text_without_overlap(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def f(x):\n    return x\n" * 20)
    with Source(Location(tiny)) as source:
        some = read_windows(LogitsOptions(text=text, num_samples=2, seq_len=16), source)
        every = read_windows(LogitsOptions(text=text, num_samples=10**6, seq_len=16), source)
    whole = torch.cat(every.ids)
    assert [len(ids) for ids in some.ids] == [16, 16]
    assert torch.equal(some.targets, whole[1:33])
    assert torch.equal(every.targets, torch.cat((whole[1:], torch.tensor([-1]))))


@pytest.mark.parametrize(
    ("content", "options", "fault"),
    [
        (b"", {}, UsageError),
        (b"\xff\xfe text", {}, CheckpointError),
        (b"some text", {"seq_len": 10**6}, UsageError),
        (b"some text", {"num_samples": 0}, UsageError),
        (None, {}, CheckpointError),
    ],
)
def test_texts_that_cannot_be_used(
    content: bytes | None, options: dict[str, int], fault: type[Exception], tiny: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with Source(Location(tiny)) as source, pytest.raises(fault):
        read_windows(LogitsOptions(text=text, **options), source)


def made_up(kl: float, same: float, nll: tuple[float, float]) -> Comparison:
    tokens = 1000
    agree = torch.arange(tokens) < same * tokens
    return Comparison(
        torch.full((tokens,), kl), agree, (torch.full((tokens,), nll[0]), torch.full((tokens,), nll[1]))
    )


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (made_up(math.nan, 0.9, (2.0, math.nan)), "M27-L001"),
        (made_up(0.01, 0.9, (2.0, 2.06)), "M27-L002"),
        (made_up(0.06, 0.9, (2.0, 2.0)), "M27-L003"),
        (made_up(0.01, 0.8, (2.0, 2.0)), "M27-L004"),
    ],
)
def test_each_limit(result: Comparison, code: str) -> None:
    assert list(codes(result)) == [code]
    assert codes(made_up(0.01, 0.9, (2.0, 2.01))) == {}


def verified(checkpoint: Path, tiny: Path) -> VerifyResult:
    options = LogitsOptions(text=tiny / "heldout.txt", num_samples=1, seq_len=64, device="cpu")
    return verify_checkpoint(checkpoint, level="quick", source=str(tiny), logits=options)


def test_verify_tells_the_figures(nvfp4: Path, tiny: Path) -> None:
    result = verified(nvfp4, tiny)
    told = result.facts["logits"]
    assert {"M27-L001", "M27-L005"} <= set(result.checks_run)
    assert (told["activations"], told["kv_cache"]) == ("nvfp4", "fp8")
    assert (told["num_windows"], told["num_tokens"]) == (1, 64)
    assert told["perplexity_ratio"] == pytest.approx(told["perplexity"] / told["perplexity_source"], rel=1e-4)


def test_what_other_checks_found_keeps_logits_from_being_computed(
    nvfp4: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(nvfp4, tmp_path / "broken"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][f"{HALVED}.w1.weight"]
    path.write_text(json.dumps(index))
    result = verified(folder, tiny)
    assert not result.ok
    assert f"{HALVED}.w1.weight" in result.facts["logits"]["not_computed"]
    assert not [code for code in result.checks_run if code.startswith("M27-L")]


def test_the_command(nvfp4: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(tiny / "heldout.txt"), "--num-samples", "1", "--seq-len", "64"]
    common = ["verify", str(nvfp4), "--quick", "--no-progress", "--device", "cpu", "--source", str(tiny)]
    precision = ["--activations", "bf16", "--kv-cache-dtype", "bf16"]
    assert main([*common, "--logits", *text, *precision, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["facts"]["logits"]
    assert (told["activations"], told["kv_cache"], told["num_tokens"]) == ("bf16", "bf16", 64)
    assert main([*common, "--logits", *text]) == 0
    assert "KL divergence" in capsys.readouterr().out
    bad = halved(nvfp4, tmp_path / "halved")
    assert main(["verify", str(bad), "--logits", "--source", str(tiny), "--no-progress", *text[:2]]) == 1
    captured = capsys.readouterr()
    assert f"'{HALVED}' gives its tokens an SQNR of" in captured.out
    assert "explain M27-L005" in captured.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--logits"], "--logits needs a model and a text"),
        (["--logits", "--source", "x"], "--logits needs a model and a text"),
        (["--text", "x"], "--text is of --logits"),
        (["--seq-len", "8"], "--seq-len is of --logits"),
        (["--logits", "--activations", "fp4"], "'fp4' is none of nvfp4, bf16"),
    ],
)
def test_wrong_usage(flags: list[str], says: str, nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(nvfp4), *flags]) == 2
    assert says in capsys.readouterr().err
