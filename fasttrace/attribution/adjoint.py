"""The way back through the scheduler: sums with the transposed weights of `Schedule`."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrace.engine.schedule import Schedule


class Adjoint:
    """Gradients of a score in latents and predictions, from the last call to the first.

    x[t+1] = sum_j weights[t, j] x[t-j] + sum_j weights[t, L+j] e[t-j] + noise. `descend(t)` gives
    dM/de[t] (the guided prediction), once all later calls have been descended; `add(t, ...)` puts
    in what flows through the denoiser's input, without which later predictions are held fixed.
    """

    def __init__(self, schedule: Schedule, last: Tensor) -> None:
        """last [B, C, h, w]: the gradient in the finished latents."""
        self.schedule = schedule
        self.latents: dict[int, Tensor] = {schedule.calls: last}
        self.predictions: dict[int, Tensor] = {}

    def copy(self) -> Adjoint:
        """Another one at the same call; what is added to either stays its own."""
        other = Adjoint(self.schedule, torch.empty(0))
        other.latents, other.predictions = dict(self.latents), dict(self.predictions)
        return other

    def descend(self, call: int) -> Tensor:
        """dM/de[call] [B, C, h, w]."""
        slots, row = self.schedule.slots, self.schedule.weights[call].tolist()
        gradient = self.latents.pop(call + 1)
        for held, weights in (
            (self.latents, row[: slots.latents]),
            (self.predictions, row[slots.latents : slots.latents + slots.predictions]),
        ):
            for back, weight in enumerate(weights):
                # A weight of 0 on what a run never had says nothing.
                if call - back >= 0:
                    _add(held, call - back, gradient * weight)
        return self.predictions.pop(call)

    def add(self, call: int, gradient: Tensor) -> None:
        """gradient: in the denoiser's input of this call."""
        _add(self.latents, call, gradient * float(self.schedule.input_scales[call]))


def _add(held: dict[int, Tensor], call: int, gradient: Tensor) -> None:
    held[call] = held[call] + gradient if call in held else gradient
