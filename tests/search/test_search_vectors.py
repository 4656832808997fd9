"""The exact product over memory-mapped shards, and the approximate one beside it."""

import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from leanclip.errors import ConfigError, DataError
from leanclip.search import approximate
from leanclip.search.items import Entry, Items
from leanclip.search.vectors import CHUNK, Vectors


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    values = rng.standard_normal((count, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def made(folder: Path, values: np.ndarray, shard_rows: int = 1000) -> Vectors:
    vectors = Vectors(folder, values.shape[1], shard_rows)
    vectors.write(range(len(values)), values)
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


@pytest.mark.parametrize(("count", "width", "shard_rows"), [(5000, 64, 1000), (70_000, 24, 60_000)])
def test_it_is_brute_force_in_float64(
    tmp_path: Path, count: int, width: int, shard_rows: int
) -> None:
    rng = np.random.default_rng(count)
    values = unit(rng, count, width)
    vectors = made(tmp_path, values, shard_rows)
    everything = np.ones(count, dtype=bool)
    most, few = rng.random(count) < 0.9, rng.random(count) < 0.02
    for queries, k in ((1, 1), (1, 10), (3, 100), (70, 5), (2, count + 5)):
        vectors_ = unit(rng, queries, width).astype(np.float32)
        for allowed in (everything, most, few):
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
    found = made(tmp_path, values, 50_000).best(query[None], 12, np.ones(len(values), bool))[0]
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
    vectors = made(tmp_path, values[:20], 50)
    reader = Vectors(tmp_path, 16, 50)
    assert len(reader.best(values[:1].astype(np.float32), 99, np.ones(20, bool))[0][0]) == 20
    vectors.write(range(20, 90), values[20:])
    rows, _ = reader.best(values[70:71].astype(np.float32), 1, np.ones(90, bool))[0]
    assert rows.tolist() == [70]
    os.truncate(tmp_path / "00001.f16", 100)
    with pytest.raises(DataError, match=r"00001\.f16: was cut short"):
        Vectors(tmp_path, 16, 50).best(values[:1].astype(np.float32), 1, np.ones(90, bool))


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


def catalogue(folder: Path, values: np.ndarray) -> tuple[Items, Vectors]:
    """An index of made vectors, a picture for each."""
    items, vectors = Items(folder, create=True), made(folder, values)
    with items.transaction():
        for row in range(len(values)):
            add(items, row)
    return items, vectors


def add(items: Items, row: int) -> int:
    number = items.add_picture(row, f"{row} {items.count()}".encode())
    items.put(Entry(f"/{number}.png", "", 1, 1), number)
    return number


# FAISS takes 8 seconds to learn codes, two minutes where other work runs
@pytest.mark.parametrize("kind", ["hnsw", pytest.param("ivfpq", marks=pytest.mark.slow)])
def test_approximate_search_and_its_recall(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss", reason="the extra `search` is not installed")
    rng = np.random.default_rng(0)
    centers = unit(rng, 60, 32).astype(np.float32)
    spread = centers[rng.integers(60, size=10_000)] + 0.1 * rng.standard_normal((10_000, 32))
    values = (spread / np.linalg.norm(spread, axis=1, keepdims=True)).astype(np.float16)
    items, vectors = catalogue(tmp_path, values)
    texts = unit(rng, 20, 32).astype(np.float32)
    facts = approximate.build(tmp_path, items, vectors, kind, 0.9, texts)
    assert items.fact(approximate.FACT) == facts
    assert facts["recall_at_10"] == min(facts["recall_at_10_pictures"], facts["recall_at_10_texts"])
    ours = approximate.Approximate(tmp_path, items, vectors)
    everything = np.ones(len(values), bool)
    shares = []
    for query, (rows, scores) in zip(texts, ours.best(texts, 10), strict=True):
        best, _ = vectors.best(query[None], 10, everything)[0]
        shares.append(np.isin(best, rows).mean())
        products = values[rows].astype(np.float64) @ query.astype(np.float64)
        np.testing.assert_allclose(scores, products, atol=1e-12)
    assert np.mean(shares) == pytest.approx(facts["recall_at_10_texts"], abs=1e-4)
    assert facts["recall_at_10"] > 0.5
    caplog.set_level(logging.WARNING, logger="leanclip")
    logging.getLogger("leanclip").propagate = True
    approximate.warn_if_low(tmp_path, facts | {"wanted": 1.01})
    assert "less than the 101% that are wanted" in caplog.text


def test_what_came_or_went_since_is_found_or_not(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra `search` is not installed")
    rng = np.random.default_rng(0)
    values = unit(rng, 300, 32)
    items, vectors = catalogue(tmp_path, values)
    approximate.build(tmp_path, items, vectors, "hnsw", 0.9, np.empty((0, 32), np.float32))
    ours = approximate.Approximate(tmp_path, items, vectors)
    assert ours.fraction_outside() == 0
    items.drop_all_but(range(1, 300))  # the last goes, and another takes its row
    items.drop_pictures_without_items()
    gone = values[299].astype(np.float32)
    assert 299 not in ours.best(gone[None], 10)[0][0]
    new = unit(rng, 2, 32)
    vectors.write([299, 300], new)
    add(items, 299)
    add(items, 300)
    for row, value in zip((299, 300), new, strict=True):
        assert ours.best(value[None].astype(np.float32), 3)[0][0][0] == row
    assert ours.fraction_outside() == pytest.approx(2 / 301)


def test_approximate_search_that_cannot_be(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra `search` is not installed")
    items, vectors = catalogue(tmp_path, unit(np.random.default_rng(0), 30, 16))
    none = np.empty((0, 16), np.float32)
    with pytest.raises(ConfigError, match="wants 10,000 pictures or more, found 30"):
        approximate.build(tmp_path, items, vectors, "ivfpq", 0.9, none)
    with pytest.raises(ConfigError, match="known are hnsw, ivfpq"):
        approximate.build(tmp_path, items, vectors, "annoy", 0.9, none)
