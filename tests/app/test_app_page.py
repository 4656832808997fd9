"""The page in a real Chromium, used as a person would: every tab, keyboard, phone, dark, axe.

LEANCLIP_SCREENSHOTS=docs/images has the pictures of docs/app.md made; the model and the pictures
are those of `make quickstart`, where it has run (else a model of a moment, and noise).
"""

import contextlib
import csv
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import AXE, DESKTOP, PHONE, Browser, chromium, skip_loudly
from conftest import PROJECT, Forked, noise_image
from PIL import Image
from test_app_server import running, until_ready
from test_inference import save_tiny

import leanclip
from leanclip.evaluation import Calibration
from leanclip.search import Index
from leanclip.weights import fingerprint

pytestmark = pytest.mark.slow

DEMO = Path(os.environ.get("LEANCLIP_DEMO", PROJECT))
SHOWN = {  # in docs/app.md
    *(f"app-{tab}-desktop-light.png" for tab in ("compare", "classify", "search")),
    *("app-compare-phone-light.png", "app-search-phone-dark.png"),
}
TEXTS = ["a red star", "a blue circle", "a green square", "a yellow triangle"]


class Place:
    """What the page is started with: a model, an index of pictures with labels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        quickstart, drawings = DEMO / "runs/quickstart", DEMO / "data/shapes"
        self.is_demo = (quickstart / "checkpoints").is_dir() and drawings.is_dir()
        if self.is_demo:
            (folder / "quickstart").symlink_to(quickstart)
            wanted = sorted(drawings.glob("unseen/*/00[0-4].png"))
            pairs = sorted((drawings / "val").rglob("*.png"))[:5]
            self.texts = [path.with_suffix(".txt").read_text().strip() for path in pairs[:4]]
        else:
            save_tiny(folder / "quickstart")
            wanted, pairs, self.texts = [None] * 100, [None] * 5, TEXTS
        self.photos = [self._put(source, i) for i, source in enumerate(wanted)]
        self.pairs = [self._put(source, i, "pairs") for i, source in enumerate(pairs)]
        self.labels = [path.name.replace("_", " ") for path in (folder / "photos").iterdir()]
        self.labels = sorted(self.labels)[:6]
        self.model = folder / "quickstart"
        self.clip = leanclip.load(self.model, device="cpu")
        Index.build(folder / "photos", self.clip, folder / "index").close()
        (folder / "animals.txt").write_text("otter\nbadger\n")
        Calibration(
            temperature=2.0,
            threshold=0.1,
            floor=1000.0,  # everything is none of these
            coverage=0.9,
            images=100,
            weights=fingerprint(self.clip.model.state_dict()),
            classes=("a thing", "another"),
            templates=("the {}",),
        ).save(folder)

    def _put(self, source: Path | None, number: int, kind: str = "photos") -> Path:
        """A picture, in the folder of its class."""
        name = source.parent.name if source else f"class {number % 7}"
        path = self.folder / kind / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if source:
            shutil.copy(source, path)
        else:
            noise_image(number).save(path)
        return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[tuple[Forked, int]]:
    words = ("--index", "index", "--calibration", "calibration.json", "--labels", "animals.txt")
    with (
        contextlib.chdir(place.folder),
        running(place.folder, *words, model="quickstart") as (process, port),
    ):
        until_ready(port)
        yield process, port


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("downloads")) as browser:
        yield browser


@pytest.fixture
def page(server: tuple[Forked, int], window: Browser) -> Browser:
    """The page, fresh, on a desktop."""
    window.look(DESKTOP)
    window.driver.get(f"http://127.0.0.1:{server[1]}/")
    window.run("localStorage.clear()")
    window.driver.refresh()
    window.until(lambda: "pixels" in window.text("#model"))
    window.errors()
    return window


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go."""
    wanted = os.environ.get("LEANCLIP_SCREENSHOTS")
    return (PROJECT / wanted) if wanted else tmp_path


def open_tab(page: Browser, name: str) -> None:
    page.one(f"#tab-{name}").click()
    page.until(lambda: page.one(f"#{name}").is_displayed())


def choose(page: Browser, selector: str, *paths: Path) -> None:
    page.one(selector).send_keys("\n".join(map(str, paths)))


def pick(page: Browser, selector: str, value: str) -> None:
    """Choose one of a list, which the page may draw again when the server answers."""
    from selenium.webdriver.support.ui import Select

    page.until(lambda: Select(page.one(selector)).select_by_value(value) is None)


def write(page: Browser, selector: str, text: str) -> None:
    field = page.one(selector)
    field.clear()
    field.send_keys(text)


def compared(page: Browser, place: Place, count: int = 5) -> list[Path]:
    """The tab Compare with a matrix."""
    chosen = place.pairs[:count]
    write(page, "#compare-texts", "\n".join(place.texts))
    choose(page, "#compare-files", *chosen)
    page.until(lambda: len(page.all("#compare-table tbody td")) == count * len(place.texts))
    return chosen


def test_compare(page: Browser, place: Place, tmp_path: Path) -> None:
    chosen = compared(page, place)
    expected = place.clip.similarity([str(path) for path in chosen], place.texts)
    shown = [float(cell.text) for cell in page.all("#compare-table tbody td")]
    np.testing.assert_allclose(shown, expected.ravel(), atol=6e-4)
    best = [cell.text for cell in page.all("#compare-table td.best")]
    assert sorted(map(float, best)) == pytest.approx(sorted(expected.max(axis=0)), abs=6e-4)
    assert f"5 of 5 images compared with {len(place.texts)} texts" in page.text("#compare-status")

    page.one("#compare-csv").click()
    page.until(lambda: (page.downloads / "similarity.csv").exists())
    with (page.downloads / "similarity.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["text", *(path.name for path in chosen)]
    assert [row[0] for row in rows[1:]] == place.texts
    np.testing.assert_allclose(np.array([r[1:] for r in rows[1:]], float), expected, atol=2e-6)
    page.one("#compare-png").click()
    page.until(lambda: (page.downloads / "similarity.png").exists())
    image = Image.open(page.downloads / "similarity.png")
    assert image.size == (260 + 120 * 5 + 10, 150 + 44 * 4 + 10)
    assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 20

    page.all("#compare-images button")[0].click()  # takes an image away
    page.until(lambda: len(page.all("#compare-table thead img")) == 4)
    wrong = tmp_path / "page.jpg"
    wrong.write_text("<html>")
    choose(page, "#compare-files", wrong)
    page.until(lambda: "page.jpg" in page.text("#compare-error"))
    assert "cannot be read as an image" in page.text("#compare-error")
    assert len(page.all("#compare-table thead img")) == 4  # the others stay
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 << 20))
    choose(page, "#compare-files", large)
    page.until(lambda: "20 MB" in page.text("#compare-error"))


DROP = """
const [selector, type, name] = arguments;
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 40;
canvas.getContext("2d").fillRect(5, 5, 20, 20);
canvas.toBlob((blob) => {
  const data = new DataTransfer();
  const kind = name.endsWith("png") ? "image/png" : "text/plain";
  data.items.add(new File([blob], name, { type: kind }));
  const event = type === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true })
    : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
  document.querySelector(selector).dispatchEvent(event);
});
"""


def test_dropped_and_pasted_images(page: Browser) -> None:
    page.run(DROP, "#compare-drop", "drop", "dropped.png")
    page.until(lambda: len(page.all("#compare-table thead img")) == 1)
    page.run(DROP, "body", "paste", "pasted.png")
    page.until(lambda: len(page.all("#compare-table thead img")) == 2)
    assert "dropped.png" in page.text("#compare-table")
    assert "pasted.png" in page.text("#compare-table")
    page.run(DROP, "#compare-drop", "drop", "notes.txt")
    page.until(lambda: "notes.txt: not an image" in page.text("#compare-error"))


def classified(page: Browser, place: Place) -> None:
    """The tab Classify with bars and a map."""
    open_tab(page, "classify")
    write(page, "#classify-labels", "\n".join(place.labels))
    choose(page, "#classify-file", place.photos[0])
    page.until(lambda: page.one("#classify-map").get_property("naturalWidth") == 448)


def test_classify(page: Browser, place: Place) -> None:
    classified(page, place)
    expected = place.clip.classify(str(place.photos[0]), place.labels)
    bars = [bar.text.split("\n") for bar in page.all("#classify-bars button")]
    assert [bar[0] for bar in bars] == [prediction.label for prediction in expected]
    assert [float(bar[1].rstrip("%")) for bar in bars] == pytest.approx(
        [100 * prediction.probability for prediction in expected], abs=0.06
    )
    assert expected[0].label in page.text("#classify-caption")
    before = page.one("#classify-map").get_attribute("src")
    page.all("#classify-bars button")[1].click()
    page.until(lambda: expected[1].label in page.text("#classify-caption"))
    assert page.one("#classify-map").get_attribute("src") != before
    page.one("#classify-whole").click()
    page.until(lambda: "without a text" in page.text("#classify-caption"))

    pick(page, "#classify-template", "own")
    write(page, "#classify-templates", "no place for it")
    page.one("#classify-form button[type=submit]").click()
    page.until(lambda: "has no {}" in page.text("#classify-error"))
    write(page, "#classify-templates", "the {}")
    page.one("#classify-form button[type=submit]").click()
    expected = place.clip.classify(str(place.photos[0]), place.labels, "the {}")
    said = f"{expected[0].label}, {100 * expected[0].probability:.1f}%"
    page.until(lambda: said in page.text("#classify-status"))


def test_label_sets_of_the_server_and_none_of_these(page: Browser, place: Place) -> None:
    classified(page, place)
    pick(page, "#classify-set", "server:animals")
    page.until(lambda: page.one("#classify-labels").get_property("value") == "otter\nbadger")
    pick(page, "#classify-set", "server:calibrated")
    page.until(lambda: page.one("#classify-labels").get_property("value") == "a thing\nanother")
    page.one("#classify-form button[type=submit]").click()
    page.until(lambda: "none of these" in page.text("#classify-status"))
    assert "None of these" in page.text("#classify-heading")
    assert "Calibrated" in page.text("#classify-note")
    assert len(page.all("#classify-bars button")) == 2


def test_label_sets_are_kept_in_the_browser(page: Browser) -> None:
    open_tab(page, "classify")
    write(page, "#classify-labels", "otter\nbadger")
    page.one("#classify-save").click()
    assert "otter, badger" in page.text("#classify-status")
    page.driver.refresh()
    page.until(lambda: page.one("#classify").is_displayed())
    write(page, "#classify-labels", "x")
    pick(page, "#classify-set", "saved:otter, badger")
    page.until(lambda: page.one("#classify-labels").get_property("value") == "otter\nbadger")
    page.one("#classify-delete").click()
    assert "otter" not in page.one("#classify-set").text


def searched(page: Browser, text: str = TEXTS[0]) -> None:
    """The tab Search with a grid."""
    open_tab(page, "search")
    write(page, "#search-text", text)
    page.one("#search-form button[type=submit]").click()
    page.until(lambda: len(page.all("#search-grid li")) >= 30)


def tiles(page: Browser) -> list[str]:
    return page.run("return [...document.querySelectorAll('#search-grid b')].map(b => b.innerText)")


def test_search(page: Browser, place: Place) -> None:
    index = Index.open(place.folder / "index", place.clip)
    open_tab(page, "search")
    assert f"{len(place.photos)} images" in page.text("#search-status")
    searched(page)
    assert len(tiles(page)) < len(place.photos)
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.until(lambda: len(tiles(page)) >= 60)
    while len(tiles(page)) < len(place.photos):
        page.run("window.scrollTo(0, document.body.scrollHeight)")
        time.sleep(0.05)
    expected = [hit.score for hit in index.search(TEXTS[0], k=len(place.photos))]
    assert [float(score) for score in tiles(page)] == pytest.approx(expected, abs=6e-4)
    page.until(lambda: not page.one("#search-more").is_displayed())
    loaded = "return document.querySelectorAll('#search-grid img')[0].naturalWidth"
    page.run("window.scrollTo(0, 0)")
    page.until(lambda: page.run(loaded) > 0)
    first = page.all("#search-grid button")[2].get_attribute("title").split("\n")[0]
    assert page.all("#search-grid .about")[2].text.endswith("/".join(first.split("/")[-2:]))
    page.all("#search-grid button")[2].click()
    page.until(lambda: f"similar to {Path(first).name}" in page.text("#search-status"))
    page.until(lambda: tiles(page)[:1] == ["1.000"])
    assert page.all("#search-grid button")[0].get_attribute("title").startswith(f"{first}\n")
    choose(page, "#search-file", place.photos[3])
    page.until(lambda: f"similar to {place.photos[3].name}" in page.text("#search-status"))
    page.until(lambda: page.all("#search-grid .about")[0].text.endswith(place.photos[3].name))
    write(page, "#search-text", "word " * 200)
    page.one("#search-form button[type=submit]").click()
    page.until(lambda: "context" in page.text("#search-error"))
    write(page, "#search-text", TEXTS[0])
    pick(page, "#search-label", str(index.item(1).label))
    page.one("#search-form button[type=submit]").click()
    of_label = index.search(TEXTS[0], label=index.item(1).label, k=100)
    page.until(lambda: f"{len(of_label)} images" in page.text("#search-status"))
    index.close()


def test_it_is_used_with_the_keyboard_alone(page: Browser, place: Place) -> None:
    from selenium.webdriver.common.keys import Keys

    page.keys(Keys.TAB)
    assert page.focused() == "tab-compare"
    page.keys(Keys.ARROW_RIGHT)
    assert page.focused() == "tab-classify"
    assert page.one("#classify").is_displayed()
    page.keys(Keys.ARROW_RIGHT)
    assert page.focused() == "tab-search"
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keys(Keys.TAB)
    assert page.focused() == "search-text"
    page.keys(*TEXTS[0], Keys.ENTER)
    page.until(lambda: len(tiles(page)) >= 30)
    page.keys(Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB)
    while page.run("return document.activeElement.closest('#search-grid') === null"):
        page.keys(Keys.TAB)
    page.keys(Keys.ENTER)
    page.until(lambda: "similar to " in page.text("#search-status"))
    page.run("document.querySelector('#tab-search').focus()")
    page.keys(Keys.HOME)
    assert page.focused() == "tab-compare"
    page.keys(Keys.TAB)
    assert page.focused() == "compare-files"


def test_every_tab_at_both_widths_light_and_dark(
    page: Browser, place: Place, pictures: Path, tmp_path: Path
) -> None:
    """Nothing sticks out, axe finds nothing serious, and the browser complains of nothing."""
    if not AXE.is_file():
        skip_loudly("there is no axe (npm install --prefix .venv axe-core@4.14.1)")
    compared(page, place)
    classified(page, place)
    searched(page, f"a {place.labels[-1]}")
    for size, width in ((DESKTOP, "desktop"), (PHONE, "phone")):
        for scheme in ("light", "dark"):
            page.look(size, scheme)
            for tab in ("compare", "classify", "search"):
                open_tab(page, tab)
                page.run("window.scrollTo(0, 0); document.activeElement.blur()")
                time.sleep(0.3)
                wide = page.run("return document.documentElement.scrollWidth")
                assert wide <= size[0], (tab, width)
                name = f"app-{tab}-{width}-{scheme}.png"
                page.screenshot((pictures if name in SHOWN else tmp_path) / name, height=1200)
                assert page.axe() == [], (tab, width, scheme)
    assert page.errors() == []


def test_errors_of_every_tab_pass_axe_too(page: Browser, tmp_path: Path) -> None:
    if not AXE.is_file():
        skip_loudly("there is no axe")
    for tab in ("compare", "classify", "search"):
        open_tab(page, tab)
        page.one(f"#{tab}-form button[type=submit]").click()
        page.until(lambda tab=tab: page.text(f"#{tab}-error"))
        for scheme in ("light", "dark"):
            page.look(DESKTOP, scheme)
            assert page.axe() == [], tab


def test_a_server_that_is_gone_is_said_in_words(
    place: Place, window: Browser, tmp_path: Path
) -> None:
    words = ("--token", "sixteen-characters")
    with (
        running(tmp_path, *words, model=str(place.model)) as (process, port),
    ):
        until_ready(port)
        window.look(DESKTOP)
        window.driver.get(f"http://127.0.0.1:{port}/")
        assert window.driver.current_url.endswith("/sign-in")
        if AXE.is_file():
            assert window.axe() == []
        write(window, "#token", "wrong")
        window.one("button").click()
        window.until(lambda: "not the token" in window.text(".error"))
        write(window, "#token", "sixteen-characters")
        window.one("button").click()
        window.until(lambda: "pixels" in window.text("#model"))
        open_tab(window, "search")
        assert "leanclip search build" in window.text("#search-status")
        open_tab(window, "compare")
        process.send(signal.SIGKILL)
        choose(window, "#compare-files", place.photos[0])
        window.until(lambda: "does not answer" in window.text("#compare-error"))
