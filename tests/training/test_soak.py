"""Nothing grows in a run that goes on: benchmarks/soak.py in short, and what it would see."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import PROJECT

SOAK = PROJECT / "benchmarks/soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    specification = importlib.util.spec_from_file_location("soak", SOAK)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["soak"] = module  # its dataclasses look there
    specification.loader.exec_module(module)
    return module


def pieces(soak: ModuleType, **grows: float) -> list:
    """Two pieces of 2,000 steps, with noise; what `grows` is so much more after each step."""
    rng, step, made = np.random.default_rng(4), 0, []
    for code in (143, -9):
        samples = []
        for i in range(200):
            step += 10
            values = {"main_kib": 300_000, "others_kib": 250_000, "shared_kib": 96}
            values |= {"files": 30, "threads": 7, "children": 1, "zombies": 0}
            if rng.random() < 0.2:  # an evaluation
                values |= {"others_kib": 500_000, "files": 60, "children": 2}
            values["main_kib"] += int(rng.integers(0, 8000))
            for name, by in grows.items():
                values[name] += int(by * step)
            samples.append(soak.Sample(float(i), step, **values))
        made.append(soak.Piece(code, 16, samples))
    return made


def test_what_stays_passes(soak: ModuleType) -> None:
    found = soak.report(pieces(soak))
    assert found["grows"] == []
    assert found["passes"]
    assert abs(found["memory"]["main_kib"]["KiB per 1000 steps"]) < 300


@pytest.mark.parametrize(
    ("name", "a_step"),
    [("main_kib", 1.0), ("others_kib", 1.0), ("files", 0.001), ("threads", 0.001),
     ("children", 0.001), ("zombies", 0.001)],
)  # fmt: skip
def test_what_grows_is_named(soak: ModuleType, name: str, a_step: float) -> None:
    found = soak.report(pieces(soak, **{name: a_step}))
    assert [line.split(":")[0] for line in found["grows"]] == [name]
    assert not found["passes"]


def test_its_end_and_its_folder_count(soak: ModuleType) -> None:
    made = pieces(soak)
    made[0].code, made[1].kept = 1, 17
    assert len(soak.report(made)["grows"]) == 2


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    words = ["--seconds", "44", "--pieces", "2", "--warm-up", "100"]
    command = [sys.executable, str(SOAK), str(tmp_path / "soak"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passes"]
    assert found["steps"] > 300
    skipped = (tmp_path / "soak/run/skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 4  # each once, in spite of resumes and epochs
