"""A headless Chromium, driven through chromedriver's HTTP (WebDriver, W3C) as Debian's packages bring it."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


def missing() -> str | None:
    """Why there is no browser here, if there is none."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(lacking)}: apt-get install chromium chromium-driver" if lacking else None


class Browser:
    """One page in one window."""

    def __init__(self, driver: httpx.Client, session: str) -> None:
        self._driver, self._path = driver, f"/session/{session}"

    def _call(self, method: str, path: str, **body: Any) -> Any:
        answer = self._driver.request(method, self._path + path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.is_success, value
        return value

    def open(self, url: str) -> None:
        self._call("POST", "/url", url=url)

    def size(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", width=width, height=height)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function body."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def keys(self, text: str) -> None:
        """Press keys, one by one, whatever has the focus."""
        pressed = [{"type": kind, "value": c} for c in text for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": pressed}])

    def text(self, selector: str) -> str:
        """What can be read of the first element; nothing where there is none."""
        found = self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        return str(found)

    def focus(self) -> str:
        """The id of what has the focus."""
        return str(self.run("return document.activeElement.id"))

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))


@contextmanager
def browser(profile: Path, *, dark: bool = False) -> Iterator[Browser]:
    """A browser with an empty profile in a folder of its own."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "started successfully on port" in line)
        port = int(line.rsplit(maxsplit=1)[1].rstrip("."))
        flags = [*FLAGS, f"--user-data-dir={profile}", *(["--force-dark-mode"] if dark else [])]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": flags}}
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as driver:
                made = driver.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
                assert "sessionId" in made, made
                try:
                    yield Browser(driver, made["sessionId"])
                finally:
                    driver.delete(f"/session/{made['sessionId']}")
        finally:
            process.terminate()
