"""What SECURITY.md says of the network: nothing is asked that was not told to."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, Command, Forked, assert_refused, make_pairs
from test_inference import save_tiny
from web import serving

WATCH = """
import json, sys
def watch(event, arguments, file=open({path!r}, "a", buffering=1)):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print(json.dumps([event, repr(arguments)]), file=file)
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # not a local socket's path
        print(json.dumps([event, repr(arguments[1])]), file=file)
sys.addaudithook(watch)
"""


def watching(path: Path) -> Callable[[], None]:
    """Has a process note every attempt to reach another by the network."""
    return lambda: exec(WATCH.format(path=str(path)), {})


def attempts(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_evaluating_and_classifying_ask_nobody(workplace: Path) -> None:
    noted = workplace / "noted"
    for words in (
        "train -c config.yaml --output-dir runs/one -o data.workers=1 -o train.epochs=1",
        "eval --model runs/one --data pairs:data",
        "classify data/000.png --labels ant,bee --model runs/one",
        "embed data --out embedded --model runs/one",
        "convert runs/one other --to hf",
        "data check pairs:data",
    ):
        process = Forked(*words.split(), folder=workplace, before=watching(noted))
        code = process.code()
        assert code == 0, process.output()
        assert attempts(noted) == [], words


def test_an_attempt_would_be_noted(workplace: Path) -> None:
    noted = workplace / "noted"
    with serving(make_pairs(workplace / "more", 1)) as server:
        words = ["data", "check", f"shards:{server.url}/0.tar"]
        Forked(*words, folder=workplace, before=watching(noted)).code()
    assert any("127.0.0.1" in where for _, where in attempts(noted))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", "hub", "stdin"])
def test_urls_in_rows_are_never_fetched(
    workplace: Path, command: Command, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Such a row is a bad sample that says what to do; the server has the image."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = make_pairs(workplace / "served", 1)
    with serving(folder) as server:
        url = f"{server.url}/000.png"
        rows = [{"image": url, "caption": "a"}, {"image": url.upper(), "caption": "b"}]
        path = workplace / ("rows.jsonl" if suffix in ("hub", "stdin") else f"rows{suffix}")
        if suffix == ".csv":
            path.write_text("".join(f"{image},{text}\n" for image, text in map(dict.values, rows)))
            path.write_text("image,caption\n" + path.read_text())
        elif suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if suffix == "stdin":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(url.encode())))
            save_tiny(workplace / "tiny")
            done = command("embed", "-", "--out", "embedded", "--model", "tiny", "--workers", "0")
        else:
            data = ("-o", f"data.format={'hub' if suffix == 'hub' else 'table'}")
            data += ("-o", f"data.root={path}", "-o", "data.split=null")
            done = command("train", "-c", "config.yaml", "--output-dir", "runs/x", *data)
        assert_refused(done, "URLs in data are not fetched", "img2dataset")
        assert server.asked == []


def test_imports_ask_nobody_and_hub_data_on_the_disk_neither(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    for words in make_pairs(tmp_path / "data", 2).glob("*.txt"):
        words.unlink()  # `datasets` would take them for the data
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n000.png,a\n001.png,b\n")
    code = (
        WATCH.format(path=str(noted))
        + """
import pkgutil, importlib, leanclip
for module in pkgutil.walk_packages(leanclip.__path__, "leanclip."):
    importlib.import_module(module.name)
from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
for streaming in (False, True):
    size = 2 if streaming else None
    data = DataConfig(format="hub", root="data", streaming=streaming, epoch_size=size)
    next(iter(open_dataset(data).visits([0])))
import huggingface_hub.constants as constants
assert constants.HF_HUB_DISABLE_TELEMETRY
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert attempts(noted) == []


def test_rows_of_a_stream_name_no_files_of_others() -> None:
    """A row may name a file of its own repository on the hub; `datasets` writes it so."""
    from leanclip.config.data import DataConfig
    from leanclip.data.formats.hub import Stream

    class Rows:
        split, info = None, type("Info", (), {"splits": None})()

    class RowMapper:
        classes, templates = (), ()

    config = DataConfig(format="hub", root="user/name:config", streaming=True, epoch_size=1)
    is_own = Stream(Rows(), RowMapper(), config)._own_file.fullmatch  # type: ignore[arg-type]
    assert is_own("hf://datasets/user/name@main/images/0.png")
    assert is_own("zip://images/0.png::hf://datasets/user/name@0a1b/images.zip")
    for other in (
        "hf://datasets/user/names@main/0.png",
        "hf://datasets/other/secret/0.png",
        "hf://user/name/0.png",
        "ssh://host/x::hf://datasets/user/name@main/0.png",
        "reference://::hf://datasets/user/name@main/0.json",
        "http://10.0.0.1/0.png",
    ):
        assert not is_own(other), other


def test_every_requirement_is_pinned() -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    pins = {
        re.split(r"[=<>!;\[ ]", line)[0].lower().replace("_", "-").replace(".", "-")
        for line in (PROJECT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    part = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    wanted = {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z][\w.-]*)', part)}
    assert wanted - pins == set()


@pytest.mark.parametrize(
    "line", re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", (PROJECT / "SECURITY.md").read_text())
)
def test_the_tests_that_security_md_names_are_there(line: tuple[str, str]) -> None:
    path, name = line
    assert (PROJECT / path).exists()
    assert not name or f"def {name}(" in (PROJECT / path).read_text()
