"""A real browser, where there is one: Debian's chromium, driven by its chromedriver."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One page of one browser, by the WebDriver protocol."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        self._session = self._call("POST", "/session", {"capabilities": wanted})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _tools(self, command: str, **parameters: Any) -> Any:
        """A command of Chrome's own protocol."""
        body = {"cmd": command, "params": parameters}
        return self._call("POST", f"/session/{self._session}/goog/cdp/execute", body)

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Show a file in a window of so many pixels; below 600 it is a phone's."""
        self._tools(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tools("Emulation.setEmulatedMedia", features=[scheme])
        self._call("POST", f"/session/{self._session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What JavaScript of ours returns; the page's own policy does not bind it."""
        body = {"script": script, "args": []}
        return self._call("POST", f"/session/{self._session}/execute/sync", body)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self._tools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._call("DELETE", f"/session/{self._session}")


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser for a test, which is skipped without one."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    page = None
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        page = Browser(f"http://127.0.0.1:{port}")
        yield page
    finally:
        if page is not None:
            page.close()
        process.terminate()
        process.wait()
