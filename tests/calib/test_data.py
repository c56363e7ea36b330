"""Calibration rows: where they come from, how they become tokens, and what is said of bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer

from m27quant.calib.data import load_sequences
from m27quant.errors import UsageError
from m27quant.recipes.schema import Calibration, Dataset
from tests.calib.rows import CHAT, VOCAB, Hub, jsonl, load, split

# -- kinds of rows ---------------------------------------------------------------------------------


def test_input_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    """No tokenizer is needed, no special token is added, `seq_len` does not cut."""
    rows = [[5, 6, 7], list(range(100)), [0]]
    sequences, notices = load(tmp_path, jsonl(tmp_path / "a.jsonl", [{"input_ids": r} for r in rows]))
    assert split(sequences) == rows
    assert sequences.num_tokens == 104
    assert notices == [f"{tmp_path}/a.jsonl (file) gave 3 of 100 rows"]


def test_masked_positions_are_left_out(tmp_path: Path) -> None:
    row = {"input_ids": [9, 9, 5, 6, 9], "attention_mask": [0, 0, 1, 1, 0]}
    sequences, _ = load(
        tmp_path, jsonl(tmp_path / "a.jsonl", [row, {"input_ids": [3], "attention_mask": [0]}])
    )
    assert split(sequences) == [[5, 6]], "a row of padding alone is no row"


def test_text_is_cut_to_seq_len(tiny: Path, tmp_path: Path) -> None:
    text = "def f(x):\n    return x + 1\n" * 20
    sequences, _ = load(tiny, jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": "x"}, {"text": ""}]))
    expected = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    assert split(sequences)[0] == expected[:32]
    assert len(sequences.lengths) == 2, "an empty row is no row"


def test_a_tokenizer_that_pads_or_truncates_is_not_let_to(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    data = jsonl(tmp_path / "a.jsonl", [{"text": "import os\nimport sys\n"}])
    assert split(load(folder, data)[0]) == split(load(tiny, data)[0])


def test_a_text_file_becomes_windows(tiny: Path, tmp_path: Path) -> None:
    text = (tiny / "heldout.txt").read_text()[:3000]
    (tmp_path / "a.txt").write_text(text)
    sequences, _ = load(tiny, tmp_path / "a.txt", samples=1000)
    ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    assert split(sequences) == [ids[i : i + 32] for i in range(0, len(ids), 32)]
    assert split(load(tiny, tmp_path / "a.txt", samples=3)[0]) == [ids[i : i + 32] for i in (0, 32, 64)]


def test_chat_goes_through_the_template(tiny: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (ids,) = split(load(tiny, data, seq_len=500)[0])
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
    assert ids[0] == special["]~!b["]
    assert [ids.count(special[t]) for t in ("]~!b[", "]~b]", "[e~[")] == [1, 3, 3]  # system, user, ai
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "user\nSay hi." in text
    assert "ai\nhi" in text
    assert split(load(tiny, data, seq_len=5)[0]) == [ids[:5]]


def test_tools_of_a_chat_row_reach_the_template(tiny: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    data = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": [tool]}])
    (ids,) = split(load(tiny, data, seq_len=500)[0])
    assert "weather" in Tokenizer.from_file(str(tiny / "tokenizer.json")).decode(ids)


def test_chat_may_be_joined_as_modelopt_does(tiny: Path, tmp_path: Path) -> None:
    data = Dataset(path=str(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])), field="messages", chat="join")
    expected = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode("Say hi.\nhi").ids
    assert split(load(tiny, [data])[0]) == [expected]


def test_the_template_may_lie_in_tokenizer_config(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny / "tokenizer.json", folder)
    data = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(UsageError, match="no chat template") as caught:
        load(folder, data)
    assert "chat_template.jinja" in str(caught.value.hint)
    template = (tiny / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert split(load(folder, data)[0]) == split(load(tiny, data)[0])


def test_parquet(tiny: Path, tmp_path: Path) -> None:
    """Columns of several kinds: the one that is not null in a row counts."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "import os", "messages": None}, {"text": None, "messages": CHAT}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = load(tiny, jsonl(tmp_path / "a.jsonl", [{"text": "import os"}, {"messages": CHAT}]))[0]
    assert split(load(tiny, tmp_path / "a.parquet")[0]) == split(expected)
    ids = [{"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ids), tmp_path / "b.parquet")
    assert split(load(tmp_path, tmp_path / "b.parquet")[0]) == [[2, 3]]


# -- which rows ------------------------------------------------------------------------------------


def test_rows_are_taken_in_order_and_no_more_than_asked(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"input_ids": [i]} for i in range(20)])
    sequences, notices = load(tmp_path, data, samples=7)
    assert split(sequences) == [[i] for i in range(7)]
    assert notices == []


def test_a_seed_shuffles_and_is_repeatable(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"input_ids": [i]} for i in range(50)])
    first, again, other = (split(load(tmp_path, data, samples=20, seed=s)[0]) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != [[i] for i in range(20)]
    assert len({i for (i,) in first}) == 20


def test_the_digest_tells_tokens_and_their_division_apart(tmp_path: Path) -> None:
    rows = ([[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[1, 2], [3]])
    found = [
        load(tmp_path, jsonl(tmp_path / f"{i}.jsonl", [{"input_ids": r} for r in part]))[0].digest
        for i, part in enumerate(rows)
    ]
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_the_default_is_modelopts_mix(tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 articles, then 128 rows of each of Nemotron's stem, chat, math and code, in this order."""
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    sequences, notices = load_sequences(Calibration(), tiny, vocab_size=VOCAB, max_length=2048)
    news, nemotron = "abisee/cnn_dailymail", "nvidia/Nemotron-Post-Training-Dataset-v2"
    assert hub.asked == [
        (news, "3.0.0", "train"), *((nemotron, None, part) for part in ("stem", "chat", "math", "code"))
    ]  # fmt: skip
    assert hub.taken == {f"{news}/train": 512} | {
        f"{nemotron}/{p}": 128 for p in ("stem", "chat", "math", "code")
    }
    assert len(sequences.lengths) == 1024
    assert notices == []
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert split(sequences)[0] == tokenizer.encode("text 0").ids
    assert split(sequences)[512] == tokenizer.encode("Say hi.\nhi").ids, (
        "joined by newlines, no chat template"
    )


@pytest.mark.filterwarnings("ignore")  # of modelopt and of what it imports
def test_tokens_of_the_default_are_those_of_modelopts_loader(
    tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """modelopt's own data loader on the same stand-in for the Hub: rows, order and tokens, its padding taken off."""
    from modelopt.torch.utils.dataset_utils import get_dataset_dataloader
    from transformers import PreTrainedTokenizerFast

    text = (tiny / "heldout.txt").read_text()

    def load_dataset(
        path: str, name: str | None = None, *, split: str, streaming: bool, **_: Any
    ) -> Iterator[Any]:
        begin = 1000 * ["train", "stem", "chat", "math", "code"].index(split)
        for number in range(300):
            piece = text[begin + 37 * number :][: 20 + 11 * (number % 40)]
            messages = [{"role": "user", "content": piece}, {"role": "assistant", "content": piece[:9]}]
            yield {"article": piece} if split == "train" else {"messages": messages}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny / "tokenizer.json"), pad_token="]!p~[", padding_side="left"
    )
    loader = get_dataset_dataloader("cnn_nemotron_v2_mix", tokenizer, num_samples=64, max_sample_length=48)
    theirs = [b["input_ids"][0][b["attention_mask"][0].bool()].tolist() for b in loader]
    plan = Calibration(num_samples=64, seq_len=48)
    assert split(load_sequences(plan, tiny, vocab_size=VOCAB, max_length=2048)[0]) == theirs
    assert len(theirs) == 64
    assert {len(row) for row in theirs} >= {48}
    assert min(len(row) for row in theirs) < 48, "some were padded"


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(10, [5, 2, 1, 1, 1]), (1, [1, 0, 0, 0, 0]), (2, [1, 1, 0, 0, 0]), (1024, [512, 128, 128, 128, 128])],
)
def test_shares_add_up(
    samples: int, expected: list[int], tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not divide goes to the first; a data set that gives nothing is not opened."""
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    plan = Calibration(num_samples=samples)
    sequences, _ = load_sequences(plan, tiny, vocab_size=VOCAB, max_length=2048)
    assert list(hub.taken.values()) == [n for n in expected if n]
    assert len(sequences.lengths) == samples


def test_weights_divide_files_too(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1]}] * 50)
    b = jsonl(tmp_path / "b.jsonl", [{"input_ids": [2]}] * 50)
    chosen = [Dataset(path=str(a), weight=3), Dataset(path=str(b))]
    assert split(load(tmp_path, chosen, samples=8)[0]) == [[1]] * 6 + [[2]] * 2
