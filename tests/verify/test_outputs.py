"""A checkpoint proven by running it: what is right passes, and each fault is found by its own name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.cli.app import main
from m27quant.errors import UsageError
from m27quant.kernels import nvfp4_moe
from m27quant.verify.collect import Findings
from m27quant.verify.findings import VerifyResult
from m27quant.verify.outputs import OutputsOptions
from m27quant.verify.text_health import health, spurious_spaces
from m27quant.verify.tokenizer_class import check_tokenizer_class

SHORT = OutputsOptions(max_tokens=24, num_experts=2)
LAYER = 3


@pytest.fixture(scope="module")
def tiny(repository: Path) -> Path:
    return repository / "examples/tiny-m27"


@pytest.fixture(scope="module")
def nvfp4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("outputs") / "nvfp4"
    rows = str(tiny / "calibration.jsonl")
    quantize_checkpoint(str(tiny), out, dataset=rows, num_samples=64, seq_len=256, device="cpu")
    return out


@pytest.fixture
def copy(nvfp4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nvfp4, tmp_path / "copy"))


def change(folder: Path, pattern: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors whose names match; the checkpoint stays one."""
    changed = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        hit = [name for name in tensors if re.fullmatch(pattern, name)]
        for name in hit:
            tensors[name] = to(tensors[name])
        if hit:
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(0o644)
        changed += len(hit)
    assert changed


def scale(folder: Path, projections: str, factor: float) -> None:
    names = rf"model\.layers\.{LAYER}\.block_sparse_moe\.experts\.\d+\.({projections})\.weight_scale_2"
    change(folder, names, lambda tensor: tensor * factor)


def verify(folder: Path, source: Path | None = None, **options: Any) -> VerifyResult:
    return verify_checkpoint(
        folder,
        source=None if source is None else str(source),
        outputs=options.pop("outputs", SHORT),
        **options,
    )


def errors(result: VerifyResult) -> dict[str, int | None]:
    """Codes of errors, with the layer that each names."""
    return {f.check.code: f.layer for f in result.findings if f.severity == "error"}


def test_a_good_checkpoint_passes_beside_its_source(nvfp4: Path, tiny: Path) -> None:
    result = verify(nvfp4, tiny)
    assert errors(result) == {}
    facts = result.facts["outputs"]
    assert [layer["layer"] for layer in facts["layers"]] == list(range(8))
    assert all(layer["kernel_db"] > 50 for layer in facts["layers"])
    assert all(layer["source_db"] > 10 for layer in facts["layers"])
    assert all(0.1 < layer["range_ratio"] < 1.5 for layer in facts["layers"])
    assert len(facts["answers"]) == 6
    assert "M27-O003" in result.checks_run
    assert "M27-O011" not in result.checks_run


def test_w4a4_is_held_against_quantized_activations(nvfp4: Path) -> None:
    result = verify(nvfp4, outputs=OutputsOptions(max_tokens=4, num_experts=2, activations="nvfp4"))
    assert errors(result) == {}
    assert result.facts["outputs"]["activations"] == "nvfp4"
    assert all(layer["kernel_db"] > 40 for layer in result.facts["outputs"]["layers"])


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_layer_s_wrong_scale_is_named_beside_the_source(copy: Path, tiny: Path, factor: float) -> None:
    scale(copy, "w2", factor)
    result = verify(copy, tiny)
    assert errors(result)["M27-O003"] == LAYER
    finding = next(f for f in result.findings if f.check.code == "M27-O003")
    told = float(re.search(r"about ([\d.]+) times", finding.message)[1])  # type: ignore[index]
    assert told == pytest.approx(factor, rel=0.1)


def test_a_layer_s_wrong_scale_is_named_without_a_source(copy: Path) -> None:
    scale(copy, "w1|w2|w3", 4.0)
    assert errors(verify(copy)) == {"M27-O002": LAYER}


def test_scales_that_are_too_small_are_suspected_without_a_source(copy: Path) -> None:
    scale(copy, "w1|w3", 0.25)
    result = verify(copy)
    assert errors(result) == {}
    assert [f.layer for f in result.findings if f.check.code == "M27-O014"] == [LAYER]


def test_a_kernel_that_computes_something_else_is_named(nvfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = nvfp4_moe.moe

    def wrong(x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        return right(x, *args, **more) * 1.05

    monkeypatch.setattr(nvfp4_moe, "moe", wrong)
    found = errors(verify(nvfp4))
    assert "M27-O001" in found


def test_a_tokenizer_class_that_breaks_spaces_is_named(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    result = verify(copy)
    assert "M27-O004" in errors(result)
    assert "GPT2Tokenizer" in next(f.message for f in result.findings if f.check.code == "M27-O004")


@pytest.mark.parametrize("name", ["NoSuchTokenizer", 3, None, "PreTrainedTokenizerFast"])
def test_other_classes_are_no_finding_of_the_tokenizer_s(copy: Path, name: object) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": name}))
    found = Findings()
    check_tokenizer_class(copy, found)
    assert {f.check.code for f in found.finish()} <= {"M27-O004"}
    if name == "PreTrainedTokenizerFast":
        assert not found.finish()


@pytest.mark.parametrize("name", ["tiny-m27-dflash", "tiny-m27-eagle3"])
def test_a_drafter_passes(nvfp4: Path, repository: Path, name: str) -> None:
    result = verify(nvfp4, drafter=repository / "examples" / name)
    assert errors(result) == {}
    drafter = result.facts["outputs"]["drafter"]
    assert drafter["is_lossless"] is True
    assert drafter["tau"] > 1.5
    assert drafter["m_accept_by_shift"]["0"] == max(drafter["m_accept_by_shift"].values())


def test_shifted_taps_are_named(nvfp4: Path, repository: Path, tmp_path: Path) -> None:
    drafter = Path(shutil.copytree(repository / "examples/tiny-m27-dflash", tmp_path / "drafter"))
    config = json.loads((drafter / "config.json").read_text())
    taps = config["dflash_config"]["target_layer_ids"]
    config["dflash_config"]["target_layer_ids"] = [tap + 1 for tap in taps]
    (drafter / "config.json").write_text(json.dumps(config))
    assert "M27-O011" in errors(verify(nvfp4, drafter=drafter))


def test_without_a_drafter_nothing_is_drafted(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(nvfp4, drafter=None)
    assert "drafter" not in result.facts["outputs"]
    assert main(["verify", str(nvfp4), "--outputs", "--max-tokens", "8", "--no-progress", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_prompts_file_takes_the_place_of_the_prompts(nvfp4: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import os\\n"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    result = verify(nvfp4, outputs=OutputsOptions(prompts=path, max_tokens=4, num_experts=1))
    answers = result.facts["outputs"]["answers"]
    assert len(answers) == 2
    assert answers[0]["name"].endswith("line 1")


def test_a_checkpoint_with_errors_is_not_run(copy: Path) -> None:
    change(
        copy,
        r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w1\.weight_scale_2",
        lambda t: t * float("nan"),
    )
    result = verify(copy)
    assert not result.ok
    assert "not_run" in result.facts["outputs"] or "M27-O005" in errors(result)


def test_every_output_format_takes_it(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("human", "json", "junit", "sarif", "github", "gitlab"):
        arguments = ["verify", str(nvfp4), "--outputs", "--max-tokens", "2", "--output-format", kind]
        assert main(arguments) == 0
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max-tokens", "4"), "--max-tokens is of --outputs"),
        (("--prompts", "x.jsonl"), "--prompts is of --outputs"),
        (("--activations", "bf16"), "--logits and --outputs"),
        (("--quick", "--outputs"), "--quick"),
        (("--outputs", "--prompts", "no-such.jsonl"), "no-such.jsonl"),
        (("--outputs", "--device", "cuda:9"), "cuda:9"),
    ],
)
def test_what_does_not_go_together_is_said(
    nvfp4: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(nvfp4), *arguments]) in (2, 3, 4)
    assert said in capsys.readouterr().err


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        OutputsOptions(max_tokens=0)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("See SPEC. md for more.", 1),
        ("See SPEC.md for more.", 0),
        ("import os. path", 1),
        ("os.path.join(a, b)", 0),
        ("I don 't know, it 's fine", 2),
        ("I don't know. It's fine. The end.", 0),
        ("main .py and notes. txt", 2),
        ("We use Go. It is fast. See the file. Then", 0),
        ("self. items.append(x)", 1),
    ],
)
def test_spaces_that_nobody_writes(text: str, count: int) -> None:
    assert len(spurious_spaces(text)) == count


def test_health_in_shares() -> None:
    found = health(["a b c d", "x\N{REPLACEMENT CHARACTER}yz"], [list(range(10)), [1, 2] * 10])
    assert found.broken_characters == pytest.approx(1 / 11)
    assert found.repetition == pytest.approx((13 - 2) / (3 + 13))
    assert health([], []).repetition == 0
