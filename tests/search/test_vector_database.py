"""What docs/search.md shows: Parquet of `leanclip embed` in a vector database, the same queries."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Command, noise_image
from test_inference import save_tiny

import leanclip
from leanclip.search import Index


def test_lancedb_finds_what_the_index_finds(workplace: Path, command: Command) -> None:
    lancedb = pytest.importorskip(
        "lancedb", reason="the vector database of docs/search.md: pip install lancedb"
    )
    import pyarrow.parquet as pq

    save_tiny(workplace / "tiny")
    (workplace / "photos").mkdir()
    for number in range(30):
        noise_image(number).save(workplace / f"photos/{number:02d}.png")
    words = ("--format", "parquet", "--shard-size", "8")
    done = command("embed", "photos", "--model", "tiny", "--out", "embeddings", *words)
    assert done.returncode == 0, done.stderr
    files = sorted(Path("embeddings").glob("*.parquet"))
    batches = (batch for file in files for batch in pq.ParquetFile(file).iter_batches())
    schema = pq.read_schema(files[0])
    assert schema.field("embedding").type.list_size == 16
    table = lancedb.connect("database").create_table("pictures", batches, schema=schema)
    assert table.count_rows() == 30
    clip = leanclip.load("tiny")
    index = Index.build("embeddings", clip, "index", root="photos")
    for query in (*clip.embed_texts(["a cat", "a dog"]), clip.embed_images(noise_image(3))[0]):
        search = table.search(query, vector_column_name="embedding").distance_type("dot")
        rows = search.limit(5).to_list()
        hits = index.search(query, k=5)
        assert [row["id"] for row in rows] == [Path(hit.path).name for hit in hits]
        scores = [1 - row["_distance"] for row in rows]
        np.testing.assert_allclose(scores, [hit.score for hit in hits], atol=1e-3)
    index.close()
