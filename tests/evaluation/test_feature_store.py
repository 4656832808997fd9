"""Features in shards on disk: whole or missing, and only of one origin."""

import json
from pathlib import Path

import numpy as np
import pytest

from leanclip.errors import ConfigError
from leanclip.evaluation.feature_store import FeatureStore, Format, read_index

FEATURES = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_was_written_is_read(tmp_path: Path, format: Format, dtype: type) -> None:
    store = FeatureStore(tmp_path / "out", 3, format)
    store.begin({"weights": "a"})
    ids = ["a.png", "caf\udce9.png", "ü\\xe9.png"]  # one is not UTF-8
    store.write(1, ids, FEATURES.astype(dtype), {"bad.png": "why"})
    store.write(2, [], np.empty((0, 2), dtype), {})
    assert FeatureStore(tmp_path / "out", 3, format).missing() == [0]
    found, features = store.read(1)
    assert found == ids
    assert features.dtype == dtype
    np.testing.assert_array_equal(features, FEATURES)
    assert isinstance(features, np.memmap) == (format == "npy")
    assert store.read(2)[1].shape == (0, 2)
    assert [store.skipped(shard) for shard in range(3)] == [{}, {"bad.png": "why"}, {}]


def test_numbers_as_ids(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 1)
    store.begin({})
    store.write(0, [0, 7, 2**64 - 1], FEATURES, {})
    assert store.read(0)[0] == [0, 7, 2**64 - 1]


def test_an_unfinished_shard_is_missing(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 2)
    store.begin({})
    store.write(0, ["a", "b", "c"], FEATURES, {"d": "why"})
    store.path(0).unlink()  # which is written last
    (tmp_path / ".00000.npy.part").write_bytes(b"half")
    assert store.missing() == [0, 1]
    assert store.skipped(0) == {}
    store.write(0, ["a", "b", "c"], FEATURES, {})
    assert store.missing() == [1]
    assert not list(tmp_path.glob("*.skipped.json"))


def test_one_folder_has_features_of_one_origin(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "out", 1)
    index = {"weights": "a", "shape": (1, 2)}  # a tuple is a list in JSON
    store.begin(index)
    store.write(0, ["a", "b", "c"], FEATURES, {})
    store.begin(index)
    assert store.missing() == []
    with pytest.raises(ConfigError, match="has features of other weights; choose another folder"):
        store.begin(index | {"weights": "b"})
    store.begin(index | {"weights": "b"}, overwrite=True)
    assert store.missing() == [0]
    assert read_index(tmp_path / "out")["weights"] == "b"
    (tmp_path / "other.npy").write_bytes(b"")
    with pytest.raises(ConfigError, match="has other files"):
        FeatureStore(tmp_path, 1).begin(index)


def test_no_store(tmp_path: Path) -> None:
    assert read_index(tmp_path) == {}
    (tmp_path / "_index.json").write_text(json.dumps([1]))
    assert read_index(tmp_path) == {}
