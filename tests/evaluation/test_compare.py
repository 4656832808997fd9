"""Two models on the same samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium
from conftest import Command, assert_refused, configured_tasks
from scipy.stats import binomtest, chi2
from test_sweep import make_classes, make_model

import leanclip
from leanclip.cli.evaluation_config import evaluation_config
from leanclip.evaluation import Classification, evaluate
from leanclip.evaluation.statistics import mcnemar


def outcomes(better: int, worse: int, both: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """What two models got right, with so many samples changed."""
    first = torch.tensor([False] * better + [True] * worse + [True] * both)
    second = torch.tensor([True] * better + [False] * worse + [True] * both)
    return first, second


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (8, 16), (12, 12), (1, 5)])
def test_mcnemar_with_few_changes_is_the_binomial_test(better: int, worse: int) -> None:
    found = mcnemar(*outcomes(better, worse))
    assert (found.better, found.worse, found.method) == (better, worse, "exact binomial")
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.p == pytest.approx(expected)


@pytest.mark.parametrize(("better", "worse"), [(20, 5), (300, 240), (13, 13), (14, 13)])
def test_mcnemar_with_many_changes_is_the_corrected_chi_square(better: int, worse: int) -> None:
    found = mcnemar(*outcomes(better, worse))
    assert found.method.startswith("chi-square")
    statistic = max(abs(better - worse) - 1, 0) ** 2 / (better + worse)
    assert found.p == pytest.approx(chi2.sf(statistic, 1))
    exact = binomtest(better, better + worse).pvalue
    assert found.p == pytest.approx(exact, abs=0.02)


def test_mcnemar_by_hand() -> None:
    # Five samples changed, all for the better: 2 * (1/2)^5.
    assert mcnemar(*outcomes(5, 0)).p == 0.0625


def compared(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


def test_zero_shot_of_two_models_by_their_own_reports(command: Command, workplace: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        make_model(workplace / name, seed)
    make_classes(workplace / "c", 20)
    done = command("compare", "a", "b", "--data", "folder:c", "--out", "out")
    assert done.returncode == 0, done.stderr
    found = compared(workplace / "out")
    metrics, right, said = [], [], []
    for name in ("a", "b"):
        clip = leanclip.load(name)
        task = configured_tasks(evaluation_config(name, "folder:c", "all"))[0]
        report = evaluate(clip.model, [task], clip.preprocess)
        metrics.append(report.metrics)
        result = report.results["zero_shot"]
        assert isinstance(result, Classification)
        order = result.indices.argsort()
        right.append(result.ranks[order] == 1)
        said.append(result.top_classes[order, 0])
    for name, one in found["differences"].items():
        assert one["first"] == pytest.approx(metrics[0][name])
        assert one["second"] == pytest.approx(metrics[1][name])
        assert one["difference"] == pytest.approx(metrics[1][name] - metrics[0][name])
        assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    better = (~right[0] & right[1]).nonzero()[:, 0].tolist()
    worse = (right[0] & ~right[1]).nonzero()[:, 0].tolist()
    assert better
    assert worse
    test = found["mcnemar"]["zeroshot_top1"]
    assert (test["better"], test["worse"]) == (len(better), len(worse))
    classes = ["ant", "bee", "cow"]
    for kind, rows in (("better", better), ("worse", worse)):
        changes = found[kind]["zeroshot_top1"]
        assert [one["index"] for one in changes] == rows
        for row, one in zip(rows, changes, strict=True):
            assert one["id"].startswith(f"c/{classes[row // 20]}/")
            assert one["truth"] == classes[row // 20]
            assert one["first"] == classes[said[0][row]]
            assert one["second"] == classes[said[1][row]]
    # The interval of a difference, drawn by another hand.
    differences = (right[1].double() - right[0].double()).numpy()
    draws = np.random.default_rng(7).choice(differences, (4000, 60)).mean(axis=1)
    ours = found["differences"]["zeroshot_top1"]["interval"]
    assert ours == pytest.approx(np.quantile(draws, (0.025, 0.975)).tolist(), abs=0.04)
    assert (
        f"zero-shot top-1: only B correct on {len(better)}, only A correct on {len(worse)}; "
        in done.stdout
    )
    page = (workplace / "out/compare.html").read_text()
    assert "only B correct" in page
    assert "only A correct" in page


def test_retrieval_of_models_of_two_resolutions(command: Command, workplace: Path) -> None:
    make_model(workplace / "a", 1)
    make_model(workplace / "b", 2, image_resolution=40)
    done = command("compare", "a", "b", "--data", "pairs:data", "--out", "out")
    assert done.returncode == 0, done.stderr
    found = compared(workplace / "out")
    for letter, name in (("first", "a"), ("second", "b")):
        command("eval", "--model", name, "--data", "pairs:data", "--out", "eval")
        metrics = json.loads((workplace / "eval/report.json").read_text())["metrics"]
        for metric, one in found["differences"].items():
            assert one[letter] == pytest.approx(metrics[metric]), metric
    assert set(found["mcnemar"]) == {"image_to_text_R@1", "text_to_image_R@1"}
    for one in found["better"]["image_to_text_R@1"]:
        assert one["second"].endswith(f"{one['index']}")  # "picture number 7" or "image 7"
        assert one["first"] != one["second"]


def test_a_model_and_itself_do_not_differ(command: Command, workplace: Path) -> None:
    make_model(workplace / "a", 1)
    done = command("compare", "a", "a", "--data", "pairs:data", "--out", "out")
    assert done.returncode == 0, done.stderr
    found = compared(workplace / "out")
    assert found["better"] == found["worse"] == {"image_to_text_R@1": [], "text_to_image_R@1": []}
    assert {one["p"] for one in found["mcnemar"].values()} == {1.0}
    assert {one["difference"] for one in found["differences"].values()} == {0.0}


def test_what_cannot_be_compared(command: Command, workplace: Path) -> None:
    make_model(workplace / "a", 1)
    assert_refused(command("compare", "a", "nope", "--data", "pairs:data"), "nope")
    assert_refused(command("compare", "a", "a"), "--data: missing; give FORMAT:ROOT")
    done = command("compare", "a", "a", "--data", "pairs:data", "--task", "zeroshot")
    assert_refused(done, "has no classes")


@pytest.mark.slow
def test_a_phone_shows_the_comparison(command: Command, workplace: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        make_model(workplace / name, seed)
    for i, path in enumerate(sorted((workplace / "data").glob("*.txt"))):
        path.write_text(f"<script>alert({i})</script> {i} {'long' * 60}\n")
    done = command("compare", "a", "b", "--data", "pairs:data", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "<script" not in (workplace / "out/compare.html").read_text()
    with chromium(workplace) as page:
        page.open(workplace / "out/compare.html", width=390)
        assert page.run("return document.documentElement.scrollWidth") == 390
        assert "<script>" in page.run("return document.body.textContent")
        assert page.run("return [...document.images].every(i => i.naturalWidth > 0)")
