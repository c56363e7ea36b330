"""What of a checkpoint's folder may leave this machine: its own files, no secrets, no strangers, a card that holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import yaml

from m27quant.checkpoint.sidecars import COPIED
from m27quant.checkpoint.source import INDEX, check_link_stays_inside
from m27quant.checkpoint.strict_json import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, parse, read_bytes
from m27quant.errors import CheckpointError, EnvironmentFault, FindingsError, escape

CARD, CONFIG = "README.md", "config.json"
LAST = (CONFIG, INDEX)
"""Without them a folder is no checkpoint: they are published last."""
KNOWN = {
    CARD, *LAST, *COPIED, "generation_config.json", "hf_quant_config.json", "quantization_report.json",
    "tokenizer_config.json", "LICENSE.txt", "NOTICE.txt", ".gitattributes",
}  # fmt: skip
LICENCE = re.compile(r"(LICENSE|LICENCE|NOTICE)[\w.-]*")
LEFT_OUT = {".m27quant": "m27quant's own notes", ".git": "git", ".cache": "the Hub client's notes"}
SHARD = ".safetensors"
SECRETS = {
    "a Hub token": rb"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a Slack token": rb"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
MAX_TEXT_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 100 * 2**20
MAX_CARD_BYTES = 4 * 2**20
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True)
class PublishFile:
    """One file that goes."""

    path: Path
    name: str
    size: int

    @property
    def is_last(self) -> bool:
        return self.name in LAST


def files_to_publish(folder: Path) -> tuple[list[PublishFile], dict[str, str]]:
    """The files that belong to the checkpoint, and what is left out with the reason.

    Raises:
        FindingsError: files of somebody else, links that leave the folder, secrets, a card that does not hold.
        CheckpointError: an index that cannot be read.
        EnvironmentFault: a file that cannot be read.
    """
    wanted = KNOWN | _shards(folder) | _remote_code(folder)
    files, left_out, strangers = [], {}, []
    try:
        for path in sorted(folder.iterdir()):
            if path.name in LEFT_OUT:
                left_out[path.name] = LEFT_OUT[path.name]
            elif path.is_file() and (path.name in wanted or LICENCE.fullmatch(path.name)):
                check_link_stays_inside(folder, path)
                files.append(PublishFile(path, path.name, path.stat().st_size))
            else:
                strangers.append(escape(path.name))
    except OSError as fault:
        raise EnvironmentFault(f"{escape(folder)}: {fault.strerror}", hint="see its permissions") from None
    if strangers:
        shown = ", ".join(strangers[:8]) + (f" and {len(strangers) - 8} more" if len(strangers) > 8 else "")
        raise FindingsError(
            f"{escape(folder)}: holds what is no part of a checkpoint: {shown}",
            hint="move it elsewhere; only the checkpoint's own files are published",
        )
    for file in files:
        _refuse_secrets(file)
    _check_card(folder, {file.name for file in files})
    return files, left_out


def _shards(folder: Path) -> set[str]:
    """Names in the index; without one, every shard that is there."""
    if not (folder / INDEX).is_file():
        return {path.name for path in folder.glob(f"*{SHARD}")}
    index = parse(read_bytes(folder / INDEX, MAX_INDEX_BYTES), INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise CheckpointError(f"{INDEX}: no weight_map")
    return {name for name in named.values() if isinstance(name, str) and name.endswith(SHARD)}


def _remote_code(folder: Path) -> set[str]:
    """Files that config.json's auto_map names."""
    if not (folder / CONFIG).is_file():
        return set()
    config = parse(read_bytes(folder / CONFIG, MAX_CONFIG_BYTES), CONFIG)
    named = config.get("auto_map") if isinstance(config, dict) else None
    classes = [c for c in named.values() if isinstance(c, str)] if isinstance(named, dict) else []
    return {c.partition(".")[0] + ".py" for c in classes}


def _refuse_secrets(file: PublishFile) -> None:
    """Whether its text, or a shard's header, has what looks like a credential; what it is, is not shown."""
    try:
        with file.path.open("rb") as opened:
            if file.name.endswith(SHARD):
                size = min(int.from_bytes(opened.read(8), "little"), MAX_HEADER_BYTES)
            else:
                size = MAX_TEXT_BYTES
            text = opened.read(size)
    except OSError as fault:
        raise EnvironmentFault(f"{escape(file.path)}: {fault.strerror}", hint="see its permissions") from None
    for kind, pattern in SECRETS.items():
        if match := re.search(pattern, text):
            line = text.count(b"\n", 0, match.start()) + 1
            raise FindingsError(
                f"{escape(file.path)}: what looks like {kind}, in line {line}",
                hint="take it out, and revoke it if it ever left this machine",
            )


# -- the card --------------------------------------------------------------------------------------


def _check_card(folder: Path, names: Collection[str]) -> None:
    """A README.md whose front matter is YAML and whose links lead somewhere."""
    if CARD not in names:
        raise FindingsError(
            f"{escape(folder)}: no model card", hint=f"write a {CARD} that says what the checkpoint is"
        )
    text = read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8", "replace")
    faults = [*_front_matter_faults(text), *_link_faults(text, names)]
    if faults:
        raise FindingsError(
            f"{escape(folder / CARD)}: {'; '.join(faults[:5])}",
            hint="mend the card: people and the Hub read it",
        )


def _front_matter_faults(text: str) -> Iterator[str]:
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if match is None:
        yield "no front matter"
        return
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        yield "its front matter is no YAML"
        return
    if not isinstance(data, dict):
        yield "its front matter is no table"
        return
    base = data.get("base_model")
    for name in base if isinstance(base, list) else [] if base is None else [base]:
        if not isinstance(name, str) or REPO.fullmatch(name) is None:
            yield f"base_model '{escape(name)}' is no Hub id"


def _link_faults(text: str, names: Collection[str]) -> Iterator[str]:
    """Relative links lead to a file that is published, all others to a host."""
    code_removed = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in LINK.findall(code_removed):
        try:
            parts = urlsplit(target)
        except ValueError:
            yield f"'{escape(target)}' is no link"
            continue
        if parts.scheme in ("http", "https"):
            if not parts.hostname or "." not in parts.hostname:
                yield f"'{escape(target)}' names no host"
        elif parts.scheme == "mailto" or (not parts.path and parts.fragment):
            continue
        elif parts.scheme or str(PurePosixPath(parts.path)) not in names:
            yield f"'{escape(target)}' leads to nothing that is published"
