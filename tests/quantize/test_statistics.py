"""Recipes that pack by statistics of inputs: the same bytes however the work is done, and what rules them out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import m27quant.calib.memory
import m27quant.prepare
from m27quant import dry_run
from m27quant.calib.hessians import hessian_bytes, hessians_on_disk
from m27quant.calib.memory import MemoryPlan, plan_memory
from m27quant.calib.moments import moments_bytes, moments_on_disk
from m27quant.checkpoint.config import parse_config
from m27quant.distributed.join import LOOPBACK, Meeting, call
from m27quant.errors import RecipeError, UsageError
from m27quant.progress import Progress
from tests.quantize.models import SHAPES, Model, quantized, random_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A recipe, a model for it, and what one process with ample memory makes of it."""

    method: str
    recipe: str
    model: Model
    out: Path


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Any:
    """About one row of tokens to a chunk, so that there are some to deal out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m27quant.calib.memory, "CHUNK_TOKENS", {"cpu": 40})
        yield


@pytest.fixture(scope="module", params=[("awmse", "gqa2"), ("gptq", "gqa1")], ids=["awmse", "gptq"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    method, shape = request.param
    recipe = f"nvfp4_experts_only_{method}-fp8_kv"
    model = random_model(tmp_path_factory.mktemp("model"), SHAPES[shape])
    return Case(
        method, recipe, model, quantized(model, tmp_path_factory.mktemp(method) / "out", recipe=recipe)
    )


def assert_same_files(a: Path, b: Path) -> None:
    names = {p.name for p in a.iterdir() if p.is_file()}
    assert names == {p.name for p in b.iterdir() if p.is_file()}
    assert [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()] == []


@pytest.mark.parametrize(("rows_in_memory", "expert_group"), [(False, 1), (True, 2)])
def test_memory_does_not_change_a_byte(
    rows_in_memory: bool, expert_group: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*args: Any, **kwargs: Any) -> MemoryPlan:
        found = plan_memory(*args, **kwargs)
        return replace(found, rows_in_memory=rows_in_memory, expert_group=expert_group)

    monkeypatch.setattr(m27quant.prepare, "plan_memory", plan)
    assert_same_files(case.out, quantized(case.model, tmp_path / "out", recipe=case.recipe))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_not_change_a_byte(size: int, case: Case, tmp_path: Path) -> None:
    meeting = Meeting()
    target = tmp_path / "out"

    def work(rank: int) -> None:
        me = meeting.open(size, lambda: None) if not rank else call(
            LOOPBACK, meeting.port, meeting.secret, rank, size
        )  # fmt: skip
        try:
            quantized(case.model, target, recipe=case.recipe, ranks=me)
        finally:
            me.close()

    case.model.write_rows(tmp_path / "rows.jsonl")
    with ThreadPoolExecutor(size) as threads:
        for done in [threads.submit(work, rank) for rank in range(size)]:
            done.result(timeout=120)
    assert threading.active_count() < 50
    assert_same_files(case.out, target)


@pytest.mark.parametrize(("stage", "after"), [("experts", 0.3), ("pack", 0.5)])
def test_stopped_and_resumed_gives_the_same_files(
    stage: str, after: float, case: Case, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.layer == 1 and progress.stage == stage and progress.fraction > after:
            raise Stopped

    again = tmp_path / "again"
    with pytest.raises(Stopped):
        quantized(case.model, again, recipe=case.recipe, progress=stop)
    with pytest.raises(UsageError):  # the journal is of another recipe
        quantized(case.model, again, resume=True)
    quantized(case.model, again, recipe=case.recipe, resume=True)
    assert_same_files(case.out, again)


def test_progress_never_goes_back(case: Case, tmp_path: Path) -> None:
    seen: list[float] = []
    quantized(case.model, tmp_path / "out", recipe=case.recipe, progress=lambda p: seen.append(p.fraction))
    begun = seen.index(min(seen))
    assert seen[begun:] == sorted(seen[begun:])


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_dry_run_counts_the_statistics(ranks: int, case: Case, tmp_path: Path) -> None:
    config = parse_config(case.model.raw_config)
    rows = case.model.write_rows(tmp_path / "rows.jsonl")
    common: dict[str, Any] = {
        "dataset": [str(rows)], "num_samples": 7, "device": "cpu", "max_memory": 2**33, "ranks": ranks,
    }  # fmt: skip
    plain = dry_run(str(case.model.folder), tmp_path / "out", **common)
    found = dry_run(str(case.model.folder), tmp_path / "out", recipe=case.recipe, **common)
    memory, disk = moments_bytes(config, CPU), moments_on_disk(config) * (ranks > 1)
    if case.method == "gptq":
        always, per_expert = hessian_bytes(config, CPU)
        inputs, activations = hessians_on_disk(config)
        memory += always + config.num_local_experts * per_expert
        disk = activations + max(disk, inputs) * (ranks > 1)
    assert found.peak_memory_bytes - plain.peak_memory_bytes == pytest.approx(memory, abs=2**24)
    assert found.peak_disk_bytes - plain.peak_disk_bytes == ranks * disk
    assert found.output_shard_bytes == plain.output_shard_bytes


def test_what_the_statistics_rule_out_is_refused(case: Case, tmp_path: Path) -> None:
    ranges = quantized(case.model, tmp_path / "ranges", calibrate_only=True) / "calibration.json"
    again: dict[str, Any] = {"recipe": case.recipe, "dataset": (), "num_samples": None}
    with pytest.raises(RecipeError, match="needs every expert to see every token"):
        quantized(case.model, tmp_path / "out", recipe=case.recipe, moe_calib="natural")
    for options in ({"ranges": str(ranges)}, {"ranges": str(ranges), "layers": (0, 1)}):
        with pytest.raises(UsageError, match=r"which calibration\.json does not hold") as caught:
            quantized(case.model, tmp_path / "out", **again, **options)
        assert "in one run" in caught.value.hint
    with pytest.raises(UsageError, match=r"which calibration\.json does not hold"):
        quantized(case.model, tmp_path / "out", recipe=case.recipe, calibrate_only=True)
    assert not (tmp_path / "out").exists()
