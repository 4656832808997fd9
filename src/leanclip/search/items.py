"""The files of an index in SQLite: where each image is, and which row its vector has.

    items      an image file or a member of a shard: path, size, time, caption, label -> number
    metadata   the model and the sources of the index, as JSON

Files with the same content share a number, which is the row of their vector. Numbers are never
used again. Paths are bytes, as in the file system.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from leanclip.errors import ConfigError
from leanclip.search.filters import Filters, condition

FILE = "items.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS metadata (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY, number INTEGER NOT NULL, hash BLOB NOT NULL,
    path BLOB NOT NULL UNIQUE, shard BLOB, start INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime INTEGER NOT NULL, caption TEXT, caption_mtime INTEGER NOT NULL, label TEXT
);
CREATE INDEX IF NOT EXISTS items_by_number ON items (number);
CREATE INDEX IF NOT EXISTS items_by_hash ON items (hash);
CREATE INDEX IF NOT EXISTS items_by_label ON items (label);
"""


class Entry(NamedTuple):
    """An image as a source lists it."""

    path: str  # absolute; for a member of a shard, the path of the shard and the member's name
    size: int  # bytes
    mtime: int  # nanoseconds since 1970; 0: the file is gone
    label: str | None = None
    caption: str | None = None  # None: not read yet, or there is none
    caption_mtime: int = 0  # of the text file beside the image; 0: there is none
    shard: str | None = None  # the tar file that contains the image
    start: int = 0  # its offset there


@dataclass(frozen=True)
class Item:
    """An image of an index."""

    number: int
    path: str
    caption: str | None
    label: str | None
    size: int  # bytes
    mtime: float  # seconds since 1970
    paths: tuple[str, ...]  # all files with the same content, including `path`
    shard: str | None  # the tar file that contains it
    start: int  # its offset there


class Indexed(NamedTuple):
    """An indexed file."""

    id: int
    number: int
    hash: bytes
    size: int
    mtime: int
    start: int
    caption_mtime: int
    label: str | None


class Items:
    """The database of an index; threads may share it.

    Raises:
        ConfigError: there is no index in the folder, and `create` is false.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        path = folder / FILE
        no_index = ConfigError(
            f"{folder}: no index; make one with: leanclip search build PHOTOS --out {folder}"
        )
        if not create and not path.is_file():
            raise no_index
        self._lock = threading.RLock()
        self._base = sqlite3.connect(path, timeout=60, check_same_thread=False)
        self._mask: tuple[object, np.ndarray] = (None, np.empty(0, bool))
        try:
            if create:
                self._base.executescript(_SCHEMA)
            elif self.metadata("model") is None:
                raise no_index
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path}: not an index: {error}") from None

    def close(self) -> None:
        """Close the database."""
        self._base.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit the changes made in the block if it succeeds, else none of them."""
        with self._lock, self._base:
            yield

    def metadata(self, name: str) -> Any:
        """A value of the metadata; None if it is not set."""
        row = self._one("SELECT value FROM metadata WHERE name = ?", name)
        return None if row is None else json.loads(row[0])

    def set_metadata(self, name: str, value: object) -> None:
        """Set a value of the metadata, which must be serialisable as JSON."""
        with self.transaction():
            self._all("INSERT OR REPLACE INTO metadata VALUES (?, ?)", name, json.dumps(value))

    def count(self) -> int:
        """The number of images; those with the same content count once."""
        return self._one("SELECT count(DISTINCT number) FROM items")[0]

    def count_files(self) -> int:
        """The number of files and members of shards."""
        return self._one("SELECT count(*) FROM items")[0]

    def labels(self) -> dict[str, int]:
        """Labels, and the number of files with each."""
        query = "SELECT label, count(*) FROM items WHERE label IS NOT NULL GROUP BY label"
        return dict(self._all(query))

    def mask(self, **filters: Unpack[Filters]) -> np.ndarray:
        """Which numbers have a file that passes the filters, (N,) bool; not to be changed."""
        where, values = condition(**filters)
        with self._lock:
            version = self._one("PRAGMA data_version")[0], self._base.total_changes
            if not values and self._mask[0] == version:
                return self._mask[1]
            found = self._all(f"SELECT DISTINCT number FROM items WHERE {where}", *values)
            numbers = np.fromiter((number for (number,) in found), np.int64, len(found))
            mask = np.zeros(numbers.max(initial=-1) + 1, dtype=bool)
            mask[numbers] = True
            if not values:
                self._mask = version, mask
            return mask

    def item(self, number: int, **filters: Unpack[Filters]) -> Item | None:
        """The image with a number, as the first of its files that pass the filters."""
        where, values = condition(**filters)
        found = self._all(
            f"SELECT path, caption, label, size, mtime, shard, start FROM items "
            f"WHERE number = ? AND {where} ORDER BY path",
            *(number, *values),
        )
        if not found:
            return None
        _, caption, label, size, mtime, shard, start = found[0]
        paths = tuple(os.fsdecode(row[0]) for row in found)
        shard = None if shard is None else os.fsdecode(shard)
        return Item(number, paths[0], caption, label, size, mtime / 1e9, paths, shard, start)

    def ids(self) -> set[int]:
        """The ids of all indexed files."""
        return {row[0] for row in self._all("SELECT id FROM items")}

    def find(self, path: str) -> Indexed | None:
        """What is indexed for a path."""
        found = self._one(
            f"SELECT {', '.join(Indexed._fields)} FROM items WHERE path = ?", os.fsencode(path)
        )
        return None if found is None else Indexed(*found)

    def number_of(self, digest: bytes) -> int | None:
        """The number of the image with a content hash."""
        found = self._one("SELECT number FROM items WHERE hash = ? LIMIT 1", digest)
        return None if found is None else found[0]

    def put(self, entry: Entry, number: int, digest: bytes) -> int:
        """Add a file, or replace what is indexed for its path; returns its id."""
        values = entry._asdict() | {"number": number, "hash": digest}
        values["path"] = os.fsencode(entry.path)
        values["shard"] = None if entry.shard is None else os.fsencode(entry.shard)
        query = (
            f"INSERT INTO items ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) "
            f"ON CONFLICT (path) DO UPDATE SET {', '.join(f'{n} = excluded.{n}' for n in values)} "
            f"RETURNING id"
        )
        return self._one(query, *values.values())[0]

    def drop(self, ids: Collection[int]) -> None:
        """Remove files."""
        with self.transaction():
            self._base.executemany("DELETE FROM items WHERE id = ?", ((one,) for one in ids))

    def _one(self, query: str, *values: object) -> Any:
        with self._lock:
            return self._base.execute(query, values).fetchone()

    def _all(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._base.execute(query, values).fetchall()
