"""Captions, YAML, settings and reports of strangers: read, or refused in one line; never slow."""

import json
from pathlib import Path
from typing import Any

import ftfy
import pytest
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, Edits, bounded, edited, examples, odd_values
from reference_tokenizer import encode as reference

from leanclip.config.schema import Config, load_config
from leanclip.config.sections import parse
from leanclip.config.strict_yaml import load_yaml
from leanclip.io.files import read_json_object, read_metrics
from leanclip.preprocess.tokenizer import encode, tokenize

PIECES = [
    "&amp;",
    "amp;",
    "&#38;",
    "#38;",
    "&",
    "&lt;",
    "<",
    ";",
    "&#xFF06;",
    "＆",
    "ï¼†",
    "Ã©",
    "é",
]
PIECES += [
    "\u0301",
    "“",
    "\x1b[0m",
    "\0",
    "\n",
    "\r\n",
    "\ud800",
    "ﬁ",
    "<|endoftext|>",
    "a",
    " ",
    "9",
]


@examples(60)
@given(st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 400)), max_size=8))
def test_a_caption(parts: list[tuple[str, int]]) -> None:
    text = "".join(piece * times for piece, times in parts)
    with bounded(text, "caption.txt", seconds=10, megabytes=100):
        tokens = tokenize(text, truncate=True)
        assert tokens.shape == (1, 77)
        assert int(tokens.max()) < 49408


@examples(40)
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PIECES)), max_size=40).map("".join))
def test_a_caption_has_the_ids_of_the_reference(text: str) -> None:
    assert encode(text) == reference(text)


@pytest.mark.parametrize("entity", ["amp;", "#38;", "#65286;"])
def test_entities_within_entities_end_soon(entity: str) -> None:
    text = "&" + entity * 12_000
    with bounded(text, "entities.txt", seconds=15):  # unbounded, they take 28 s and more
        assert tokenize(text, truncate=True)[0, 0] == 49406
    deep = "a &" + "amp;" * 300 + "lt; b"
    assert encode(deep)[0] == encode("a")[0]


def test_an_entity_of_thousands_of_digits() -> None:
    assert encode("a &#" + "9" * 10_000 + "; b") == encode("a &#9999999; b")
    assert encode("a &#38;#" + "0" * 10_000 + "66; b") == encode("a &#66; b")


@pytest.mark.parametrize("levels", [1, 5, 15])
def test_a_long_caption_of_some_levels_is_as_the_reference_has_it(levels: int) -> None:
    words = "caf\u00c3\u00a9 “quoted” \u0132 " * 60
    for text in (
        "&" + "amp;" * levels + "lt; " + words,
        words + "<br> &" + "amp;" * levels + "gt;",
    ):
        assert len(text) > 1000
        assert encode(text) == reference(text)
        lines = text + "\n" + "é < &" + "amp;" * levels + "\n&amp;amp;"
        assert encode(lines) == reference(lines)
    assert ftfy.fix_text("&amp;amp;lt;") == "<"  # what the levels are about


_SCALARS = st.one_of(
    st.text(max_size=12),
    st.integers(-(10**40), 10**40).map(str),
    st.sampled_from(
        ["1e999", ".nan", "5e-4", "0x1F", "~", "<<", "=", "!!bool x", "!!set", "&a", "*a"]
    ),
    st.sampled_from(
        ['"\\UFFFFFFFF"', '"\\uD800"', "|\n ", ">9", "!<x> y", "%YAML 9.9", "---", "...", "?"]
    ),
)
_NESTED = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(_SCALARS, inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        ),
        st.lists(st.tuples(_SCALARS, inner), max_size=4).map(
            lambda pairs: "".join(f"\n{key}: {value}" for key, value in pairs)
        ),
    ),
    max_leaves=12,
)


@examples(80)
@given(_NESTED)
def test_a_yaml_text(text: str) -> None:
    with bounded(text, "settings.yaml", seconds=5, megabytes=100):
        value = load_yaml(text, where="x")
        if isinstance(value, dict):
            parse(Config, value, where="x")


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000,
        "- " * 20_000,
        "{a: " * 20_000,
        "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(50)),
        "a: " + "9" * 100_000,
        "? " * 10_000,
        "a: |" + "\n" * 100_000,
        '"' + "\\x41" * 100_000,
        "# " * 100_000,
    ],
    ids=lambda text: text[:8],
)
def test_yaml_that_is_deep_or_long(text: str) -> None:
    with bounded(text, "deep.yaml", seconds=10, megabytes=100):
        load_yaml(text, where="x")


CONFIGS = [PROJECT / "configs/quickstart.yaml", PROJECT / "configs/clip/vit-b-32.yaml"]


@examples(60)
@given(EDITS, st.booleans(), st.sampled_from(CONFIGS))
def test_a_config(tmp_path_factory: Any, edits: Edits, is_odd: bool, seed: Path) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    content = edited(seed.read_bytes(), edits)
    if is_odd:
        content = json.dumps(odd_values(load_yaml(seed.read_text(), where="x"), edits)).encode()
    path.write_bytes(content)
    with bounded(content, path.name, seconds=10, megabytes=100):
        load_config(path)


@examples(30)
@given(EDITS)
def test_the_files_of_a_run(tmp_path_factory: Any, edits: Edits) -> None:
    folder = tmp_path_factory.getbasetemp() / "run"
    folder.mkdir(exist_ok=True)
    lines = [{"step": i, "time": 1.5, "train/loss": 2.0 / i, "val/x": 0.5} for i in range(1, 20)]
    text = "\n".join(map(json.dumps, lines)).encode()
    content = edited(text, edits)
    if len(edits) > 3:
        content = b"\n".join(json.dumps(odd_values(line, edits)).encode() for line in lines)
    status = {"state": "running", "step": 3, "steps": 9}
    (folder / "metrics.jsonl").write_bytes(content)
    (folder / "status.json").write_text(json.dumps(odd_values(status, edits)))
    with bounded(content, "metrics.jsonl", seconds=5, megabytes=100):
        assert all(isinstance(line["step"], int) for line in read_metrics(folder))
        assert isinstance(read_json_object(folder / "status.json"), dict)


def test_the_files_of_a_run_that_are_too_deep(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "status.json"):
        (tmp_path / name).write_bytes(b"[" * 100_000 + b"\n\xff\n{}\n3\n")
    assert read_json_object(tmp_path / "status.json") == {}
    assert read_metrics(tmp_path) == []
