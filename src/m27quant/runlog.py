"""run.log: what happened when, as JSON lines; the only output that carries times."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class RunLog:
    """Appends to a log that survives resumes; a log that cannot be written never stops a run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fault is not None:
            self.write("stopped", kind=type(fault).__name__, message=str(fault))

    def write(self, event: str, **fields: Any) -> None:
        """One line with the time in UTC."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"time": now, "event": event, **fields}) + "\n")
        except OSError:
            pass
