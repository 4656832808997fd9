"""Data sets: one file per layout, the samples they give, and the loader that batches them."""

from leanclip.config import DataConfig
from leanclip.data import folder, food101, pairs, shapes
from leanclip.data.samples import Dataset, Sample

LAYOUTS = {
    "shapes": shapes.open_dataset,
    "food101": food101.open_dataset,
    "folder": folder.open_dataset,
    "pairs": pairs.open_dataset,
}


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a `data` section describes.

    Raises:
        DataError: it is missing, empty or not of its layout.
    """
    return LAYOUTS[config.layout](config)


__all__ = ["LAYOUTS", "Dataset", "Sample", "open_dataset"]
