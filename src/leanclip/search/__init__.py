"""Search images by texts or by images: an index on disk.

index.py         build, open, search
update.py        add new files, drop those that are gone
sources.py       folders, shards and embeddings, and what they contain
items.py         the files of an index, in SQLite
filters.py       which of them to search
vectors.py       their features in a memory-mapped file, and exact top-k search
"""

from leanclip.search.index import Hit, Index
from leanclip.search.items import Item
from leanclip.search.update import Changes

__all__ = ["Changes", "Hit", "Index", "Item"]
