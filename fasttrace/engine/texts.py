"""Which text lies in which slot of the tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.graph.capture import flatten
from fasttrace.types import Sampling


class Texts:
    """The texts of some pairs: unconditional ones, each once, then clean and corrupt of each pair.

    others: runs of other prompts ("prompt:..."), whose texts come next, pair by pair. given: what
    the denoiser reads of them [shared, ...], by name. Lanes' own texts come behind.
    """

    def __init__(
        self, model: Model, sampling: Sampling, pairs: Sequence[Pair], others: Sequence[str] = ()
    ) -> None:
        self.model, self.sampling, self.pairs = model, sampling, pairs
        self.others = tuple(others)
        halves: list[dict[str, Tensor]] = []
        self._uncond: list[int] = []
        for pair in pairs:
            half, *rest = self._halves(pair.texts[CLEAN])
            if not rest:  # no guidance
                self._uncond.append(0)
                continue
            known = [i for i, other in enumerate(halves) if _equal(half, other)]
            self._uncond.append(known[0] if known else len(halves))
            if not known:
                halves.append(half)
        self._first = len(halves)
        for pair in pairs:
            halves += [self._halves(pair.texts[run])[-1] for run in (CLEAN, CORRUPT)]
        for pair in pairs:
            halves += [self._halves(pair.texts[run])[-1] for run in self.others]
        self.given = _joined(halves)
        self.shared = len(halves)

    def slot(self, pair: int, run: str) -> int:
        """run: "uncond", "clean", "corrupt" or one of the others."""
        if run == "uncond":
            return self._uncond[pair]
        if run in self.others:
            first = self._first + 2 * len(self.pairs)
            return first + pair * len(self.others) + self.others.index(run)
        return self._first + 2 * pair + (run == CORRUPT)

    def own(self, lanes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """What the denoiser reads of lanes' own texts [lanes, ...]; one encoder pass a pair."""
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for number in dict.fromkeys(pair for pair, _ in lanes):
            pair = self.pairs[number]
            mine = [lane for owner, lane in lanes if owner == number]
            assert pair.lane_texts is not None
            texts = pair.lane_texts([pair.lanes[i] for i in mine])
            for lane, text in zip(mine, texts, strict=True):
                found[number, lane] = self._halves(text)[-1]
        return _joined([found[key] for key in lanes])

    def _halves(self, text: Text) -> list[dict[str, Tensor]]:
        """The unconditional half (where there is guidance) and the conditional one."""
        given = flatten(self.model.conditioning(text, self.sampling))
        rows = len(next(iter(given.values())))
        return [{name: value[i : i + 1] for name, value in given.items()} for i in range(rows)]


def _joined(halves: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())
