"""Images that cannot be read again once everything is measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, make_config, make_model, make_table, report_of
from test_same_images import (
    make_other,
    pictures,
    write_csv,
    write_pairs,
    write_parquet,
    write_shards,
)
from test_sweep import make_classes

from leanclip import api
from leanclip.evaluation import evaluator as measure
from leanclip.preprocess.images import open_image, warn_unreadable_once


def spoil(root: Path) -> None:
    """Every file of a folder becomes one that is no image, table or text."""
    for path in root.rglob("*.*"):
        path.write_bytes(b"\xff\x00 gone")


def remove(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)


def damage_after(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, damage: Callable[[Path], None]
) -> None:
    """Damage the data, and what is kept of it, when a function has done its work."""
    function = getattr(module, name)

    def work(*given: Any, **options: Any) -> Any:
        found = function(*given, **options)
        for folder in ("d", "cache"):
            damage(Path(folder))
        return found

    monkeypatch.setattr(module, name, work)


@pytest.fixture(autouse=True)
def _new_warnings() -> None:
    warn_unreadable_once.cache_clear()


def classes(root: Path) -> Path:
    make_classes(root, 4)
    return root


WRITERS = {
    "pairs": lambda root: write_pairs(root, pictures(8)),
    "csv": lambda root: write_csv(root, pictures(8)),
    "parquet": lambda root: write_parquet(root, pictures(8)),
    "shards": lambda root: write_shards(root, pictures(8)),
    "folder": lambda root: f"folder:{classes(root)}",
    "table of classes": lambda root: f"table:{make_table(root, 12) / 'label.csv'}",
}


@pytest.mark.parametrize("damage", [spoil, remove])
@pytest.mark.parametrize("form", WRITERS)
def test_an_evaluation_ends_with_its_report(
    form: str,
    damage: Callable[[Path], None],
    command: Command,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(workplace / "cache"))
    make_model(workplace / "m")
    spec = WRITERS[form](workplace / "d")
    damage_after(monkeypatch, measure, "encode_dataset", damage)
    done = command("eval", "--model", "m", "--data", spec, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert report_of(workplace / "out")["metrics"]
    page = (workplace / "out/report.html").read_text()
    if form != "parquet" and not (form == "shards" and damage is remove):  # files that stay open
        assert "no picture" in page
        assert "not shown: " in done.stderr
    assert len(done.stderr.splitlines()) < 40
    assert min(open_image(workplace / "out/similarity.png").size) > 100


def test_a_comparison_and_a_training_end_too(
    command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_classes(workplace / "d", 8)
    make_model(workplace / "a")
    make_other(workplace / "b")
    with monkeypatch.context() as patch:
        damage_after(patch, api, "compare_models", spoil)
        done = command("compare", "a", "b", "--data", "folder:d", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "not shown: " in done.stderr
    assert "no picture" in (workplace / "out/compare.html").read_text()
    remove(workplace / "d")
    write_pairs(workplace / "d", pictures(12))
    make_config(
        workplace / "c.yaml",
        data={"root": "d"},
        train={"epochs": 1},
        evaluate={"retrieval": {}, "pictures": True},
    )
    damage_after(monkeypatch, measure, "encode_dataset", remove)
    done = command("train", "-c", "c.yaml", "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((workplace / "run/status.json").read_text())["state"] == "done"
    assert "no picture" in (workplace / "run/report.html").read_text()
