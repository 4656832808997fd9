"""Every snippet of the documents, docstrings and helps: Python is run, commands parsed or run.

A block's language is what follows its three backticks: python and yaml, text for what is printed
or how files lie, bash or nothing for commands. Python blocks of a document are one program, in a
folder with a tiny trained model and a few files of the names that the documents use. A command is
in RUN, or its reason not to be is in NOT_RUN; all of them are parsed.
"""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import PROJECT, TINY, make_config, noise_image
from test_inference import save_tiny
from typer.main import get_command

from leanclip.cli.main import app, main
from leanclip.config.schema import Config
from leanclip.config.sections import paths
from leanclip.config.strict_yaml import load_yaml
from leanclip.data.formats import shapes

DOCUMENTS = [PROJECT / "README.md", *sorted(PROJECT.glob("*/*.md"))]
SOURCES = sorted((PROJECT / "src").rglob("*.py"))

RUN = {
    "leanclip classify data/shapes/unseen/hollow_red_star/000.png --labels 'red star, blue circle'",
    "leanclip classify photo.jpg --labels 'cat, dog, fox'",
    "leanclip convert ViT-B-32.pt vit-b-32 --to leanclip",
    "leanclip convert runs/quickstart quickstart-hf --to hf",
    "leanclip data check configs/quickstart.yaml --batch-size 1024",
    "leanclip data check pairs:data/my-photos",
    "leanclip data check shapes:data/shapes",
    "leanclip data pack pairs:data/my-photos data/my-photos-packed --side 256 --quality 90",
    "leanclip data pack pairs:data/my-photos data/my-photos-packed",
    "leanclip data shapes data/shapes",
    "leanclip doctor",
    "leanclip embed photos --out embeddings",
    "leanclip eval --model runs/quickstart --data folder:data/shapes/unseen",
    "leanclip eval --model runs/quickstart --data shapes:data/shapes",
    "leanclip inspect ViT-B-32.pt",
    "leanclip inspect runs/quickstart",
    "leanclip search build photos --model runs/quickstart --out index",
    "leanclip search find index 'a beach' --not people",
    "leanclip search find index 'a beach' --not people --date 2023.. --grid out.png",
    "leanclip search find index 'a cat' --label 2023 --folder photos/2023 --size 100k..5M "
    "--date 2023-05..2023-09-15",
    "leanclip search find index 'a cat' --top 20 --minimum 0.25 --grid found.png",
    "leanclip search find index 'a red bowl'",
    "leanclip search find index 'in the evening' --image photo.jpg --weight 1 --weight 0.5",
    "leanclip search find index --image photo.jpg",
    "leanclip search update index",
    "leanclip similarity --images a.jpg b.jpg --texts 'a cat' 'a dog' --plot out.png",
    "leanclip similarity --images photos --texts - --json",
}
NOT_RUN = {  # a part of a command: why it is not run here
    "--num-gpus": "needs GPUs",
    "--num-procs": "takes minutes",
    "--dry-run": "needs Food-101",
    "compare runs/": "needs two runs; tests/evaluation/test_compare.py has them",
    "interpolate runs/": "needs two runs; tests/evaluation/test_sweep.py has them",
    "food101": "needs Food-101, or the network",
    "food-101": "needs Food-101",
    "ViT-B": "needs published weights",
    "runs/other": "needs another run",
    "runs/big": "needs a run in shards; tests/distributed/test_fsdp.py has one",
    "merged": "needs what leanclip merge writes",
    "retrieval.limit=500": "needs more photos; tests/evaluation/test_same_images.py has a limit",
    "data/pets": "needs class data; tests/evaluation/test_evaluate.py has some",
    "-c configs/quickstart.yaml": "takes minutes; .ci/run runs it",
    "-c configs/naflex.yaml": "takes minutes; tests/training/test_naflex.py runs smaller ones",
    "siglip-quickstart.yaml": "takes minutes; tests/training/test_training_families.py reads it",
    "my-lora": "needs an adapter; tests/weights/test_adapter.py has some",
    "google/siglip2": "needs published weights; tests/training has tiny ones",
    "leanclip models": "prints hundreds of lines; tests/model/test_presets.py runs it",
    "python tools/train.py": "trains ViT-B/32",
    "quickstart exported": "takes seconds; tests/inference/test_export.py has them",
    "leanclip app": "serves until it is stopped; tests/app/test_app_server.py starts it",
    "classify - ": "reads from a pipe; tests/inference/test_use.py does",
}


PYTHON_NOT_RUN = {  # what a block imports: why it is not run here
    "lancedb": "is no dependency; tests/search/test_vector_database.py runs these lines",
}


class Block(NamedTuple):
    document: Path
    line: int  # of its first line
    language: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    """What stands between lines of three backticks; in a .py file, in its docstrings."""
    start, language, lines = None, "", []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip().startswith("```"):
            lines.append(line)
        elif start is None:
            start, language, lines = number + 1, line.strip()[3:], []
        else:
            yield Block(path, start, language, "\n".join(lines))
            start = None
    assert start is None, f"{path}:{start}: a block without an end"


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


BLOCKS = [block for path in (*DOCUMENTS, *SOURCES) for block in blocks(path)]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of leanclip's commands in a block of shell, without redirections."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        line = line.removeprefix("$ ")
        for part in line.split(" | ") if re.match(r"(leanclip|python|find) ", line) else ():
            part = re.sub(r"[<>] \S+", "", part.replace("[", "").replace("]", ""))
            words = shlex.split(part, comments=True)
            if words[:1] in (["leanclip"], ["python"]):
                yield words


SHELL = [block for block in BLOCKS if block.language in ("", "bash", "sh")]


def help_examples(command: Any, name: str) -> Iterator[Block]:
    """What the help of each command shows, as a block of shell."""
    if command.epilog:
        yield Block(PROJECT / name, 0, "sh", command.epilog.removeprefix("Example: "))
    for inner_name, inner in getattr(command, "commands", {}).items():
        yield from help_examples(inner, f"{name} {inner_name}")


SHELL += list(help_examples(get_command(app), "leanclip"))
COMMANDS = [(block, words) for block in SHELL for words in commands(block)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the documents name: a run, drawings, photographs, lists of words."""
    folder = tmp_path_factory.mktemp("snippets")
    before = Path.cwd()
    os.chdir(folder)
    for name in ("configs", "benchmarks", "tools"):
        (folder / name).symlink_to(PROJECT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_COUNTS", {"train": 64, "val": 16, "unseen": 24})
        list(shapes.draw_dataset(folder / "data/shapes"))
        for name in ("photo", "a", "b", "photos/1", "photos/2", "data/my-photos/1"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            noise_image(len(name)).save(folder / f"{name}.jpg")
        (folder / "data/my-photos/1.txt").write_text("a picture\n")
        for name in ("labels", "captions"):
            (folder / f"{name}.txt").write_text("a cat\na dog\n")
        make_config(
            folder / "config.yaml",
            model=TINY | {"context_length": 77},
            data={"format": "shapes", "root": "data/shapes"},
            train={"epochs": 1, "batch_size": 16},
            evaluate={"zero_shot": {}},
        )
        run("train -c config.yaml --output-dir runs/quickstart")
        save_tiny(
            folder / "plain",
            vision_heads=1,
            transformer_heads=1,
            vision_width=64,
            transformer_width=64,
        )
        run("convert plain ViT-B-32.pt --to openai")
        run("embed photos --out embeddings --model runs/quickstart")
        run("export runs/quickstart exported --to onnx")
        run("search build photos --model runs/quickstart --out index")
        yield folder
    os.chdir(before)


def run(line: str) -> str:
    """Run a command in this process; what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(shlex.split(line))
        except SystemExit as end:
            code = end.code
        else:
            code = 0
    assert not code, f"leanclip {line}: {err.getvalue()}"
    return out.getvalue()


def test_blocks_are_of_kinds_that_are_known() -> None:
    for block in BLOCKS:
        known = ("python", "yaml", "text", "bash", "sh", "")
        assert block.language in known, f"{name_of(block.document)}:{block.line}"
    assert len([block for block in BLOCKS if block.language == "python"]) >= 9


@pytest.mark.parametrize("document", [*DOCUMENTS, *SOURCES], ids=name_of)
def test_python_runs(document: Path, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    found = [block for block in BLOCKS if block.document == document and block.language == "python"]
    if not found:
        return
    for block in found:
        if any(f"import {name}\n" in block.text for name in PYTHON_NOT_RUN):
            continue
        source = "\n" * (block.line - 1) + block.text  # errors show the document's lines
        exec(compile(source, str(document), "exec"), names)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b[1])
def test_settings_in_yaml_exist(block: Block) -> None:
    values = load_yaml(block.text, where=name_of(block.document))
    assert isinstance(values, dict)
    if "apiVersion" in values:  # Kubernetes's
        return
    known = paths(Config)
    for section, settings in values.items():
        for name in settings:
            assert f"{section}.{name}" in known, f"{name_of(block.document)}:{block.line}: {name}"


def test_commands_are_understood(place: Path) -> None:
    tree: Any = get_command(app)
    for block, words in COMMANDS:
        where = f"{name_of(block.document)}:{block.line}: {shlex.join(words)}"
        if words[0] == "python" and words[1] != "tools/train.py":
            assert (PROJECT / words[1]).is_file(), where
            continue
        rest = words[1:] if words[0] == "leanclip" else ["train", *words[2:]]
        inner, at = tree, []
        while rest and rest[0] in getattr(inner, "commands", {}):
            at.append(rest.pop(0))
            inner = inner.commands[at[-1]]
        if not at or "KEY" in where or "CONFIG" in where:  # a form, not a command
            continue
        inner.make_context(" ".join(at), rest)  # raises what is wrong with them


def test_each_command_is_run_or_has_a_reason_not_to_be() -> None:
    lines = {shlex.join(words) for _, words in COMMANDS if words[0] == "leanclip"}
    lines |= {shlex.join(words) for _, words in COMMANDS if words[1] == "tools/train.py"}
    unclear = [line for line in sorted(lines - RUN) if not any(part in line for part in NOT_RUN)]
    assert unclear == [], "put each into RUN, or a part of it and why not into NOT_RUN"
    assert sorted(RUN - lines) == []
    for part in NOT_RUN:
        assert any(part in line for line in lines - RUN), f"{part}: no command has it"


@pytest.mark.parametrize("line", sorted(RUN))
def test_commands_run(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a cat\na dog\n")))
    monkeypatch.setattr("leanclip.training.tracking.find_spec", lambda name: None)
    run(line.removeprefix("leanclip "))


def test_a_block_that_is_broken_would_be_found(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "```python\nimport leanclip\nleanclip.nothing\n```\n\n```\nleanclip x -z\n```\n"
    )
    python, shell = blocks(document)
    assert (python.line, python.language, shell.language) == (2, "python", "")
    with pytest.raises(AttributeError):
        exec(python.text, {})
    assert list(commands(shell)) == [["leanclip", "x", "-z"]]
    document.write_text("```\nno end\n")
    with pytest.raises(AssertionError, match="a block without an end"):
        list(blocks(document))


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.M))
    for block in SHELL:
        for target in re.findall(r"^make ([a-z][\w-]*)", block.text, re.M):
            assert target in targets, f"{name_of(block.document)}:{block.line}: make {target}"
