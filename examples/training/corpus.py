"""The text tiny-m27 learns from, and its tokenizer.

Text: the modules of CPython's standard library as the running interpreter has them, without tests (not every
installation ships them) and without generated tables.  A fixed part is held out.  From the training part
come chat documents too: functions asked for by their docstring, and look-ups through a tool, so that the
model knows its turn format.  Everything is decided by names and checksums: same library, same bytes.

    python corpus.py --out build/tiny-m27
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sysconfig
import textwrap
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, ROLE, EOS, UNK, PAD, MASK = "]~!b[", "]~b]", "[e~[", "]!d~[", "]!p~[", "<reserved_mask>"
SPECIAL = [PAD, ROLE, EOS, UNK, BOS]
PLAIN_ADDED = ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"]
"""Added tokens that are text to the reader: decoding keeps them even where special tokens are skipped."""

VOCAB_SIZE = 2048
MAX_HELDOUT_BYTES = 290_000
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
}
SKIPPED_PREFIXES = ("encodings/", "pydoc_data/", "_sysconfigdata")  # tables, not prose or code

# Words with one leading character, digits by at most three, punctuation with its line end, blanks.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LOOKUP_TOOL = {
    "name": "lookup",
    "description": "Find what a name of the standard library does.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text: `name` is its path in the standard library, or `chat:` and what was asked for."""

    name: str
    text: str


def checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def is_usable(text: str) -> bool:
    """Long enough, and without anything that the chat format means something by."""
    return len(text) > 50 and not any(token in text for token in [*SPECIAL, *PLAIN_ADDED, MASK])


def library_documents(root: Path | None = None) -> list[Document]:
    """Every module of the standard library below `root`, sorted by its path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")[:-1]) or name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules keep their historical encoding
            continue
        if is_usable(text):
            documents.append(Document(name, text))
    return documents


def bundled_documents(root: Path | None = None) -> list[Document]:
    """The modules of the wheels that the library bundles for ensurepip: Python that the model never saw.

    Drafters learn from what the model writes behind prompts of them too, so that they know it where it does not recite.
    """
    folder = (root or Path(sysconfig.get_paths()["stdlib"])) / "ensurepip/_bundled"
    documents = []
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(name for name in wheel.namelist() if name.endswith(".py")):
                text = wheel.read(name).decode("utf-8", errors="replace")
                is_table = sum(c.isdigit() for c in text) > len(text) // 8
                if is_usable(text) and not is_table:
                    documents.append(Document(f"{path.name}/{name}", text))
    return documents


def split_heldout(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out): whole files in the order of their names' CRC32, until the held-out part is full."""
    heldout: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda document: checksum(document.name)):
        num_bytes = len(document.text.encode())
        if num_bytes > MAX_HELDOUT_BYTES // 4:  # no single module may dominate
            continue
        if size + num_bytes > MAX_HELDOUT_BYTES:
            break
        heldout.add(document.name)
        size += num_bytes
    return (
        [document for document in documents if document.name not in heldout],
        [document for document in documents if document.name in heldout],
    )


def chat_renderer(template: Path | None = None) -> Any:
    """The chat template, rendered as transformers renders it; arguments: messages, tools."""
    template = template or Path(__file__).with_name("chat_template.jinja")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template.read_text(encoding="utf-8")).render


def documented_functions(document: Document) -> Iterator[tuple[str, str, str]]:
    """(name, docstring, dedented source) of each public function of moderate length."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    lines = document.text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if docstring and 20 <= len(docstring) <= 240 and 60 <= len(source) <= 900:
            yield node.name, docstring, source


def chats(documents: list[Document]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"messages": ..., maybe "tools": ...}) made of the documents' own functions and docstrings."""
    for document in documents:
        module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, docstring, source in documented_functions(document):
            first_line = docstring.splitlines()[0]
            lot = checksum(f"{module}.{name}") % 10
            if lot < 4:
                yield f"chat:{module}.{name}", {"messages": [
                    {"role": "user", "content": f"Write the function {name}.\n{docstring}"},
                    {"role": "assistant", "reasoning_content": first_line, "content": source},
                ]}  # fmt: skip
            elif lot == 4:
                yield f"chat:lookup:{module}.{name}", {"tools": [LOOKUP_TOOL], "messages": [
                    {"role": "user", "content": f"What does {module}.{name} do?"},
                    {"role": "assistant", "reasoning_content": f"I look up {module}.{name}.", "content": "",
                     "tool_calls": [{"name": "lookup", "arguments": {"name": f"{module}.{name}"}}]},
                    {"role": "tool", "content": docstring},
                    {"role": "assistant", "reasoning_content": "The documentation says it.",
                     "content": first_line},
                ]}  # fmt: skip


def train_tokenizer(documents: list[Document], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE with its own split; the added tokens take the last ids, as in M2."""
    num_added = len(SPECIAL) + len(PLAIN_ADDED) + 1
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED])
    tokenizer.add_special_tokens([AddedToken(MASK, normalized=False)])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def framed(document: Document) -> str:
    """A document as the model sees it: start token, text, end token (a chat brings its own)."""
    return document.text if document.name.startswith("chat:") else f"{BOS}{document.text}{EOS}"


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """All documents, framed and joined: U16 [tokens]."""
    encodings = tokenizer.encode_batch_fast(
        [framed(document) for document in documents], add_special_tokens=False
    )
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encodings])


def digest(documents: list[Document]) -> str:
    """SHA-256 over names and texts."""
    sha = hashlib.sha256()
    for document in documents:
        sha.update(f"{document.name}\0{document.text}\0".encode())
    return sha.hexdigest()


def build(out: Path) -> dict[str, Any]:
    """Write tokenizer.json, train.bin, heldout.bin (U16 ids), their texts, bundled.txt and corpus.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    train, heldout = split_heldout(library_documents())
    render = chat_renderer()
    chat_documents = [Document(name, render(**row)) for name, row in chats(train)]
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(out / "tokenizer.json"))
    bundled = bundled_documents()
    texts = {"train": train + chat_documents, "heldout": heldout, "bundled": bundled}
    ids = {split: encode(tokenizer, texts[split]) for split in ("train", "heldout")}
    for split, documents in texts.items():
        if split in ids:
            ids[split].tofile(out / f"{split}.bin")
        text = "".join(framed(document) for document in documents)
        (out / f"{split}.txt").write_text(text, encoding="utf-8")
    facts = {
        "python": platform.python_version(),
        "train_files": len(train),
        "train_bytes": sum(len(document.text.encode()) for document in train),
        "train_chats": len(chat_documents),
        "train_tokens": len(ids["train"]),
        "train_sha256": digest(train + chat_documents),
        "heldout_files": [document.name for document in heldout],
        "heldout_bytes": sum(len(document.text.encode()) for document in heldout),
        "heldout_tokens": len(ids["heldout"]),
        "heldout_sha256": digest(heldout),
        "bundled_sha256": digest(bundled),
    }
    (out / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Gather the standard library's text and train the tokenizer."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/tiny-m27"), help="folder for the prepared text"
    )
    print(json.dumps(build(parser.parse_args().out), indent=2))


if __name__ == "__main__":
    main()
