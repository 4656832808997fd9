"""The exact product over a memory-mapped file."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from leanclip.errors import DataError
from leanclip.search.vectors import CHUNK, Vectors


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    values = rng.standard_normal((count, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def made(folder: Path, values: np.ndarray) -> Vectors:
    vectors = Vectors(folder, values.shape[1])
    assert vectors.append(values) == 0
    return vectors


def brute_force(values: np.ndarray, query: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Scores of the best in float64, by sorting all."""
    return np.sort((values.astype(np.float64) @ query.astype(np.float64))[allowed])[::-1][:k]


def assert_best(
    values: np.ndarray,
    query: np.ndarray,
    allowed: np.ndarray,
    k: int,
    found: tuple[np.ndarray, np.ndarray],
) -> None:
    """The scores are those of the best; each row has the score that is said, and is allowed."""
    rows, scores = found
    np.testing.assert_allclose(scores, brute_force(values, query, allowed, k), rtol=0, atol=1e-12)
    assert len(set(rows.tolist())) == len(rows)
    assert allowed[rows].all()
    products = values[rows].astype(np.float64) @ query.astype(np.float64)
    np.testing.assert_allclose(scores, products, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "width"), [(5000, 64), (70_000, 24)])
def test_it_is_brute_force_in_float64(tmp_path: Path, count: int, width: int) -> None:
    rng = np.random.default_rng(count)
    values = unit(rng, count, width)
    vectors = made(tmp_path, values)
    everything = np.ones(count, dtype=bool)
    shares = (0.9, 0.49, 0.02)
    masks = [everything, *(rng.random(count) < share for share in shares)]
    masks.append(np.arange(count) % CHUNK == CHUNK // 9)  # one row of a chunk, at most
    masks.append(np.arange(count) >= count - 7)  # in one chunk alone
    for queries, k in ((1, 1), (1, 10), (3, 100), (70, 5), (2, count + 5)):
        vectors_ = unit(rng, queries, width).astype(np.float32)
        for allowed in masks:
            found = vectors.best(vectors_, k, allowed)
            assert len(found) == queries
            for query, one in zip(vectors_, found, strict=True):
                assert_best(values, query, allowed, k, one)


def test_what_float32_cannot_tell_apart_is_in_order(tmp_path: Path) -> None:
    """Twelve rows whose products differ in the eighth digit, in several chunks of others."""
    rng = np.random.default_rng(0)
    values = unit(rng, 2 * CHUNK + 10, 64)
    query = values[0].astype(np.float32)
    near = rng.choice(len(values), 12, replace=False)
    smallest = np.argsort(np.abs(query))
    for rank, row in enumerate(near):
        values[row] = query
        at = smallest[rank]
        values[row, at] = np.nextafter(values[row, at], np.float16(9))
    products = values[near].astype(np.float64) @ query.astype(np.float64)
    assert len(set(products)) > len(set(products.astype(np.float32)))
    found = made(tmp_path, values).best(query[None], 12, np.ones(len(values), bool))[0]
    assert_best(values, query, np.ones(len(values), bool), 12, found)


def test_equal_ones_come_in_the_order_of_their_rows(tmp_path: Path) -> None:
    values = np.tile(unit(np.random.default_rng(0), 1, 16), (40, 1))
    rows, _ = made(tmp_path, values).best(values[:1].astype(np.float32), 40, np.ones(40, bool))[0]
    assert rows.tolist() == list(range(40))


def test_none_allowed_and_none_there(tmp_path: Path) -> None:
    values = unit(np.random.default_rng(0), 10, 16)
    query = values[:1].astype(np.float32)
    assert made(tmp_path, values).best(query, 3, np.zeros(10, bool))[0][0].tolist() == []
    assert Vectors(tmp_path / "new", 16).best(query, 3, np.zeros(0, bool))[0][0].tolist() == []


def test_it_grows_while_it_is_open_and_says_where_it_is_cut(tmp_path: Path) -> None:
    values = unit(np.random.default_rng(0), 90, 16)
    vectors = made(tmp_path, values[:20])
    reader = Vectors(tmp_path, 16)
    assert len(reader.best(values[:1].astype(np.float32), 99, np.ones(20, bool))[0][0]) == 20
    assert vectors.append(values[20:]) == 20
    rows, _ = reader.best(values[70:71].astype(np.float32), 1, np.ones(90, bool))[0]
    assert rows.tolist() == [70]
    os.truncate(tmp_path / "features.f16", 89 * 32 + 5)
    assert Vectors(tmp_path, 16).read(np.array([88])).shape == (1, 16)
    with pytest.raises(DataError, match=r"features\.f16: the file is truncated"):
        Vectors(tmp_path, 16).read(np.array([88, 89]))
    with pytest.raises(DataError, match=r"features\.f16: the file is truncated"):
        Vectors(tmp_path, 16).best(values[:1].astype(np.float32), 1, np.ones(90, bool))
    assert Vectors(tmp_path, 16).append(values[:1]) == 89  # over the row that was cut


def test_it_works_in_threads_and_after_a_fork(tmp_path: Path) -> None:
    values = unit(np.random.default_rng(0), 3000, 32)
    vectors = made(tmp_path, values)
    everything, queries = np.ones(3000, bool), values[:40].astype(np.float32)
    found: list[list[int]] = [[] for _ in queries]

    def look(number: int) -> None:
        found[number] = vectors.best(queries[number : number + 1], 3, everything)[0][0].tolist()

    threads = [threading.Thread(target=look, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rows[0] for rows in found] == list(range(40))
    if (child := os.fork()) == 0:  # in it the threads are no more
        rows = vectors.best(queries[5:6], 3, everything)[0][0]
        os._exit(0 if rows.tolist() == found[5] else 1)
    assert os.waitpid(child, 0)[1] == 0
