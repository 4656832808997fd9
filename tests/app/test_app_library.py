"""The API's search: what it finds, and that paths lead nowhere."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image
from starlette.testclient import TestClient
from test_app import check, png, refused, started, upload
from test_inference import save_tiny

import leanclip
from leanclip.app.schemas import Hit
from leanclip.app.server import make_app
from leanclip.app.service import Service
from leanclip.search import Index

PICTURES = 12
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    save_tiny(folder / "tiny")
    for i in range(PICTURES):
        inner = folder / "photos" / ("cats" if i % 3 else "dogs")
        inner.mkdir(parents=True, exist_ok=True)
        noise_image(i, (400, 300)).save(inner / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def index(place: Path) -> Iterator[Index]:
    found = Index.build(place / "photos", place / "tiny", place / "index")
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(place: Path, index: Index) -> Iterator[TestClient]:
    clip = index.clip
    assert clip is not None
    with TestClient(make_app(Service(started(clip), index=index)), base_url=URL) as client:
        yield client


def found_by(client: TestClient, **query: str | int) -> list[dict]:
    return check(client.get("/api/search", params=query), "Hits")["hits"]


def test_words_find_what_the_index_finds(client: TestClient, index: Index) -> None:
    expected = index.search("a red bowl", k=5)
    found = found_by(client, q="a red bowl", limit=5)
    assert [hit["number"] for hit in found] == [hit.number for hit in expected]
    assert [hit["path"] for hit in found] == [hit.path for hit in expected]
    scores = [hit.score for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx(scores, abs=1e-6)
    vector = index.query(texts=["a red bowl"], without=["a cat"])
    less = index.search(vector, k=5)
    found = found_by(client, q="a red bowl", without="a cat", limit=5)
    assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in less], abs=1e-5)
    dogs = found_by(client, q="a red bowl", label="dogs")
    assert [hit["label"] for hit in dogs] == ["dogs"] * (PICTURES // 3)


def test_pages_of_a_search_make_the_whole(client: TestClient, index: Index) -> None:
    whole = [hit.number for hit in index.search("a red bowl", k=PICTURES)]
    parts, ends = [], []
    for offset in range(0, PICTURES, 5):
        query = {"q": "a red bowl", "offset": offset, "limit": 5}
        found = client.get("/api/search", params=query).json()
        parts += [hit["number"] for hit in found["hits"]]
        ends.append(found["is_end"])
    assert (parts, ends) == (whole, [False, False, True])
    past = client.get("/api/search", params={"q": "x", "offset": 100}).json()
    assert past == {"hits": [], "is_end": True}


def test_pictures_find_themselves(client: TestClient, index: Index) -> None:
    for number in (1, 5):
        assert found_by(client, like=number)[0]["number"] == number
        files = upload(index.read(number), name="image")
        answer = client.post("/api/search", files=files, data={"limit": "3", "offset": "0"})
        found = check(answer, "Hits")
        assert [len(found["hits"]), found["is_end"]] == [3, False]
        assert found["hits"][0]["number"] == number
        assert found["hits"][0]["score"] == pytest.approx(1, abs=2e-3)  # fp16 vectors


def test_a_picture_is_encoded_anew(client: TestClient, index: Index) -> None:
    answer = client.get("/api/pictures/3", params={"side": 128})
    assert answer.headers["content-type"] == "image/jpeg"
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.size) == ("JPEG", (128, 96))
    expected = Image.open(io.BytesIO(index.read(3))).convert("RGB").resize((128, 96))
    far = np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(far).mean() < 8


@pytest.mark.parametrize(
    "number", ["..%2f..%2fetc%2fpasswd", "..%2f1", "-1", "1.png", "%00", "1e3", "٣", "9" * 30]
)
def test_tricks_with_numbers(client: TestClient, number: str) -> None:
    answer = client.get(f"/api/pictures/{number}")
    refused(answer, 404 if "%2f" in number else 400, "" if "%2f" in number else "number: ")
    assert "root:" not in answer.text
    if "%2f" not in number:
        refused(client.get(f"/api/search?like={number}"), 400, "like: ")


def test_numbers_that_are_none(client: TestClient, index: Index) -> None:
    refused(client.get("/api/pictures/999"), 404, "picture 999")
    refused(client.get("/api/search?like=999"), 404, "picture 999")
    refused(client.get("/api/search"), 400, "q")
    refused(client.get("/api/search?q=+"), 400, "q")
    refused(client.get("/api/search?q=a&offset=-1"), 400, "offset")
    refused(client.get("/api/search?q=a&limit=100000"), 400, "limit")
    refused(client.get("/api/pictures/1?side=100000"), 400, "side")
    refused(client.get("/api/search", params={"q": "word " * 400}), 400, "context")
    refused(client.post("/api/search", files=upload(b"x", name="image")), 422, "0.png")


def test_a_file_that_is_gone_or_is_no_picture_any_more(
    client: TestClient, index: Index, place: Path
) -> None:
    path = Path(index.item(7).path)
    content = path.read_bytes()
    path.write_bytes(b"<html>" * (len(content) // 6) + b"x" * (len(content) % 6))
    refused(client.get("/api/pictures/7"), 422, "picture 7")
    path.unlink()
    answer = client.get("/api/pictures/7")
    refused(answer, 404, "picture 7")
    assert str(place) not in answer.text
    path.write_bytes(content)


def test_names_that_are_no_unicode_are_replaced() -> None:
    hit = Hit(number=1, score=0.12345678, path="caf\udce9.png", caption=None, label="\udce9")
    expected = {"number": 1, "score": 0.123457, "path": "caf?.png", "caption": None, "label": "?"}
    assert json.loads(hit.model_dump_json()) == expected


def test_about_says_what_there_is(client: TestClient) -> None:
    found = check(client.get("/api/about"), "About")
    assert found["index"] == {"pictures": PICTURES, "labels": ["cats", "dogs"]}


def test_without_an_index_the_answer_says_how(index: Index) -> None:
    assert index.clip is not None
    with TestClient(make_app(Service(started(index.clip))), base_url=URL) as bare:
        refused(bare.get("/api/search?q=a"), 409, "leanclip app --index")
        refused(bare.get("/api/pictures/1"), 409, "--index")


def test_the_index_of_another_model_is_refused(place: Path, index: Index, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", vision_layers=1)
    with pytest.raises(leanclip.ConfigError, match="another model"):
        Index.open(place / "index", leanclip.load(tmp_path / "other"))


def test_a_picture_of_ones_own_is_none_of_the_index(client: TestClient) -> None:
    found = client.post("/api/search", files=upload(png(99), name="image")).json()["hits"]
    assert found[0]["score"] < 0.9999
