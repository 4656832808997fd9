"""Reads the samples of a batch: decode, crop, tokenise; runs in the data workers.

Shapes: B batch, L tokens, R resolution.
"""

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from leanclip.config.data import DataConfig
from leanclip.data.batch import Batch, trim
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.decoded_image_cache import CACHE_BYTES, DecodedImageCache
from leanclip.data.skipped import Bad
from leanclip.errors import DataError, SampleError, is_shortage, one_line
from leanclip.preprocess.decoding import Source
from leanclip.preprocess.images import Preprocess, evaluation_pixels, training_pixels
from leanclip.preprocess.tokenizer import encode, tokenize


class Visit(NamedTuple):
    """One look at a sample."""

    epoch: int
    place: int  # in the epoch
    what: int | Sample


class Packed:
    """A batch on its way from a worker, its images in shared memory.

    PyTorch would pack it in a thread, whose errors are printed and the batch lost.
    """

    def __init__(self, batch: Batch) -> None:
        self.content = bytes(ForkingPickler.dumps(batch))

    def unpack(self) -> Batch:
        """In the process that asked for it."""
        return pickle.loads(self.content)

    def pin_memory(self) -> Batch:
        """Called by PyTorch, in a thread of the process that asked for it."""
        return self.unpack().pin_memory()


class BatchReader:
    """Reads the samples of a batch; runs in the workers. `seed` None: the evaluation transform."""

    reading: torch.Tensor  # (workers, 2) int64, shared: a process's id, the index it is reading

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        preprocess: Preprocess,
        context_length: int,
        truncate: bool,
        seed: int | None,
        undecoded: Mapping[int, Bad] | None,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.preprocess, self.context_length = preprocess, context_length
        self.truncate, self.undecoded = truncate, undecoded
        # Each worker would see, and keep, a part of an epoch that is drawn anew.
        is_cut = seed is not None and config.augment and undecoded is None
        has_again = is_cut and config.workers == 0
        self.kept = DecodedImageCache(
            dataset, max_pixels=config.max_pixels, room=CACHE_BYTES if has_again else 0
        )

    def __getitem__(self, visits: Sequence[Visit]) -> Batch | Packed | DataError:
        """The batch; an error in place of one that there is no memory or file for."""
        batch = None
        try:
            batch = self._read(visits)
            return Packed(batch) if get_worker_info() else batch
        except (MemoryError, OSError, RuntimeError) as error:
            if batch is None and not lacks_memory(error):
                raise
            info = get_worker_info()
            index = int(self.reading[info.id if info else 0, 1])
            return shortage_error(self.name(index), error)

    def name(self, index: int) -> str:
        """Of a sample that was noted as being read."""
        return self.dataset.name(index) if index >= 0 else "a sample of a stream"

    def _read(self, visits: Sequence[Visit]) -> Batch:
        info = get_worker_info()
        me = self.reading[info.id if info else 0]
        me[0] = os.getpid()
        side = 0 if self.undecoded is not None else self.preprocess.resolution
        images = torch.empty(len(visits), 3, side, side, dtype=torch.uint8)
        samples: list[Sample] = []
        indices, captions, digests, bad = [], [], [], []
        for visit in visits:
            what = visit.what
            index = me[1] = -1 if isinstance(what, Sample) else what
            sample = None
            try:
                if isinstance(what, Sample):
                    sample, image = what, what.image
                else:
                    sample, image = self.kept[what]
                caption, pixels = self._look(sample, image, visit)
                if self.seed is None and self.undecoded is None:
                    digests.append(_digest(sample))
            except SampleError as error:
                name = sample.id if sample else self.dataset.name(index)
                bad.append(Bad.of(name, error))
                continue
            if pixels is not None:
                images[len(samples)] = torch.from_numpy(pixels)
            samples.append(sample)
            indices.append(index)
            captions.append(caption)
        tokens = tokenize(captions, self.context_length, truncate=True)
        return Batch(
            images[: len(samples)],
            trim(tokens),
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor([-1 if s.label is None else s.label for s in samples]).long(),
            torch.tensor([sample.source for sample in samples]).long(),
            torch.tensor([_group(s, row) for s, row in zip(samples, tokens, strict=True)]).long(),
            [sample.captions for sample in samples] if self.seed is None else [],
            torch.tensor(digests, dtype=torch.int64),
            bad,
        )

    def _look(
        self, sample: Sample, image: Source | np.ndarray, visit: Visit
    ) -> tuple[str, np.ndarray | None]:
        """A caption and the pixels (3, R, R) of a visit."""
        if sample.error:
            raise sample.error
        if self.seed is None:
            pixels = self._pixels(image, visit, None)
            return self._checked(sample, sample.captions[0]), pixels
        rng = np.random.default_rng([self.seed, visit.epoch, visit.place])
        caption = sample.captions[int(rng.integers(len(sample.captions)))]
        pixels = self._pixels(image, visit, rng)
        return self._checked(sample, caption), pixels

    def _pixels(
        self, image: Source | np.ndarray, visit: Visit, rng: np.random.Generator | None
    ) -> np.ndarray | None:
        """(3, R, R) of a visit; without `rng` as evaluation sees the image."""
        config = self.config
        if self.undecoded is not None:
            if isinstance(visit.what, int) and (bad := self.undecoded.get(visit.what)):
                raise SampleError(bad.kind, bad.reason)
            return None
        if rng is None or not config.augment:
            assert not isinstance(image, np.ndarray)  # kept, so that parts are cut from it
            return evaluation_pixels(image, self.preprocess, max_pixels=config.max_pixels)
        return training_pixels(
            image,
            self.preprocess.resolution,
            rng,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            scaled_decoding=config.scaled_decoding,
            max_pixels=config.max_pixels,
        )

    def _checked(self, sample: Sample, caption: str) -> str:
        if not caption.strip():
            raise SampleError("empty caption", f"{sample.id}: an empty caption")
        if not self.truncate and (length := len(encode(caption)) + 2) > self.context_length:
            raise SampleError(
                "long caption",
                f"{sample.id}: a caption of {length} tokens is over the context of "
                f"{self.context_length}",
            )
        return caption


def lacks_memory(error: Exception) -> bool:
    """As `is_shortage`, and by the words of PyTorch's and multiprocessing's errors."""
    words = ("allocate memory", "Too many open files", "shared memory", "items of ancdata")
    return is_shortage(error) or any(word in str(error) for word in words)


def shortage_error(name: str, error: Exception) -> DataError:
    """An error for a sample that could not be read, though there may be nothing wrong with it."""
    return DataError(
        f"{name}: cannot be read, for there is not enough memory, not enough shared memory or too "
        f"few files may be open: {one_line(error)}; raise what is too low (df -h /dev/shm, of a "
        f"container --shm-size; ulimit -n), or set data.workers or train.batch_size lower"
    )


def _group(sample: Sample, tokens: torch.Tensor) -> int:
    """A number that samples share which are of one class, or have the same caption."""
    if sample.label is not None:
        return sample.source << 32 | sample.label
    return int.from_bytes(blake2b(tokens.numpy().tobytes(), digest_size=7).digest())


def _digest(sample: Sample) -> int:
    """Of an image file's bytes, and of the label or else the captions."""
    image = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
    found = blake2b(image, digest_size=8)
    words = sample.captions if sample.label is None else sample.label
    found.update(json.dumps(words).encode())
    return int.from_bytes(found.digest(), signed=True)
