"""An engine's answers in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrace.engine.base import Engine, Pair


def runs_of_pairs(engine: Engine, pairs: Sequence[Pair]) -> dict[tuple[int, str | int], Tensor]:
    """Final latents by pair and run; [copies, C, h, w] for "floor", else [1, C, h, w]."""
    found: dict[tuple[int, str | int], list[Tensor]] = {}
    with torch.no_grad():
        for finished in engine.run(pairs):
            for i, key in enumerate(finished.runs):
                found.setdefault(key, []).append(finished.latents[i : i + 1])
    return {key: torch.cat(parts) for key, parts in found.items()}


def runs_of(engine: Engine, pair: Pair) -> dict[str | int, Tensor]:
    """The same of one pair."""
    return {run: latents for (_, run), latents in runs_of_pairs(engine, [pair]).items()}
