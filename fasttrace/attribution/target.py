"""The metric's own gradient in finished latents: where a screen begins its way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.attribution.counting import counting
from fasttrace.attribution.scaling import HALF, gradients
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Metric, MetricContext, Probe

DECODER = "the finished latents"
_ADVICE = (
    "Write it with torch operations on what it is given (no detach, item, numpy or 8 bits), or "
    "choose 'latent_recovery', 'clip_score' or another registered one."
)


@dataclass(frozen=True)
class Target:
    """Scores of one pair's runs, in the metric's unit, and the gradient at the bases' latents.

    gradient [bases, C, h, w] in 32 or 64 bits, turned so that positive is towards the clean run.
    base_scores: of the bases, turned likewise.
    """

    clean: float
    corrupt: float
    base_scores: Tensor
    gradient: Tensor
    flops: int


def target_of(
    model: Model, metric: Metric, probe: Probe, clean: Tensor, corrupt: Tensor, bases: Tensor
) -> Target:
    """clean, corrupt [1, C, h, w] and bases [n, C, h, w]: finished latents.

    Raises `UsageError` where the metric has no gradient, `ModelError` where it isn't finite.
    """
    picture = metric.needs == "picture"
    with counting() as count:
        with torch.no_grad():
            ends = torch.cat([clean, corrupt])
            given = model.decode(ends) if picture else ends
            context = MetricContext(probe, given[:1] if picture else None, clean, corrupt)
            scores = _ask(metric, given, context)
        turn = 1.0 if metric.higher_is_closer else -1.0
        if torch.equal(clean, corrupt):  # nothing to restore: no direction leads anywhere
            wide = torch.promote_types(bases.dtype, torch.float32)
            found = [(scores[1], row[None]) for row in torch.zeros_like(bases, dtype=wide)]
        else:
            found = [_gradient(model, metric, context, base[None], turn) for base in bases]
    return Target(
        float(scores[0]),
        float(scores[1]),
        torch.stack([score for score, _ in found]),
        torch.cat([gradient for _, gradient in found]),
        count.flops,
    )


def _gradient(
    model: Model, metric: Metric, context: MetricContext, latents: Tensor, turn: float
) -> tuple[Tensor, Tensor]:
    """One base at a time: a VAE's activations are larger than a denoiser's."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    with torch.enable_grad():
        leaf = latents.detach().to(wide).requires_grad_()
        given = model.decode(leaf.to(latents.dtype)) if metric.needs == "picture" else leaf
        score = _ask(metric, given, context)
        if not score.requires_grad:
            raise UsageError(
                f"The metric '{metric.key}' can't be screened: its score doesn't carry a gradient. "
                f"{_ADVICE}"
            )
        [gradient] = torch.autograd.grad(
            turn * score.sum(), [given], allow_unused=True, retain_graph=given is not leaf
        )
    if gradient is None:
        raise UsageError(
            f"The metric '{metric.key}' can't be screened: its score doesn't depend on what it is "
            f"given. {_ADVICE}"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise ModelError(
            f"The metric '{metric.key}' has no finite gradient for '{context.probe.prompt}' at the "
            "corrupt run."
        )
    if given is not leaf:
        dtype = latents.dtype if model.dtype in HALF else None
        pulled = gradients(
            given, gradient, {DECODER: leaf}, "the decoder", lanes=len(given), dtype=dtype
        )
        gradient = pulled[DECODER]
    return (turn * score.detach())[0], gradient


def _ask(metric: Metric, given: Tensor, context: MetricContext) -> Tensor:
    """[B]"""
    try:
        answer = metric.function(given, context)
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        raise UsageError(
            f"The metric '{metric.key}' can't be screened: {str(error).split('. ')[0]}. {_ADVICE}"
        ) from error
    if not isinstance(answer, Tensor):
        if torch.is_grad_enabled():
            raise UsageError(
                f"The metric '{metric.key}' can't be screened: it gave {type(answer).__name__}, "
                f"which carries no gradient. {_ADVICE}"
            )
        answer = torch.as_tensor(answer, dtype=torch.float64)
    scores = answer.flatten()
    if len(scores) != len(given):
        raise ModelError(
            f"The metric '{metric.key}' gave {len(scores)} scores for {len(given)} pictures; it "
            "has to give one each."
        )
    if not bool(torch.isfinite(scores).all()):
        raise ModelError(f"The metric '{metric.key}' gave {scores.tolist()} for runs of a screen.")
    return scores
