"""Contrastive losses over the global batch, as functions of features.

    zimg, ztxt (n, E) of this rank -> texts of all ranks (N, E) -> logits, in tiles -> loss ()

`clip_loss`, `multi_positive_loss` and `siglip_loss` are the equations, for one process. Training
calls `contrastive_loss`: any of the three over all ranks, tile by tile in O(N * tile) memory, or
by those equations on gathered features.

Shapes: n pairs of this rank, N pairs of all ranks, E embedding.
"""

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leanclip.distributed.collectives import (
    gather_rows,
    rank_and_world_size,
    reduce_scatter_rows,
    sum_over_ranks,
)

Kind = Literal["clip", "multi-positive", "siglip"]
TILE = 2048  # rows and columns of a tile of logits
MAX_LOGITS_KEPT = 2**27  # logits that backward need not recompute: 512 MB


def clip_loss(zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE (arXiv 2103.00020, figure 3) of unit features (N, E), in float32.

    The mean of the image-to-text and the text-to-image cross-entropy. PASSL's loss is their sum,
    so its gradients are twice these.
    """
    logits = scale * _float32(zimg) @ _float32(ztxt).T  # (N, N)
    matching = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching)) / 2


def multi_positive_loss(
    zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """InfoNCE in which all pairs of a group (the same caption or class) match each other.

    The target distribution of a row is uniform over its group, in both directions (the supervised
    contrastive loss of arXiv 2004.11362 between two towers). `groups` is (N,), any integers.
    """
    logits = scale * _float32(zimg) @ _float32(ztxt).T  # (N, N)
    matching = (groups[:, None] == groups[None, :]).to(logits.dtype)  # (N, N)
    target = matching / matching.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_loss(
    zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Sigmoid loss (arXiv 2303.15343, algorithm 1): each of the N x N pairs is independent."""
    logits = scale * _float32(zimg) @ _float32(ztxt).T + bias  # (N, N)
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def contrastive_loss(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    scale: torch.Tensor,
    *,
    kind: Kind = "clip",
    bias: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    is_tiled: bool = True,
    tile: int = TILE,
) -> torch.Tensor:
    """The loss of the global batch, the same on every rank.

    The gradients of the features are complete; those of `scale` and `bias` are this rank's part,
    to be summed over ranks. Ranks may have different numbers of pairs, also none.

    Args:
        zimg: unit image features (n, E) of this rank.
        ztxt: unit text features (n, E) of this rank.
        scale: factor of the cosines, ().
        kind: which of the three losses.
        bias: added to the logits, (), for "siglip".
        groups: (n,) integers, equal for matching pairs, for "multi-positive".
        is_tiled: compute tile by tile; else by the equations on gathered features.
        tile: rows and columns of a tile.
    """
    bias = torch.zeros_like(scale) if bias is None else bias
    if kind != "multi-positive":
        groups = None
    else:
        assert groups is not None
    if is_tiled:
        loss = _Tiled.apply(_float32(zimg), _float32(ztxt), scale, bias, groups, kind, tile)
        assert isinstance(loss, torch.Tensor)
        return loss
    world_size = rank_and_world_size()[1]
    images, texts = _gather_with_gradient(zimg), _gather_with_gradient(ztxt)  # (N, E)
    # Every rank computes the whole loss and the whole gradient of the scalars, but returns a part.
    scale, bias = (_divide_gradient(scalar, world_size) for scalar in (scale, bias))
    if kind == "siglip":
        return siglip_loss(images, texts, scale, bias)
    if groups is not None:
        return multi_positive_loss(images, texts, scale, gather_rows(groups)[0])
    return clip_loss(images, texts, scale)


class _Tiled(torch.autograd.Function):
    """All three losses without a matrix of N x N.

    Each rank computes the logits of its own images against the texts of all ranks, tile by tile.
    Given the log-sum-exps of rows and columns, the gradient of a tile needs only that tile, which
    is recomputed in backward, except for the first `MAX_LOGITS_KEPT` logits. The positive logits
    need no tiles: averaged over its group, those of a row are its logit with the mean text.

        loss = mean of row_lse and column_lse - positive logits     d/dlogits = softmaxes - targets
        siglip: softplus(logits) - positive logits                              = sigmoid - targets
    """

    @staticmethod
    def forward(
        ctx: Any,
        zimg: torch.Tensor,
        ztxt: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        groups: torch.Tensor | None,
        kind: Kind,
        tile: int,
    ) -> torch.Tensor:
        texts, sizes = gather_rows(ztxt)  # (N, E)
        rank = rank_and_world_size()[0]
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        matching = _Matching(groups, own, sizes)
        mean_texts = matching.mean_over_groups(texts)[own]  # (n, E)
        positives = scale * (zimg * mean_texts).sum() + bias * len(zimg)
        rows = zimg.new_full((len(zimg),), -torch.inf, dtype=torch.float64)  # (n,) log-sum-exps
        columns = rows.new_full((len(texts),), -torch.inf)  # (N,)
        total = zimg.new_zeros(())
        kept: list[torch.Tensor] = []
        budget = MAX_LOGITS_KEPT if any(ctx.needs_input_grad) else 0
        for here, there, logits in _tiles(zimg, texts, scale, bias, tile):
            if (budget := budget - logits.numel()) >= 0:
                kept.append(logits)
            if kind == "siglip":
                total += F.softplus(logits).sum()
            else:
                rows[here] = torch.logaddexp(rows[here], _logsumexp(logits, 1))
                columns[there] = torch.logaddexp(columns[there], _logsumexp(logits, 0))
        if kind == "siglip":
            loss = total - positives
        else:
            columns = _logsumexp_over_ranks(columns)
            loss = (rows.sum() + columns[own].sum()) / 2 - positives
        ctx.save_for_backward(zimg, texts, scale, bias, mean_texts, rows, columns)
        ctx.matching, ctx.kind, ctx.tile, ctx.sizes = matching, kind, tile, sizes
        ctx.kept = kept  # backward overwrites and frees them
        return sum_over_ranks(loss).to(zimg.dtype) / max(1, len(texts))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: hidden by the decorator
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        zimg, texts, scale, bias, mean_texts, rows, columns = ctx.saved_tensors
        to_images = torch.zeros_like(zimg)  # (n, E), of logits / scale
        to_texts = torch.zeros_like(texts)  # (N, E)
        to_bias = zimg.new_zeros(())
        rows, row_factors = _round(rows, zimg.dtype)
        columns, column_factors = _round(columns, zimg.dtype)
        for here, there, logits in _tiles(zimg, texts, scale, bias, ctx.tile, ctx.kept):
            if ctx.kind == "siglip":
                gradient = logits.sigmoid_()
                to_bias += gradient.sum()
            else:
                gradient = (logits - columns[there]).exp_().mul_(column_factors[there])
                gradient.addcmul_(logits.sub_(rows[here, None]).exp_(), row_factors[here, None])
            to_images[here].addmm_(gradient, texts[there])
            to_texts[there].addmm_(gradient.T, zimg[here])
        to_images -= mean_texts
        to_texts -= ctx.matching.mean_over_groups(zimg, is_local=True)
        to_scale = (zimg * to_images).sum()
        factor = upstream / max(1, len(texts))
        return (
            to_images * (factor * scale),
            reduce_scatter_rows(to_texts, ctx.sizes) * (factor * scale),
            (to_scale * factor).to(scale.dtype),
            ((to_bias - len(zimg)) * factor).to(bias.dtype) if ctx.kind == "siglip" else None,
            None,
            None,
            None,
        )


class _Matching:
    """Which pairs of the global batch match: those of a group, or only each pair itself."""

    def __init__(self, groups: torch.Tensor | None, own: slice, sizes: list[int]) -> None:
        self.own, self.count, self.group = own, sum(sizes), None
        if groups is not None:
            self.group = gather_rows(groups)[0].unique(return_inverse=True)[1]  # (N,)
            self.sizes = self.group.bincount()  # of each group

    def mean_over_groups(self, rows: torch.Tensor, *, is_local: bool = False) -> torch.Tensor:
        """(N, E): for each pair, its group's sum of `rows` divided by the group's size.

        `rows` are (N, E), or with `is_local` (n, E), in which case those of other ranks are zero.
        """
        if self.group is None:
            if not is_local:
                return rows
            padded = rows.new_zeros(self.count, rows.shape[1])
            padded[self.own] = rows
            return padded
        sums = rows.new_zeros(len(self.sizes), rows.shape[1])
        sums.index_add_(0, self.group[self.own] if is_local else self.group, rows)
        return (sums / self.sizes[:, None])[self.group]


def _tiles(
    zimg: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    tile: int,
    kept: list[torch.Tensor] | None = None,
):
    """Yield rows, columns and logits of each tile; the first ones are taken from `kept`."""
    for top in range(0, len(zimg), tile):
        here = slice(top, min(top + tile, len(zimg)))
        scaled = zimg[here] * scale
        for left in range(0, len(texts), tile):
            there = slice(left, min(left + tile, len(texts)))
            logits = kept.pop(0) if kept else torch.addmm(bias.to(scaled), scaled, texts[there].T)
            yield here, there, logits


def _logsumexp(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Log-sum-exp along `dim`, in float64: float32 errs by 5e-6 at a scale of 100."""
    top = logits.amax(dim, keepdim=True)
    return (logits - top).exp_().sum(dim).double().log() + top.squeeze(dim)


def _round(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exps as `dtype`, and exp(rounding error) / 2: the factor of a softmax in the mean."""
    rounded = values.to(dtype)
    return rounded, (rounded - values).exp().to(dtype) / 2


def _logsumexp_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """(N,) of each rank -> (N,), the same on all ranks."""
    if rank_and_world_size()[1] == 1:
        return values
    return gather_rows(values[None])[0].logsumexp(dim=0)


def _gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """(n, E) -> (N, E), with a gradient for this rank's rows."""
    everyone, sizes = gather_rows(rows.detach())
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return rows
    parts = list(everyone.split(sizes))
    parts[rank] = rows
    return torch.cat(parts)


def _divide_gradient(scalar: torch.Tensor, world_size: int) -> torch.Tensor:
    """The same value; its gradient is divided by the number of ranks."""
    return scalar / world_size + (scalar * (1 - 1 / world_size)).detach()


def _float32(x: torch.Tensor) -> torch.Tensor:
    """At least float32: float64 is not changed."""
    return x if x.dtype == torch.float64 else x.float()
