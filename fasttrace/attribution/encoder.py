"""From the gradient in what the denoiser reads of a text to scores of text-encoder sites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fasttrace.adapters.corruption import corrupt_prompt, enter_corruption
from fasttrace.adapters.hooks import rewriting
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.attribution.counting import counting
from fasttrace.engine.graph.capture import flatten
from fasttrace.errors import ModelError
from fasttrace.types import Corruption, Probe, Sampling, Site


def encoder_scores(
    model: Model,
    sampling: Sampling,
    probe: Probe,
    corruption: Corruption,
    clean: Text,
    sites: Sequence[Site],
    gradients: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], int]:
    """Scores [n] of every token at each site, and FLOPs.

    gradients: by the names of what the denoiser reads, in the conditional text's row. Weights are
    left without gradients; the caller's scope gives them back. Raises `ModelError` for a site that
    was not called.
    """
    modules = {name: m for encoder in model.encoders for name, m in encoder.modules().items()}
    wanted = {site.name: modules[site.name] for site in sites}
    runs: list[dict[str, Tensor]] = [{}, {}]

    def keep(into: dict[str, Tensor]) -> ExitStack:
        # First of all hooks: transformers collects hidden states with hooks of its own.
        def see(site: str, out: Tensor) -> None:
            into[site] = out

        hooks = ExitStack()
        hooks.enter_context(rewriting(wanted, see, first=True))
        return hooks

    for encoder in model.encoders:
        encoder.module.requires_grad_(False)
    with counting() as count:
        with torch.no_grad(), keep(runs[0]):
            model.family.read(probe.prompt)
        with torch.enable_grad(), ExitStack() as hooks:
            enter_corruption(hooks, model, probe, corruption)
            words = {encoder.name: encoder.word_embedding for encoder in model.encoders}
            hooks.enter_context(rewriting(words, lambda _name, out: _leaf(out)))
            hooks.enter_context(keep(runs[1]))
            [text] = model.encode([corrupt_prompt(probe, corruption)], clean)
            read = flatten(model.conditioning(text.alone, sampling))
            ends = {name: read[name] for name in gradients if read[name].requires_grad}
            [missing] = [sorted(wanted.keys() - run.keys()) for run in runs[1:]]
            if missing:
                raise ModelError(f"{missing[0]} was not called, so it has no score.")
            places = list(wanted)
            largest = max((float(gradients[name].abs().max()) for name in ends), default=0.0)
            # Half precision holds gradients of about 1 best; a power of two rounds nothing.
            scale = 2.0 ** -math.frexp(largest)[1] if math.isfinite(largest) else 1.0
            found = torch.autograd.grad(
                list(ends.values()),
                [runs[1][name] for name in places],
                [(gradients[name] * scale).to(end) for name, end in ends.items()],
                allow_unused=True,
            )
    scores = {}
    for name, gradient in zip(places, found, strict=True):
        own, other = runs[1][name].detach(), runs[0][name]
        wide = torch.promote_types(own.dtype, torch.float32)
        product = torch.zeros_like(own, dtype=wide)
        if gradient is not None:
            product = (other.to(wide) - own.to(wide)) * gradient.to(wide) / scale
        if not bool(torch.isfinite(product).all()):
            raise ModelError(f"The gradient is not finite at {name}.")
        scores[name] = product[0].sum(-1)
    return scores, count.flops


def _leaf(out: Tensor) -> Tensor:
    return out.detach().requires_grad_()
