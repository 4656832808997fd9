"""A headless Chromium for tests, driven through chromedriver; and axe, which checks a page.

Debian: apt-get install chromium chromium-driver; npm install --prefix .venv axe-core@4.14.1
"""

import base64
import io
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

AXE = Path(sys.prefix) / "node_modules/axe-core/axe.min.js"
DESKTOP, PHONE = (1200, 900), (390, 844)


def skip_loudly(reason: str) -> None:
    """Skip the test, with a warning that stands at the end of pytest's output."""
    warnings.warn(f"THE PAGE WAS NOT TESTED: {reason}", stacklevel=2)
    pytest.skip(reason)


class Browser:
    """A window of it."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def look(self, size: tuple[int, int], scheme: str = "light") -> None:
        """Make it a desktop's or a phone's window, light or dark."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        metrics["mobile"] = size == PHONE
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce"})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Show a file in a window of so many pixels."""
        self.look((width, PHONE[1]), "dark" if dark else "light")
        self.driver.get(path.resolve().as_uri())

    def one(self, selector: str) -> Any:
        """The element that a CSS selector means."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """All that it means."""
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return self.one(selector).text

    def run(self, script: str, *values: object) -> Any:
        """Run JavaScript."""
        return self.driver.execute_script(script, *values)

    def until(self, is_so: Any, seconds: float = 20) -> Any:
        """Wait for something to be so; elements may come and go meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(
            self.driver, seconds, 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return wait.until(lambda _: is_so())

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def focused(self) -> str:
        """The id of what has the focus."""
        return self.run("return document.activeElement.id")

    def errors(self) -> list[str]:
        """What the browser complained of since the last call."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """The whole page, or its first `height` pixels, as a small PNG."""
        box = self.run("const r = document.documentElement; return [r.clientWidth, r.scrollHeight]")
        clip = {
            "x": 0,
            "y": 0,
            "width": box[0],
            "height": min(height or box[1], box[1]),
            "scale": 1,
        }
        wanted = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", wanted)
        image = Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)

    def axe(self) -> list[str]:
        """What axe finds serious or critical: rule, words, element."""
        if not self.run("return 'axe' in window"):
            self.run(AXE.read_text(encoding="utf-8"))
        script = "const done = arguments[0]; axe.run().then(done, (e) => done({error: String(e)}))"
        found = self.driver.execute_async_script(script)
        assert "error" not in found, found
        return [
            f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]


@contextmanager
def chromium(downloads: Path) -> Iterator[Browser]:
    """A browser; without one, the test is skipped, and says so."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        skip_loudly("there is no chromium or chromedriver (apt-get install chromium-driver)")
    try:
        from selenium import webdriver
    except ImportError:
        skip_loudly("selenium is not installed")
        raise
    options = webdriver.ChromeOptions()
    options.binary_location = str(program)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.add_experimental_option(
        "prefs",
        {"download.default_directory": str(downloads), "download.prompt_for_download": False},
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=str(driver))
    window = webdriver.Chrome(options=options, service=service)
    window.set_script_timeout(60)
    try:
        yield Browser(window, downloads)
    finally:
        window.quit()
