"""The API of `leanclip app`, and what it refuses, in this process."""

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from jsonschema import Draft202012Validator
from PIL import Image
from starlette.testclient import TestClient
from test_inference import save_tiny

import leanclip
from leanclip.app.heat import heat_picture
from leanclip.app.safety import HEADERS, MAX_BODY
from leanclip.app.schemas import LabelSet
from leanclip.app.server import make_app
from leanclip.app.service import MAX_PIXELS, Cache, Service
from leanclip.app.worker import MAX_BATCH, Worker, embed_images, embed_texts, rollouts
from leanclip.evaluation import Calibration
from leanclip.inference.attention_maps import gradient_map, rollout
from leanclip.weights import fingerprint

TOKEN = "a-token-that-nobody-guesses"
LABELS = ["cat", "dog", "red fox"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> leanclip.InferenceModel:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder / "tiny")
    return leanclip.load(folder / "tiny", device="cpu")


@contextmanager
def serving(
    clip: leanclip.InferenceModel, *, token: str | None = None, **more: Any
) -> Iterator[TestClient]:
    worker = Worker(lambda: clip)
    worker.start()
    service = Service(worker, "tiny", **more)
    app = make_app(service, host="0.0.0.0" if token else "127.0.0.1", token=token)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        worker.loaded.result(30)
        yield client


@pytest.fixture(scope="module")
def client(clip: leanclip.InferenceModel) -> Iterator[TestClient]:
    with serving(clip, label_sets=[LabelSet(name="animals", labels=LABELS)]) as client:
        yield client


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise_image(seed).save(file, "PNG")
    return file.getvalue()


def upload(*contents: bytes, name: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(name, (f"{i}.png", content)) for i, content in enumerate(contents)]


@cache
def described() -> dict[str, Any]:
    """openapi.json."""
    app = make_app(Service(Worker(lambda: leanclip.load("nothing"))))
    return TestClient(app, base_url="http://127.0.0.1:8000").get("/openapi.json").json()


def check(answer: Any, schema: str) -> dict:
    """The response matches openapi.json."""
    Draft202012Validator(described() | {"$ref": f"#/components/schemas/{schema}"}).validate(
        answer.json()
    )
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def refused(answer: Any, status: int, *words: str) -> None:
    """One sentence, and nothing of the code."""
    said = check(answer, "Error")["error"]
    assert answer.status_code == status, said
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    for word in words:
        assert word in said, said


def test_compare_is_the_similarity(client: TestClient, clip: leanclip.InferenceModel) -> None:
    texts, images = ["a cat", "a dog", "a fox, running"], [png(1), png(2)]
    fields = {"texts": ["a cat\n a dog ", "", "a fox, running"]}  # one a line, or one a field
    found = check(client.post("/api/compare", files=upload(*images), data=fields), "Comparison")
    assert (found["texts"], found["images"]) == (texts, ["0.png", "1.png"])
    np.testing.assert_allclose(found["similarity"], clip.similarity(images, texts), atol=2e-6)


def test_classify_is_what_the_model_says(client: TestClient, clip: leanclip.InferenceModel) -> None:
    data = {"labels": LABELS, "templates": ["a {}", "the {}"], "top": "2"}
    answer = client.post("/api/classify", files=upload(png(3), name="image"), data=data)
    found = check(answer, "Classification")
    expected = clip.classify(png(3), LABELS, ["a {}", "the {}"], top=2)
    assert [prediction["label"] for prediction in found["predictions"]] == [
        prediction.label for prediction in expected
    ]
    for ours, theirs in zip(found["predictions"], expected, strict=True):
        assert ours["probability"] == pytest.approx(theirs.probability, abs=1e-5)
        assert ours["similarity"] == pytest.approx(theirs.similarity, abs=1e-5)
    assert (found["calibrated"], found["none_of_these"]) == (False, False)


def test_a_calibration_is_used_for_its_own_labels_alone(clip: leanclip.InferenceModel) -> None:
    calibration = Calibration(
        temperature=2.0,
        threshold=0.1,
        floor=-1000.0,
        coverage=0.9,
        images=100,
        weights=fingerprint(clip.model.state_dict()),
        classes=tuple(LABELS),
        templates=("a {}",),
    )
    files, data = upload(png(3), name="image"), {"labels": LABELS, "templates": "a {}"}
    with serving(clip, calibration=calibration) as client:
        found = client.post("/api/classify", files=files, data=data).json()
        other = client.post("/api/classify", files=files, data=data | {"templates": "the {}"})
    expected = clip.classify(png(3), LABELS, "a {}", calibration=calibration)
    assert found["calibrated"]
    assert found["predictions"][0]["probability"] == pytest.approx(
        expected[0].probability, abs=1e-5
    )
    assert not other.json()["calibrated"]
    with serving(clip, calibration=calibration.model_copy(update={"floor": 1000.0})) as client:
        found = client.post("/api/classify", files=files, data=data).json()
    assert found["none_of_these"]
    assert [prediction["label"] for prediction in found["predictions"]] == [
        prediction.label for prediction in expected
    ]


def test_attention_is_a_picture_of_the_map(
    client: TestClient, clip: leanclip.InferenceModel
) -> None:
    image = Image.open(io.BytesIO(png(4))).convert("RGB")
    pixels = clip.preprocess(png(4))[None]
    text = clip.embed_texts("a cat", as_torch=True)
    for texts, heat in (
        (["a cat"], gradient_map(clip.model, pixels, text)),
        ([], rollout(clip.model, pixels)),
    ):
        answer = client.post(
            "/api/attention", files=upload(png(4), name="image"), data={"texts": texts}
        )
        assert answer.headers["content-type"] == "image/jpeg"
        ours, theirs = (
            np.asarray(Image.open(io.BytesIO(jpeg)), dtype=int)
            for jpeg in (answer.content, heat_picture(image, heat[0].numpy()))
        )
        assert ours.shape == (448, 448, 3)
        assert np.abs(ours - theirs).mean() < 1


def test_heat_is_brightest_where_the_map_is_highest() -> None:
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[1, 2] = 3
    grey = Image.new("RGB", (300, 200), (128, 128, 128))
    found = np.asarray(Image.open(io.BytesIO(heat_picture(grey, heat))).convert("L"))
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert (y * 4 // 448, x * 4 // 448) == (1, 2)


def started(clip: leanclip.InferenceModel, **options: Any) -> Worker:
    worker = Worker(lambda: clip, **options)
    worker.start()
    worker.loaded.result(30)
    return worker


def test_concurrent_requests_share_passes(clip: leanclip.InferenceModel) -> None:
    worker = started(clip, max_wait=0.2)
    pixels = [torch.full((3, 32, 32), i % 256, dtype=torch.uint8) for i in range(MAX_BATCH + 5)]

    async def embed() -> list[torch.Tensor]:
        return await asyncio.gather(*(worker.run(embed_images, one) for one in pixels))

    found = torch.stack(asyncio.run(embed()))
    assert (worker.jobs, worker.passes) == (MAX_BATCH + 5, 2)
    torch.testing.assert_close(found, clip.embed_pixels(torch.stack(pixels)))


def test_each_kind_of_job_has_its_own_pass(clip: leanclip.InferenceModel) -> None:
    worker, pixels = started(clip), torch.zeros(3, 32, 32, dtype=torch.uint8)

    async def work() -> list[torch.Tensor]:
        jobs = (
            worker.run(embed_images, pixels),
            worker.run(embed_texts, "a cat"),
            worker.run(rollouts, pixels),
            worker.run(embed_texts, "a dog"),
        )
        return list(await asyncio.gather(*jobs))

    assert [len(result) for result in asyncio.run(work())] == [16, 16, 4, 16]
    assert (worker.jobs, worker.passes) == (4, 3)


def test_a_failing_pass_does_not_stop_the_worker(clip: leanclip.InferenceModel) -> None:
    worker = started(clip)

    async def work() -> list[Any]:
        wrong = worker.run(embed_images, torch.zeros(3, 5, 7, dtype=torch.uint8))
        first = await asyncio.gather(wrong, return_exceptions=True)
        return [*first, await worker.run(embed_texts, "a cat")]

    error, features = asyncio.run(work())
    assert "size" in str(error)
    assert len(features) == 16


def test_a_cancelled_request_does_not_cancel_its_batch(clip: leanclip.InferenceModel) -> None:
    worker = started(clip, max_wait=0.1)

    async def work() -> torch.Tensor:
        gone = asyncio.create_task(worker.run(embed_texts, "a cat"))
        stays = asyncio.create_task(worker.run(embed_texts, "a dog"))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    expected = clip.embed_texts("a dog", as_torch=True)[0]
    torch.testing.assert_close(asyncio.run(work()), expected)


def test_too_many_pending_requests_are_refused(
    clip: leanclip.InferenceModel, monkeypatch: Any
) -> None:
    monkeypatch.setattr("leanclip.app.worker.MAX_PENDING", 3)
    worker = started(clip, max_wait=0.1)

    async def work() -> list[Any]:
        jobs = [worker.run(embed_texts, f"{i}") for i in range(5)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    found = asyncio.run(work())
    assert [getattr(one, "status_code", None) for one in found] == [None] * 3 + [503] * 2
    assert not isinstance(asyncio.run(worker.run(embed_texts, "later")), Exception)


def test_a_failed_classifier_is_not_cached(clip: leanclip.InferenceModel, monkeypatch: Any) -> None:
    service, calls, original = Service(started(clip)), [], type(clip).classifier

    def classifier(*values: Any, **options: Any) -> Any:
        calls.append(values)
        if len(calls) == 1:
            raise MemoryError
        return original(*values, **options)

    monkeypatch.setattr(type(clip), "classifier", classifier)

    async def work() -> None:
        with pytest.raises(MemoryError):
            await service.classifier(LABELS, ["a {}"])
        found = await asyncio.gather(*(service.classifier(LABELS, ["a {}"]) for _ in range(3)))
        assert [one.labels for one in found] == [tuple(LABELS)] * 3

    asyncio.run(work())
    assert len(calls) == 2  # the three shared one


def test_a_cache_keeps_the_newest_values() -> None:
    cache = Cache(2)
    for number, key in enumerate("abc"):
        cache[key] = number
    assert cache == {"b": 1, "c": 2}


def test_while_the_model_loads_requests_are_told_to_wait(clip: leanclip.InferenceModel) -> None:
    go_on = threading.Event()

    def load() -> leanclip.InferenceModel:
        go_on.wait(30)
        return clip

    worker = Worker(load)
    worker.start()
    files = upload(png())
    with TestClient(make_app(Service(worker)), base_url="http://127.0.0.1:8000") as client:
        for _ in range(2):
            answer = client.post("/api/compare", files=files, data={"texts": "a"})
            refused(answer, 503, "being loaded")
            assert int(answer.headers["retry-after"]) > 0
        refused(client.get("/api/search?q=a"), 503, "being loaded")
        health = client.get("/healthz")
        assert (health.status_code, check(health, "Health")["status"]) == (503, "loading")
        assert int(health.headers["retry-after"]) > 0
        assert check(client.get("/api/about"), "About")["model"] is None
        assert "tablist" in client.get("/").text
        go_on.set()
        worker.loaded.result(30)
        assert client.get("/healthz").status_code == 200
        assert client.post("/api/compare", files=files, data={"texts": "a"}).status_code == 200


def test_a_failed_load_is_not_ready() -> None:
    worker = Worker(lambda: leanclip.load("nothing"))
    worker.start()
    assert isinstance(worker.loaded.exception(30), leanclip.LeanclipError)
    with TestClient(make_app(Service(worker)), base_url="http://127.0.0.1:8000") as client:
        answer = client.post("/api/compare", files=upload(png()), data={"texts": "a"})
        refused(answer, 503)
        assert client.get("/healthz").status_code == 503


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size, with hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bomb.png", png_header(60_000, 60_000), "exceeds limit"),
        ("large.png", png_header(8_000, 8_000), f"limit of {MAX_PIXELS}"),
        ("page.jpg", b"<!doctype html><script>alert(1)</script>", "none of JPEG, PNG"),
        ("x.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "none of JPEG, PNG"),
        ("cut.png", png()[:200], "cannot be read as an image"),
        ("empty.png", b"", "empty"),
        ("p.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_named(
    client: TestClient, name: str, content: bytes, words: str
) -> None:
    file = [("images", (f"C:\\photos\\{name}", content))]
    answer = client.post("/api/compare", files=file, data={"texts": "a"})
    refused(answer, 422, f"{name}: ", words)
    assert "photos" not in answer.text


def test_forms_that_are_wrong(client: TestClient) -> None:
    kind = "multipart/form-data; boundary=b"
    part = 'b\r\ncontent-disposition: form-data; name="images"; filename="a.png"\r\n\r\nx\r\n'
    for content_type, body, words in (
        ("application/json", b"{}", "images: Field required"),
        ("", b"x", "images: Field required"),
        ("multipart/form-data", b"x", "boundary"),
        (kind, b"nothing of the kind", "multipart"),
        (kind, f"--{part}".encode(), "images: Field required"),  # it never ends
        (kind, b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n", "multipart"),
        (kind, b"", "images: Field required"),
    ):
        headers = {"content-type": content_type} if content_type else {}
        answer = client.post("/api/compare", content=body, headers=headers)
        refused(answer, 400, words)


def test_fields_that_are_wrong(client: TestClient) -> None:
    files, image = upload(png()), upload(png(), name="image")
    compare: Any = lambda **form: client.post("/api/compare", **form)  # noqa: E731
    classify: Any = lambda **form: client.post("/api/classify", **form)  # noqa: E731
    refused(compare(files=files), 400, "texts: Field required")
    refused(compare(files=files, data={"texts": " \n "}), 400, "texts: found none")
    address = {"texts": "a", "images": "http://127.0.0.1/a.png"}
    refused(compare(data=address), 400, "images: found text")
    wrong = [("images", (None, b"/etc/passwd")), ("texts", (None, b"a"))]
    refused(compare(files=wrong), 400, "images: found text")
    refused(compare(files=[*files, ("texts", ("a.txt", b"a"))]), 400, "texts: ", "valid string")
    refused(compare(files=files, data={"texts": "word " * 400}), 400, "context")
    refused(compare(files=files, data={"texts": "a\n" * 3000}), 400, "2,000")
    refused(compare(files=files, data={"texts": ["a"] * 3000}), 400, "fields", "2000")
    refused(compare(files=upload(*[b""] * 70), data={"texts": "a"}), 400, "files", "64")
    refused(classify(files=image, data={"labels": ["cat"]}), 400, "found 1")
    refused(classify(files=image, data={"labels": ["cat", "cat"]}), 400, "found 1")
    refused(classify(files=image, data={"labels": LABELS, "templates": "a photo"}), 400, "{}")
    for top in ("-1", "0", "x", "1e3", "9" * 30):
        refused(classify(files=image, data={"labels": LABELS, "top": top}), 400, "top: ")
    many = {"labels": [f"label {i}" for i in range(1000)], "templates": ["{}"] + ["a {}"] * 5}
    refused(classify(files=image, data=many), 400, "2,000")
    two = upload(png(), png(1), name="image")
    refused(classify(files=two, data={"labels": LABELS}), 400, "image: ", "at most 1")


def test_a_label_over_the_context_fails_alone(client: TestClient) -> None:
    image = upload(png(), name="image")
    data = {"labels": ["cat", "word " * 400]}
    refused(client.post("/api/classify", files=image, data=data), 400, "context")
    answer = client.post("/api/classify", files=image, data={"labels": LABELS})
    assert answer.status_code == 200


def test_a_request_over_the_limit(client: TestClient) -> None:
    large = upload(bytes(MAX_BODY))
    refused(client.post("/api/compare", files=large, data={"texts": "a"}), 413, "20 MB")

    def pieces() -> Iterator[bytes]:  # without a Content-Length
        yield b'--b\r\ncontent-disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(30):
            yield bytes(1 << 20)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused(client.post("/api/compare", content=pieces(), headers=headers), 413, "20 MB")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", ""],
)
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/healthz", "/api/about"):
        answer = client.get(path, headers={"host": host})
        assert (answer.status_code, answer.text) == (400, "Invalid host header")


def test_hosts_of_this_machine(client: TestClient) -> None:
    for host in ("localhost:8000", "127.0.0.1", "LOCALHOST", "[::1]:8000", "127.0.0.1:9000"):
        assert client.get("/", headers={"host": host}).status_code == 200, host


def test_another_origin_is_refused(client: TestClient) -> None:
    form = {"files": upload(png()), "data": {"texts": "a"}}
    for origin in (
        "http://evil.example",
        "null",
        "http://[",
        "",
        "http://127.0.0.1:8000.evil.example",
    ):
        answer = client.post("/api/compare", headers={"origin": origin}, **form)
        refused(answer, 403, "Origin")
    for headers in ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        refused(client.post("/api/compare", headers=headers, **form), 403, "Origin")
    for origin in ("http://127.0.0.1:8000", "null"):  # null: a form of a page without referrers
        own = {"origin": origin, "sec-fetch-site": "same-origin"}
        assert client.post("/api/compare", headers=own, **form).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/static/..%2froutes.py",
        "/static/../routes.py",
        "/static/..%5croutes.py",
        "/static/%2fetc%2fpasswd",
        "/static/",
        "/static/%00",
        "/templates/index.html",
        "/%00",
        "/api/..%2f..%2fetc/passwd",
        "/__init__.py",
        "/api/nothing",
    ],
)
def test_paths_lead_to_nothing_but_the_page(client: TestClient, path: str) -> None:
    refused(client.get(path), 404, "Not Found")


def test_head_requests_are_answered(client: TestClient) -> None:
    for path in ("/", "/healthz", "/static/app.js"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_page_knows_the_limit(client: TestClient) -> None:
    page = client.get("/").text
    assert f'data-max-bytes="{MAX_BODY}"' in page
    assert "at most 20 MB each" in page


def test_a_method_that_is_none(client: TestClient) -> None:
    refused(client.get("/api/compare"), 405)
    refused(client.delete("/api/about"), 405)


def test_every_answer_has_the_headers(client: TestClient) -> None:
    for path in ("/", "/static/app.js", "/api/about", "/nothing", "/openapi.json"):
        answer = client.get(path)
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "'unsafe" not in HEADERS["content-security-policy"]
    assert client.get("/", headers={"host": "x"}).headers["x-content-type-options"] == "nosniff"
    assert "server" not in client.get("/").headers


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    for name in ("index.html", "sign-in.html"):
        text = (Path(leanclip.__file__).parent / "app/templates" / name).read_text()
        assert " style=" not in text
        assert "<style" not in text
        assert " onclick" not in text
        assert "http" not in text
        assert text.count("<script") == text.count('src="static/app.js"')


def test_a_token_is_asked_for(clip: leanclip.InferenceModel) -> None:
    with serving(clip, token=TOKEN) as client:
        refused(client.get("/api/about"), 401, "token")
        refused(client.get("/static/app.js"), 401, "token")
        for wrong in ("Bearer ", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}"):
            refused(client.get("/api/about", headers={"authorization": wrong}), 401)
        headers = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/api/about", headers=headers).status_code == 200
        assert client.get("/healthz").status_code == 200
        page = client.get("/")
        assert (page.url.path, page.status_code) == ("/sign-in", 200)
        assert "password" in page.text
        answer = client.post("/sign-in", data={"token": "wrong"})
        assert answer.status_code == 401
        assert "not the token" in answer.text
        assert not client.cookies
        answer = client.post("/sign-in", data={"token": TOKEN}, follow_redirects=False)
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert TOKEN not in cookie
        assert client.get("/api/about").status_code == 200
        assert "tablist" in client.get("/").text
        origin = {"origin": "http://evil.example"}
        refused(client.post("/sign-in", data={"token": TOKEN}, headers=origin), 403, "Origin")


def test_with_a_token_the_server_may_have_any_name(clip: leanclip.InferenceModel) -> None:
    with serving(clip, token=TOKEN) as client:
        for host in ("10.1.2.3:8000", "localhost", "[fe80::1]", "box.example"):
            headers = {"host": host}
            refused(client.get("/api/about", headers=headers), 401, "token")
            headers["authorization"] = f"Bearer {TOKEN}"
            assert client.get("/api/about", headers=headers).status_code == 200, host


def test_a_fault_of_our_own_is_no_trace(client: TestClient, monkeypatch: Any) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret of the code")

    monkeypatch.setattr("leanclip.app.routes.version", broken)
    with TestClient(client.app, "http://127.0.0.1:8000", raise_server_exceptions=False) as other:
        answer = other.get("/api/about")
    refused(answer, 500, "something went wrong")
    assert "secret" not in answer.text


def test_openapi_describes_every_route(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert {(path, method) for path, one in found["paths"].items() for method in one} == {
        ("/healthz", "get"),
        ("/api/about", "get"),
        ("/api/compare", "post"),
        ("/api/classify", "post"),
        ("/api/attention", "post"),
        ("/api/search", "get"),
        ("/api/search", "post"),
        ("/api/pictures/{number}", "get"),
    }
    for schema in found["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for one in found["paths"].values():
        for operation in one.values():
            error = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert error == {"$ref": "#/components/schemas/Error"}
            assert "422" not in operation["responses"]
    for path in ("/docs", "/redoc"):  # pages that load scripts from elsewhere
        refused(client.get(path), 404)
