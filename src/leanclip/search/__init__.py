"""Search pictures by words or by pictures: an index on disk, exact or approximate.

index.py     build, update, search
sources.py   folders, shards, embeddings -> what is there now
items.py     pictures and their files, in SQLite
filters.py   which of them count
vectors.py   their features in memory-mapped shards, and the exact product
"""

from leanclip.search.index import Changes, Hit, Index
from leanclip.search.items import Item

__all__ = ["Changes", "Hit", "Index", "Item"]
