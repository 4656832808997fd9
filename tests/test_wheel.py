"""The wheel, installed without extras, trains from a CSV and writes its report."""

import contextlib
import os
import re
import subprocess
import sys
import venv
from importlib import import_module, metadata
from pathlib import Path

import pytest
from conftest import PROJECT, make_config, noise_image
from packaging.requirements import Requirement

EXTRA = ("datasets", "fastapi", "multipart", "onnx", "onnxruntime", "pandas", "pytest", "scipy",
         "sentencepiece", "sklearn", "tensorboard", "tokenizers", "transformers", "uvicorn",
         "wandb")  # fmt: skip


def run(*words: str | Path) -> str:
    """Run a command; what it prints to stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(requirements: list[str]) -> set[str]:
    """The distributions that requirements bring, and those that these require, without extras."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        one = waiting.pop()
        name = normalized(one.name)
        is_wanted = one.marker is None or any(
            one.marker.evaluate({"extra": extra}) for extra in one.extras or ("",)
        )
        if name in found or not is_wanted:
            continue
        try:
            waiting += map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
    return found


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel and links to what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    hatchling = import_module("hatchling.build")  # the build backend
    with contextlib.chdir(PROJECT):
        wheel = folder / hatchling.build_wheel(str(folder))
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        *("--no-index", "--disable-pip-version-check", wheel),
    )
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (info,) = packages.glob("leanclip-*.dist-info")
    requirements = metadata.Distribution.at(info).requires or []
    for name in needed_by([text for text in requirements if "extra ==" not in text]):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {".."}:
            link = packages / top
            if not link.exists():
                link.symlink_to(str(distribution.locate_file(top)))
    return python.parent


def test_the_bare_wheel_trains_from_a_csv_and_writes_its_report(
    commands: Path, workplace: Path
) -> None:
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {EXTRA}))"
    assert run(commands / "python", "-c", code).split() == []
    rows = ["image,caption"]
    for i in range(8):
        noise_image(i).save(workplace / f"{i}.png")
        rows.append(f'{i}.png,"picture number {i}, of noise"')
    (workplace / "pairs.csv").write_text("\n".join(rows) + "\n")
    data = {"format": "table", "root": "pairs.csv"}
    train = {"epochs": 1, "batch_size": 4}
    make_config(workplace / "config.yaml", data=data, train=train)
    words = ("train", "-c", "config.yaml", "--output-dir", "run")
    assert "Report:   run/report.html" in run(commands / "leanclip", *words)
    assert "<svg" in (workplace / "run/report.html").read_text()
