"""What an evaluation says, against transformers' own logits, hidden states and routing, and plain formulas."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from m27quant import Evaluation, Limits, evaluate
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import QuantizedSource
from m27quant.errors import CheckpointError, Interrupted, M27Error, UsageError
from m27quant.evaluation.lockstep import measure
from m27quant.evaluation.models import open_candidate, open_reference
from m27quant.progress import Progress
from m27quant.runtime.streamed import Precision, logits
from tests.checkpoints import read_tensors, write_checkpoint
from tests.evaluation.conftest import Files
from tests.oracles import forward
from tests.runtime.test_against_transformers import transformers_model
from tests.tolerance import EVALUATION_RTOL

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch deprecate things of each other


@dataclass(frozen=True)
class Seen:
    """What transformers computes of each window, one after another."""

    log_p: torch.Tensor
    """F64 [T, V]."""
    x: list[torch.Tensor]
    """F64 [T, D] behind each layer."""
    experts: list[torch.Tensor]
    """int64 [T, K] of each layer, in ascending order."""


def windows_of(rows: Path) -> list[torch.Tensor]:
    return [torch.tensor(json.loads(line)["input_ids"]) for line in rows.read_text().splitlines()]


@torch.no_grad()
def seen(model: Any, windows: list[torch.Tensor]) -> Seen:
    layers = model.model.layers
    x: list[list[torch.Tensor]] = [[] for _ in layers]
    experts: list[list[torch.Tensor]] = [[] for _ in layers]
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *a, i=i: x[i].append(a[2][0].double()))
        layer.mlp.gate.register_forward_hook(lambda *a, i=i: experts[i].append(a[2][2].sort(-1).values))
    log_p = [
        model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1) for ids in windows
    ]
    return Seen(torch.cat(log_p), [torch.cat(parts) for parts in x], [torch.cat(parts) for parts in experts])


def with_nvfp4_experts(model: Any, checkpoint: Path) -> Any:
    """transformers' model with its experts' weights as the NVFP4 checkpoint means them, unpacked by the oracle."""
    t = read_tensors(checkpoint)

    def weight(module: str) -> torch.Tensor:
        return forward.unpack(
            t[f"{module}.weight"], t[f"{module}.weight_scale"], t[f"{module}.weight_scale_2"]
        ).float()

    for i, layer in enumerate(model.model.layers):
        for e in range(layer.mlp.experts.num_experts):
            w1, w2, w3 = (
                weight(f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}") for w in ("w1", "w2", "w3")
            )
            layer.mlp.experts.gate_up_proj.data[e] = torch.cat((w1, w3))
            layer.mlp.experts.down_proj.data[e] = w2
    return model


def run(files: Files, *candidates: Path, **more: Any) -> Evaluation:
    plain: dict[str, Any] = {
        "activations": ["bf16"],
        "kv_cache_dtypes": ["bf16"],
        "device": "cpu",
        "num_prompts": 0,
    }
    plain |= {"reference": files.reference, "dataset": files.rows}
    return evaluate(candidates, **(plain | more))


@pytest.fixture(scope="module")
def both(files: Files) -> Evaluation:
    return run(files, files.max, files.mse)


def test_figures_are_those_of_transformers(files: Files, both: Evaluation, tmp_path: Path) -> None:
    """Weights alone are rounded: all else that transformers computes is what we compute."""
    windows = windows_of(files.rows)
    p = seen(transformers_model(files.reference, tmp_path / "p"), windows)
    q = seen(with_nvfp4_experts(transformers_model(files.reference, tmp_path / "q"), files.max), windows)
    row = both.candidates[0]
    near = lambda value: pytest.approx(value, rel=EVALUATION_RTOL)  # noqa: E731

    kl = F.kl_div(q.log_p, p.log_p, reduction="none", log_target=True).sum(-1)
    assert row.kl_mean.value == near(float(kl.mean()))
    assert row.kl_max == near(float(kl.max()))
    assert row.kl_p99.value == near(float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]))

    def nll(log_p: torch.Tensor) -> float:
        """Each window alone: its last token predicts nothing."""
        of_windows = torch.split(log_p, [len(ids) for ids in windows])
        losses = [
            F.nll_loss(own[:-1], ids[1:], reduction="none")
            for own, ids in zip(of_windows, windows, strict=True)
        ]
        return float(torch.cat(losses).mean())

    assert both.reference_perplexity.value == near(math.exp(nll(p.log_p)))
    assert row.perplexity.value == near(math.exp(nll(q.log_p)))
    assert row.perplexity_ratio.value == near(math.exp(nll(q.log_p) - nll(p.log_p)))
    assert row.top1.value == float((p.log_p.argmax(-1) == q.log_p.argmax(-1)).double().mean())
    eight = [{*log_p.topk(8).indices.tolist()} for log_p in p.log_p]
    ours = [{*log_p.topk(8).indices.tolist()} for log_p in q.log_p]
    assert row.top8.value == near(sum(len(a & b) for a, b in zip(eight, ours, strict=True)) / 8 / len(eight))
    for layer in range(2):
        same = (p.experts[layer] == q.experts[layer]).all(-1).double().mean()
        assert row.router[layer].value == near(float(same))
        noise = (p.x[layer] - q.x[layer]).square().sum()
        sqnr = 10 * math.log10(float(p.x[layer].square().sum() / noise))
        assert row.layer_sqnr_db[layer].value == pytest.approx(sqnr, abs=0.01)
    assert 0.3 < row.top1.value < 1
    assert row.router[1].value < 1, "nothing to compare where no router changes its mind"


def test_every_figure_lies_in_its_interval(both: Evaluation) -> None:
    for row in both.candidates:
        for e in (row.perplexity, row.perplexity_ratio, row.kl_mean, row.kl_p99, row.top1, row.top8,
                  *row.router, *row.layer_sqnr_db):  # fmt: skip
            assert e.low <= e.value <= e.high
        assert row.kl_mean.low < row.kl_mean.value < row.kl_p99.value <= row.kl_max
    assert both.num_windows == 10
    assert both.num_tokens == sum(map(len, windows_of(Path(both.dataset[0]))))
    assert [row.label for row in both.candidates] == ["max", "mse"]
    assert {row.mode for row in both.candidates} == {"W4A16, BF16 KV"}


def test_pairs_compare_the_same_windows(both: Evaluation) -> None:
    a, b = both.candidates
    by_metric = {pair.metric: pair for pair in both.pairs}
    assert set(by_metric) == {"kl", "nll", "top1", "top8"}
    assert all((pair.a, pair.b) == ("max", "mse") for pair in both.pairs)
    assert by_metric["kl"].difference == pytest.approx(a.kl_mean.value - b.kl_mean.value)
    nll = math.log(a.perplexity.value) - math.log(b.perplexity.value)
    assert by_metric["nll"].difference == pytest.approx(nll)
    assert by_metric["top8"].difference == pytest.approx(a.top8.value - b.top8.value)
    for pair in both.pairs:
        assert pair.low <= pair.difference <= pair.high
        assert pair.p * 2**10 == int(pair.p * 2**10) > 0, "ten windows: all ways to flip signs are tried"
    assert by_metric["kl"].difference > 0, "mse has the smaller error"


def test_modes_are_rows_and_round_what_they_say(files: Files) -> None:
    """W4A4 and an FP8 cache against one window's logits at a time, as `runtime.streamed` computes them."""
    result = run(files, files.max, activations=["nvfp4", "bf16"], kv_cache_dtypes=["auto", "bf16"])
    modes = [(row.activations, row.kv_cache_dtype) for row in result.candidates]
    assert modes == [("nvfp4", "fp8"), ("nvfp4", "bf16"), ("bf16", "fp8"), ("bf16", "bf16")]
    assert result.candidates[0].label == "max (nvfp4, fp8)"
    assert len(result.pairs) == 6 * 4
    windows = windows_of(files.rows)
    with QuantizedSource(Location(files.max)) as ours:
        for row, mode in zip(result.candidates, modes, strict=True):
            alone = [logits(ours, ids, precision=Precision(*mode)) for ids in windows]
            losses = [
                F.cross_entropy(own[:-1].double(), ids[1:], reduction="none")
                for own, ids in zip(alone, windows, strict=True)
            ]
            nll = float(torch.cat(losses).mean())
            assert math.log(row.perplexity.value) == pytest.approx(nll, rel=1e-3), mode  # a code may flip
    assert result.candidates[0].kl_mean.value > 1.2 * result.candidates[3].kl_mean.value


def test_a_model_against_itself(files: Files) -> None:
    row = run(files, files.reference).candidates[0]
    assert not row.is_quantized
    assert row.kl_max == 0
    assert row.perplexity_ratio.value == row.perplexity_ratio.high == 1
    assert row.top1.low == row.top8.low == min(e.low for e in row.router) == 1
    assert {e.value for e in row.layer_sqnr_db} == {math.inf}


def test_neither_batches_nor_company_change_a_figure(files: Files, both: Evaluation) -> None:
    """But for the last bits of products of other shapes."""
    alone = run(files, files.mse).candidates[0]
    assert alone == both.candidates[1]
    first = open_reference("fp8", Location(files.reference))
    ours = open_candidate("mse", Location(files.mse), first, ["bf16"], ["bf16"])
    windows = windows_of(files.rows)
    with first.source, ours.source:
        measured = measure(first, [ours], windows, device=torch.device("cpu"), batch_tokens=50)
    kl = measured.rows[0].scores.kl
    assert float(kl.mean()) == pytest.approx(alone.kl_mean.value, rel=EVALUATION_RTOL)


def broken(files: Files, folder: Path) -> Path:
    """A checkpoint whose first expert's products overflow."""
    tensors = read_tensors(files.max)
    for projection in ("w1", "w3"):  # no weight does, and no input of a norm: that would make 0 of it
        tensors[f"model.layers.0.block_sparse_moe.experts.0.{projection}.weight_scale_2"].fill_(1e25)
    config = json.loads((files.max / "config.json").read_text())
    return write_checkpoint(folder / "broken", tensors=tensors, config=config)


def test_what_is_no_number_is_counted_and_fails(files: Files, both: Evaluation, tmp_path: Path) -> None:
    result = run(files, files.max, broken(files, tmp_path))
    whole, row = result.candidates
    assert whole == both.candidates[0], "one candidate's fault is not the others'"
    assert 0 < row.non_finite <= result.num_tokens
    for figure in (row.kl_mean, row.kl_p99, row.perplexity, row.top1, row.layer_sqnr_db[0]):
        assert math.isnan(figure.value)
        assert math.isnan(figure.low)
    assert all(math.isnan(pair.p) for pair in result.pairs)
    assert result.failures == (
        f"broken: {row.non_finite:,} of {result.num_tokens:,} tokens get NaN or infinite logits",
    )
    with pytest.raises(CheckpointError, match="nothing can be compared"):
        evaluate(files.max, reference=tmp_path / "broken", dataset=files.rows, device="cpu")


def test_limits(files: Files, both: Evaluation) -> None:
    kl, top1 = both.candidates[0].kl_mean.value, both.candidates[0].top1.value
    kept = run(files, files.max, limits=Limits(max_kl=kl, min_top1=top1, max_ppl_ratio=10))
    assert kept.ok
    missed = run(files, files.max, limits=Limits(max_kl=kl * 0.99, min_top1=1.0, max_ppl_ratio=0.5))
    assert [line.partition(" is ")[0] for line in missed.failures] == [
        "max: mean KL divergence", "max: top-1 agreement", "max: perplexity ratio",
    ]  # fmt: skip
    for bad in ({"max_kl": -1.0}, {"min_top1": 1.1}, {"max_ppl_ratio": math.nan}):
        with pytest.raises(UsageError):
            Limits(**bad)


@pytest.mark.parametrize(
    ("more", "fault", "words"),
    [
        ({"seq_len": 1}, UsageError, "2 to 1024"),
        ({"seq_len": 4096}, UsageError, "2 to 1024"),
        ({"num_samples": 0}, UsageError, "there must be one"),
        ({"activations": ["fp4"]}, UsageError, "fp4"),
        ({"kv_cache_dtypes": ["int8"]}, UsageError, "int8"),
        ({"dataset": "/nowhere.txt"}, UsageError, "no such file"),
        ({"reference": "/nowhere"}, CheckpointError, "no such folder"),
    ],
)
def test_what_cannot_be_evaluated(
    more: dict[str, Any], fault: type[M27Error], words: str, files: Files
) -> None:
    asked: dict[str, Any] = {"reference": files.reference, "dataset": files.rows} | more
    with pytest.raises(fault, match=words):
        evaluate(files.max, **asked, device="cpu")


def test_candidates_that_do_not_go_together(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        run(files, files.max, files.max)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        run(files)
    config = json.loads((files.max / "config.json").read_text()) | {"rope_theta": 5}
    other = write_checkpoint(tmp_path / "other", tensors=read_tensors(files.max), config=config)
    with pytest.raises(CheckpointError, match="other: rope_theta is 5"):
        run(files, other)
    (tmp_path / "one.jsonl").write_text('{"input_ids": [7]}\n')
    with pytest.raises(UsageError, match="no window holds two tokens"):
        run(files, files.max, dataset=tmp_path / "one.jsonl")


def test_it_tells_how_far_it_is_and_can_be_stopped(files: Files) -> None:
    told: list[Progress] = []

    def stop() -> None:
        if told and told[-1].fraction == 0.5:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run(files, files.max, progress=told.append, stop=stop)
    expected = [
        i / 36 for i in range(19)
    ]  # two layers of two models with six experts, and logits: half of it
    assert [p.fraction for p in told] == pytest.approx(expected)
    assert [p.layer for p in told] == [0] * 12 + [1] * 7


@pytest.mark.gpu
def test_a_gpu_says_the_same(files: Files, both: Evaluation) -> None:
    there = run(files, files.max, files.mse, device="cuda")
    for ours, row in zip(both.candidates, there.candidates, strict=True):
        assert row.kl_mean.value == pytest.approx(ours.kl_mean.value, rel=0.01)
        assert row.perplexity.value == pytest.approx(ours.perplexity.value, rel=EVALUATION_RTOL)
