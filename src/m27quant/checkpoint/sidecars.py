"""The small files beside the weights: tokenizer, chat template, generation config, remote code, licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m27quant.checkpoint.strict_json import DAMAGED, MAX_CONFIG_BYTES, parse, read_bytes, refuse_lfs_pointer
from m27quant.errors import CheckpointError, escape

COPIED = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE-MODEL", "LICENSE.md", "NOTICE",
)  # fmt: skip
SAFE_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Reads tokenizer.json as it stands in transformers 4 and 5; 5's GPT2Tokenizer would swap the pre-tokenizer."""
UNSAFE_TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
END_OF_TURN = "[e~["
MAX_SIDECAR_BYTES = 128 * 2**20


def collect(folder: Path, raw_config: dict[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    """File name -> bytes of what comes along, and notices about what does not.

    Raises:
        CheckpointError: a file that is no valid JSON where it must be, a link that leaves the folder.
    """
    files: dict[str, bytes] = {}
    notices: list[str] = []
    for name in COPIED:
        if (data := _read(folder, name)) is not None:
            files[name] = data
    if "tokenizer.json" in files:
        _check_tokenizer(files["tokenizer.json"], escape(folder / "tokenizer.json"))
    else:
        notices.append("the source has no tokenizer.json; the output will have none either")
    _add_tokenizer_config(folder, files, notices)
    _add_generation_config(folder, files, notices)
    files |= _remote_code(folder, raw_config, notices)
    if not any(name.startswith("chat_template") for name in files) and b'"chat_template"' not in files.get(
        "tokenizer_config.json", b""
    ):
        notices.append("the source has no chat template")
    return files, notices


def _read(folder: Path, name: str) -> bytes | None:
    path = folder / name
    if not path.exists():
        return None
    target, home = path.resolve(), folder.resolve()
    inside_cache = (
        home.parent.name == "snapshots" and target.parent == (home.parent.parent / "blobs").resolve()
    )
    if path.is_symlink() and target.parent != home and not inside_cache:
        raise CheckpointError(
            f"{escape(path)}: a link that leaves the folder", hint="copy the file into the folder"
        )
    data = read_bytes(path, MAX_SIDECAR_BYTES)
    refuse_lfs_pointer(path, data[:200])
    return data


def _check_tokenizer(data: bytes, where: str) -> None:
    value = parse(data, where)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object", hint=DAMAGED)
    if not isinstance(value.get("added_tokens") or [], list):
        raise CheckpointError(f"{where}: added_tokens is not a list", hint=DAMAGED)


def _object(folder: Path, name: str) -> dict[str, Any] | None:
    data = _read(folder, name)
    if data is None:
        return None
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{escape(folder / name)}: {len(data):,} bytes is no configuration", hint=DAMAGED
        )
    value = parse(data, escape(folder / name))
    if not isinstance(value, dict):
        raise CheckpointError(f"{escape(folder / name)}: expected a JSON object", hint=DAMAGED)
    return value


def _add_tokenizer_config(folder: Path, files: dict[str, bytes], notices: list[str]) -> None:
    config = _object(folder, "tokenizer_config.json")
    if config is None:
        if "tokenizer.json" in files:
            notices.append("the source has no tokenizer_config.json")
        return
    if config.get("tokenizer_class") in UNSAFE_TOKENIZER_CLASSES and "tokenizer.json" in files:
        config["tokenizer_class"] = SAFE_TOKENIZER_CLASS
    files["tokenizer_config.json"] = to_json(config)


def _add_generation_config(folder: Path, files: dict[str, bytes], notices: list[str]) -> None:
    """Engines stop at generation_config's eos; the class defaults are wrong for this model, so it must be there."""
    config = _object(folder, "generation_config.json") or {}
    eos = end_of_turn_id(files)
    if "eos_token_id" not in config and eos is not None:
        config["eos_token_id"] = eos
        notices.append(
            f"generation_config.json of the source names no eos; {eos} ('{END_OF_TURN}' of the tokenizer) was written"
        )
    if config:
        files["generation_config.json"] = to_json(config)
    else:
        notices.append(
            "the source has no generation_config.json and its end-of-turn token is unknown; engines may not stop"
        )


def end_of_turn_id(files: dict[str, bytes]) -> int | None:
    """The id of M2's end-of-turn token in tokenizer.json, if it is there."""
    if "tokenizer.json" not in files:
        return None
    tokens = json.loads(files["tokenizer.json"]).get("added_tokens") or []
    for token in tokens:
        if (
            isinstance(token, dict)
            and token.get("content") == END_OF_TURN
            and isinstance(token.get("id"), int)
        ):
            return int(token["id"])
    return None


def _remote_code(folder: Path, raw_config: dict[str, Any], notices: list[str]) -> dict[str, bytes]:
    """The Python files that auto_map names, if all of them are there; they are copied, never run."""
    auto_map = raw_config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        return {}
    wanted = {str(v).partition(".")[0] + ".py" for v in auto_map.values()}
    found = {
        name: data for name in sorted(wanted) if _is_plain(name) and (data := _read(folder, name)) is not None
    }
    if set(found) != wanted:
        notices.append("config.json's auto_map names code that is not in the folder; auto_map is left out")
        return {}
    notices.append(f"custom code named by auto_map is copied and was not run: {', '.join(sorted(found))}")
    return found


def _is_plain(name: str) -> bool:
    return name.removesuffix(".py").isidentifier() and len(name.encode()) <= 255


def has_remote_code(files: dict[str, bytes]) -> bool:
    """True where the code that auto_map names comes along."""
    return any(name.endswith(".py") for name in files)


def to_json(value: dict[str, Any]) -> bytes:
    """Indented UTF-8 JSON, as checkpoints on the Hub have it."""
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
