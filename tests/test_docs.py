"""What the documents say about files, commands and settings is so."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, Command
from test_imports import ROOMS
from typer.main import get_command

from leanclip.cli.main import app

DOCUMENTS = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    *sorted((PROJECT / "docs").glob("*.md")),
]


def test_the_readme_lists_the_rooms_in_order() -> None:
    block = (PROJECT / "README.md").read_text().partition("```text\nsrc/leanclip/\n")[2]
    lines = block.partition("```")[0].splitlines()
    names = [line.split()[0] for line in lines]
    assert [name.strip("/").removesuffix(".py") for name in names] == list(ROOMS)
    assert [n for n in names if not (PROJECT / "src/leanclip" / n).exists()] in ([], ["openai/"])


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
