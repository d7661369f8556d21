"""The linear schedule: a diffusers scheduler read off as one weight vector a denoiser call.

A deterministic scheduler makes the next latent out of earlier latents and predictions by sums with
fixed weights; a stochastic one adds fixed amounts of fresh noise. The weights are what the
scheduler itself answers to unit vectors, so no scheduler's formula is written again, and the
sampling loop needs neither the scheduler nor a host sync.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST_LATENTS = MOST_PREDICTIONS = 4
MOST_RESIDUAL = 1e-6
_NEGLIGIBLE = 1e-12  # of a weight; solved ones carry rounding of about 1e-15
_SCALES = (1e-3, 1.0, 1e3)  # clipping and thresholding show at one of them
_LATENT, _PREDICTION, _NOISE = range(3)


@dataclass(frozen=True)
class Slots:
    """What the next latent is summed from: the newest latents and predictions, perhaps noise.

    Order of a weight vector: latents newest first, predictions newest first, noise.
    """

    latents: int
    predictions: int
    noise: bool

    @property
    def count(self) -> int:
        return self.latents + self.predictions + self.noise

    @property
    def kept(self) -> int:
        """Tensors that live from one call to the next: not the newest prediction, not noise."""
        return self.latents + self.predictions - 1


@dataclass(frozen=True)
class Schedule:
    """A run of T denoiser calls. Where `linear` is False only timesteps and `why` are filled.

    timesteps [T]: as the scheduler has them. weights [T, S] float64 over `slots`. input_scales
    [T + 1] float64: what a latent is multiplied by before the denoiser sees it; the last entry, for
    the finished latent, is 1. residual: the largest difference of one call from the scheduler's own
    on random vectors, relative to the latent's rms (some schedulers round to float32 inside).
    """

    timesteps: Tensor
    linear: bool
    why: str
    slots: Slots = Slots(1, 1, False)
    weights: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.float64))
    input_scales: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    residual: float = float("nan")

    @property
    def calls(self) -> int:
        return len(self.timesteps)

    def first_state(self, latents: Tensor) -> Tensor:
        """latents [L, ...], already times the scheduler's `init_noise_sigma`: `advance`'s state."""
        state = latents.new_zeros(self.slots.kept, *latents.shape)
        state[0] = latents
        return state


def advance(
    prediction: Tensor,
    state: Tensor,
    call: Tensor,
    guidance: float | Tensor | None,
    noise: Tensor | None,
    *,
    weights: Tensor,
    input_scales: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor]:
    """The end of a call: guidance, the next latent, the next call's input. Reads no value.

    prediction [2L, ...] (unconditional lanes first) with a guidance (number or [L, 1, ...]), or
    [L, ...] with guidance None. state [kept, L, ...] as `Schedule.first_state` began it. call [1]
    int64: which call has just been made. noise [T, L, ...], or [T, 1, ...] for all lanes, if
    `slots.noise`. weights [T, S] and input_scales [T + 1] in float32, or float64.

    Returns the new state, whose first entry is the next latent, and that latent times its input
    scale, in prediction's dtype. Sums are made one slot after another, so that a lane's bits do not
    depend on how many lanes there are.
    """
    if guidance is not None:
        uncond, cond = prediction.chunk(2)
        prediction = uncond + guidance * (cond - uncond)
    newest = prediction.to(state.dtype)
    summed = [*state[: slots.latents], newest, *state[slots.latents :]]
    if slots.noise:
        if noise is None:
            raise ValueError("This schedule has a noise slot, but no noise was given.")
        summed.append(noise.index_select(0, call)[0])
    row = weights.index_select(0, call)[0]
    latent = row[0] * summed[0]
    for weight, tensor in zip(row[1:], summed[1:], strict=True):
        latent = latent + weight * tensor
    latent = latent.to(state.dtype)
    kept = [latent, *summed[: slots.latents - 1]]
    kept += summed[slots.latents : slots.latents + slots.predictions - 1]
    scaled = latent * input_scales.index_select(0, call + 1)
    return torch.stack(kept), scaled.to(prediction.dtype)


def read_schedule(
    scheduler: Any, options: Mapping[str, Any] | None = None, timesteps: Tensor | None = None
) -> Schedule:
    """`scheduler`, set to its timesteps (and begin index), as a `Schedule`. It is not changed.

    options: keyword arguments of its `step` (eta; a generator is left out). timesteps: those the
    loop will use, where they are not all of the scheduler's.
    """
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    options = {k: v for k, v in (options or {}).items() if k != "generator"}
    name = type(scheduler).__name__
    if str(getattr(getattr(scheduler, "config", None), "variance_type", "")).startswith("learned"):
        return Schedule(timesteps, False, f"{name} reads a learned variance from the prediction.")
    try:
        answers, scales = _answers(scheduler, timesteps, options)
        found = _fit(answers, len(timesteps))
        if found is None:
            return Schedule(
                timesteps, False, f"{name} uses more than the last {MOST_PREDICTIONS} predictions."
            )
        schedule = Schedule(timesteps, True, "", *found, scales)
        residual = max(_residual(scheduler, options, schedule, scale) for scale in _SCALES)
    except Exception as error:
        # Any scheduler may refuse unit vectors in its own way; its own `step` then runs instead.
        return Schedule(timesteps, False, f"{name} can't be read as a sum: {error}")
    if not residual <= MOST_RESIDUAL:
        return Schedule(
            timesteps,
            False,
            f"{name} is not linear as configured (clipping or thresholding?): off by "
            f"{residual:.1e} of the latent's rms on random vectors.",
        )
    return Schedule(timesteps, True, "", *found, scales, residual)


def draw_noise(
    scheduler: Any,
    latents: Tensor,
    options: Mapping[str, Any] | None = None,
    timesteps: Tensor | None = None,
) -> Tensor:
    """What the scheduler draws in a run on `latents` [1, ...] with `step`'s `options`: [T, 1, ...].

    Its own `step` draws from the generator among the options, in its own order, shape and dtype;
    zero where a call draws nothing. The scheduler is not changed, the generator advances.
    """
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    zero = torch.zeros_like(latents)
    noise = latents.new_zeros(len(timesteps), *latents.shape)
    stepped = copy.deepcopy(scheduler)
    for call, t in enumerate(timesteps):
        stepped.scale_model_input(zero, t)
        with _Draws() as draws:
            stepped.step(zero, t, zero, **(options or {}), return_dict=False)
        if draws.seen is not None:
            noise[call] = draws.seen.to(noise.device)
    return noise


class _Draws(TorchFunctionMode):
    """Sees normal noise as it is drawn, or puts other noise in its place."""

    def __init__(self, instead: Tensor | None = None) -> None:
        super().__init__()
        self.instead = instead
        self.seen: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **(kwargs or {}))
        if self.seen is not None:
            raise ValueError("it draws noise more than once in a call.")
        self.seen = func(*args, **(kwargs or {})) if self.instead is None else self.instead
        return self.seen


def _answers(
    scheduler: Any, timesteps: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Each call's next latent [T, 3, T] over every latent, prediction and noise of the run.

    Every call is given a latent that is a unit vector of its own, not what the call before gave.
    So what a scheduler remembers of earlier calls shows as weights on earlier units.
    """
    calls = len(timesteps)
    units = torch.eye(3 * calls, dtype=torch.float64, device=timesteps.device)
    units = units.reshape(3, calls, 1, 1, 1, 3 * calls)  # each shaped like a latent [1, 1, 1, 3 T]
    answers = torch.empty(calls, 3 * calls, dtype=torch.float64)
    scales = torch.ones(calls + 1, dtype=torch.float64)
    stepped = copy.deepcopy(scheduler)
    for call, t in enumerate(timesteps):
        latent = units[_LATENT, call]
        scales[call] = stepped.scale_model_input(latent, t).flatten()[call].cpu()
        with _Draws(units[_NOISE, call]):
            prediction = units[_PREDICTION, call]
            new = stepped.step(prediction, t, latent, **options, return_dict=False)[0]
        answers[call] = new.flatten()
    return answers.reshape(calls, 3, calls), scales


def _fit(answers: Tensor, calls: int) -> tuple[Slots, Tensor] | None:
    """The fewest slots that hold every call's answer, and the weights [T, S] over them."""
    noise = bool(answers[:, _NOISE].any())
    sizes = product(range(1, MOST_LATENTS + 1), range(1, MOST_PREDICTIONS + 1))
    for latents, predictions in sorted(sizes, key=sum):
        slots = Slots(latents, predictions, noise)
        rows: list[Tensor] = []
        for call in range(calls):
            row = _weights(answers, call, slots)
            if row is None:
                break
            rows.append(row)
        else:
            return slots, torch.stack(rows)
    return None


def _weights(answers: Tensor, call: int, slots: Slots) -> Tensor | None:
    """One call's weights [S], or None if it needs what is in no slot.

    Latents are answers of earlier calls, so `answer - next unit` of an earlier call is zero in any
    run and may be added. The last two such zeros are enough to be rid of what a scheduler keeps
    instead of latents (UniPC its corrected ones), or of an older latent (PNDM, Heun).
    """
    held = torch.zeros_like(answers[call], dtype=torch.bool)
    held[_LATENT, max(0, call + 1 - slots.latents) : call + 1] = True
    held[_PREDICTION, max(0, call + 1 - slots.predictions) : call + 1] = True
    held[_NOISE, call] = slots.noise
    answer = answers[call]
    limit = _NEGLIGIBLE * answer.abs().max()
    earlier = range(max(0, call - 2), call)
    if earlier and (answer[~held].abs() > limit).any():
        zeros = answers[earlier.start : call].clone()
        for row, before in zip(zeros, earlier, strict=True):
            row[_LATENT, before + 1] -= 1
        factors = torch.linalg.lstsq(zeros[:, ~held].T, answer[~held], driver="gelsd").solution
        answer = answer - torch.einsum("z,zkt->kt", factors, zeros)
    if (answer[~held].abs() > limit).any():
        return None
    weights = torch.zeros(slots.count, dtype=torch.float64)
    for first, kind, size in (
        (0, _LATENT, slots.latents),
        (slots.latents, _PREDICTION, slots.predictions),
    ):
        found = answer[kind, max(0, call + 1 - size) : call + 1].flip(0)
        weights[first : first + len(found)] = found
    if slots.noise:
        weights[-1] = answer[_NOISE, call]
    return weights


def _residual(
    scheduler: Any, options: Mapping[str, Any], schedule: Schedule, scale: float
) -> float:
    """How far any one call is from the scheduler's, on random vectors `scale` large."""
    device = schedule.timesteps.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, 2, 4, 5, 3, generator=generator, dtype=torch.float64)
        return scale * drawn.to(device)

    stepped = copy.deepcopy(scheduler)
    latents = random() * float(scheduler.init_noise_sigma)
    state = schedule.first_state(latents)
    noise = random(schedule.calls)
    worst = 0.0
    for call, t in enumerate(schedule.timesteps):
        prediction = random()
        stepped.scale_model_input(latents, t)
        with _Draws(noise[call]):
            latents = stepped.step(prediction, t, latents, **options, return_dict=False)[0]
        state, _ = advance(
            prediction,
            state,
            torch.tensor([call], device=device),
            None,
            noise,
            weights=schedule.weights.to(device),
            input_scales=schedule.input_scales.to(device),
            slots=schedule.slots,
        )
        rms = latents.square().mean().sqrt()
        worst = max(worst, float((state[0] - latents).abs().max() / rms))
        state[0] = latents
    return worst
