"""The order of the rooms, no circles among files, and what must not be imported early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, make_model

SOURCE = PROJECT / "src" / "leanclip"
# A room imports only from rooms above it; README.md shows the same list.
ROOMS = (
    "errors",
    "io",
    "config",
    "preprocess",
    "data",
    "model",
    "distributed",
    "losses",
    "weights",
    "evaluation",
    "report",
    "training",
    "inference",
    "search",
    "api",
    "app",
    "openai",
    "passl",
    "cli",
)


def modules_in(source: Path) -> dict[str, Path]:
    """The package's modules by dotted name, without `leanclip.`; packages by their folder's."""
    found = {}
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules_in(SOURCE)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path, *, type_checking: bool = True) -> set[str]:
    """The modules of leanclip that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped.update(inner for one in node.body for inner in ast.walk(one))
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module.split(".")[0] != "leanclip":
                continue
            base = node.module.removeprefix("leanclip").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                found.add(full if full in MODULES else base)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("leanclip.") for n in names if n.startswith("leanclip.")}
    return found - {""}


def arrows() -> dict[str, set[str]]:
    """What each room imports of the others."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        room = room_of(module)
        found.setdefault(room, set()).update({room_of(m) for m in imports_of(path)} - {room})
    return found


def test_every_room_is_in_the_list() -> None:
    assert sorted(arrows()) == sorted(ROOMS)
    assert len(list(SOURCE.iterdir())) - (SOURCE / "__pycache__").exists() <= 22


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_back_up(room: str) -> None:
    above = ROOMS[: ROOMS.index(room)]
    assert arrows()[room] <= set(above), f"{room} imports a room below it"


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_do_not_form_circles(room: str) -> None:
    within = {
        module: {m for m in imports_of(path, type_checking=False) if room_of(m) == room} - {module}
        for module, path in MODULES.items()
        if room_of(module) == room
    }
    while free := [m for m, needs in within.items() if not needs & within.keys()]:
        for module in free:
            del within[module]
    assert within == {}


def test_a_backward_import_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from leanclip.training import loop\n    import leanclip.cli.main\n"
    )
    assert imports_of(file) == {"training.loop", "cli.main"}


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
    code = (
        "from leanclip.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: 0"
    )
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
    assert set(ROOMS).isdisjoint(leanclip.__all__)
