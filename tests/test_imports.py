"""The order of the rooms, no circles among files, and what must not be imported early."""

import ast
import subprocess
import sys
from functools import cache
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


@cache
def imports_of(path: Path, *, type_checking: bool = True) -> frozenset[str]:
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
    return frozenset(found - {""})


@cache
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


# Private names of libraries; CONTRIBUTING.md has the reasons. Four places at most.
PRIVATE = {
    "_proc_pax",  # tarfile
    "_set_params_and_buffers_to_ignore_for_model",  # DistributedDataParallel
    "_foreach_mul_",  # torch
    "_modules", "_parameters",  # nn.Module, in one function of model/lora.py
}  # fmt: skip
REPLACED: set[str] = set()
# Names with an underscore that are documented.
PUBLIC = {"os._exit", "_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_uses(source: str) -> set[str]:
    """Private names of other packages and classes that a file names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name) if ast.unparse(node) not in PUBLIC:
                found.add(name)
            case ast.Import(names=names):
                found |= {part for one in names for part in one.name.split(".")}
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] != "leanclip":
                    found |= {*module.split("."), *(one.name for one in names)}
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                found.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                found.add(name)
    return {name for name in found if is_private(name)} - PUBLIC


def test_private_names_of_libraries_are_few_and_listed() -> None:
    found = set().union(*(private_uses(path.read_text()) for path in MODULES.values()))
    assert found - REPLACED == PRIVATE
    text = (PROJECT / "CONTRIBUTING.md").read_text()
    assert [name for name in sorted(PRIVATE) if f"`{name}`" not in text] == []


def test_a_private_name_would_be_found() -> None:
    assert private_uses("import torch._C\nfrom PIL import _imaging\nfrom a._b import c") == {
        "_C", "_imaging", "_b"
    }  # fmt: skip
    assert private_uses("x.y._z\nsuper()._w()\nd['_k']\ngetattr(x, '_g', 0)") == {
        "_z", "_w", "_k", "_g"
    }  # fmt: skip
    assert private_uses("self._x\nos._exit(1)\nrow._asdict()\nx.__dict__\nx, _ = y") == set()


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


def test_loading_a_model_does_not_load_pytorchs_compiler(tmp_path: Path) -> None:
    stages = {"vision_layers": [1, 1, 1, 1], "vision_patch_size": None, "vision_heads": None}
    folders = [make_model(tmp_path / "vit"), make_model(tmp_path / "resnet", **stages)]
    loaded = loaded_by(
        "import leanclip, PIL.Image\n"
        f"for folder in {[*map(str, folders)]}:\n"
        "    clip = leanclip.load(folder)\n"
        "    clip.classify(PIL.Image.new('RGB', (40, 40)), ['a dog', 'a cat'])"
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
