"""A source checkpoint, read lazily: the index says where each tensor is, headers say what it is, `pread` fetches it.

Nothing is memory-mapped: a file that shrinks under us is then an error, not a SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path, PureWindowsPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.config import M2Config, read_config
from m27quant.checkpoint.header import Header, TensorInfo, pread_exactly, read_header
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.strict_json import (
    DAMAGED,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    parse,
    read_bytes,
    refuse_lfs_pointer,
)
from m27quant.errors import CheckpointError, EnvironmentFault, escape

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLES, SAMPLE_BYTES = 32, 4096
"""Of each shard for the source's identity: a second of reading for the 230 GB of M2.7."""


class Source:
    """The tensors of one checkpoint folder by name.  Threads may read at the same time."""

    def __init__(self, location: Location) -> None:
        """Read config.json, the index and every header; no tensor byte.

        Raises:
            CheckpointError: whatever is wrong with them, naming file, tensor or key.
            EnvironmentFault: a file that cannot be read.
        """
        self.location = location
        self.folder = location.folder
        self.config: M2Config
        self.raw_config: dict[str, Any]
        self.config, self.raw_config = self._read_config()
        self.warnings: list[str] = []
        self.headers: dict[Path, Header] = {}
        self.tensors = self._locate_tensors()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def _read_config(self) -> tuple[M2Config, dict[str, Any]]:
        return read_config(self.folder)

    # -- where everything is ------------------------------------------------------------------

    def _locate_tensors(self) -> dict[str, TensorInfo]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists() or index.is_symlink():
            weight_map = _read_weight_map(index)
            tensors = self._tensors_by_index(weight_map)
            if single.exists() and SINGLE not in weight_map.values():
                raise CheckpointError(
                    f"{escape(self.folder)}: both {SINGLE} and an index that does not mention it",
                    hint="remove the one that is not meant",
                )
            return tensors
        if single.exists() or single.is_symlink():
            check_stays_inside(self.folder, SINGLE)
            self.headers[single] = read_header(single)
            return dict(self.headers[single].tensors)
        shards = sorted(self.folder.glob("*.safetensors"))
        pickles = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")])
        if shards:
            raise CheckpointError(
                f"{escape(self.folder)}: {len(shards)} shards but no {INDEX}", hint=f"fetch {INDEX} too"
            )
        if pickles:
            raise CheckpointError(
                f"{escape(self.folder)}: only pickled weights ({escape(pickles[0].name)}), which are never loaded",
                hint="convert the checkpoint to safetensors",
            )
        raise CheckpointError(
            f"{escape(self.folder)}: no weights ({INDEX} or {SINGLE})", hint="download them"
        )

    def _tensors_by_index(self, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
        by_shard: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            by_shard.setdefault(shard, []).append(name)
        missing = []
        for shard in sorted(by_shard):
            check_stays_inside(self.folder, shard)
            path = self.folder / shard
            if not path.exists():
                missing.append(shard)
                continue
            self.headers[path] = read_header(path)
        if missing:
            shown = ", ".join(escape(s) for s in missing[:5]) + (" ..." if len(missing) > 5 else "")
            message = f"{len(missing)} of the index's {len(by_shard)} shards are missing: {shown}"
            if self.location.repo_id:  # the Hub's cache is incomplete, which is no fault of the checkpoint
                raise EnvironmentFault(
                    f"{self.location.repo_id}: {message}",
                    hint="fetch them where there is a network: "
                    f"hf download {self.location.repo_id} --revision {self.location.commit}",
                )
            raise CheckpointError(
                f"{escape(self.folder)}: {message}",
                hint=f"fetch them: hf download ORG/NAME {escape(missing[0])} --local-dir {escape(self.folder)}",
            )
        tensors = {}
        for shard, names in by_shard.items():
            header = self.headers[self.folder / shard]
            for name in names:
                if name not in header.tensors:
                    raise CheckpointError(
                        f"{INDEX} maps tensor '{escape(name)}' to {escape(shard)}, which does not hold it",
                        hint=f"index and shards are not of one checkpoint; download {INDEX} and the shard again",
                    )
                tensors[name] = header.tensors[name]
        for path, header in self.headers.items():
            stray = [n for n in header.tensors if n not in tensors or tensors[n].path != path]
            if stray:
                self.warnings.append(
                    f"{escape(path.name)} holds {len(stray)} tensors that the index does not place there "
                    f"('{escape(stray[0])}' ...); they are ignored"
                )
        return tensors

    # -- reading -------------------------------------------------------------------------------

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{escape(self.folder)}: tensor '{escape(name)}' is missing", hint=DAMAGED
            ) from None

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor on the CPU, bit for bit as it is stored.

        It lies in `out` where that is given, U8 [n] of at least its size: fresh memory costs more than reading.
        """
        info = self.info(name)
        return self._typed(self.read_raw(info, out=out), info, info.shape)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) along the first dimension."""
        info = self.info(name)
        row_bytes = info.nbytes // info.shape[0]
        raw = self.read_raw(info, begin * row_bytes, (end - begin) * row_bytes)
        return self._typed(raw, info, (end - begin, *info.shape[1:]))

    def read_raw(
        self, info: TensorInfo, offset: int = 0, nbytes: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`nbytes` bytes (U8 [nbytes]) of a tensor from `offset` within it, at the beginning of `out` if given."""
        import torch

        count = info.nbytes - offset if nbytes is None else nbytes
        raw = torch.empty(count, dtype=torch.uint8) if out is None else out[:count]
        if count:
            pread_exactly(self._open(info.path), byte_view(raw), info.start + offset, escape(info.path))
        return raw

    @staticmethod
    def _typed(raw: torch.Tensor, info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
        return raw.view(torch_dtype(info)).view(shape)

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as fault:
                    raise EnvironmentFault(
                        f"{escape(path)}: cannot be opened ({fault.strerror})", hint="check its permissions"
                    ) from None
            return self._files[path]

    def recheck_all(self) -> None:
        """Raise `CheckpointError` when a shard is not the file whose header was read."""
        for path, header in self.headers.items():
            self._recheck(path, header)

    @staticmethod
    def _recheck(path: Path, header: Header) -> None:
        try:
            now = path.stat()
        except OSError:
            raise CheckpointError(
                f"{escape(path)}: vanished while it was in use", hint="leave MODEL alone during a run"
            ) from None
        if (now.st_size, now.st_mtime_ns) != (header.file_size, header.mtime_ns):
            raise CheckpointError(
                f"{escape(path)}: changed while it was in use",
                hint="leave MODEL alone during a run, then start again with --overwrite",
            )

    def identity(self) -> dict[str, str]:
        """What the run's fingerprint records of the source, by file name.

        Of a shard: size, header, and samples of its content, since two fine-tunes have the same headers.
        """
        shards = {p.name: f"{h.file_size}:{h.digest}:{self._sample(h)}" for p, h in self.headers.items()}
        config = read_bytes(self.folder / "config.json", MAX_CONFIG_BYTES)
        return shards | {"config.json": hashlib.sha256(config).hexdigest()}

    def _sample(self, header: Header) -> str:
        """SHA-256 of blocks that lie evenly over a shard; all of it where it is small."""
        digest = hashlib.sha256()
        last = max(0, header.file_size - SAMPLE_BYTES)
        for begin in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            block = bytearray(min(SAMPLE_BYTES, header.file_size - begin))
            pread_exactly(self._open(header.path), memoryview(block), begin, escape(header.path))
            digest.update(block)
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that the index places."""
        return sum(info.nbytes for info in self.tensors.values())


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The torch dtype of a stored tensor; `CheckpointError` where torch has none that is used here."""
    import torch

    known = {
        "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16, "BF16": torch.bfloat16,
        "F32": torch.float32, "F64": torch.float64,
    }  # fmt: skip
    if info.dtype not in known:
        raise CheckpointError(
            f"tensor '{escape(info.name)}' has dtype {info.dtype}, which MiniMax-M2.x does not use"
        )
    return known[info.dtype]


def _read_weight_map(index: Path) -> dict[str, str]:
    data = read_bytes(index, MAX_INDEX_BYTES)
    refuse_lfs_pointer(index, data)
    value = parse(data, escape(index))
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{escape(index)}: weight_map is missing, empty or not an object", hint=DAMAGED)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{escape(index)}: weight_map['{escape(name)}'] is not a file name", hint=DAMAGED
            )
    return weight_map


def check_stays_inside(folder: Path, shard: str) -> None:
    """A shard is a plain `.safetensors` file name in the folder, a link only as the Hub's cache lays links.

    Windows rules are applied on every system, so that a checkpoint is refused everywhere or nowhere.
    """
    windows = PureWindowsPath(shard)
    if (
        "\x00" in shard
        or windows.name != shard
        or windows.drive
        or shard in ("", ".", "..")
        or len(shard.encode("utf-8", "backslashreplace")) > 255
    ):
        raise CheckpointError(
            f"{INDEX}: '{escape(shard)}' is not a plain file name; it would leave the folder",
            hint="do not use this checkpoint",
        )
    if not shard.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX}: '{escape(shard)}' is not a .safetensors file", hint=DAMAGED)
    check_link_stays_inside(folder, folder / shard)


def check_link_stays_inside(folder: Path, path: Path) -> None:
    """A file in the folder is a link only to its neighbours, or as the Hub's cache lays links.

    Raises:
        CheckpointError: it leads elsewhere, or in circles.
    """
    if not path.is_symlink():
        return
    try:
        target, home = path.resolve(strict=False), folder.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(
            f"{escape(path)}: a link that cannot be followed", hint="put the file itself in its place"
        ) from None
    blobs = home.parent.parent / "blobs"
    in_cache = home.parent.name == "snapshots" and target.parent == blobs.resolve()
    if target.parent != home and not in_cache:
        raise CheckpointError(
            f"{escape(path)}: a link that leaves the folder", hint="copy the file into the folder"
        )
