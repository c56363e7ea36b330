"""Memory of a command, seen from outside."""

from __future__ import annotations

import sys

from benchmarks.watch import watch

MIB = 2**20


def test_the_peak_is_seen_even_when_it_is_short() -> None:
    found = watch(
        [sys.executable, "-c", "import time; b = bytearray(b'1') * (200 << 20); del b; time.sleep(0.2)"]
    )
    assert found.returncode == 0
    assert 200 * MIB <= found.peak_rss_bytes < 240 * MIB
    assert found.seconds >= 0.2


def test_children_are_counted_with_their_parent() -> None:
    child = "import time; b = bytearray(b'1') * (100 << 20); time.sleep(2)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = watch([sys.executable, "-c", program])
    assert found.peak_rss_bytes < 60 * MIB
    assert found.peak_tree_bytes >= 100 * MIB


def test_output_and_exit_code_are_kept() -> None:
    program = "import sys; print('x' * 300_000); print('no', file=sys.stderr); sys.exit(3)"
    found = watch([sys.executable, "-c", program])
    assert (found.returncode, len(found.stdout), found.stderr) == (3, 300_001, "no\n")
