"""Data sets: one file per layout, the samples they give, and the loader that batches them."""

from leanclip.config import DataConfig
from leanclip.data import folder, food101, pairs, shapes, shards
from leanclip.data.mixture import Mixture
from leanclip.data.samples import Dataset, Sample

LAYOUTS = {
    "shapes": shapes.open_dataset,
    "food101": food101.open_dataset,
    "folder": folder.open_dataset,
    "pairs": pairs.open_dataset,
    "shards": shards.open_dataset,
}


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a `data` section describes.

    Raises:
        DataError: it is missing, empty or not of its layout.
    """
    if config.layout == "mixture":
        opened = [
            open_dataset(
                config.model_copy(update=dict(source) | {"sources": (), "epoch_size": None})
            )
            for source in config.sources
        ]
        weights = [source.weight for source in config.sources if source.weight is not None]
        return Mixture(opened, weights, config.epoch_size)
    dataset = LAYOUTS[config.layout](config)
    return Mixture([dataset], epoch_size=config.epoch_size) if config.epoch_size else dataset


__all__ = ["LAYOUTS", "Dataset", "Sample", "open_dataset"]
