"""README.md from the records: each script's docstring, where it was measured, tables and charts.

    python benchmarks/render.py            # writes README.md and images/
    python benchmarks/render.py --check    # exit code 1 where README.md is another

No figure in README.md is written by hand: the text is template.md and the scripts' docstrings, the
tables are made of the JSON files by tables.py. What a file does not hold is "not measured".
"""

import argparse
import ast
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import charts
import tables
from cells import NOT_MEASURED, Records

HERE = Path(__file__).parent
SECTIONS: dict[str, tuple[str, Callable[[Records], list[str]]]] = {
    "train_step": ("Training step", tables.train_step),
    "naflex": ("Training on patches of drawn lengths (NaFlex)", tables.naflex),
    "roofline": ("Roofline", tables.roofline),
    "encode": ("Encoding", tables.encode),
    "images": ("Images, per core", tables.images),
    "pipeline": ("Input pipeline, end to end", tables.pipeline),
    "tokenizer": ("Tokenising", tables.tokenizer),
    "loss": ("The loss", tables.loss),
    "checkpoint": ("Checkpoints", tables.checkpoint),
    "read_weights": ("Reading weights", tables.read_weights),
    "startup": ("Start-up", tables.startup),
    "scaling": ("Scaling", tables.scaling),
    "growth": ("Cost against size", tables.growth),
    "pack": ("Packing and checking", tables.pack),
    "table": ("Opening a table", tables.opening_a_table),
    "embed": ("Embedding a folder", tables.embed),
    "search": ("Search", tables.search),
    "app": ("The page's server", tables.app),
}


def records_of(name: str, folder: Path = HERE) -> Records:
    """What was measured; none where there is no file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def prose_of(name: str) -> tuple[str, str]:
    """A script's docstring without the first indented block, and that block: its command."""
    doc = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    paragraphs = doc.split("\n\n")
    commands = [part for part in paragraphs if part.startswith("    ")]
    words = [part for part in paragraphs if not part.startswith("    ")]
    return "\n\n".join(words), textwrap.dedent(commands[0])


def about(record: dict[str, Any]) -> str:
    """Where, with what and when, in a line."""
    machine, versions = record.get("machine") or {}, record.get("versions") or {}
    parts = [str(machine.get("gpu") or machine.get("processor") or NOT_MEASURED)]
    for key, words in (
        ("cores", "{} cores"),
        ("threads", "{} threads"),
        ("memory_gb", "{} GB of memory"),
        ("load_average", "load average {} at the end"),
    ):
        if machine.get(key) is not None:
            word = words.format(machine[key])
            parts.append(word.removesuffix("s") if machine[key] == 1 else word)
    shown = {"torch": "PyTorch", "transformers": "transformers", "open_clip_torch": "open_clip"}
    parts += [f"{shown[name]} {versions[name]}" for name in shown if versions.get(name)]
    commit = record.get("commit") or "not known"
    parts.append(f"commit {commit}{' with changes' if record.get('dirty') else ''}")
    parts += [str(record[key]) for key in ("time", "note") if record.get(key)]
    return ", ".join(parts)


def section(name: str, folder: Path) -> str:
    """A script's part of the page."""
    title, make = SECTIONS[name]
    prose, command = prose_of(name)
    records = records_of(name, folder)
    lines = [f"## {title}", "", "```", command, "```", "", prose, ""]
    if records:
        lines += ["Measured on:", "", *(f"- {about(record)}" for record in records), ""]
    else:
        lines += ["Nothing of it is measured yet.", ""]
    lines += make(records)
    if name in charts.CHARTS and records:
        lines += ["", f"![{title}](images/{name}.svg)"]
    return "\n".join(lines).rstrip() + "\n"


def page(folder: Path = HERE) -> str:
    """README.md."""
    parts = [section(name, folder) for name in SECTIONS]
    return (HERE / "template.md").read_text() + "\n" + "\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    given = parser.parse_args(words)
    readme = HERE / "README.md"
    if given.check:
        if readme.read_text() != page():
            sys.exit("benchmarks/README.md is another; make it with: python benchmarks/render.py")
        return
    for name, draw in charts.CHARTS.items():
        if records := records_of(name):
            draw(records, HERE / "images" / f"{name}.svg")
    readme.write_text(page())


if __name__ == "__main__":
    main()
