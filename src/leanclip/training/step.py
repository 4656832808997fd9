"""One step of training: features of the batch, the loss over all ranks, gradients, the update.

    batch of this rank -> micro-batches -> towers -> loss over all ranks -> backward -> AdamW

With several micro-batches the features are computed without a graph first, then the loss over all
of them, then each micro-batch again with its features' gradients (GradCache, arXiv 2101.06983):
the gradients are those of the whole batch, the memory that of one micro-batch.

Shapes: n pairs of this rank, L tokens, R resolution, E embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F

from leanclip.config.training import TrainConfig
from leanclip.data.loader import Batch
from leanclip.distributed.collectives import mean_over_ranks_, rank_and_world_size
from leanclip.distributed.wrap_model import eval_mode_batch_norm, gradient_sync, is_sharded
from leanclip.losses import Kind, contrastive_loss
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.preprocess.tokenizer import END
from leanclip.training.gradients import StepNorms, clip_, total_norm

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of others: none


class StepResult(NamedTuple):
    """What a step came to, still on the device."""

    loss: torch.Tensor  # (), over all ranks
    gradient_norm: torch.Tensor  # () of all parameters, before clipping
    is_finite: torch.Tensor  # () bool; where false, nothing was changed
    norms: dict[str, torch.Tensor]  # by tower, as StepNorms says; empty unless asked for


def train_step(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    preprocess: Preprocess,
    *,
    rate: float,
    settings: TrainConfig = TrainConfig(),  # noqa: B008, a constant
    kind: Kind = "clip",
    max_gradient_norm: float | None = None,
    towers: nn.Module | None = None,
    must_measure: bool = False,
    scaler: GradScaler | None = None,
) -> StepResult:
    """One step of the optimiser on this rank's part of a batch.

    A step whose loss or gradients are not finite changes nothing, on any rank.

    Args:
        model: both towers and the scalars of the loss.
        optimizer: a fused AdamW of the model's parameters.
        batch: this rank's part, perhaps empty; not all ranks' may be.
        preprocess: mean and standard deviation of the pixels.
        rate: the learning rate of this step; a group's "factor" is on it.
        settings: precision, micro-batches and how the loss is computed.
        kind: which loss.
        max_gradient_norm: the global norm to clip to.
        towers: the model as `wrap_model` gives it; the model itself by default.
        scaler: of precision fp16; updated by the step.
        must_measure: give the towers' norms, which takes a copy of the parameters.
    """
    device = model.logit_scale.device
    world_size = rank_and_world_size()[1]
    towers = towers or model
    groups = batch.groups.to(device) if kind == "multi-positive" else None
    # FSDP brings a block's parameters together for all ranks at once: all run it as often.
    parts = _micro_batches(batch, settings, is_exact=is_sharded(model))

    def forward(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = part.images.to(device, non_blocking=True)  # (m, 3, R, R) uint8
        tokens = part.tokens.to(device, non_blocking=True)  # (d, L)
        if pixels.dim() == 4:  # not features already
            pixels = normalize(pixels, preprocess.mean, preprocess.std)
        dtype = AUTOCAST.get(settings.precision)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            features = towers(pixels, tokens)
        text = features.text
        if part.places is not None:  # F.embedding: an index's gradients are summed in any order
            text = F.embedding(part.places.to(device, non_blocking=True), text)  # (m, E)
        return features.image[: part.size], text[: part.size]

    def backward(zimg: torch.Tensor, ztxt: torch.Tensor) -> torch.Tensor:
        loss = contrastive_loss(
            zimg,
            ztxt,
            model.logit_scale.float().exp(),
            kind=kind,
            bias=model.logit_bias,
            groups=groups,
            is_tiled=settings.tiled_loss,
        )
        total = loss * world_size  # the loss is over all ranks, gradients are averaged
        (scaler.scale(total) if scaler else total).backward()
        return loss.detach()

    if settings.micro_batches == 1:  # not by what is left of the batch: ranks must do the same
        loss = backward(*forward(parts[0]))
    else:
        loss = _cached_backward(towers, parts, forward, backward)
    mean_over_ranks_([p.grad for p in _scalars(model) if p.grad is not None])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if scaler:
        scaler.unscale_(optimizer)
    norm = total_norm(gradients)
    norms = StepNorms(model) if must_measure else None
    if max_gradient_norm is not None:
        clip_(gradients, norm, max_gradient_norm)
    is_finite = torch.isfinite(loss + norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        # The fused AdamW changes nothing where this is 1, without waiting for the device.
        optimizer.found_inf = (~is_finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    optimizer.zero_grad()
    model.clamp_logit_scale()
    return StepResult(loss, norm, is_finite, norms.after_step() if norms else {})


class Part(NamedTuple):
    """A micro-batch; images without pairs (beyond `size`) are there to be run, not counted."""

    images: torch.Tensor  # (m, 3, R, R) uint8, or (m, E) as in a Batch
    tokens: torch.Tensor  # (d, L), or (m, E)
    size: int
    places: torch.Tensor | None = None  # (m,), which of the d captions each has; None: all, m = d


def _micro_batches(batch: Batch, settings: TrainConfig, *, is_exact: bool) -> list[Part]:
    """The batch in at most so many parts of nearly the same size, or in as many with blank ones.

    A rank without a pair runs a blank one, so that it takes its part in the sums over ranks.
    """
    count, parts = settings.micro_batches, []
    split = (rows.tensor_split(count) for rows in (batch.images, batch.tokens))
    for images, tokens in zip(*split, strict=True):
        if len(images):
            distinct, places = _distinct(tokens, settings)
            parts.append(Part(images, distinct, len(images), places))
    blank = batch.images.new_zeros(1, *batch.images.shape[1:])
    has_features = batch.tokens.is_floating_point()
    end = (
        batch.tokens.new_zeros(1, batch.tokens.shape[1]) if has_features else torch.tensor([[END]])
    )
    least = count if is_exact else 1
    return parts + [Part(blank, end, 0)] * (least - len(parts))


def _distinct(
    tokens: torch.Tensor, settings: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens (m, L) with each caption once, (d, L), and the place (m,) of each row in them.

    They stay as they are, with no places, where nothing repeats; where they are features; and
    where the towers are compiled, whose graphs want few shapes.
    """
    if settings.compile or tokens.is_floating_point():
        return tokens, None
    distinct, places = tokens.unique(dim=0, return_inverse=True)
    if len(distinct) == len(tokens):
        return tokens, None
    if tokens.is_pinned():
        return distinct.pin_memory(), places.pin_memory()
    return distinct, places


def _cached_backward(
    towers: nn.Module,
    parts: list[Part],
    forward: Callable[[Part], tuple[torch.Tensor, torch.Tensor]],
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Gradients of the loss over all parts, with the graph of one part at a time."""
    states, features = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            features.append(forward(part))
    zimg, ztxt = (torch.cat(z).requires_grad_() for z in zip(*features, strict=True))  # (n, E)
    loss = backward(zimg, ztxt)
    assert zimg.grad is not None
    assert ztxt.grad is not None
    sizes = [part.size for part in parts]
    gradients = zip(zimg.grad.split(sizes), ztxt.grad.split(sizes), strict=True)
    after = _random_state()
    for number, (part, state, gradient) in enumerate(zip(parts, states, gradients, strict=True)):
        is_last = number + 1 == len(parts)
        _set_random_state(state)  # dropped patches and activations are the same again
        with eval_mode_batch_norm(towers), gradient_sync(towers, is_last=is_last):
            both = zip(forward(part), gradient, strict=True)
            trained = [(z, dz) for z, dz in both if z.requires_grad]  # not of a locked tower
            torch.autograd.backward([z for z, _ in trained], [dz for _, dz in trained])
    _set_random_state(after)
    return loss


def _scalars(model: CLIP) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name in SCALARS]


def _random_state() -> list[torch.Tensor]:
    """The generators' states, of the CPU and of the GPU that is used."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
