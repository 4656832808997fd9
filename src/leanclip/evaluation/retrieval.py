"""Retrieval between images and captions: recall@k and median rank, both ways.

    features -> blocks of images x all captions, of captions x all images -> ranks -> metrics

An image's rank is that of the best of its own captions among all captions; a caption's, that of
its image among all images. Ties: of equal scores the first ranks first, as in a stable sort.
`encode_dataset` orders images by digest, which is random and depends on their content alone; so a
model that gives everything the same score is at chance, and the order of rows does not matter.

Scores are computed a block at a time: the memory does not grow with N * M.

Shapes: N images, M captions, E embedding, B block, R resamples, K top results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from leanclip.evaluation.classification import rank_of
from leanclip.evaluation.statistics import Interval, bootstrap, mean_by_group, median_by_group

WAYS = ("image_to_text", "text_to_image")
AT = (1, 5, 10)
TOP_K = 5
_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 25}  # scores at a time; on a CPU they fit its caches

Match = Callable[[torch.Tensor, int], torch.Tensor]  # scores (B, ...), first row -> (B,) indices


@dataclass(frozen=True)
class RetrievalResult:
    """The ranks and top results of images and captions; an image's captions are adjacent."""

    indices: torch.Tensor  # (N,) int64, in the data set; the first of several rows
    features: torch.Tensor  # (N, E), of unit length
    captions: Sequence[str]  # M
    owners: torch.Tensor  # (M,) int64: the row of a caption's image, 0 to N - 1
    text_features: torch.Tensor  # (M, E)
    image_ranks: torch.Tensor  # (N,) int64, from 1
    caption_ranks: torch.Tensor  # (M,) int64, from 1
    top_captions: torch.Tensor  # (N, K) int64, the highest first
    top_images: torch.Tensor  # (M, K) int64

    def metrics(self) -> dict[str, float]:
        """Recall at 1, 5 and 10, and the median rank, both ways."""
        return retrieval_metrics_of(self.image_ranks, self.caption_ranks)

    def first_caption(self, row: int) -> int:
        """The index of the first caption of an image, given by its row."""
        return int((self.owners == row).nonzero()[0, 0])

    def intervals(self) -> dict[str, Interval]:
        """Of all metrics, over images: captions of one image are not independent samples."""
        images = np.arange(len(self.indices))
        found = _intervals(WAYS[0], self.image_ranks.numpy(), images)
        return found | _intervals(WAYS[1], self.caption_ranks.numpy(), self.owners.numpy())


def recall_at_k(scores: torch.Tensor, owners: torch.Tensor, k: int) -> tuple[float, float]:
    """Image-to-text and text-to-image recall@k of scores (N, M).

    `owners[j]` is the image of caption j. An image counts if any of its own captions is among its
    k highest; a caption, if its image is.
    """
    image_ranks, caption_ranks = retrieval_ranks(scores, owners)
    return _recall(image_ranks, k), _recall(caption_ranks, k)


def retrieval_metrics(scores: torch.Tensor, owners: torch.Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10, and the median rank, both ways, of scores (N, M)."""
    return retrieval_metrics_of(*retrieval_ranks(scores, owners))


def retrieval_ranks(
    scores: torch.Tensor, owners: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks, from 1, of images (N,) and of captions (M,), by scores (N, M)."""
    image_ranks = rank_of(scores, _first_own(scores, owners, 0))
    return image_ranks, rank_of(scores.T, owners)


def retrieval_metrics_of(
    image_ranks: torch.Tensor, caption_ranks: torch.Tensor
) -> dict[str, float]:
    """The metrics by their usual names."""
    both = dict(zip(WAYS, (image_ranks, caption_ranks), strict=True))
    recalls = {f"{way}_R@{k}": _recall(ranks, k) for k in AT for way, ranks in both.items()}
    medians = {f"{way}_median_rank": float(np.median(r.numpy())) for way, r in both.items()}
    return recalls | medians


def retrieve(
    features: torch.Tensor,
    text_features: torch.Tensor,
    owners: torch.Tensor,
    *,
    captions: Sequence[str],
    indices: torch.Tensor,
    device: torch.device | str = "cpu",
    block: int | None = None,
) -> RetrievalResult:
    """Rank all captions for each image and all images for each caption, a block at a time.

    Args:
        features: of images, (N, E).
        text_features: of captions, (M, E).
        owners: the row of each caption's image; every image has one or more.
        captions: M texts.
        indices: of the images in their data set.
        device: where scores are computed.
        block: the most scores at a time; None: by device.
    """
    block = block or _BLOCK[torch.device(device).type]
    images, texts, owners_there = (x.to(device) for x in (features, text_features, owners))
    image_ranks, top_captions = _ranks(
        images, texts, lambda scores, row: _first_own(scores, owners_there, row), block
    )
    caption_ranks, top_images = _ranks(
        texts, images, lambda scores, row: owners_there[row : row + len(scores)], block
    )
    return RetrievalResult(
        indices, features, captions, owners, text_features,
        image_ranks, caption_ranks, top_captions, top_images,
    )  # fmt: skip


def _ranks(
    queries: torch.Tensor, gallery: torch.Tensor, match: Match, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of each query's best match in the gallery, and the K highest."""
    rows, count = max(1, block // len(gallery)), min(TOP_K, len(gallery))
    # Allocated first: small results between large blocks would fragment the memory.
    ranks = torch.empty(len(queries), dtype=torch.int64)
    tops = torch.empty(len(queries), count, dtype=torch.int64)
    for first in range(0, len(queries), rows):
        scores = queries[first : first + rows] @ gallery.T  # (B, M) or (B, N)
        ranks[first : first + rows] = rank_of(scores, match(scores, first))
        tops[first : first + rows] = scores.topk(count, dim=1).indices
    return ranks, tops


def _first_own(scores: torch.Tensor, owners: torch.Tensor, first: int) -> torch.Tensor:
    """The best of each image's own captions, of equals the first: scores (B, M) -> (B,).

    `first` is the row of the block's first image.
    """
    rows = torch.arange(first, first + len(scores), device=scores.device)
    others = owners != rows[:, None]  # (B, M)
    return scores.masked_fill(others, -torch.inf).argmax(dim=1)


def _recall(ranks: torch.Tensor, k: int) -> float:
    return (ranks <= k).double().mean().item()


def _intervals(way: str, ranks: np.ndarray, images: np.ndarray) -> dict[str, Interval]:
    """Intervals over images of the ranks of queries, each of which belongs to an image."""

    def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
        recalls = {f"{way}_R@{k}": mean_by_group(ranks <= k, images, drawn) for k in AT}
        return recalls | {f"{way}_median_rank": median_by_group(ranks, images, drawn)}

    return bootstrap(int(images.max()) + 1, measure, width=len(ranks))
