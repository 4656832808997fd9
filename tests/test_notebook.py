"""The notebook runs from top to bottom, and what is committed of it is of such a run."""

import os
from pathlib import Path

import nbformat
import pytest
from conftest import PROJECT
from nbclient import NotebookClient
from test_inference import save_tiny

NOTEBOOK = PROJECT / "examples" / "clip.ipynb"


def run(folder: Path) -> list[str]:
    """The texts that the notebook prints when it is run in a folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return printed(notebook)


def printed(notebook) -> list[str]:
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    return [one.text for one in outputs if one.output_type == "stream" and one.name == "stdout"]


def test_it_runs_with_a_tiny_model_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEANCLIP_WEIGHTS", raising=False)
    said = "".join(run(tmp_path))
    assert "Weights: random, tiny" in said
    assert "8 of 8 images are nearest to their own description" in said


@pytest.mark.slow
def test_it_takes_the_weights_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save_tiny(tmp_path / "named")
    monkeypatch.setenv("LEANCLIP_WEIGHTS", str(weights))
    assert f"Weights: {weights}" in "".join(run(tmp_path))


def test_its_outputs_are_those_of_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [one.output_type for cell in cells for one in cell.outputs]
    assert "error" not in kinds
    figures = [one for cell in cells for one in cell.outputs if "image/jpeg" in one.get("data", {})]
    assert len(figures) == 5
    assert "8 of 8 images" in "".join(printed(notebook))
    assert "Weights: ../runs/quickstart" in "".join(printed(notebook))
    assert NOTEBOOK.stat().st_size < 400_000
    assert os.sep + "work" + os.sep not in NOTEBOOK.read_text()
