"""What an index holds, in SQLite: pictures, each once, and the files that show them.

    pictures   number, row of its vector, SHA-256 of the file's content
    items      a file, or a member of a shard: path, size, time, caption, label -> picture
    facts      what the index is of: model, sources, sizes

A picture's number is never used again; the row of one that is gone is. Paths are bytes, as the
file system has them.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leanclip.errors import ConfigError

FILE = "items.sqlite"
VERSION = 2
_SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY AUTOINCREMENT, row INTEGER NOT NULL UNIQUE, hash BLOB NOT NULL UNIQUE
);
CREATE TABLE items (
    id INTEGER PRIMARY KEY, number INTEGER NOT NULL REFERENCES pictures (number),
    path BLOB NOT NULL UNIQUE, below BLOB NOT NULL, shard BLOB, start INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime INTEGER NOT NULL, caption TEXT, caption_mtime INTEGER NOT NULL,
    label TEXT
);
CREATE INDEX items_by_number ON items (number);
CREATE INDEX items_by_label ON items (label);
PRAGMA user_version = {VERSION};
"""


class Entry(NamedTuple):
    """An image where a source has it."""

    path: str  # absolute; of a shard's member the shard's path and the member's name
    below: str  # the folder that it is in, below its source: "2019/june"
    size: int  # bytes
    mtime: int  # nanoseconds since 1970
    label: str | None = None
    caption: str | None = None  # None: not read yet
    caption_mtime: int = 0  # of the file beside it; 0: none
    shard: str | None = None  # the tar file that it is in
    start: int = 0  # where in it


@dataclass(frozen=True)
class Item:
    """A picture of an index."""

    number: int
    path: str
    caption: str | None
    label: str | None
    size: int  # bytes
    mtime: float  # seconds since 1970
    paths: tuple[str, ...]  # all files with this content, `path` among them
    shard: str | None  # the tar file that it is in
    start: int  # where in it


class Known(NamedTuple):
    """What is known of a path."""

    id: int
    number: int
    size: int
    mtime: int
    start: int
    caption_mtime: int
    label: str | None
    below: bytes


class Items:
    """The database of an index; any thread may use it.

    Raises:
        ConfigError: there is none, or it is of another version.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        self.path = folder / FILE
        if not create and not self.path.is_file():
            raise ConfigError(
                f"{folder}: no index; make one with: leanclip search build PHOTOS --out {folder}"
            )
        self._lock = threading.RLock()
        self._base = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        self._base.isolation_level = None  # transactions are begun here
        self._rows: tuple[object, np.ndarray] | None = None
        try:
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            if create and version == 0:
                with self.transaction():
                    for line in _SCHEMA.split(";"):
                        self._base.execute(line)
                version = VERSION
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{self.path}: is no index: {error}") from None
        if version != VERSION:
            raise ConfigError(
                f"{folder}: is an index of version {version}, this leanclip reads {VERSION}; "
                f"build it again in another folder"
            )

    def close(self) -> None:
        """Close the database."""
        self._base.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is changed inside is kept, or nothing."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def fact(self, name: str) -> Any:
        """Something that was noted; None: it was not."""
        row = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else json.loads(row[0])

    def note(self, name: str, value: object) -> None:
        """Note something, as JSON."""
        self._all("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, json.dumps(value))

    def count(self) -> int:
        """Pictures; those with the same content are one."""
        return self._one("SELECT count(*) FROM pictures")[0]

    def count_items(self) -> int:
        """Files and members of shards."""
        return self._one("SELECT count(*) FROM items")[0]

    def labels(self) -> dict[str, int]:
        """Labels, and how many files have each."""
        query = "SELECT label, count(*) FROM items WHERE label IS NOT NULL GROUP BY label"
        return dict(self._all(query))

    def numbers(self) -> np.ndarray:
        """The number of the picture in each row, (N,) int64; 0: the row is free. Do not change."""
        with self._lock:
            change = (self._one("PRAGMA data_version")[0], self._base.total_changes)
            if self._rows is None or self._rows[0] != change:
                pairs = self._base.execute("SELECT row, number FROM pictures")
                flat = np.fromiter((value for pair in pairs for value in pair), np.int64)
                rows = flat[::2]
                numbers = np.zeros(int(rows.max()) + 1 if len(rows) else 0, np.int64)
                numbers[rows] = flat[1::2]
                self._rows = (change, numbers)
            return self._rows[1]

    def rows_where(self, condition: str, values: Sequence[object], total: int) -> np.ndarray:
        """Which of `total` rows have an item that meets a condition: (N,) bool."""
        query = f"SELECT DISTINCT row FROM items JOIN pictures USING (number) WHERE {condition}"
        rows = np.fromiter((row for (row,) in self._all(query, *values)), int)
        found = np.zeros(total, dtype=bool)
        found[rows[rows < total]] = True
        return found

    def row_of(self, number: int) -> int | None:
        """Where a picture's vector is; None: there is no such picture."""
        found = self._one("SELECT row FROM pictures WHERE number = ?", number)
        return None if found is None else found[0]

    def item(self, number: int, condition: str = "1", values: Sequence[object] = ()) -> Item | None:
        """A picture by its number, as the first of its files that meet a condition."""
        fields = "path, caption, label, size, mtime, shard, start"
        found = self._all(
            f"SELECT {fields} FROM items WHERE number = ? AND {condition} ORDER BY path",
            number,
            *values,
        )
        if not found:
            return None
        path, caption, label, size, mtime, shard, start = found[0]
        paths = tuple(os.fsdecode(row[0]) for row in found)
        where = None if shard is None else os.fsdecode(shard)
        return Item(
            number, os.fsdecode(path), caption, label, size, mtime / 1e9, paths, where, start
        )

    def known(self, path: str) -> Known | None:
        """What is known of a path."""
        found = self._one(
            "SELECT id, number, size, mtime, start, caption_mtime, label, below "
            "FROM items WHERE path = ?",
            os.fsencode(path),
        )
        return None if found is None else Known(*found)

    def number_of(self, digest: bytes) -> int | None:
        """The picture with a content."""
        found = self._one("SELECT number FROM pictures WHERE hash = ?", digest)
        return None if found is None else found[0]

    def add_picture(self, row: int, digest: bytes) -> int:
        """A new picture, whose vector is in a row; its number."""
        with self._lock:
            query = "INSERT INTO pictures (row, hash) VALUES (?, ?)"
            return int(self._base.execute(query, (row, digest)).lastrowid or 0)

    def put(self, entry: Entry, number: int) -> int:
        """Note where a picture is; its item's id."""
        values = (
            number,
            os.fsencode(entry.path),
            os.fsencode(entry.below),
            None if entry.shard is None else os.fsencode(entry.shard),
            entry.start,
            entry.size,
            entry.mtime,
            entry.caption,
            entry.caption_mtime,
            entry.label,
        )
        names = "number, path, below, shard, start, size, mtime, caption, caption_mtime, label"
        marks = ", ".join("?" * len(values))
        changes = ", ".join(f"{name} = excluded.{name}" for name in names.split(", "))
        query = (
            f"INSERT INTO items ({names}) VALUES ({marks}) "
            f"ON CONFLICT (path) DO UPDATE SET {changes} RETURNING id"
        )
        return self._one(query, *values)[0]

    def drop_all_but(self, ids: Iterable[int]) -> int:
        """Forget the other items; how many they were."""
        with self.transaction():
            self._base.execute("CREATE TEMP TABLE kept (id INTEGER PRIMARY KEY)")
            self._base.executemany("INSERT OR IGNORE INTO kept VALUES (?)", ((i,) for i in ids))
            gone = self._base.execute("DELETE FROM items WHERE id NOT IN (SELECT id FROM kept)")
            self._base.execute("DROP TABLE kept")
            return gone.rowcount

    def drop_pictures_without_items(self) -> int:
        """Forget pictures that no file shows any more, which frees their rows; how many."""
        with self.transaction():
            query = "DELETE FROM pictures WHERE number NOT IN (SELECT number FROM items)"
            return self._base.execute(query).rowcount

    def _one(self, query: str, *values: object) -> Any:
        with self._lock:
            return self._base.execute(query, values).fetchone()

    def _all(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._base.execute(query, values).fetchall()
