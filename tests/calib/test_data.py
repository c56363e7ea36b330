"""Calibration rows: where they come from, how they become tokens, and what is said of bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from tokenizers import Tokenizer

from m27quant.calib.data import Sequences, load_sequences, parse_dataset
from m27quant.errors import CheckpointError, EnvironmentFault, M27Error, UsageError
from m27quant.recipes.schema import Calibration, Dataset

VOCAB = 2048


@pytest.fixture(scope="module")
def tiny() -> Path:
    return Path(__file__).parents[2] / "examples/tiny-m27"


def load(
    folder: Path, data: Path | list[Dataset], *, samples: int = 100, seq_len: int = 32, **options: Any
) -> tuple[Sequences, list[str]]:
    """`load_sequences` with the tokenizer of `folder`."""
    chosen = data if isinstance(data, list) else [Dataset(path=str(data))]
    plan = Calibration(datasets=tuple(chosen), num_samples=samples, seq_len=seq_len)
    return load_sequences(plan, folder, **({"vocab_size": VOCAB, "max_length": 2048} | options))


def split(sequences: Sequences) -> list[list[int]]:
    """The rows again."""
    return [part.tolist() for part in sequences.ids.split(list(sequences.lengths))]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]


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


class Hub:
    """Stands in for `datasets.load_dataset`: every split of every data set counts up from a base."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self.taken: dict[str, int] = {}

    def __call__(
        self, path: str, config: str | None, *, split: str, revision: str | None, streaming: bool, token: str | None
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        assert streaming, "Nemotron alone is 136 GB"
        self.asked.append((path, config, split))
        field = "messages" if "Nemotron" in path else "article"
        for number in range(10_000):
            self.taken[f"{path}/{split}"] = number + 1
            yield {"article": f"text {number}"} if field == "article" else {field: CHAT, "uuid": str(number)}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


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


# -- what can be wrong -----------------------------------------------------------------------------


BAD_ROWS: dict[str, tuple[str, str]] = {
    "no-json": ("{not json}", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "no-object": ("[1, 2]", "must be an object, found list"),
    "no-field": ('{"id": 1, "label": "x"}', "no `input_ids`, `messages` or `text`"),
    "null": ('{"text": null}', "no `input_ids`, `messages` or `text`"),
    "number": ('{"text": 5}', "`text` is neither text"),
    "too-large-id": ('{"input_ids": [1, 2048]}', "token id 2048 is outside of the vocabulary of 2048"),
    "huge-id": ('{"input_ids": [1000000000000000000000000]}', "outside of the vocabulary"),
    "negative-id": ('{"input_ids": [-1]}', "token id -1 is outside"),
    "float-id": ('{"input_ids": [1.0]}', "`input_ids` is neither text"),
    "bool-id": ('{"input_ids": [true]}', "`input_ids` is neither text"),
    "mask-length": ('{"input_ids": [1, 2], "attention_mask": [1]}', "attention_mask and input_ids differ"),
    "mask-kind": ('{"input_ids": [1], "attention_mask": 1}', "attention_mask and input_ids differ"),
    "no-role": ('{"messages": [{"from": "human", "value": "x"}]}', "a chat turn without `role`"),
    "no-content": ('{"messages": [{"role": "user"}]}', "a chat turn without `content`"),
    "no-turn": ('{"messages": [{"role": "user", "content": "x"}, 5]}', "a chat turn is int"),
    "tools": ('{"messages": [{"role": "user", "content": "x"}], "tools": "x"}', "the chat template refuses"),
    "surrogate": ('{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
    "chat-surrogate": ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "half a surrogate pair"),
    "ansi": ('{"\\u001b[2Jevil": 1}', r"\\x1b[2Jevil"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(name: str, tiny: Path, tmp_path: Path) -> None:
    line, message = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"input_ids": [1, 2]}}\n\n{line}\n')
    with pytest.raises(CheckpointError) as caught:
        load(tiny, path)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert message.replace("\\\\", "\\") in caught.value.message
    assert "\x1b" not in caught.value.message


def test_invalid_utf8_is_named_too(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(CheckpointError, match=r"a\.jsonl, line 1: not valid JSON"):
        load(tiny, tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    with pytest.raises(CheckpointError, match=r"a\.txt: not UTF-8 at byte 3"):
        load(tiny, tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CheckpointError, match=r"a\.parquet: not a readable Parquet file"):
        load(tiny, tmp_path / "a.parquet")


def test_a_row_longer_than_the_model_takes(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1] * 65}])
    with pytest.raises(CheckpointError, match="line 1: 65 tokens, the model takes at most 64"):
        load(tmp_path, data, max_length=64)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        load(tmp_path, data)
    assert "input_ids" in str(caught.value.hint)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load(tmp_path, data)


@pytest.mark.parametrize("content", ["", "\n\n", '{"input_ids": []}\n', '{"text": ""}\n'])
def test_a_file_without_a_usable_row(content: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match="no usable row"):
        load(tiny, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "argument", ["missing.jsonl", "./x", "/no/such", "a/b/c", "a b", "~nobody/x", "x" * 5000]
)
def test_a_dataset_that_is_neither_file_nor_hub_id(argument: str) -> None:
    with pytest.raises(UsageError, match="--dataset") as caught:
        parse_dataset(argument)
    assert caught.value.exit_code == 2


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(M27Error) as caught:
        load(tmp_path, [parse_dataset(str(tmp_path))])
    assert caught.value.exit_code in (2, 3)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_hub_data_set_offline(how: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(datasets, "load_dataset", never)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "environment")
    with pytest.raises(EnvironmentFault, match="offline mode is on") as caught:
        load(tiny, [parse_dataset("org/data")], offline=how == "option")
    assert caught.value.exit_code == 4
    assert "--dataset FILE" in str(caught.value.hint)


@pytest.mark.parametrize(
    "fault",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/data' is a gated dataset on the Hub."),
        ConnectionError("Couldn't reach 'org/data' on the Hub (\x1b[31mtimed out)\nsecond line"),
        ValueError("Unknown split \"train\". Should be one of ['test']."),
    ],
)
def test_a_hub_data_set_that_cannot_be_had(
    fault: Exception, tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(EnvironmentFault, match=r"data set org/data \(train\) cannot be read") as caught:
        load(tiny, [parse_dataset("org/data")])
    assert caught.value.exit_code == 4
    assert "hf auth login" in str(caught.value.hint)
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert "second line" not in caught.value.message


def test_a_fault_in_the_middle_of_a_stream(tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "x"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", breaks)
    with pytest.raises(EnvironmentFault, match="connection reset"):
        load(tiny, [parse_dataset("org/data")], samples=2)


def test_a_bad_row_of_a_stream_is_a_bad_row(
    tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "x"}, {"label": 1}]))
    with pytest.raises(CheckpointError, match=r"org/data \(train\), row 2: no `input_ids`"):
        load(tiny, [parse_dataset("org/data")])
