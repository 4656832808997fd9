"""The benchmarks run, refuse to compare what differs, and README.md is what they measured."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import PROJECT

FOLDER = PROJECT / "benchmarks"
FAST = ("checkpoint", "encode", "images", "loss", "naflex", "roofline", "tokenizer", "train_step")
SLOW = ("app", "embed", "growth", "pack", "pipeline", "read_weights", "scaling", "search")
SLOW += ("startup", "table")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a benchmark's module as its neighbours do; none of them is left behind."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def run(script: ModuleType, folder: Path, *words: str) -> list[dict[str, Any]]:
    """The records of a script's tiny form."""
    out = folder / "record.json"
    script.main(["--tiny", "--out", str(out), *words])
    return json.loads(out.read_text())


def test_all_scripts_are_tested_rendered_and_run_by_make(load: Any) -> None:
    scripts = {p.stem for p in FOLDER.glob("*.py") if "options(__doc__" in p.read_text()}
    assert scripts == {*FAST, *SLOW}
    assert scripts == set(load("render").SECTIONS)
    makefile = (PROJECT / "Makefile").read_text().replace("\\\n", " ")
    line = next(row for row in makefile.splitlines() if row.startswith("BENCHMARKS :="))
    assert scripts == set(line.split()[2:])


@pytest.mark.parametrize("name", FAST)
def test_a_benchmark_runs_and_is_rendered(name: str, load: Any, tmp_path: Path) -> None:
    more = ["--no-memory"] if name == "train_step" else ["--memory"] if name == "loss" else []
    records = run(load(name), tmp_path, "--rounds", "2", *more)
    assert_complete(name, records, load)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_longer_benchmark_runs_and_is_rendered(name: str, load: Any, tmp_path: Path) -> None:
    assert_complete(name, run(load(name), tmp_path, "--rounds", "1"), load)


@pytest.mark.slow
def test_memory_is_that_of_fresh_processes(load: Any, tmp_path: Path) -> None:
    (record,) = run(load("train_step"), tmp_path, "--rounds", "1", "--captions", "realistic")
    peaks = record["results"]["tiny, realistic"]["peak_gb"]
    assert peaks["leanclip"] > 0.1
    assert peaks["transformers, to 77"] >= peaks["imports"]


def assert_complete(name: str, records: list[dict[str, Any]], load: Any) -> None:
    (record,) = records
    assert record["results"]
    assert record["machine"]["cores"] > 0
    assert record["machine"]["threads"] > 0
    assert record["machine"]["memory_gb"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "command", "time", "seconds"} <= record.keys()
    lines = load("render").SECTIONS[name][1](records)
    assert any(any(c.isdigit() for c in line) for line in lines if line.startswith("|"))


def test_readme_is_what_the_records_make(load: Any) -> None:
    assert (FOLDER / "README.md").read_text() == load("render").page()


def test_what_is_missing_is_not_measured(load: Any, tmp_path: Path) -> None:
    render = load("render")
    for name in render.SECTIONS:
        assert "Nothing of it is measured yet." in render.section(name, tmp_path)
    for name in ("train_step", "encode", "loss", "startup", "growth", "roofline"):
        assert "not measured" in render.section(name, tmp_path)


def test_the_gate_refuses_what_differs(load: Any) -> None:
    measuring = load("measuring")
    one = torch.tensor([3.0, 4.0])
    assert measuring.agree(one, one, 0.0, "the same") == 0
    assert measuring.agree(one + torch.tensor([0.0, 0.05]), one, 0.02, "x") == pytest.approx(
        0.01, rel=1e-4
    )
    other = (one + 1, one * torch.nan, one[:1])
    for wrong in other:
        with pytest.raises(measuring.NotTheSame):
            measuring.agree(wrong, one, 0.02, "x")
    with pytest.raises(measuring.NotTheSame, match="b"):
        measuring.agree({"a": one}, {"a": one, "b": one}, 0.02, "x")


def test_a_step_that_learns_something_else_gets_no_figure(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, measuring = load("train_step"), load("measuring")
    right = script.Transformers.gradients

    def wrong(step: Any) -> dict[str, torch.Tensor]:
        gradients = right(step)
        return gradients | {"ln_final.weight": gradients["ln_final.weight"] * 1.5}

    monkeypatch.setattr(script.Transformers, "gradients", wrong)
    with pytest.raises(measuring.NotTheSame, match="gradients"):
        run(script, tmp_path, "--no-memory")
    assert not (tmp_path / "record.json").exists()


def test_ways_take_turns_and_ratios_are_within_rounds(load: Any) -> None:
    measuring = load("measuring")
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = measuring.in_turn(ways, 3)
    assert calls == ["a", "b"] * 4  # the first round is not counted
    assert [len(taken) for taken in seconds.values()] == [3, 3]
    ratios = measuring.ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 8.0, 4.0]}, "a")
    assert ratios["b"] == {"median": 2, "least": 1, "greatest": 4, "rounds": [2, 4, 1]}


def test_records_stand_side_by_side(load: Any, tmp_path: Path) -> None:
    measuring = load("measuring")
    out = tmp_path / "records.json"
    parser = measuring.options("doc")
    for note in ("before", "after"):
        words = ["--out", str(out), "--add", "--note", note]
        measuring.finish({"x": note}, measuring.chosen(parser, words))
    records = json.loads(out.read_text())
    assert [record["note"] for record in records] == ["before", "after"]
    assert load("cells").merged(records) == {"x": "after"}
