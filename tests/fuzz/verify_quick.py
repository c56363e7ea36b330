"""Mutated checkpoints through `verify --quick`: `python -m tests.fuzz.verify_quick [CASES] [SEED]`.

A small sparse checkpoint and a drafter lie in a folder; each case changes one to three things in them: bytes of a file,
a header's JSON or its length, the index, a config, the tokenizer, a file's kind or place.  What must hold:

* the outcome is a result or an `M27Error` with exit code 3 or 4, never another exception;
* every message is one printable line;
* no file outside of the folder is opened, whatever the names in it say;
* the peak of Python's memory stays below `MAX_BYTES` (tracemalloc, every 20th case, as it is slow).

Run on 2026-11-21: 26,000 cases each of seeds 1 and 2, 52,000 together, in 968 s on a core that others used too; 44,462
ended with findings of errors, 7,486 without, 52 with exit code 3; peak 0.5 MiB; none broke a rule.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m27quant import verify_checkpoint
from m27quant.errors import M27Error
from m27quant.verify.configs import SPECIAL_TOKENS
from m27quant.verify.serving import Serving
from tests import drafter_files as drafters
from tests.checkpoints import Shape
from tests.faults import corruptions as c
from tests.verify.sparse import write_sparse

TINY = Shape(
    hidden_size=48, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, rotary_dim=4, num_local_experts=2, num_experts_per_tok=1, vocab_size=2048,
)  # fmt: skip
MAX_BYTES = 64 * 2**20
MEASURE_EVERY = 20
TOKENIZER = {
    "added_tokens": [
        {"id": number, "content": token}
        for number, token in enumerate(("[e~[", *(t for t in SPECIAL_TOKENS if t != "[e~[")), 5)
    ],
    "model": {"vocab": {"a": 0, "b": 1}},
}
SECRET = "secret.safetensors"
"""Lies beside the folders; opening it is the failure."""


def write_good(home: Path) -> Path:
    """The folder that every case begins with: `checkpoint` and `drafter`, and a secret beside them."""
    home.mkdir()
    folder = write_sparse(home / "checkpoint", TINY)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x", "tokenizer_class": "X"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    for name, maker in (("dflash", drafters.dflash), ("eagle3", drafters.eagle3)):
        drafters.write_drafter(home / name, *maker())
    c.join_shard(home / SECRET, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    return home


# -- what is wrong in a case -----------------------------------------------------------------------


class Mutator:
    """Changes to a folder's files, drawn from one generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.steps: tuple[Callable[[Path], None], ...] = (
            self.bytes, self.cut, self.replace, self.header, self.header, self.length, self.fields, self.fields,
            self.index, self.kind, self.stray,
        )  # fmt: skip

    def files(self, folder: Path, suffix: str = "") -> list[Path]:
        """Regular files, those of the name's ending."""
        return sorted(
            p for p in folder.iterdir() if p.is_file() and not p.is_symlink() and p.name.endswith(suffix)
        )

    def pick(self, folder: Path, suffix: str = "") -> Path | None:
        files = self.files(folder, suffix)
        return self.rng.choice(files) if files else None

    def value(self, depth: int = 2) -> Any:
        """Any JSON value, and what only looks like one."""
        rng = self.rng
        plain: list[Any] = [
            None, True, False, -1, 0, 1, 2, 16, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, "", "F32", "BF16", "U8",
            "NVFP4", "modelopt", "minimax_m2", "fp8", f"../{SECRET}", f"/{SECRET}", "a/b", "C:\\a", "\x00", "\ud800",
            "\x1b[2J", "x" * 5000, "model.safetensors", rng.randrange(-5, 20_000),
        ]  # fmt: skip
        if depth and rng.random() < 0.3:
            return [self.value(depth - 1) for _ in range(rng.randrange(4))]
        if depth and rng.random() < 0.3:
            return {str(self.value(0)): self.value(depth - 1) for _ in range(rng.randrange(4))}
        return rng.choice(plain)

    def edit(self, root: Any) -> None:
        """Change, drop or add one field somewhere in a JSON object."""
        place = root
        while isinstance(place, dict) and place:
            key = self.rng.choice(sorted(place, key=str))
            below = place[key]
            if isinstance(below, dict) and below and self.rng.random() < 0.6:
                place = below
                continue
            action = self.rng.random()
            if action < 0.2:
                del place[key]
            elif action < 0.3:
                place[str(self.value(0))] = below
            elif isinstance(below, list) and below and action < 0.6:
                below[self.rng.randrange(len(below))] = self.value()
            else:
                place[key] = self.value()
            return

    # each of these changes one thing

    def bytes(self, folder: Path) -> None:
        if (path := self.pick(folder)) is None:
            return
        data = bytearray(path.read_bytes())
        end = min(len(data), 4096)
        for _ in range(self.rng.randrange(1, 9) if end else 0):
            data[self.rng.randrange(end)] = self.rng.randrange(256)
        path.write_bytes(data)

    def cut(self, folder: Path) -> None:
        if (path := self.pick(folder)) is not None:
            size = path.stat().st_size
            os.truncate(path, self.rng.choice([0, 1, 8, size // 2, max(0, size - 1), size + 3]))

    def replace(self, folder: Path) -> None:
        if (path := self.pick(folder)) is not None:
            path.write_bytes(
                self.rng.choice(
                    [b"", b"{", b"[]", b"null", b"\xef\xbb\xbf{}", b'{"a": NaN}', c.LFS_POINTER, b"PK\x03\x04",
                     b"[" * 5000, b'{"a":1,"a":2}', self.rng.randbytes(64), b"1" * 5000]
                )
            )  # fmt: skip

    def header(self, folder: Path) -> None:
        if (path := self.pick(folder, ".safetensors")) is None:
            return
        try:
            header, buffer = c.split_shard(path)
        except (ValueError, struct.error, RecursionError):
            return  # it was broken before
        self.edit(header)
        c.join_shard(path, json.dumps(header).encode("utf-8", "surrogatepass"), buffer)

    def length(self, folder: Path) -> None:
        path = self.pick(folder, ".safetensors")
        if path is not None and path.stat().st_size >= 8:
            with path.open("r+b") as file:
                file.write(struct.pack("<Q", self.rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])))

    def fields(self, folder: Path) -> None:
        if (path := self.pick(folder, ".json")) is None:
            return
        try:
            root = json.loads(path.read_text())
        except (ValueError, RecursionError):
            return  # it was broken before
        self.edit(root)
        path.write_text(json.dumps(root))

    def index(self, folder: Path) -> None:
        path = folder / c.INDEX
        try:
            root = json.loads(path.read_text())
            names = root["weight_map"]
            names[self.rng.choice(sorted(names))] = self.value(1)
            path.write_text(json.dumps(root))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return  # none, or broken before

    def kind(self, folder: Path) -> None:
        """A link, a directory or nothing in a file's place."""
        if (path := self.pick(folder)) is None:
            return
        path.unlink()
        match self.rng.randrange(4):
            case 0:
                path.mkdir()
            case 1:
                path.symlink_to(f"../{SECRET}")
            case 2:
                path.symlink_to(path.name)

    def stray(self, folder: Path) -> None:
        name = self.rng.choice(["model.safetensors", "a.safetensors", "x.bin", "y.tmp", "a\x1b[1m.json"])
        if not os.path.lexists(folder / name):
            (folder / name).write_bytes(self.rng.choice([b"", c.LFS_POINTER, bytes(64)]))


# -- what must hold --------------------------------------------------------------------------------


_opened: list[str] | None = None
"""Where opened paths are noted, while they are."""


def _note(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: it sees every way of opening a file."""
    if event == "open" and _opened is not None and isinstance(args[0], (str, bytes, os.PathLike)):
        _opened.append(os.path.realpath(os.fsdecode(args[0])))


class Fuzz:
    """Cases in a folder of their own."""

    def __init__(self, home: Path, seed: int = 0) -> None:
        self.good, self.work = write_good(home / "good"), home / "work"
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.peak = 0
        shutil.copytree(self.good, self.work)
        outcome = self._verify(self.work / "dflash")  # what is imported late is imported now
        assert outcome == "passed", outcome
        sys.addaudithook(_note)

    def run(self, cases: int) -> None:
        """Run so many more; an AssertionError, or whatever was not caught, ends it."""
        for number in range(cases):
            self.case(measured=number % MEASURE_EVERY == 0)

    def case(self, *, measured: bool = False) -> None:
        """One mutated folder."""
        shutil.rmtree(self.work)
        shutil.copytree(self.good, self.work)
        drafter = self.rng.choice([None, None, "dflash", "eagle3"])
        folder = self.work / (drafter or "checkpoint")
        mutate = Mutator(self.rng)
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            self.rng.choice(mutate.steps)(folder)
        self._watched(None if drafter is None else folder, measured)

    def _watched(self, drafter: Path | None, measured: bool) -> None:
        global _opened
        _opened = opened = []
        if measured:
            tracemalloc.start()
        try:
            self.outcomes[self._verify(drafter)] += 1
        finally:
            _opened = None
            if measured:
                self.peak = max(self.peak, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
        assert self.peak < MAX_BYTES, self.peak
        inside = tuple(f"{self.work.resolve()}/{name}/" for name in ("checkpoint", "dflash", "eagle3"))
        code = tuple(
            os.path.realpath(path)
            for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2] / "src")
        )
        outside = [path for path in opened if not path.startswith(inside + code)]
        assert not outside, outside

    def _verify(self, drafter: Path | None) -> str:
        """The outcome in a word."""
        serving = Serving(gpu="h200", tp=1, context=1024)
        try:
            result = verify_checkpoint(
                self.work / "checkpoint", level="quick", serving=serving, drafter=drafter
            )
        except M27Error as fault:
            if fault.exit_code not in (3, 4) or not fault.message.isprintable():
                raise AssertionError(repr(fault)) from fault
            return f"exit code {fault.exit_code}"
        for finding in result.findings:
            texts = (
                finding.message,
                finding.tensor,
                finding.file,
                finding.expected,
                finding.found,
                *finding.examples,
            )
            assert all(text is None or (text.isprintable() and len(text) < 5000) for text in texts), finding
        json.dumps(result.facts)
        return "passed" if result.ok else "failed"


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as home:
        fuzz = Fuzz(Path(home), seed)
        fuzz.run(cases)
    seconds = time.perf_counter() - begin
    sys.stdout.write(
        f"{cases:,} cases of seed {seed} in {seconds:.0f} s: {dict(fuzz.outcomes)}, "
        f"peak {fuzz.peak / 2**20:.1f} MiB\n"
    )


if __name__ == "__main__":
    main()
