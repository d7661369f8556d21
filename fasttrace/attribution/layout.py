"""Which runs a screen makes, and in which rows and text slots they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.attribution.estimators import Base
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.texts import Texts
from fasttrace.types import Sampling


@dataclass(frozen=True)
class Lane:
    """A run of one pair: "clean", "corrupt", or that of a base which is neither."""

    pair: int
    run: str | None
    base: Base | None = None

    @property
    def text(self) -> float:
        if self.run is not None:
            return float(self.run == CLEAN)
        assert self.base is not None
        return self.base.text


class Layout:
    """Lanes of the way forward: clean and corrupt of each pair in turn, then what bases add.

    bases: the same for every pair. Rows of the way back: pair by pair, each with all bases.
    """

    def __init__(
        self, model: Model, sampling: Sampling, pairs: Sequence[Pair], bases: Sequence[Base]
    ) -> None:
        self.pairs, self.bases = list(pairs), list(bases)
        self.texts = Texts(model, sampling, self.pairs)
        self.lanes = [Lane(p, run) for p in range(len(pairs)) for run in (CLEAN, CORRUPT)]
        own = [base for base in self.bases if base.run is None]
        self.lanes += [Lane(p, None, base) for p in range(len(pairs)) for base in own]

    def lane(self, pair: int, base: Base) -> int:
        """Whose latents a base's are."""
        return self.lanes.index(Lane(pair, base.run, base if base.run is None else None))

    @cached_property
    def rows(self) -> list[tuple[int, Base]]:
        """(pair, base) in the order of the rows on the way back."""
        return [(p, base) for p in range(len(self.pairs)) for base in self.bases]

    @cached_property
    def given(self) -> dict[str, Tensor]:
        """What the denoiser reads of all texts [slots, ...]: shared ones, then those between."""
        parts = [self.texts.given]
        for pair, between in self._between:
            clean, corrupt = (self.texts.slot(pair, run) for run in (CLEAN, CORRUPT))
            parts.append(
                {
                    name: _mixed(value[corrupt], value[clean], between)[None]
                    for name, value in self.texts.given.items()
                }
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def slot(self, pair: int, text: float) -> int:
        """Of a conditional text."""
        if text in (0.0, 1.0):
            return self.texts.slot(pair, CLEAN if text else CORRUPT)
        return self.texts.shared + self._between.index((pair, text))

    @cached_property
    def _between(self) -> list[tuple[int, float]]:
        found = [(lane.pair, lane.text) for lane in self.lanes]
        return list(dict.fromkeys(key for key in found if key[1] not in (0.0, 1.0)))


def _mixed(corrupt: Tensor, clean: Tensor, part: float) -> Tensor:
    return corrupt.lerp(clean, part) if corrupt.is_floating_point() else corrupt
