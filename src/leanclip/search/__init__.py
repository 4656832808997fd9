"""Search pictures by words or by pictures: an index on disk.

index.py         build, open, search
update.py        what is new, changed or gone
sources.py       folders, shards, embeddings -> what is there now
items.py         pictures and their files, in SQLite
filters.py       which of them count
identity.py      which model an index is of
vectors.py       their features in a memory-mapped file, and the exact product
"""

from leanclip.search.index import Hit, Index
from leanclip.search.items import Item
from leanclip.search.update import Changes

__all__ = ["Changes", "Hit", "Index", "Item"]
