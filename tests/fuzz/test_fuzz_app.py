"""Requests of strangers to the page: answered with what was asked or with one sentence; no 500."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, Edits, bounded, edited, examples
from starlette.testclient import TestClient
from test_app import png, serving
from test_inference import save_tiny

import leanclip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    top = tmp_path_factory.mktemp("app")
    save_tiny(top / "tiny")
    with serving(leanclip.load(top / "tiny", device="cpu")) as client:
        yield client


def form(*parts: tuple[str, str, bytes]) -> bytes:
    return (
        b"".join(
            b'--b\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
            % (name.encode(), f'; filename="{file}"'.encode() if file else b"", content)
            for name, file, content in parts
        )
        + b"--b--\r\n"
    )


FORMS = {
    "compare": form(("images", "a.png", png()), ("texts", "", b"a cat\na dog")),
    "classify": form(("image", "a", png()), ("labels", "", b"cat\ndog"), ("top", "", b"2")),
    "attention": form(("image", "a.png", png()), ("texts", "", b"a cat")),
}


def checked(answer: Any) -> None:
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    if answer.headers.get("content-type") == "application/json" and answer.status_code >= 400:
        assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("name", FORMS)
@examples(15)
@given(EDITS)
def test_a_form(client: TestClient, name: str, edits: Edits) -> None:
    data = FORMS[name]
    content = edited(
        data, edits, [m.start() for m in re.finditer(rb"\r\n|--b|name|PNG|IHDR", data)]
    )
    kind = {"content-type": "multipart/form-data; boundary=b"}
    with bounded(content, f"{name}.form", megabytes=200):
        checked(client.post(f"/api/{name}", content=content, headers=kind))


_WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["../../etc/passwd", "%00", "-1", "1e9", "٣", "9" * 40, "&" + "amp;" * 1000]),
)


@examples(40)
@given(
    st.sampled_from(["/api/search", "/api/pictures/1", "/sign-in", "/x"]),
    st.dictionaries(st.sampled_from(["q", "like", "offset", "limit", "side", "label"]), _WORDS),
)
def test_a_query(client: TestClient, path: str, query: dict[str, str]) -> None:
    query = {name: text.encode("utf-8", "replace").decode() for name, text in query.items()}
    with bounded(repr(query), "query.txt"):
        checked(client.get(path, params=query))


@examples(25)
@given(
    st.dictionaries(
        st.sampled_from(["host", "origin", "cookie", "authorization", "content-type", "range"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
    )
)
def test_headers(client: TestClient, headers: dict[str, str]) -> None:
    with bounded(repr(headers), "headers.txt"):
        checked(client.post("/api/compare", content=FORMS["compare"], headers=headers))


def test_a_form_of_millions_of_fields(client: TestClient) -> None:
    kind = {"content-type": "application/x-www-form-urlencoded"}
    with bounded(b"", "fields.form", seconds=30, megabytes=300):
        for content in (b"a=&" * 300_000, b"texts=" + b"%0a" * 300_000, b"&" * 2_000_000):
            answer = client.post("/api/compare", content=content, headers=kind)
            assert answer.status_code == 400, answer.text[:200]


def test_a_text_of_entities_within_entities(client: TestClient) -> None:
    text = b"&" + b"amp;" * 2400
    content = form(("images", "a.png", png()), ("texts", "", text))
    kind = {"content-type": "multipart/form-data; boundary=b"}
    with bounded(content, "entities.form", seconds=20):
        checked(client.post("/api/compare", content=content, headers=kind))


def test_the_seeds_are_answered(client: TestClient, tmp_path: Path) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    for name, content in FORMS.items():
        assert client.post(f"/api/{name}", content=content, headers=kind).status_code == 200
