"""Whether an engine is installed here, and in which version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from m27quant.errors import EnvironmentFault, UsageError, escape
from m27quant.serve.launch import Launch

TIMEOUT_S = 60
PROBE = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"


def find_engine(launch: Launch, warn: Callable[[str], None]) -> str:
    """The program to start; another version than the flags are for is said.

    Raises:
        EnvironmentFault: the engine is not installed; says how to install it.
        UsageError: several machines, and nobody said where the first one is.
    """
    s, engine = launch.setup, launch.engine
    if s.nnodes > 1 and s.master is None:
        raise UsageError(f"{s.nnodes} machines serve, and --master-addr is not given", hint="name machine 0")
    beside = Path(sys.executable).with_name(engine.program[0])
    program = shutil.which(engine.program[0]) or (str(beside) if os.access(beside, os.X_OK) else None)
    if program is None:
        raise EnvironmentFault(
            f"{engine.shown} is not installed here: no program '{engine.program[0]}' on PATH",
            hint=f"pip install {engine.package} in an environment of its own and put it on PATH, "
            "or take the command with --print",
        )
    version = _version(program, engine.name)
    if version is not None and not version.startswith(engine.version):
        warn(f"the flags are those of {engine.name} {engine.version}; {escape(version)} is installed")
    return program


def _version(program: str, package: str) -> str | None:
    """Asked of the interpreter that the program's first line names: importing the engine would take long."""
    try:
        with Path(program).open("rb") as file:
            first = file.readline(4096).decode("utf-8", "replace")
        match = re.fullmatch(r"#!\s*(\S*python[\d.]*)\s*", first)
        if match is None:
            return None
        answer = subprocess.run(
            [match[1], "-c", PROBE, package], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
