"""Which GPUs this machine has, asked of nvidia-smi: no CUDA context, no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

from m27quant.errors import EnvironmentFault, UsageError, escape
from m27quant.verify.engines_data import GPUS

NAMES = {
    r"\bGB200\b": "gb200",
    r"\bB200\b": "b200",
    r"\bB300\b": "b300",
    r"\bRTX PRO 6000\b.*\bBlackwell\b": "rtx-pro-6000",
    r"\bGB10\b": "gb10",
    r"\bH200\b": "h200",
    r"\bH100\b": "h100",
}
"""What nvidia-smi calls them -> our names."""
TIMEOUT_S = 20


def detect_gpus() -> tuple[str, int]:
    """Name and number of this machine's GPUs.

    Raises:
        UsageError: none was found, or none that the table of GPUs has.
        EnvironmentFault: nvidia-smi is there and fails.
    """
    names = _ask()
    known = Counter(ours for name in names for pattern, ours in NAMES.items() if re.search(pattern, name))
    hint = f"name the GPUs that will serve: --gpu {'|'.join(GPUS)}"
    if not names:
        raise UsageError("no GPU was found on this machine", hint=hint)
    if not known:
        raise UsageError(f"this machine's GPU, {escape(names[0])}, is not in the table of GPUs", hint=hint)
    return known.most_common(1)[0]


def _ask() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise EnvironmentFault(
            f"nvidia-smi does not answer: {escape(fault)}", hint="name the GPUs with --gpu"
        ) from None
    if answer.returncode:
        raise EnvironmentFault(
            f"nvidia-smi failed: {escape(answer.stderr or answer.stdout)}", hint="name the GPUs with --gpu"
        )
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
