"""Small images that one process reads: decoded once, kept for the next epochs.

index -> sample and where its image lies, or the image itself
"""

from dataclasses import replace

import numpy as np

from leanclip.data.dataset import Dataset, Sample
from leanclip.errors import SampleError
from leanclip.preprocess.decoding import Source, open_small

CACHE_BYTES = 256 << 20  # bytes of pixels
MAX_IMAGE_PIXELS = 1 << 16  # pixels of an image


class DecodedImageCache:
    """Reads samples by index, and keeps them until there is no room, or an image is not small."""

    def __init__(self, dataset: Dataset, *, max_pixels: int, room: int = CACHE_BYTES) -> None:
        self._dataset, self._max_pixels, self._room = dataset, max_pixels, room
        self._seen: dict[int, tuple[Sample, Source | np.ndarray]] = {}

    def __getitem__(self, index: int) -> tuple[Sample, Source | np.ndarray]:
        """A sample, and its image: not yet decoded, or as `open_small` gives it.

        Raises:
            SampleError: the sample cannot be read; of its image, whoever looks at it says so.
        """
        if index in self._seen:
            return self._seen[index]
        sample = self._dataset[index]
        if self._room <= 0 or sample.error:
            return sample, sample.image
        try:
            image = open_small(sample.image, MAX_IMAGE_PIXELS, max_pixels=self._max_pixels)
        except SampleError:
            return sample, sample.image
        if image is None:  # nor will most of the others be small
            self._room = 0
            return sample, sample.image
        self._room -= image.nbytes
        self._seen[index] = replace(sample, image=b""), image
        return sample, image
