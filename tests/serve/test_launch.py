"""What is decided for a way of serving: arithmetic, spreads, drafters, and a command that a shell takes as it is."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from m27quant.checkpoint.config import parse_config
from m27quant.errors import CheckpointError, FindingsError, M27Error, UsageError
from m27quant.serve import detect
from m27quant.serve.compose import compose_file
from m27quant.serve.launch import LaunchOptions, plan_launch
from m27quant.serve.memory_fit import ROUND, DrafterSize, fit
from m27quant.serve.speculation import Wish
from m27quant.verify.engines_data import GPUS
from m27quant.verify.serving import memory
from tests.checkpoints import Shape
from tests.serve import full_size
from tests.serve.test_golden import quickly
from tests.verify.sparse import M27, write_sparse

ONE_LAYER = replace(M27, num_hidden_layers=1)
"""M2.7's widths: what divides there divides here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of M2.7 beside drafters of full size."""
    folder = tmp_path_factory.mktemp("models")
    write_sparse(folder / "m27", ONE_LAYER)
    taps = {"dflash_config": {"target_layer_ids": [0], "mask_token_id": 9}, "num_hidden_layers": 1}
    full_size.write_drafter(folder / "dflash", full_size.DFLASH | taps)
    return folder


def launch(model: Path, **options: Any) -> Any:
    return plan_launch(model, LaunchOptions(**{"engine": "vllm", "gpu": "b200", "level": "quick"} | options))


def flags(planned: Any) -> dict[str, str | None]:
    return {c.flag.name: c.value for c in planned.choices}


# -- memory ----------------------------------------------------------------------------------------


def test_the_sum_for_the_real_model() -> None:
    """134.5 GB of weights and 126,976 bytes of FP8 cache a token, by hand."""
    c = parse_config(M27.config(fp8=False) | {"max_position_embeddings": 204_800, "rope_theta": 5_000_000})
    needed = memory(c, 1, 1, 1, fp8_cache=True)
    assert round(needed.weights / 1e9, 1) == 134.5
    assert needed.cache_per_token == 62 * 2 * 8 * 128
    b200 = GPUS["b200"]
    found = fit(needed, c, b200, tp=1, slices=1, share=0.9, steps_inside=False)
    assert found.tokens == (int(0.9 * b200.memory_bytes) - needed.weights) // 126_976
    assert (found.context, found.fits) == (204_800, True)
    h200 = fit(needed, c, GPUS["h200"], tp=1, slices=1, share=0.9, steps_inside=False)
    assert (h200.context % ROUND, h200.fits) == (0, h200.tokens >= 8192)
    drafter = DrafterSize(weights=2**30, cache_per_token=1024)
    smaller = fit(needed, c, b200, tp=1, slices=1, share=0.9, steps_inside=True, drafter=drafter)
    assert smaller.usable - smaller.weights - smaller.drafter - smaller.steps >= 0
    assert smaller.tokens < found.tokens
    assert "drafter 1.0 GiB" in smaller.describe()
    assert f"{smaller.tokens:,} tokens" in smaller.describe()


def test_a_context_that_memory_cuts_short(m27: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m27quant.serve.launch.verify_checkpoint", quickly)
    planned = launch(m27, tp=1, memory_share=0.75)
    context = int(flags(planned)["--max-model-len"] or 0)
    fitted = planned.setup.fit
    assert 8192 <= context < 204_800
    assert fitted.weights + fitted.steps + context * fitted.cache_per_token <= fitted.usable
    assert fitted.weights + fitted.steps + (context + ROUND) * fitted.cache_per_token > fitted.usable
    with pytest.raises(FindingsError, match=r"M27-V004: weights 125\.3 GiB .* on each of 1 b200"):
        launch(m27, tp=1, memory_share=0.73, max_model_len=100_000)
    assert launch(m27, gpu="rtx-pro-6000").setup.tp == 2  # the fewest that hold it


# -- spreads ---------------------------------------------------------------------------------------


def test_whole_experts_where_slices_would_be_too_narrow(models: Path) -> None:
    planned = launch(models / "m27", gpu="rtx-pro-6000", tp=16)
    assert "--enable-expert-parallel" in flags(planned)
    assert planned.setup.nnodes == 2
    assert flags(launch(models / "m27", engine="sglang", gpu="rtx-pro-6000", tp=16))["--ep-size"] == "16"
    assert "--enable-expert-parallel" not in flags(launch(models / "m27", tp=16))  # trtllm pads
    padded = launch(models / "m27", gpu="rtx-pro-6000", tp=48)  # 256 experts do not divide among 48
    assert flags(padded)["--moe-backend"] == "marlin"
    with pytest.raises(FindingsError, match="M27-V001"):
        launch(models / "m27", tp=3)


def test_data_parallel_experts(models: Path) -> None:
    planned = flags(launch(models / "m27", tp=2, ep=8))
    assert planned["--data-parallel-size"] == "4"
    assert planned["--moe-backend"] == "flashinfer_cutedsl"
    with pytest.raises(FindingsError, match="M27-V003"):
        launch(models / "m27", tp=2, ep=3)


def test_machines(models: Path) -> None:
    second = launch(models / "m27", gpu="gb10", tp=2, node_rank=1, master="10.0.0.1")
    assert flags(second)["--node-rank"] == "1"
    assert "--headless" in flags(second)
    assert flags(second)["--master-addr"] == "10.0.0.1"
    with pytest.raises(UsageError, match="--node-rank 2"):
        launch(models / "m27", gpu="gb10", tp=2, node_rank=2)


# -- drafters --------------------------------------------------------------------------------------


def eagle3(folder: Path, **changes: Any) -> Path:
    config = full_size.EAGLE3 | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}} | changes
    return full_size.write_drafter(folder, config)


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    return write_sparse(tmp_path / "eight", replace(M27, num_hidden_layers=8, num_local_experts=16))


def test_taps_in_each_engines_own_terms(eight: Path, tmp_path: Path) -> None:
    """The same head: nested ids that are vLLM's defaults, others, and top-level ones."""
    planned = launch(eight, drafter=str(eagle3(tmp_path / "a")))
    assert planned.environment == {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    assert planned.notes == ()
    other = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}}
    (note,) = launch(eight, drafter=str(eagle3(tmp_path / "b", **other))).notes
    assert "will take hidden states [2, 4, 5] for this drafter's [1, 3, 6]" in note
    both = other | {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    planned = launch(eight, drafter=str(eagle3(tmp_path / "c", **both)))
    assert (planned.environment, planned.notes) == ({}, ())
    top = {"eagle_config": {}, "eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    planned = launch(eight, engine="sglang", drafter=str(eagle3(tmp_path / "d", **top)))
    assert "M27-R022" in [f.check.code for f in planned.findings]


def test_drafts_that_go_and_that_do_not(models: Path, eight: Path, tmp_path: Path) -> None:
    head, block = str(eagle3(tmp_path / "head")), str(models / "dflash")
    tree = launch(eight, engine="sglang", drafter=head, wish=Wish(eagle_topk=4))
    assert flags(tree)["--attention-backend"] == "flashinfer"  # trtllm_mha takes chains alone
    assert flags(tree)["--speculative-num-draft-tokens"] == "8"
    chain = launch(eight, engine="sglang", drafter=head, wish=Wish(num_steps=5))
    assert flags(chain)["--speculative-num-draft-tokens"] == "6"
    config = flags(launch(models / "m27", drafter=block, wish=Wish(num_draft_tokens=4)))[
        "--speculative-config"
    ]
    assert json.loads(config or "")["num_speculative_tokens"] == 4
    with pytest.raises(UsageError, match="never trees: --eagle-topk 4"):
        launch(eight, drafter=head, wish=Wish(eagle_topk=4))
    with pytest.raises(UsageError, match="a block of 8 drafts 7 at most"):
        launch(models / "m27", drafter=block, wish=Wish(num_draft_tokens=8))
    with pytest.raises(UsageError, match="--num-steps is for EAGLE3"):
        launch(models / "m27", drafter=block, wish=Wish(num_steps=2))
    with pytest.raises(FindingsError, match="M27-R029") as refused:
        launch(models / "m27", engine="sglang", drafter=block)
    assert "--engine vllm" in (refused.value.hint or "")


def test_a_faulty_drafter_is_named(eight: Path, tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match="M27-R009"):
        launch(eight, drafter=str(eagle3(tmp_path / "narrow", target_hidden_size=1024)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FindingsError, match="M27-R001"):
        launch(eight, drafter=str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="no such folder"):
        launch(eight, drafter=str(tmp_path / "gone"))


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "it's", 'q"uote', "$HOME `id` ;x", "-rf", "ünï"])
def test_a_shell_takes_it_as_it_is(name: str, tmp_path: Path) -> None:
    model = write_sparse(tmp_path / name, Shape())
    planned = launch(model, engine="sglang", served_name="x y", has_key=True)
    show = 'sglang() { printf "%s\\0" "$@"; }\n'
    said = subprocess.run(
        ["sh", "-c", show + planned.shell()],
        capture_output=True,
        check=True,
        env={"M27QUANT_API_KEY": "k e y"},
    ).stdout
    assert said.decode().split("\0")[:-1] == planned.argv("k e y")[1:]
    assert "k e y" not in planned.shell()
    assert str(model) in planned.argv()


def test_the_key_is_in_vllms_environment_alone(models: Path) -> None:
    planned = launch(models / "m27", has_key=True)
    assert planned.shell().startswith('VLLM_API_KEY="$M27QUANT_API_KEY" \\\n')
    assert "--api-key" not in planned.argv()


def test_a_name_that_no_terminal_shows(tmp_path: Path) -> None:
    model = write_sparse(tmp_path / "a\x1b[2Jb", Shape())
    with pytest.raises(UsageError, match="cannot be printed"):
        launch(model)


def test_plain_data(models: Path) -> None:
    planned = launch(models / "m27", tp=2)
    document = json.loads(json.dumps(planned.document()))
    assert document["command"] == planned.argv()
    assert all(flag["why"] for flag in document["flags"])
    assert shlex.split(document["shell"].replace("\\\n", "")) == document["command"]


def test_a_hub_id_is_pinned_to_its_commit(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m27quant.checkpoint.hub import Location

    commit = "0123456789abcdef0123456789abcdef01234567"
    found = {
        "org/name": Location(models / "m27", "org/name", commit),
        "org/draft": Location(models / "dflash", "org/draft", commit[::-1]),
    }
    monkeypatch.setattr("m27quant.serve.launch.find_checkpoint", lambda name, **_: found[name])
    planned = plan_launch(
        "org/name", LaunchOptions(engine="vllm", gpu="b200", level="quick", drafter="org/draft")
    )
    assert planned.argv()[:3] == ["vllm", "serve", "org/name"]
    assert flags(planned)["--revision"] == commit
    config = json.loads(flags(planned)["--speculative-config"] or "")
    assert (config["model"], config["revision"]) == ("org/draft", commit[::-1])
    service = yaml.safe_load(compose_file(planned))["services"]["m27"]
    assert service["command"][0] == "org/name"
    assert [v["type"] for v in service["volumes"]] == ["volume"]
    assert "HF_HUB_OFFLINE" not in service["environment"]


# -- GPUs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("NVIDIA B200\n" * 8, ("b200", 8)),
        ("NVIDIA B300 SXM6 AC\n", ("b300", 1)),
        ("NVIDIA GB200\n" * 4, ("gb200", 4)),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition\n" * 2, ("rtx-pro-6000", 2)),
        ("NVIDIA GB10\n", ("gb10", 1)),
        ("NVIDIA H200 NVL\nNVIDIA T1000\n", ("h200", 1)),
        ("NVIDIA H100 80GB HBM3\n", ("h100", 1)),
        ("NVIDIA GH200 480GB\n", None),
        ("NVIDIA RTX 6000 Ada Generation\n", None),
        ("", None),
    ],
)
def test_gpus_of_this_machine(
    said: str, found: tuple[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if found is None:
        with pytest.raises(UsageError) as refused:
            detect.detect_gpus()
        assert "--gpu" in (refused.value.hint or "")
    else:
        assert detect.detect_gpus() == found


def test_without_nvidia_smi_or_with_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no GPU was found"):
        detect.detect_gpus()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho driver mismatch >&2; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    with pytest.raises(M27Error, match="nvidia-smi failed: driver mismatch"):
        detect.detect_gpus()


def test_no_more_gpus_than_there_are(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m27quant.serve.launch.detect_gpus", lambda: ("b200", 2))
    assert launch(models / "m27", gpu=None).setup.tp == 1
    with pytest.raises(UsageError, match="--tp 4"):
        launch(models / "m27", gpu=None, tp=4)
