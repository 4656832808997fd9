"""Reads the samples of a batch: decode, crop, tokenise. Runs in the data workers.

Shapes: B batch, L tokens, R resolution, P patches.
"""

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from leanclip.config.data import DataConfig
from leanclip.data.batch import Batch, trim
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.skipped import Bad
from leanclip.errors import DataError, SampleError, is_shortage, one_line
from leanclip.preprocess.crops import training_pixels
from leanclip.preprocess.images import Preprocess, evaluation_pixels
from leanclip.preprocess.patches import Patches, write_patches
from leanclip.preprocess.text import Tokenizer


class Visit(NamedTuple):
    """One use of a sample."""

    epoch: int
    position: int  # in the epoch
    sample: int | Sample  # an index, or of a stream the sample itself
    patches: int | None = None  # of each image of the batch, for naflex; None: the most


class BatchReader:
    """Reads the samples of a batch, in this process (`read`) or in data workers (`[slot, visits]`).

    Images of workers' batches cross through memory that all processes share: `share` allocates it
    before the workers start. It is anonymous: neither the size of /dev/shm nor the limit on open
    files matters, and the kernel frees it whichever process is killed.

    The arguments are those of `training_batches`; without a seed, every sample has the evaluation
    transform and its first caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        truncate: bool,
        seed: int | None,
        known_bad: Mapping[int, Bad] | None,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.truncate, self.known_bad = truncate, known_bad
        self.patch_size = preprocess.patch_size if known_bad is None else None

    def shape(self, count: int, patches: int | None) -> tuple[int, ...]:
        """That of a batch's images: (B, 3, R, R), or (B, P, 3p²); of none if they are left out."""
        if self.known_bad is not None:
            return count, 3, 0, 0
        return count, *self.preprocess.shape_of_image(patches)

    def share(self, workers: int, slots: int, size: int) -> None:
        """Allocate memory for the images of `slots` batches, and the samples being read.

        Args:
            workers: processes that read.
            slots: batches, each of at most `size` bytes.
            size: see `shape`.

        Raises:
            OSError: there is not enough memory.
        """
        self.images = _shared((slots, size), np.uint8)
        self.reading = _shared((workers, 2), np.int64)  # process id and index, by worker

    def __getitem__(self, task: tuple[int, Sequence[Visit]]) -> Batch | DataError:
        """In a worker: a batch, its images in this slot of the shared memory; or an error."""
        slot, visits = task
        worker = get_worker_info()
        assert worker is not None
        reading = self.reading[worker.id]
        reading[0] = os.getpid()
        try:
            batch = self._read(visits, self._slot(slot, self._shape_of(visits)), reading)
        except DataError as error:
            return error  # raised here, PyTorch would add a traceback to its message
        return replace(batch, images=_with_values(batch.images, _values(batch.images)[:0]))

    def take(self, slot: int, batch: Batch) -> Batch:
        """A worker's batch with a copy of its images, so that the slot is free."""
        shape = (len(batch), *_values(batch.images).shape[1:])
        images = _with_values(batch.images, torch.from_numpy(self._slot(slot, shape)))
        if torch.cuda.is_available():
            return replace(batch, images=images).pin_memory()
        return replace(batch, images=_with_values(images, _values(images).clone()))

    def _slot(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """The beginning of a slot as an array."""
        return np.ndarray(shape, np.uint8, buffer=self.images[slot].data)

    def _shape_of(self, visits: Sequence[Visit]) -> tuple[int, ...]:
        return self.shape(len(visits), visits[0].patches if visits else None)

    def read(self, visits: Sequence[Visit]) -> Batch:
        """The batch, read in this process."""
        images = np.empty(self._shape_of(visits), np.uint8)
        return self._read(visits, images, np.zeros(2, np.int64))

    def name(self, index: int) -> str:
        """The name of a sample that was noted as being read."""
        return self.dataset.name(index) if index >= 0 else "a sample of a stream"

    def _read(self, visits: Sequence[Visit], images: np.ndarray, reading: np.ndarray) -> Batch:
        """Fill `images`, of that `shape`, and note in `reading` each sample's index.

        Raises:
            DataError: there is not enough memory, or too few files may be open.
        """
        samples: list[Sample] = []
        indices, captions, digests, bad, shapes = [], [], [], [], []
        try:
            for visit in visits:
                what, sample = visit.sample, None
                index = reading[1] = -1 if isinstance(what, Sample) else what
                try:
                    sample = what if isinstance(what, Sample) else self.dataset[what]
                    caption, shape = self._read_sample(sample, visit, images[len(samples)])
                    if self.seed is None and self.known_bad is None:
                        digests.append(_digest(sample))
                except SampleError as error:
                    bad.append(Bad.of(sample.id if sample else self.dataset.name(index), error))
                    continue
                samples.append(sample)
                indices.append(index)
                captions.append(caption)
                shapes.append(shape)
            tokens = self.tokenizer(captions, truncate=True)
        except (MemoryError, OSError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            raise shortage_error(self.name(int(reading[1])), error) from None
        pixels = torch.from_numpy(images[: len(samples)])
        if self.patch_size is not None:
            pixels = Patches(pixels, torch.tensor(shapes, dtype=torch.int64).view(-1, 2))
        return Batch(
            pixels,
            trim(tokens, self.tokenizer),
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor([-1 if s.label is None else s.label for s in samples]).long(),
            torch.tensor([sample.source for sample in samples]).long(),
            torch.tensor([_group(s, row) for s, row in zip(samples, tokens, strict=True)]).long(),
            [sample.captions for sample in samples] if self.seed is None else [],
            torch.tensor(digests, dtype=torch.int64),
            bad,
        )

    def _read_sample(
        self, sample: Sample, visit: Visit, into: np.ndarray
    ) -> tuple[str, tuple[int, int]]:
        """The caption of a visit, and its image's rows and columns of patches, if it has some.

        The image is written to `into`, (3, R, R) or (P, 3p²).
        """
        if sample.error:
            raise sample.error
        rng, caption, shape = None, sample.captions[0], (0, 0)
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, visit.epoch, visit.position])
            caption = sample.captions[int(rng.integers(len(sample.captions)))]
        if self.known_bad is None:
            pixels = self._pixels(sample, visit.patches, rng)
            if self.patch_size is None:
                into[:] = pixels
            else:
                shape = write_patches(pixels, self.patch_size, into)
        elif isinstance(visit.sample, int) and (bad := self.known_bad.get(visit.sample)):
            raise SampleError(bad.kind, bad.reason)
        self._check_caption(sample, caption)
        return caption, shape

    def _pixels(
        self, sample: Sample, patches: int | None, rng: np.random.Generator | None
    ) -> np.ndarray:
        """(3, R, R), or (3, ph, pw) of at most `patches`; without `rng`, as in evaluation."""
        config, preprocess = self.config, self.preprocess
        if patches is not None:
            preprocess = replace(preprocess, max_patches=patches)
        if rng is None or not config.augment:
            return evaluation_pixels(sample.image, preprocess, max_pixels=config.max_pixels)
        return training_pixels(
            sample.image,
            preprocess,
            rng,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            scaled_decoding=config.scaled_decoding,
            max_pixels=config.max_pixels,
        )

    def _check_caption(self, sample: Sample, caption: str) -> None:
        if not caption.strip():
            raise SampleError("empty caption", f"{sample.id}: an empty caption")
        most = self.tokenizer.context_length
        if not self.truncate and (length := len(self.tokenizer.encode(caption))) > most:
            raise SampleError(
                "long caption",
                f"{sample.id}: a caption of {length} tokens exceeds the context length of {most}",
            )


def lacks_memory(error: Exception) -> bool:
    """Whether memory or open files ran out, also by the messages of PyTorch's errors."""
    return is_shortage(error) or "allocate memory" in str(error)


def shortage_error(name: str, error: Exception) -> DataError:
    """The error for a sample that could not be read although it may be valid."""
    return DataError(
        f"{name}: cannot be read: there is not enough memory or shared memory, or too few files "
        f"may be open: {one_line(error)}; raise the limit (ulimit -n; df -h /dev/shm, of a "
        f"container --shm-size), or set data.workers or train.batch_size lower"
    )


def _values(images: torch.Tensor | Patches) -> torch.Tensor:
    return images.values if isinstance(images, Patches) else images


def _with_values(images: torch.Tensor | Patches, values: torch.Tensor) -> torch.Tensor | Patches:
    """The same images, their values elsewhere."""
    return replace(images, values=values) if isinstance(images, Patches) else values


def _shared(shape: tuple[int, ...], dtype: type[np.number]) -> np.ndarray:
    """Zeros that processes forked from here share; memory is used as far as it is written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=mmap.mmap(-1, max(1, size)))


def _group(sample: Sample, tokens: torch.Tensor) -> int:
    """A number shared by samples of one class, or with the same caption."""
    if sample.label is not None:
        return sample.source << 32 | sample.label
    return int.from_bytes(blake2b(tokens.numpy().tobytes(), digest_size=7).digest())


def _digest(sample: Sample) -> int:
    """Digest of an image file and of its label or captions."""
    image = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
    found = blake2b(image, digest_size=8)
    text = sample.captions if sample.label is None else sample.label
    found.update(json.dumps(text).encode())
    return int.from_bytes(found.digest(), signed=True)
