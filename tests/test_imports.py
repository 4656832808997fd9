"""The one direction of imports, and what must not be imported early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, make_model

SOURCE = PROJECT / "src" / "leanclip"
# DESIGN.md, section 2: a module may import what stands in its own line or above it.
LEVELS = (
    ("errors", "extras", "files", "strict_yaml", "settings", "config", "launch", "stopping"),
    (
        "tokenizer",
        "image_formats",
        "decoding",
        "images",
        "tracking",
        "addresses",
        "fetch",
        "prompts",
    ),
    ("data", "model"),
    ("determinism", "distributed", "loss", "weights", "optim", "finetune"),
    ("norms", "loss_scale", "utilisation"),
    ("sharded", "shard_files", "evaluate", "inputs", "classifier", "attention", "exported"),
    ("checkpoint",),
    ("plots", "page", "towers", "plan", "step", "frozen"),
    ("report_results",),
    ("report_page",),
    ("outcome", "watching", "best"),
    ("train", "inference", "charts", "embeddings"),
    ("openai", "passl", "export", "compare", "sweep", "search"),
    ("compare_page", "app"),
    ("cli", "cli_app", "cli_data", "cli_eval", "cli_options", "cli_search", "cli_use", "doctor"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def part_of(module: str) -> str:
    """`leanclip.data.formats.pairs` -> `data`."""
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """The parts of leanclip that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leanclip."):
            found.add(part_of(node.module or ""))
        elif isinstance(node, ast.ImportFrom) and node.module == "leanclip":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.startswith("leanclip.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def arrows() -> dict[str, set[str]]:
    """What each part of the package imports of the others."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part != "__init__":
            found.setdefault(part, set()).update(imports_of(path) - {part})
    return found


def test_every_part_has_a_level() -> None:
    assert arrows().keys() == LEVEL_OF.keys()


def test_no_import_runs_back_up() -> None:
    wrong = [
        f"{part} imports {other}"
        for part, others in arrows().items()
        for other in others
        if LEVEL_OF[other] > LEVEL_OF[part]
    ]
    assert wrong == []


def test_no_two_parts_import_each_other() -> None:
    found = arrows()
    assert "train" not in found["inference"]
    assert "inference" not in found["train"]
    assert [(a, b) for a in found for b in found[a] if a in found[b]] == []


def test_a_backward_import_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from leanclip.training.loop import train\n    import leanclip.cli.main\n"
    )
    assert imports_of(file) == {"train", "cli"}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split("\n")[-2].split())


def test_import_leanclip_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "PIL", "pydantic", "typer", "rich", "ftfy", "matplotlib"}
    assert loaded_by("import leanclip").isdisjoint(heavy)


def test_help_does_not_load_torch() -> None:
    code = "import leanclip.cli.main\ntry: leanclip.cli.main.main(['train', '--help'])\nexcept SystemExit: 0"
    assert loaded_by(code).isdisjoint({"torch", "numpy", "PIL", "ftfy", "matplotlib"})


@pytest.mark.parametrize("resnet", [False, True])
def test_loading_a_model_does_not_load_pytorchs_compiler(resnet: bool, tmp_path: Path) -> None:
    stages = {"vision_layers": [1, 1, 1, 1], "vision_patch_size": None, "vision_heads": None}
    folder = make_model(tmp_path / "model", **(stages if resnet else {}))
    loaded = loaded_by(
        "import leanclip, PIL.Image\n"
        f"clip = leanclip.load({str(folder)!r})\n"
        "clip.classify(PIL.Image.new('RGB', (40, 40)), ['a dog', 'a cat'])"
    )
    assert "torch" in loaded
    assert loaded.isdisjoint({"torch._dynamo", "torch._inductor", "sympy", "transformers"})


def test_every_public_name_can_be_had() -> None:
    import leanclip

    for name in leanclip.__all__:
        assert getattr(leanclip, name) is not None
    assert set(leanclip.__all__) <= set(dir(leanclip))
    # A module of the same name would take the place of what is public as soon as it is imported.
    assert LEVEL_OF.keys().isdisjoint(leanclip.__all__)
