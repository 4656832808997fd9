"""The report as a page: whole, escaped, and looked at in a browser."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium
from conftest import TINY, Command, configured_tasks, make_model, noise_image, run_cli
from PIL import Image

from leanclip import CLIP, Preprocess
from leanclip.config.data import DataConfig
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.data import Dataset, Sample
from leanclip.evaluation import Task, evaluate
from leanclip.evaluation.classification import classify
from leanclip.evaluation.results import Report
from leanclip.report.page import svg, write_page
from leanclip.report.plots import confusion_matrix, line_chart
from leanclip.report.report_page import write_report
from leanclip.report.text import sentences

HOSTILE = "<script>alert(1)</script> \"'&amp;"


class Reader(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def make_report(root: Path, *, is_broken: bool = False) -> Report:
    """Zero-shot on three classes and retrieval on pairs, both with hostile names and captions."""
    for label, name in enumerate(("ant", "bee", "cow")):
        (root / "c" / name).mkdir(parents=True)
        for i in range(4):
            noise_image(10 * label + i).save(root / "c" / name / f"{i}.png")
    names = root / "names.txt"
    names.write_text(f"{HOSTILE}\nbee{'e' * 300}\ncow \u202e txt.exe\n")
    (root / "p").mkdir()
    for i in range(9):
        noise_image(i).save(root / "p" / f"{i}.png")
        (root / "p" / f"{i}.txt").write_text(f"{HOSTILE} {i}\n")
    (root / "p" / "3.png").write_bytes(b"no")
    values = {
        "model": TINY,
        "data": {"format": "folder", "root": str(root / "c"), "workers": 0, "max_bad_fraction": 0.5,
                 "class_names": str(names)},
        "evaluate": {"zero_shot": {"templates": ["a {}"]},
                     "retrieval": {"format": "pairs", "root": str(root / "p")}},
    }  # fmt: skip
    tasks = configured_tasks(parse(Config, values, where="test"))
    torch.manual_seed(0)
    model = CLIP(**TINY).eval()
    if is_broken:
        torch.nn.init.constant_(model.get_parameter("text_projection"), torch.nan)
    report = evaluate(model, tasks, Preprocess(32))
    report.source, report.command = "runs/<b>x</b>", "leanclip eval --model 'runs/<b>x</b>'"
    return report


class Noise(Dataset):
    """Images of noise."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> Sample:
        file = io.BytesIO()
        noise_image(index).save(file, "PNG")
        return Sample(str(index), file.getvalue(), ["x"])


def write_metrics(folder: Path) -> None:
    lines = [
        {"step": i, "train/loss": 3 / i, "train/lr": 1e-4 * i, "train/logit_scale": 14 + i}
        for i in range(1, 30)
    ]
    lines += [{"step": i, "val/zeroshot_top1": i / 40, "val/zeroshot_ece": 0.1} for i in (10, 29)]
    lines.append({"step": 30, "train/loss": float("nan")})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_is_whole_and_everything_in_it_is_escaped(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    write_metrics(tmp_path / "run")
    page = write_report(tmp_path / "run", report).read_text(encoding="utf-8")
    reader = Reader(page)
    kinds = {name for name, _ in reader.elements}
    assert not kinds & {"script", "link", "iframe", "object", "b><"}
    for name, attributes in reader.elements:
        assert not any(key.startswith("on") for key in attributes), name
        for key in ("src", "href", "data"):
            own = ("data:image/jpeg", "#") if name == "use" else "data:image/jpeg"
            assert (attributes.get(key) or "data:image/jpeg").startswith(own), name
    policy = next(a["content"] for n, a in reader.elements if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page
    assert HOSTILE in reader.text
    assert "\u202e" not in page
    assert "runs/<b>x</b>" in reader.text
    for words in (report.weights, report.command, "3.png", *sentences(report)):
        assert words in reader.text, words
    for data in report.data.values():
        assert data["sha256"] in reader.text
    for title in ("Metrics", "Training", "Confusion matrix", "Most confused",
                  "Nearest images", "Cosine similarity of", "Evaluation skipped 1 sample.",
                  "First caption retrieved for an image", "zero-shot top-1"):  # fmt: skip
        assert title in reader.text, title
    for name, (low, high) in report.intervals.items():
        if "rank" not in name:
            assert f"{low:.1%}–{high:.1%}" in reader.text


def test_the_pictures_are_inside(tmp_path: Path) -> None:
    page = write_report(tmp_path, make_report(tmp_path)).read_text(encoding="utf-8")
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(found) > 30
    for data in set(found):
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 40)
    assert len(page) < 500_000


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path, Report()).read_text(encoding="utf-8")
    assert "leanclip report" in Reader(page).text


def test_training_and_eval_leave_a_page_and_say_where(command: Command, workplace: Path) -> None:
    (workplace / "data/005.txt").write_bytes(b"\xff")
    words = ("-o", "data.max_bad_fraction=0.5")
    done = command("train", "-c", "config.yaml", "--output-dir", "run", *words)
    assert done.returncode == 0, done.stderr
    page = Reader((workplace / "run/report.html").read_text(encoding="utf-8"))
    assert "Report:   run/report.html" in done.stdout
    metrics = json.loads((workplace / "run/report.json").read_text())["metrics"]
    first = f"{metrics['image_to_text_R@1']:.1%}"
    assert f"Metrics:  image→text R@1 {first} (" in done.stdout
    assert "learning rate" in page.text
    assert "Training skipped 1 caption not UTF-8: see skipped.jsonl." in page.text
    done = command("eval", "--model", "run", "--out", "out")
    assert "Report:   out/report.html" in done.stdout
    page = Reader((workplace / "out/report.html").read_text(encoding="utf-8"))
    assert "learning rate" in page.text  # of the run that is measured
    assert "leanclip eval --model run --out out" in page.text


def test_a_hundred_classes_are_shown_by_the_worst(tmp_path: Path) -> None:
    scores = torch.randn(300, 150)
    labels = torch.arange(300) % 150
    scores[torch.arange(300), labels] += 3
    result = classify(
        iter([scores]),
        labels,
        classes=[f"class {i}" for i in range(150)],
        indices=torch.arange(300),
        features=torch.nn.functional.normalize(torch.randn(300, 8), dim=1),
    )
    data = parse(DataConfig, {"format": "folder", "root": "x"}, where="test")
    report = Report(results={"knn": result}, data={"knn": {"sha256": "0", "format": "folder",
                    "root": "x", "split": None, "samples": 300}})  # fmt: skip
    report.tasks["knn"] = Task("knn", data, Noise(), None, 8)
    page = write_report(tmp_path, report).read_text(encoding="utf-8")
    reader = Reader(page)
    assert "The 40 of 150 classes with most errors." in reader.text
    wrong = result.confusion() - torch.diag(result.confusion().diagonal())
    mistakes = wrong.sum(dim=0) + wrong.sum(dim=1)
    shown = mistakes.sort(descending=True, stable=True).indices[:40]
    squares = [
        n for n, a in reader.elements if n == "path" and "fill: var(--c" in (a.get("style") or "")
    ]
    assert len(squares) == int((result.confusion()[shown][:, shown] > 0).sum())
    assert "all 150 classes" in reader.text
    assert len(page) < 1_000_000


def test_a_broken_model_has_a_page(tmp_path: Path) -> None:
    report = make_report(tmp_path, is_broken=True)
    page = write_report(tmp_path, report).read_text(encoding="utf-8")
    text = Reader(re.sub(r"base64,[^\"]+", "", page)).text
    assert "NaN" in text
    assert re.search(r"\bnan\b", text) is None
    assert ":nan" not in page


def test_templates_escape_text_and_attributes(tmp_path: Path) -> None:
    rows = [(HOSTILE, "a\x00b\ud800\tc", '"><x', "", "")]
    models = [("A", HOSTILE, "0"), ("B", '"><x', "1")]
    values = {"models": models, "rows": rows, "notes": [HOSTILE]}
    tiles = [{"image": "data:,", "alt": '"><x', "title": HOSTILE, "caption": "<i>", "kind": '"><x'}]
    groups = [{"title": HOSTILE, "count": "1", "tiles": tiles}]
    write_page(tmp_path / "p", "compare.html", title=HOSTILE, groups=groups, **values)
    page = (tmp_path / "p").read_text(encoding="utf-8")
    assert [part for part in ("<x", "<i>", "<script", "\x00") if part in page] == []
    assert '<td class="n">a�b� c</td>' in page
    assert Reader(page).text.count(HOSTILE) == 6


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, float("nan")), (2, float("inf"))],
        [(i, 5.0) for i in range(10_000)],
    ],
    ids=["one point", "none is finite", "many, all the same"],
)
def test_a_line_with_odd_values_is_drawn(points: list[tuple[float, float]]) -> None:
    chart = svg(line_chart({"a": points}), "x")
    assert "nan" not in chart
    assert "inf" not in chart
    assert len(chart) < 30_000


def test_pictures_in_a_page_are_svg_with_text_and_themed_colours() -> None:
    names = [HOSTILE, "cost $5 to $6", "x\u202ey\x00 犬"]
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    matrix = confusion_matrix(counts, np.array([4, 4, 0]), names, [1, 2, 3])
    chart = line_chart({name: [(1, 1.0), (2, 3.0)] for name in names})
    pictures = svg(matrix, "first"), svg(chart, "second")
    for picture in pictures:
        reader = Reader(str(picture))
        assert {"svg", "text", "path"} <= {name for name, _ in reader.elements}
        assert not {"script", "image", "metadata"} & {name for name, _ in reader.elements}
        assert HOSTILE[:30] in reader.text
        assert "cost $5 to $6" in reader.text
        assert "犬" in reader.text
        assert "\u202e" not in picture
        colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", picture))
        assert {"var(--soft)", "var(--c1)"} <= colors
        assert not {color for color in colors if color.startswith("#")}
        ids = re.findall(r' id="([^"]+)"', picture)
        assert {target[1:] for target in re.findall(r'href="([^"]+)"', picture)} <= set(ids)
    assert not set(re.findall(r' id="([^"]+)"', pictures[0])) & set(
        re.findall(r' id="([^"]+)"', pictures[1])
    )
    assert svg(line_chart({"a": [(1, 1.0), (2, 3.0)]}), "x") == svg(
        line_chart({"a": [(1, 1.0), (2, 3.0)]}), "x"
    )


def test_results_are_printed_where_an_encoding_lacks_the_arrow(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(workplace / "m")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_cli("eval", "--model", "m", "--data", "pairs:data", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "image?text" in done.stdout


@pytest.mark.slow
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    write_metrics(tmp_path / "run")
    path = write_report(tmp_path / "run", report)
    with chromium(tmp_path) as page:
        for width, dark in ((390, False), (390, True), (1200, False), (320, False)):
            page.open(path, width=width, dark=dark)
            assert page.run("return document.documentElement.scrollWidth") <= width
            assert page.run("return document.title").startswith("leanclip report")
            loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
            assert page.run(loaded)
            assert page.run("return performance.getEntriesByType('resource')"
                            ".filter(e => !e.name.startsWith('data:')).length") == 0  # fmt: skip
            outside = "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"  # noqa: E501
            assert page.run(outside) == []
            back = page.run("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == dark
            smallest = "return Math.min(...[...document.querySelectorAll('p, td, th, figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize)))"  # noqa: E501
            assert page.run(smallest) >= 11
        page.screenshot(tmp_path / "page.png")
    shot = Image.open(tmp_path / "page.png").convert("RGB")
    assert len(shot.resize((100, 300)).getcolors(30_000) or ()) > 50
