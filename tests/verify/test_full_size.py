"""The inventory of the real thing: 191,211 tensors in their real shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.verify.sparse import write_sparse

TENSORS = 191_211
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from m27quant import verify_checkpoint
begin = time.process_time()  # others may be using the machine
result = verify_checkpoint(sys.argv[1], level="quick")
json.dump({
    "seconds": time.process_time() - begin,
    # not ru_maxrss, which begins with the size of whoever started this
    "peak": int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024,
    "torch": "torch" in sys.modules,
    "codes": [f.check.code for f in result.findings],
    "tensors": result.facts["num_tensors"],
}, sys.stdout)
"""


@pytest.mark.slow
def test_quick_on_full_m27_takes_seconds_and_little_memory(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Ten seconds are the aim; how long it takes is told, not judged: the machine may be busy."""
    folder = write_sparse(tmp_path / "m27")
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["codes"] == ["M27-F033"]  # it has no tokenizer and no chat template
    assert measured["tensors"] == TENSORS
    assert not measured["torch"]
    assert measured["peak"] < 1e9
    record_property("verify --quick of 191,211 tensors, seconds", round(measured["seconds"], 2))
    record_property("peak memory, MB", round(measured["peak"] / 1e6))
