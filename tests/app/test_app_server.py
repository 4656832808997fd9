"""`leanclip app` as a process on loopback: uploads that are refused, many at once, its end."""

import asyncio
import io
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from conftest import Command, Forked, assert_refused, noise_image
from test_inference import save_tiny

import leanclip
from leanclip.evaluation import Calibration
from leanclip.search import Index
from leanclip.weights import fingerprint

CLIENTS = 200


@contextmanager
def running(folder: Path, *words: str, model: str = "tiny") -> Iterator[tuple[Forked, int]]:
    """The server and its port."""
    process = Forked("app", "--port", "0", "--model", model, *words, folder=folder)
    try:
        process.until(lambda: "http://" in process.output())
        yield process, int(process.output().split("/   ")[0].rpartition(":")[2])
    finally:
        with suppress(ProcessLookupError):  # it may have ended
            process.send(signal.SIGKILL)
            process.code()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    save_tiny(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def port(place: Path) -> Iterator[int]:
    with running(place, model=str(place / "tiny")) as (_, port):
        until_ready(port)
        yield port


def until_ready(port: int) -> None:
    while httpx2.get(f"http://127.0.0.1:{port}/healthz").status_code != 200:
        time.sleep(0.02)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed).save(file, "PNG")
    return file.getvalue()


def exchange(port: int, head: str, body: bytes = b"") -> tuple[int, dict]:
    """What comes back for a request by hand, whose body may be cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(head.encode() + b"\r\n" + body)
        file = line.makefile("rb")
        status = int(file.readline().split()[1])
        length = 0
        while (header := file.readline().strip().lower()) != b"":
            if header.startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        return status, json.loads(file.read(length))


HEAD = "POST /api/compare HTTP/1.1\r\nHost: 127.0.0.1\r\n"
FORM = "Content-Type: multipart/form-data; boundary=b\r\n"


def test_fifty_megabytes_are_refused_before_they_are_read(port: int) -> None:
    """The answer is there when one byte of the body is."""
    head = f"{HEAD}{FORM}Content-Length: {50 << 20}\r\n"
    status, found = exchange(port, head, b"-")
    assert status == 413
    assert "20 MB" in found["error"]
    status, _ = exchange(port, f"{head}Expect: 100-continue\r\n")
    assert status == 413  # and no "100 Continue" before


def test_who_sends_fifty_megabytes_all_the_same_gets_the_answer(port: int) -> None:
    url = f"http://127.0.0.1:{port}/api/compare"
    answer = httpx2.post(url, files={"images": bytes(50 << 20)}, data={"texts": "a"})
    assert answer.status_code == 413

    def pieces() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(50):
            yield bytes(1 << 20)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert httpx2.post(url, content=pieces(), headers=headers).status_code == 413


def test_a_client_that_sends_all_before_it_reads_gets_the_answer(port: int) -> None:
    head = f"{HEAD}{FORM}Content-Length: {22 << 20}\r\n"
    assert exchange(port, head, bytes(22 << 20))[0] == 413
    head = f"{HEAD}{FORM}Origin: http://evil.example\r\nContent-Length: {19 << 20}\r\n"
    assert exchange(port, head, bytes(19 << 20))[0] == 403


def test_a_form_that_is_refused_early_gets_the_answer(port: int) -> None:
    """The parser stops at the 65th file, while 20 MB are still on their way."""

    def pieces() -> Iterator[bytes]:
        for i in range(200):
            yield b'--b\r\ncontent-disposition: form-data; name="images"; filename="%d"\r\n\r\n' % i
            yield bytes(100_000) + b"\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    url = f"http://127.0.0.1:{port}/api/compare"
    answer = httpx2.post(url, content=pieces(), headers=headers)
    assert (answer.status_code, "64" in answer.json()["error"]) == (400, True)


def test_what_the_server_was_started_with(place: Path, tmp_path: Path) -> None:
    (tmp_path / "animals.txt").write_text("otter\nbadger\n")
    clip = leanclip.load(place / "tiny", device="cpu")
    Calibration(
        temperature=2.0,
        threshold=0.1,
        floor=0.0,
        coverage=0.9,
        images=100,
        weights=fingerprint(clip.model.state_dict()),
        classes=("a thing", "another"),
        templates=("the {}",),
    ).save(tmp_path)
    words = ("--labels", str(tmp_path / "animals.txt"), "--calibration", str(tmp_path))
    with running(tmp_path, *words, model=str(place / "tiny")) as (_, port):
        until_ready(port)
        about = httpx2.get(f"http://127.0.0.1:{port}/api/about").json()
    assert about["model"]["name"] == str(place / "tiny")
    assert about["label_sets"] == [
        {"name": "calibrated", "labels": ["a thing", "another"], "templates": ["the {}"]},
        {"name": "animals", "labels": ["otter", "badger"], "templates": None},
    ]


def test_nonsense_in_place_of_http_is_answered(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(b"nonsense\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 400")
    assert exchange(port, f"{HEAD}Content-Length: 0\r\n")[0] == 400
    head = "GET /..%2f..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    assert exchange(port, head)[0] == 404
    assert exchange(port, head.replace("..%2f..%2f", "../../"))[0] == 404
    two = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(two.encode() + b"\r\n")
        assert line.recv(100).split()[1] in (b"400", b"403")


def test_who_leaves_in_the_middle_harms_nobody(port: int) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(f"{HEAD}{FORM}Content-Length: 1000\r\n\r\n--b".encode())
    assert httpx2.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


def test_two_hundred_at_once_are_all_answered_in_few_passes(place: Path, port: int) -> None:
    """Every one with what it would get alone."""
    labels = ["cat", "dog", "red fox"]
    images = [png(i) for i in range(CLIENTS)]
    before = httpx2.get(f"http://127.0.0.1:{port}/healthz").json()

    async def all_at_once() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(limits=limits, timeout=120) as client:
            url = f"http://127.0.0.1:{port}/api/classify"
            asked = (
                client.post(url, files={"image": image}, data={"labels": labels})
                for image in images
            )
            return await asyncio.gather(*asked)

    answers = asyncio.run(all_at_once())
    assert [answer.status_code for answer in answers] == [200] * CLIENTS
    expected = leanclip.load(place / "tiny").classify(images, labels)
    for answer, predictions in zip(answers, expected, strict=True):
        for ours, theirs in zip(answer.json()["predictions"], predictions, strict=True):
            assert ours["similarity"] == pytest.approx(theirs.similarity, abs=2e-6)
    after = httpx2.get(f"http://127.0.0.1:{port}/healthz").json()
    assert after["jobs"] - before["jobs"] == CLIENTS
    assert after["passes"] - before["passes"] < CLIENTS / 2  # the labels are encoded once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to(place: Path, number: int) -> None:
    with running(place, model=str(place / "tiny")) as (process, port):
        until_ready(port)
        process.send(number)
        code = process.code()
        assert code in (130, -number)
        assert "Traceback" not in process.output()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"http://127.0.0.1:{port}/healthz")


def test_a_model_that_is_none_ends_it_with_a_line(tmp_path: Path) -> None:
    with running(tmp_path, model=str(tmp_path / "nothing")) as (process, _):
        assert process.code() == 2
        last = process.output().splitlines()[-1]
        assert last.startswith("error: ")
        assert "nothing" in last


def test_the_index_of_another_model_ends_it_with_a_line(place: Path, tmp_path: Path) -> None:
    noise_image(1).save(tmp_path / "1.png")
    Index.build(tmp_path, place / "tiny", tmp_path / "index").close()
    other = save_tiny(tmp_path / "other", vision_layers=1)
    with running(tmp_path, "--index", str(tmp_path / "index"), model=str(other)) as (process, _):
        assert process.code() == 2
        assert "built with another model" in process.output().splitlines()[-1]


def test_mistakes_on_the_command_line(
    place: Path, port: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", str(place / "tiny"))
    monkeypatch.delenv("LEANCLIP_TOKEN", raising=False)
    assert_refused(command("app", *model, "--host", "0.0.0.0"), "--host", "LEANCLIP_TOKEN")
    assert_refused(command("app", *model, "--token", "short"), "--token", "16")
    assert_refused(command("app", *model, "--port", str(port)), str(port), "--port")
    assert_refused(command("app", *model, "--labels", "none.txt"), "none.txt")
    assert_refused(command("app", *model, "--calibration", "none"), "none", "--calibrate")
    assert_refused(command("app", *model, "--index", "none"), "none", "leanclip search build")
    assert_refused(command("app"), "--model")
