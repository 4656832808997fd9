"""The library in a thread that is not the main one, as notebooks and servers use it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from conftest import TINY, configured_tasks, make_config, make_model

import leanclip
from leanclip import CLIP, DataError, Preprocess
from leanclip.api import evaluate_only, train
from leanclip.config.schema import load_config
from leanclip.data import batch_reader
from leanclip.evaluation import evaluate
from leanclip.inference.embeddings import Source, embed, read_embeddings
from leanclip.training.plan import make_plan

T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives in another thread; what it raises is raised here."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Every handler of a signal stays what it was."""
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    yield
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_and_training(workers: int, workplace: Path) -> None:
    make_config(workplace / "c.yaml", data={"workers": workers}, train={"epochs": 1})
    plan = make_plan(load_config("c.yaml"), torch.device("cpu"))
    outcome = in_thread(lambda: train(plan))
    assert outcome is not None
    again = in_thread(lambda: evaluate_only(plan.config, torch.device("cpu")))
    assert again is not None
    assert again.report.metrics == outcome.report.metrics


def test_inference_and_embedding(workplace: Path) -> None:
    make_model(workplace / "m")
    paths = sorted((workplace / "data").glob("*.png"))
    expected = leanclip.load("m").embed_images(paths)

    def work() -> np.ndarray:
        clip = leanclip.load("m")
        embed(clip, Source.of(workplace / "data"), Path("out"), workers=2)
        return clip.embed_images(paths)

    np.testing.assert_array_equal(in_thread(work), expected)
    np.testing.assert_array_equal(read_embeddings("out")[1], expected)


def test_a_dead_worker_is_reported(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_config(workplace / "c.yaml", data={"workers": 2}, evaluate={"batch_size": 2})
    (task,) = configured_tasks(load_config("c.yaml"))
    parent, read = os.getpid(), batch_reader.evaluation_pixels

    def die(image: Path, *more: Any, **options: Any) -> np.ndarray:
        if os.getpid() != parent and image.name == "007.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(image, *more, **options)

    monkeypatch.setattr(batch_reader, "evaluation_pixels", die)
    model = CLIP(**TINY).eval()
    with pytest.raises(DataError, match=r"007\.png: the process that was reading it died"):
        in_thread(lambda: evaluate(model, [task], Preprocess(32)))
