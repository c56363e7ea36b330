"""On-policy data: a sample follows from its number alone, and a killed run leaves what an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import m27quant
from m27quant import RunOptions, SamplingParams
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.drafters.generate import DataOptions, DataResult, generate_drafter_data
from m27quant.drafters.heldout import heldout_samples
from m27quant.drafters.prompts import Prompts
from m27quant.drafters.samples import read_manifest, read_samples
from m27quant.drafters.text_data import Cut, open_source
from m27quant.errors import Interrupted, M27Error

SAMPLED = SamplingParams(max_tokens=6, temperature=1.0)
OPTIONS = DataOptions(num_samples=12, sampling=SAMPLED, shard_size=5, seed=3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt_token_ids": chance.choices(range(256), k=chance.randint(1, 20))} for _ in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def make(random_target: Path, prompts: Path) -> Callable[..., DataResult]:
    def generate(out: Path, options: DataOptions = OPTIONS, concurrency: int = 4, **more: Any) -> DataResult:
        run_options = RunOptions(max_num_seqs=concurrency)
        return generate_drafter_data(random_target, [prompts], out, options, run_options=run_options, **more)

    return generate


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(make: Callable[..., DataResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run; to be read only."""
    out = tmp_path_factory.mktemp("whole") / "data"
    make(out)
    return out


def test_what_is_made(
    make: Callable[..., DataResult], whole: Path, random_target: Path, prompts: Path
) -> None:
    assert sorted(files(whole)) == ["manifest.json", *(f"shard-0000{i}.jsonl" for i in range(3))]
    manifest = read_manifest(whole)
    assert (manifest["finished"], manifest["samples"], manifest["failed"]) == (True, 12, 0)
    assert [shard["samples"] for shard in manifest["shards"]] == [5, 5, 2]
    samples = read_samples(whole)
    assert [sample.id for sample in samples] == [str(i) for i in range(12)]
    assert manifest["tokens"] == sum(sum(sample.loss_mask) for sample in samples)
    rows = [json.loads(line)["prompt_token_ids"] for line in prompts.read_text().splitlines()]
    assert [sample.ids[: sample.num_prompt] for sample in samples] == [*rows, *rows[:5]]
    # each is what the model writes with this sample's own seed, alone
    from m27quant.runtime.generation import derived_seed

    params = [replace(SAMPLED, seed=derived_seed(3, i)) for i in range(12)]
    alone = m27quant.load(random_target, max_num_seqs=1).generate([*rows, *rows[:5]], params)
    assert [sample.ids[sample.num_prompt :] for sample in samples] == [r.token_ids for r in alone]
    assert samples[0].ids != samples[7].ids, "the same prompt, drawn anew"


def test_neither_concurrency_nor_shards_matter(
    make: Callable[..., DataResult], whole: Path, tmp_path: Path
) -> None:
    make(tmp_path / "one", concurrency=1)
    assert files(tmp_path / "one") == files(whole)
    make(tmp_path / "two", replace(OPTIONS, shard_size=100), concurrency=12)
    lines = (tmp_path / "two/shard-00000.jsonl").read_bytes()
    assert lines == b"".join((whole / f"shard-0000{i}.jsonl").read_bytes() for i in range(3))


@pytest.mark.parametrize("stops", [(3,), (2, 7, 1)])
def test_a_stopped_run_goes_on(
    make: Callable[..., DataResult], whole: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for count in stops:
        steps = iter(range(1000))

        def stop(most: int = count, steps: Any = steps) -> None:
            if next(steps) >= most:
                raise Interrupted("stopped")

        with pytest.raises(Interrupted):
            make(tmp_path / "data", resume=True, stop=stop)
        assert not read_manifest(tmp_path / "data")["finished"]
    result = make(tmp_path / "data", resume=True)
    assert files(tmp_path / "data") == files(whole)
    assert 0 < result.num_new <= result.num_samples == 12


@pytest.mark.parametrize("fault", ["journal-torn:2", "shard-written:2", "manifest-written:1"])
def test_kill_9_loses_no_finished_sample(
    make: Callable[..., DataResult],
    whole: Path,
    random_target: Path,
    prompts: Path,
    tmp_path: Path,
    fault: str,
) -> None:
    out = tmp_path / "data"
    script = (
        "from m27quant import RunOptions, SamplingParams\n"
        "from m27quant.drafters.generate import DataOptions, generate_drafter_data\n"
        "sampling = SamplingParams(max_tokens=6, temperature=1.0)\n"
        "options = DataOptions(num_samples=12, sampling=sampling, shard_size=5, seed=3)\n"
        f"generate_drafter_data({str(random_target)!r}, [{str(prompts)!r}], {str(out)!r}, options,\n"
        "                      run_options=RunOptions(max_num_seqs=4))\n"
    )
    environment = {**os.environ, "M27QUANT_FAULT": fault, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 137
    with pytest.raises(M27Error, match="unfinished data are there already"):
        make(out)
    result = make(out, resume=True)
    assert files(out) == files(whole)
    if not fault.startswith("journal"):
        assert result.num_new < 12, "what was finished before is kept"


def test_a_shard_that_was_lost_is_made_again(
    make: Callable[..., DataResult], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    make(out)
    (out / "shard-00001.jsonl").write_text("rubbish\n")
    with pytest.raises(M27Error, match="SHA-256"):
        read_samples(out)
    assert make(out, resume=True).num_new == 5
    assert files(out) == files(whole)
    assert make(out, resume=True, command="another spelling of it").num_new == 0
    assert files(out) == files(whole)


def test_what_is_there_is_neither_mixed_nor_lost(
    make: Callable[..., DataResult], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    make(out)
    with pytest.raises(M27Error, match="finished data are there already") as fault:
        make(out)
    assert fault.value.exit_code == 2
    with pytest.raises(M27Error, match=r"settings\.seed was 3, now 4"):
        make(out, replace(OPTIONS, seed=4), resume=True)
    with pytest.raises(M27Error, match="exclude each other"):
        make(out, resume=True, overwrite=True)
    assert files(out) == files(whole)
    make(out, replace(OPTIONS, num_samples=3), overwrite=True)
    assert sorted(files(out)) == ["manifest.json", "shard-00000.jsonl"]
    (out / "mine.txt").write_text("mine")
    with pytest.raises(M27Error, match="holds other files"):
        make(out, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    with pytest.raises(M27Error, match="not a folder"):
        make(out / "mine.txt")


def test_greedy_answers_are_not_repeated(make: Callable[..., DataResult], tmp_path: Path) -> None:
    said: list[str] = []
    greedy = replace(OPTIONS, sampling=SamplingParams(max_tokens=2, temperature=0.0))
    assert make(tmp_path / "data", greedy, say=said.append).num_samples == 7
    assert any("hold 7 prompts, 12 were asked for" in line for line in said)


def test_a_prompt_without_an_answer_is_left_out(random_target: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [[1, 2], [], [5] * 2000, [3]]
    path.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in rows))
    options = DataOptions(num_samples=4, sampling=SamplingParams(max_tokens=2, temperature=0.0), shard_size=2)
    result = generate_drafter_data(random_target, [path], tmp_path / "out", options)
    assert (result.num_samples, result.num_failed) == (2, 2)
    assert [sample.id for sample in read_samples(tmp_path / "out")] == ["0", "3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ('{"a": 1}', "line 1: no prompt in a row with the keys a"),
        ('{"prompt": "text"}', "no tokenizer.json"),
        ('{"prompt_token_ids": [300]}', "`prompt_token_ids` holds 300"),
        ("[]", "must be an object"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no turn to answer"),
        ('{"prompt_token_ids": [1]', "not valid JSON"),
        ('{"prompt_token_ids": [1]}\n{"prompt_token_ids": "x"}', "line 2: `prompt_token_ids` is no list"),
    ],
)
def test_bad_rows_are_named(random_target: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(M27Error, match=r"rows\.jsonl") as fault:
        generate_drafter_data(random_target, [tmp_path / "rows.jsonl"], tmp_path / "out")
    assert said in fault.value.message
    assert fault.value.exit_code in (2, 3)
    assert fault.value.hint
    assert not (tmp_path / "out").exists()


# -- prompts of text and chats ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> Tokenizer:
    return Tokenizer(repository / "examples/tiny-m27")


def test_pieces_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [f"]~!b[def f{i}(x):\n    return x + {i}\n[e~[" for i in range(40)]
    (tmp_path / "t.txt").write_text("".join(documents))
    cut = Cut(prompt_tokens=(4, 64), beginnings=0.5)
    source = open_source(str(tmp_path / "t.txt"), tokenizer, vocab_size=2048, cut=cut, most_rows=9)
    ids = tokenizer.rendered("".join(documents))
    pieces = list(Prompts([source], 400, 1, again=False))
    assert pieces == list(Prompts([source], 400, 1, again=False))
    assert pieces[:50] == list(Prompts([source], 50, 1, again=False)), "a piece follows from its number"
    assert pieces[:50] != list(Prompts([source], 50, 2, again=False))
    starts = {tuple(ids[i : i + n]) for n in {len(p) for p in pieces} for i in range(len(ids))}
    assert all(tuple(piece) in starts for piece in pieces)
    lengths = sorted(map(len, pieces))
    assert lengths[0] >= 3
    assert lengths[-1] <= 64
    assert 12 <= lengths[200] <= 21, "the geometric mean of 4 and 64 is 16"
    at_beginnings = sum(piece[0] == tokenizer.token_id("]~!b[") for piece in pieces)
    assert 160 < at_beginnings < 260


def test_rows_of_all_forms(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [
        {"prompt": "def f"}, {"messages": turns}, {"question": "Why?"}, {"text": "one two three"},
        {"prompt_token_ids": [4, 5]}, {"conversations": [{"from": "human", "value": "Hi"}]},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(**cut: Any) -> list[str]:
        source = open_source(
            str(path), tokenizer, vocab_size=2048, cut=Cut(prompt_tokens=(2, 2), **cut), most_rows=9
        )
        found = Prompts([source], 6, 0, again=False)
        return [tokenizer.decode(ids, skip_special_tokens=False) for ids in found]

    hi = tokenizer.render(turns[:1], add_generation_prompt=True)
    found = asked()
    assert (found[0], found[1], found[5]) == ("def f", hi, hi)
    assert found[2] == hi.replace("Hi", "Why?")
    assert found[4] == tokenizer.decode([4, 5])
    assert asked(chat=True)[0] == hi.replace("Hi", "def f")
    assert asked(thinking=False)[1] == hi.rstrip() + "\n\n</think>\n\n"
    assert "Be brief." in asked(system_prompt="Be brief.")[1]


def test_held_out_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def read(name: str) -> list[tuple[list[int], list[int]]]:
        found = heldout_samples(
            str(tmp_path / name), tokenizer, vocab_size=2048, prompt_tokens=3, max_tokens=4, most=5
        )
        return [(s.ids[: s.num_prompt], s.ids[s.num_prompt :]) for s in found]

    text = "".join(f"word{i} " for i in range(60))
    ids = tokenizer.rendered(text)
    (tmp_path / "t.txt").write_text(text)
    last = len(ids) - 7
    starts = [0, last // 4, last * 2 // 4, last * 3 // 4, last]
    assert read("t.txt") == [(ids[at : at + 3], ids[at + 3 : at + 7]) for at in starts]
    rows = [
        {"text": text}, {"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [1], "token_ids": [3, 4, 5, 6, 7, 8]},
        {"prompt": "def f"},
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read("r.jsonl") == [
        (ids[:3], ids[3:7]), ([1, 2], []), ([1], [3, 4, 5, 6]), (tokenizer.rendered("def f"), []),
    ]  # fmt: skip
