"""What a patch writes: the words of `Patch.source`, and the numbers behind them.

"clean", "corrupt", "prompt:<text>": that run's own activation, at this site and call.
"mean": the clean one's mean over its positions (tokens [N, C], places [C, h, w]), at every one.
"zero": zeros. "tensor:<name>", "add:<name>": a tensor of `Pair.tensors` under that whole word,
[1 or calls, ...] broadcast to the site's shape; written, or added `strength` times to the lane's
own activation. "text:<run>": the module stays and reads that run's text (cross-attention alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fasttrace.errors import ModelError
from fasttrace.types import Lane, Patch

CLEAN, CORRUPT = "clean", "corrupt"
ZERO, MEAN = "zero", "mean"
PROMPT, TENSOR, ADD, TEXT = "prompt:", "tensor:", "add:", "text:"


def run_of(source: str) -> str | None:
    """The run whose activation is read; None where none is."""
    if source == MEAN:
        return CLEAN
    return source if source in (CLEAN, CORRUPT) or source.startswith(PROMPT) else None


def replaces(source: str) -> bool:
    """Whether the activation itself becomes another one, whatever it was."""
    return not source.startswith((ADD, TEXT))


def is_own_row(source: str) -> bool:
    """Whether a batch can hold what is read as the row of a run beside it."""
    return source in (CLEAN, CORRUPT)


def prompts_of(lanes: Iterable[Lane]) -> list[str]:
    """The "prompt:..." runs that lanes read, each once."""
    found = {p.source for lane in lanes for p in lane.patches if p.source.startswith(PROMPT)}
    return sorted(found)


def mean_of(activation: Tensor) -> Tensor:
    """[B, N, C] or [B, C, h, w] -> the same shape: the mean over N, or over h and w, everywhere."""
    axes = (1,) if activation.ndim == 3 else tuple(range(2, activation.ndim))
    if not axes:
        return activation
    mean = activation.float().mean(axes, keepdim=True).to(activation.dtype)
    return mean.expand_as(activation)


def tensor_at(tensors: Mapping[str, Tensor], source: str, call: int) -> Tensor:
    """The given tensor's value at a call. Raises `ModelError` where it is not there."""
    found = tensors.get(source)
    if found is None:
        raise ModelError(f"The patch's source {source!r} names no tensor that was given.")
    return found[call if len(found) > 1 else 0]


def written(
    patch: Patch,
    own: Tensor,
    recorded: Callable[[str], Tensor],
    tensors: Mapping[str, Tensor],
    call: int,
) -> tuple[Tensor, float]:
    """What is written over `own` [R, ...], and at which strength: the definition.

    recorded(run): the activation of that run at this site and call, [R, ...].
    """
    source = patch.source
    if source == ZERO:
        return torch.zeros_like(own), patch.strength
    if source.startswith((TENSOR, ADD)):
        value = tensor_at(tensors, source, call).to(own).expand_as(own)
        return (value, patch.strength) if replaces(source) else (own + patch.strength * value, 1.0)
    run = run_of(source)
    if run is None:
        raise ModelError(f"The patch at {patch.site.name} has an unknown source {source!r}.")
    found = recorded(run)
    return (mean_of(found) if source == MEAN else found), patch.strength


def check_sources(
    patches: Iterable[Patch], tensors: Mapping[str, Tensor], calls: int, runs: Sequence[str]
) -> None:
    """Every source is there and fits. runs: those that are made. Raises `ModelError`."""
    for patch in patches:
        source = patch.source
        if source in (ZERO, MEAN) or source.startswith(TEXT) or run_of(source) in runs:
            continue
        if not source.startswith((TENSOR, ADD)):
            raise ModelError(
                f"The patch at {patch.site.name} reads the run {source!r}, which is not made."
            )
        value = tensor_at(tensors, source, 0)
        try:
            fits = torch.broadcast_shapes(value.shape, patch.site.shape) == patch.site.shape
        except RuntimeError:
            fits = False
        if not fits or len(tensors[source]) not in (1, calls):
            raise ModelError(
                f"The tensor for {patch.site.name} has shape {list(tensors[source].shape)}; "
                f"expected [1 or {calls}, ...] that broadcasts to {list(patch.site.shape)}."
            )
