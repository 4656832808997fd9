"""One step of training: features of the batch, the loss over all ranks, gradients, the update.

    batch of this rank -> micro-batches -> towers -> loss over all ranks -> backward -> AdamW

With several micro-batches the features are computed without a graph first, then the loss over all
of them, then each micro-batch again with its features' gradients (GradCache, arXiv 2101.06983):
the gradients are those of the whole batch, the memory that of one micro-batch.

Shapes: n pairs of this rank, L tokens, R resolution, E embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F

from leanclip.config.training import TrainConfig
from leanclip.data.batch import Batch
from leanclip.distributed.collectives import (
    mean_over_ranks_,
    rank_and_world_size,
    sum_over_ranks,
)
from leanclip.distributed.wrap_model import eval_mode_batch_norm, gradient_sync
from leanclip.losses import Kind, contrastive_loss
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS, is_shard, local
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.preprocess.patches import Patches

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # other precisions: none


class StepResult(NamedTuple):
    """Results of a step, still on the device."""

    loss: torch.Tensor  # (), over all ranks
    gradient_norm: torch.Tensor  # () of all parameters, before clipping
    is_finite: torch.Tensor  # () bool; where false, nothing was changed
    norms: dict[str, torch.Tensor]  # by tower, such as `update_norm/image`; empty unless asked for


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
    weight: float = 1.0,
) -> StepResult:
    """One step of the optimiser on this rank's part of a batch.

    A step whose loss or gradients are not finite changes nothing, on any rank.

    Args:
        model: both towers and the scalars of the loss.
        optimizer: a fused AdamW of the model's parameters.
        batch: this rank's part; may be empty, but not on all ranks.
        preprocess: mean and standard deviation of the pixels.
        rate: the learning rate of this step; a group's "factor" multiplies it.
        settings: precision, micro-batches and how the loss is computed.
        kind: which loss.
        max_gradient_norm: the global norm to clip to.
        towers: the model as `wrap_model` gives it; the model itself by default.
        must_measure: return the towers' norms, which takes a copy of the parameters.
        scaler: of precision fp16; updated by the step.
        weight: of the loss in the gradients: where batches differ in size, that of this one over
            their mean, so that each sample counts alike.
    """
    towers = towers or model
    forward = partial(_forward, towers, preprocess, settings.precision, model.logit_scale.device)
    backward = partial(_backward, model, batch, settings, kind, scaler, weight)
    # FSDP gathers each block's parameters on all ranks together: all run as many micro-batches.
    is_exact = any(map(is_shard, model.parameters()))
    parts = _micro_batches(batch, settings, model.tokenizer.blank_id, is_exact=is_exact)
    if settings.micro_batches == 1:  # not len(parts): all ranks must do the same
        loss = backward(*forward(parts[0]))
    else:
        loss = _cached_backward(towers, parts, forward, backward)
    mean_over_ranks_([p.grad for p in _scalars(model) if p.grad is not None])  # not the towers'
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if scaler:
        scaler.unscale_(optimizer)
    norm = _total_norm(gradients)
    norms = _StepNorms(model) if must_measure else None
    if max_gradient_norm is not None:
        _clip(gradients, norm, max_gradient_norm)
    is_finite = torch.isfinite(loss + norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    _optimizer_step(optimizer, is_finite, scaler)
    optimizer.zero_grad()
    model.clamp_logit_scale()
    return StepResult(loss, norm, is_finite, norms.after_step() if norms else {})


class Part(NamedTuple):
    """A micro-batch; rows beyond `size` are blank, computed but not counted."""

    images: torch.Tensor | Any  # (m, 3, R, R) uint8, or (m, E) as in a Batch
    tokens: torch.Tensor  # (d, L), or (m, E)
    size: int
    places: torch.Tensor | None = None  # (m,), each row's index among d captions; None: d = m


def _forward(
    towers: nn.Module, preprocess: Preprocess, precision: str, device: torch.device, part: Part
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text features (m, E) of a micro-batch."""
    pixels = part.images.to(device, non_blocking=True)  # (m, 3, R, R) uint8, or patches
    tokens = part.tokens.to(device, non_blocking=True)  # (d, L)
    if isinstance(pixels, Patches) or pixels.dim() == 4:  # not features already
        pixels = normalize(pixels, preprocess.mean, preprocess.std)
    dtype = AUTOCAST.get(precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        features = towers(pixels, tokens)
    text = features.text  # (d, E)
    if part.places is not None:  # F.embedding: gradients of an index are summed in a fixed order
        text = F.embedding(part.places.to(device, non_blocking=True), text)  # (m, E)
    return features.image[: part.size], text[: part.size]


def _backward(
    model: CLIP,
    batch: Batch,
    settings: TrainConfig,
    kind: Kind,
    scaler: GradScaler | None,
    weight: float,
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
) -> torch.Tensor:
    """The loss () over all ranks, from features (n, E) of this one; adds its gradients."""
    loss = contrastive_loss(
        zimg,
        ztxt,
        model.logit_scale.float().exp(),
        kind=kind,
        bias=model.logit_bias,
        groups=batch.groups.to(zimg.device) if kind == "multi-positive" else None,
        is_tiled=settings.tiled_loss,
    )
    # the loss is over all ranks, gradients are averaged
    total = loss * (rank_and_world_size()[1] * weight)
    (scaler.scale(total) if scaler else total).backward()
    return loss.detach()


def _optimizer_step(
    optimizer: torch.optim.Optimizer, is_finite: torch.Tensor, scaler: GradScaler | None
) -> None:
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        # With this at 1 the fused AdamW changes nothing; no synchronisation with the device.
        optimizer.found_inf = (~is_finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()


def _micro_batches(
    batch: Batch, settings: TrainConfig, blank_id: int, *, is_exact: bool
) -> list[Part]:
    """The batch in at most `micro_batches` parts of nearly equal size.

    With `is_exact`, blank parts make up the number, with a text of the token `blank_id`; without a
    pair there is one blank part, so that the rank takes part in the sums over ranks.
    """
    count, parts = settings.micro_batches, []
    split = (rows.tensor_split(count) for rows in (batch.images, batch.tokens))
    for images, tokens in zip(*split, strict=True):
        if len(images):
            distinct, places = _distinct(tokens, settings)
            parts.append(Part(images, distinct, len(images), places))
    pixels = batch.images
    is_patches = isinstance(pixels, Patches)
    blank = pixels.blank() if is_patches else pixels.new_zeros(1, *pixels.shape[1:])
    is_features = batch.tokens.is_floating_point()
    text = batch.tokens.new_zeros(1, batch.tokens.shape[1])
    text = text if is_features else torch.tensor([[blank_id]])
    return parts + [Part(blank, text, 0)] * ((count if is_exact else 1) - len(parts))


def _distinct(
    tokens: torch.Tensor, settings: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens (m, L) with each caption once, (d, L), and each row's index (m,) in them.

    Unchanged, with no indices, if no caption repeats; if they are features; and if the towers are
    compiled, where more shapes mean more graphs.
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
        _set_random_state(state)  # so that patch dropout repeats
        with eval_mode_batch_norm(towers), gradient_sync(towers, is_last=is_last):
            both = zip(forward(part), gradient, strict=True)
            trained = [(z, dz) for z, dz in both if z.requires_grad]  # locked towers
            torch.autograd.backward([z for z, _ in trained], [dz for _, dz in trained])
    _set_random_state(after)
    return loss


def _total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm () over all of the tensors, equal on every rank."""
    sharded = [tensor.to_local() for tensor in tensors if is_shard(tensor)]
    whole = [tensor for tensor in tensors if not is_shard(tensor)]
    norm = nn.utils.get_total_norm(whole)
    if not sharded:
        return norm
    square = sum_over_ranks(nn.utils.get_total_norm(sharded).square())
    return (square + norm.to(square.device).square()).sqrt()


def _clip(gradients: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients, whose norm is given, down to `max_norm` if it is larger.

    As `torch.nn.utils.clip_grads_with_norm_`, which cannot mix sharded and whole tensors.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    shards = [local(gradient) for gradient in gradients]
    torch._foreach_mul_(shards, factor)  # pyright: ignore[reportPrivateImportUsage]


class _StepNorms:
    """The norms of one step by tower: created before the optimiser's step, read after it.

    Keeps a copy of the parameters in between.
    """

    def __init__(self, model: CLIP) -> None:
        self._parameters: dict[str, list[nn.Parameter]] = {"image": [], "text": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in SCALARS:
                tower = "image" if name.startswith("visual.") else "text"
                self._parameters[tower].append(parameter)
        self._before = {k: [p.detach().clone() for p in v] for k, v in self._parameters.items()}
        self._gradients = {
            tower: _total_norm([p.grad for p in parameters if p.grad is not None])
            for tower, parameters in self._parameters.items()
        }

    @torch.no_grad()
    def after_step(self) -> dict[str, torch.Tensor]:
        """`gradient_norm/image`, `parameter_norm/text`, `update_norm/image` and so on, each ()."""
        norms = {}
        for tower, parameters in self._parameters.items():
            norms[f"gradient_norm/{tower}"] = self._gradients[tower]
            norms[f"parameter_norm/{tower}"] = _total_norm(parameters)
            before = self._before[tower]
            for old, parameter in zip(before, parameters, strict=True):
                local(old).sub_(local(parameter))
            norms[f"update_norm/{tower}"] = _total_norm(before)
        self._before.clear()
        return norms


def _scalars(model: CLIP) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name in SCALARS]


def _random_state() -> list[torch.Tensor]:
    """The states of the random generators, of the CPU and of the current GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
