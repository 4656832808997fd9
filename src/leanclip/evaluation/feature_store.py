r"""Features of many items on disk: numbered shards in a folder, each of which appears whole.

    FOLDER/_index.json          what the features follow from, as `begin` was given it
    FOLDER/00000.npy            features (n, E)        } or 00000.parquet with both: columns `id`
    FOLDER/00000.ids.json       a list of n ids        } and `embedding`; the bytes of an id that
                                                         are not UTF-8 as in "caf\xe9.png"
    FOLDER/_00000.skipped.json  items without features, where there are any: id -> reason

The caller decides which items belong to which shard, and computes missing shards in any order and
in any number of processes. A shard whose last file exists is finished.

Shapes: n rows of a shard, E embedding.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from leanclip.errors import ConfigError
from leanclip.io.files import atomic_write, read_json_object, write_array, write_text

INDEX = "_index.json"
Format = Literal["npy", "parquet"]
_ESCAPED = b"leanclip_escaped"  # metadata of a Parquet file: rows whose ids are escaped


class FeatureStore:
    """The shards of a folder.

    Args:
        folder: a new one, or one that was begun before.
        shards: how many shards there are once all are finished.
        format: of the shards.
    """

    def __init__(self, folder: Path, shards: int, format: Format = "npy") -> None:
        self.folder, self.shards, self.format = folder, shards, format

    def begin(self, index: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Create the folder for features that follow from `index`, or continue with it.

        Args:
            index: plain values, such as the digest of the weights; recorded in `_index.json`.
            overwrite: remove shards that do not belong to `index`.

        Raises:
            ConfigError: without `overwrite`, the folder has shards of another or no index.
        """
        text = json.dumps(index, indent=1) + "\n"
        found, wanted = read_index(self.folder), json.loads(text)
        if found == wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = [*self.folder.glob("*.npy"), *self.folder.glob("*.parquet")]
        if overwrite:
            for path in shards:
                path.unlink()
        elif found:
            names = [name for name in wanted if found.get(name) != wanted[name]]
            raise ConfigError(
                f"{self.folder}: has features of other {', '.join(names)}; choose another folder, "
                f"or remove it"
            )
        elif shards:
            raise ConfigError(f"{self.folder}: has other files; choose another folder")
        with atomic_write(self.folder / INDEX, is_concurrent=True) as part:
            part.write_text(text)

    def missing(self) -> list[int]:
        """The numbers of the shards that are not finished."""
        return [shard for shard in range(self.shards) if not self.path(shard).exists()]

    def path(self, shard: int) -> Path:
        """The file of a shard that is written last."""
        return self.folder / f"{shard:05d}.{self.format}"

    def write(
        self,
        shard: int,
        ids: Sequence[str] | Sequence[int],
        features: np.ndarray,
        skipped: Mapping[str, Any],
    ) -> None:
        """Write a shard.

        Args:
            shard: its number; other processes write others.
            ids: n of them, strings in Parquet; strings may have surrogate escapes.
            features: (n, E) float32 or float16.
            skipped: the items of the shard that have no features, with the reason.
        """
        path = self._skipped_path(shard)
        path.unlink(missing_ok=True)  # of an earlier attempt
        if skipped:
            write_text(path, json.dumps(skipped, indent=1) + "\n")
        if self.format == "npy":
            write_text(self._ids_path(shard), json.dumps(ids))
        with atomic_write(self.path(shard)) as part:
            if self.format == "npy":
                write_array(part, features)
            else:
                _write_parquet(part, list(map(str, ids)), features)

    def read(self, shard: int) -> tuple[list[Any], np.ndarray]:
        """The ids and features (n, E) of a finished shard; those of npy are memory-mapped."""
        if self.format == "parquet":
            return _read_parquet(self.path(shard))
        ids = json.loads(self._ids_path(shard).read_text())
        return ids, np.load(self.path(shard), mmap_mode="r")

    def skipped(self, shard: int) -> dict[str, Any]:
        """The items of a finished shard that have no features, with the reason."""
        return read_json_object(self._skipped_path(shard)) if self.path(shard).exists() else {}

    def _ids_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.ids.json"

    def _skipped_path(self, shard: int) -> Path:
        # Readers of a folder of Parquet files ignore names with an underscore.
        return self.folder / f"_{shard:05d}.skipped.json"


def read_index(folder: Path) -> dict[str, Any]:
    """What the features of a folder follow from; empty where it is no feature store."""
    return read_json_object(folder / INDEX)


def _write_parquet(path: Path, ids: list[str], features: np.ndarray) -> None:
    import pyarrow as pa  # takes 0.1 s
    import pyarrow.parquet as pq

    values = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    texts = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in ids]
    table = pa.table({"id": pa.array(texts, pa.string()), "embedding": values})
    if escaped := [row for row, text in enumerate(texts) if text != ids[row]]:
        table = table.replace_schema_metadata({_ESCAPED: json.dumps(escaped)})
    pq.write_table(table, path)


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    column = table["embedding"].combine_chunks()
    ids = table["id"].to_pylist()
    for row in json.loads((table.schema.metadata or {}).get(_ESCAPED, b"[]")):
        content = re.sub(
            rb"\\x([89a-f][0-9a-f])", lambda m: bytes.fromhex(m[1].decode()), ids[row].encode()
        )
        ids[row] = os.fsdecode(content)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return ids, flat.reshape(-1, column.type.list_size)
