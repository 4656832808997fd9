"""What the documents say about files, commands and settings is so."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, Command
from test_imports import arrows
from typer.main import get_command

from leanclip.cli.main import app

DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def tree_in(text: str) -> set[str]:
    """The paths of the file tree in the README, whose lines are indented by depth."""
    block = re.search(r"```text\nleanclip/\n(.*?)```", text, re.DOTALL)
    assert block
    paths, parents = set(), []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        parents = [*parents[:depth], name]
        paths.add("".join(parents))
    return paths


def test_the_file_tree_of_the_readme_is_true() -> None:
    paths = tree_in((PROJECT / "README.md").read_text())
    missing = [path for path in paths if not (PROJECT / path).exists()]
    assert missing == []
    package = {p for p in paths if p.startswith("src/leanclip/")}
    for path in (PROJECT / "src/leanclip").iterdir():
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            if path.name == "__init__.py":
                continue
            name = f"src/leanclip/{path.name}{'/' if path.is_dir() else ''}"
            assert name in package, f"{name} is not in the README's file tree"


def test_the_file_tree_is_in_the_order_of_imports() -> None:
    text = (PROJECT / "README.md").read_text().partition("\n  configs/")[0]
    found = re.findall(r"^    (\w+)(?:\.py|/) ", text, re.M)
    imported = arrows()
    order = [name for name in found if name in imported]
    assert sorted(order) == sorted(imported)
    for place, name in enumerate(order):
        assert imported[name] <= set(order[:place]), f"{name} imports what stands below it"


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_commands_have_the_options_that_are_shown(document: Path) -> None:
    command: Any = get_command(app)
    for line in re.findall(
        r"^(?:\$ )?((?:leanclip|python tools/train\.py) .*)", document.read_text(), re.M
    ):
        words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
        words = ["train", *words[2:]] if words[0] == "python" else words[1:]
        if "|" in words:
            continue
        inner = command
        while words and words[0] in getattr(inner, "commands", {}):
            inner = inner.commands[words.pop(0)]
        known = {option for parameter in inner.params for option in parameter.opts} | {"--help"}
        for word in words:
            if word.startswith("-") and word != "-":
                assert word.split("=")[0] in known, f"{document.name}: {line}"


def test_every_command_shows_an_example_that_it_understands(command: Command) -> None:
    commands = (["shapes"], ["food101"], ["pack"], ["check"])
    for words in (
        ["train"],
        ["eval"],
        ["classify"],
        ["similarity"],
        ["embed"],
        ["export"],
        ["compare"],
        ["interpolate"],
        ["app"],
        *(["data", *words] for words in commands),
        *(["search", word] for word in ("build", "update", "find")),
    ):
        done = command(*words, "--help")
        assert done.returncode == 0
        assert "Example: leanclip " + " ".join(words) in done.stdout


def test_settings_named_in_documents_exist() -> None:
    from leanclip.config.schema import Config
    from leanclip.config.sections import paths

    known = set(paths(Config))
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:data|train|optimizer|evaluate|checkpoint|model|finetune)\.\w+)[`:=]",
            document.read_text(),
        ):
            assert name in known or Path(name).suffix == ".safetensors", f"{document.name}: {name}"
