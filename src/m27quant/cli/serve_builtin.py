"""`m27quant serve --engine builtin`: the server that comes with m27quant."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m27quant.cli.output import Output
from m27quant.errors import CheckpointError, FindingsError, escape

if TYPE_CHECKING:
    from m27quant.checkpoint.hub import Location


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for; of each group the options that were given, by the names of the classes that take them."""

    checkpoint: str
    drafter: str | None
    run: Mapping[str, Any]
    """Of RunOptions."""
    server: Mapping[str, Any]
    """Of ServerOptions."""
    drafting: Mapping[str, Any]
    """Of DrafterOptions."""
    hub: Mapping[str, Any]
    """revision, offline, token."""
    quick: bool
    verify: bool


OPTIONS = {
    "max_body_bytes": "--max-body",
    "request_timeout_s": "--request-timeout",
    "drain_timeout_s": "--drain-timeout",
    "tap_offset": "--drafter-tap-offset",
    "rope_theta": "--drafter-rope-theta",
}
"""Fields whose options are spelt otherwise."""


def serve_builtin(output: Output, asked: Asked, *, print_only: bool) -> None:
    """Check the checkpoint, then serve it until a signal ends that; or print the command.

    Raises:
        FindingsError: verify finds errors.
        M27Error: as `m27quant.serve.server.serve`.
    """
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if asked.verify:
        _check(output, asked)
    if print_only:
        words = command(asked)
        shell = " \\\n".join([shlex.join(words[:3]), *(f"  {line}" for line in _lines(words[3:]))])
        document = {"engine": "builtin", "command": words, "shell": shell}
        output.result(document, human=shell, quiet=shell)
        return
    from m27quant.runtime.options import RunOptions
    from m27quant.runtime.speculative.load import DrafterOptions
    from m27quant.serve.server import ServerOptions, serve

    drafting = DrafterOptions(**asked.drafting) if asked.drafter is not None else None
    serve(
        asked.checkpoint,
        RunOptions(**asked.run),
        asked.drafter,
        ServerOptions(**asked.server),
        say=output.status,
        check=False,  # it was done
        drafter_options=drafting,
        **asked.hub,
    )


def command(asked: Asked) -> list[str]:
    """The command as words, without any secret: the key comes from M27QUANT_API_KEY."""
    words = ["m27quant", "serve", asked.checkpoint, "--engine", "builtin"]
    if asked.drafter is not None:
        words += ["--drafter", asked.drafter]
    given = {**asked.run, **asked.server, **asked.drafting, **asked.hub}
    for name, value in given.items():
        option = OPTIONS.get(name, "--" + name.replace("_", "-"))
        if name in ("api_key", "token") or value is None or value is False:
            if name == "chat_page":
                words.append("--no-chat-page")
            elif name == "invariant" and value is False:
                words.append("--fast")
        elif name == "cors_origins":
            words += [word for origin in value for word in ("--cors-origin", origin)]
        elif value is True:
            words.append(option)
        else:
            words += [option, str(value)]
    return [*words, *([] if asked.verify else ["--no-verify"])]


def _lines(words: list[str]) -> list[str]:
    """An option and its value to a line."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([word])
        else:
            lines[-1].append(word)
    return [shlex.join(line) for line in lines]


def _check(output: Output, asked: Asked) -> None:
    """verify's rules for what is quantized; of an FP8 or BF16 source its headers, by config.json."""
    from m27quant.checkpoint.strict_json import read_object
    from m27quant.verify.locate import find_checkpoint
    from m27quant.verify.refuse import refuse_errors
    from m27quant.verify.run import verify_checkpoint

    location = find_checkpoint(asked.checkpoint, say=output.status, **asked.hub)
    if not location.folder.is_dir():
        raise CheckpointError(
            f"{escape(location.folder)}: no such folder", hint="name the checkpoint's folder"
        )
    section = read_object(location.folder / "config.json").get("quantization_config")
    if section is None or (isinstance(section, dict) and section.get("quant_method") == "fp8"):
        _check_source(location)
        return
    result = verify_checkpoint(location, level="quick" if asked.quick else "default")
    refuse_errors(result, "not fit to be served")


def _check_source(location: Location) -> None:
    from m27quant.checkpoint.layout import check_layout
    from m27quant.checkpoint.quantized import open_checkpoint

    with open_checkpoint(location) as source:
        try:
            check_layout(source)
        except CheckpointError as fault:
            raise FindingsError(f"not fit to be served: {fault.message}", hint=fault.hint) from None
