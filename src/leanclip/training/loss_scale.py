"""The factor on the loss that keeps small gradients from vanishing in fp16.

    loss * factor -> backward -> gradients / factor -> finite: grow now and then, else halve

The rule and its numbers are torch.amp.GradScaler's. Everything stays on the device, and every rank
comes to the same factor, for the gradients that it is judged by are those of all ranks.
"""

from collections.abc import Iterable, Sequence

import torch

from leanclip.model.parameters import local

START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """The factor, and the number of finite steps since it last changed.

    Args:
        device: where the loss is.
        state: as `state` gave it, to go on from there.
    """

    def __init__(self, device: torch.device, state: Sequence[float] | None = None) -> None:
        factor, steps = state or (START, 0)
        self.factor = torch.tensor(factor, dtype=torch.float32, device=device)  # ()
        self._steps = torch.tensor(int(steps), device=device)

    def unscale_(self, gradients: Iterable[torch.Tensor]) -> None:
        """Divide gradients of the scaled loss by the factor."""
        inverse = self.factor.reciprocal()
        for gradient in gradients:
            local(gradient).mul_(inverse)

    def update(self, is_finite: torch.Tensor) -> None:
        """Halve the factor after a step that was not finite, double it after 2000 that were."""
        steps = torch.where(is_finite, self._steps + 1, 0)
        grown = torch.where(steps == INTERVAL, self.factor * GROWTH, self.factor)
        self.factor = torch.where(is_finite, grown, self.factor * BACKOFF)
        self._steps = torch.where(steps == INTERVAL, 0, steps)

    def state(self) -> list[float]:
        """Both in plain values."""
        return [self.factor.item(), self._steps.item()]
