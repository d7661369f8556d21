"""From activations and gradients of one call to scores, added up over bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fasttrace.attribution.estimators import Estimator
from fasttrace.attribution.keys import swapped_keys
from fasttrace.attribution.layout import Layout
from fasttrace.attribution.machine import Machine
from fasttrace.attribution.readings import Reading
from fasttrace.engine.base import CLEAN, CORRUPT

Activations = dict[str, Tensor]  # place -> [rows, ...]
Beside = dict[tuple[str, str], Activations]  # (run, branch) -> place -> [P, ...]


@dataclass(frozen=True)
class Question:
    """What is asked of every pair.

    branches: "cond", "uncond", whose rows are scored. horizon: for so many calls, the patched one
    included, predictions answer to a patch; later ones are held as they were. None is all. texts:
    names of what the denoiser reads of a text, whose tokens are scored too.
    """

    readings: tuple[Reading, ...]
    estimator: Estimator
    branches: tuple[str, ...] = ("cond",)
    horizon: int | None = None
    texts: tuple[Reading, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(reading.mark for reading in self.readings))

    @property
    def attentions(self) -> tuple[str, ...]:
        """Sites whose keys go through the softmax."""
        keys = [r.site for r in self.readings if r.part == "key"]
        return tuple(dict.fromkeys(keys)) if self.estimator.exact_keys else ()


@dataclass
class Found:
    """scores: reading -> [P, branches, T, size]. text_gradients: name -> [P, ...], over all calls,
    averaged over the bases."""

    scores: dict[str, Tensor]
    text_gradients: dict[str, Tensor] = field(default_factory=dict)


class Scores:
    """The scores of one group of pairs while they are being added up."""

    def __init__(self, machine: Machine, layout: Layout, question: Question) -> None:
        self.machine, self.layout, self.question = machine, layout, question
        self.wide = torch.promote_types(machine.dtype, torch.float32)
        self.device = machine.device
        self.pair_of = self._index([p for p, _ in layout.rows])
        pairs = len(layout.pairs)
        shape = pairs, len(question.branches), machine.schedule.calls
        self.found = Found(
            {
                r.key: torch.zeros(*shape, r.size, dtype=self.wide, device=self.device)
                for r in (*question.readings, *question.texts)
            },
            {
                r.mark: torch.zeros(pairs, *r.shape, dtype=self.wide, device=self.device)
                for r in question.texts
            },
        )

    def add(
        self,
        call: int,
        given: Activations,
        found: Activations,
        beside: Beside,
        scales: Mapping[str, float | None],
    ) -> None:
        """given: of a call of all rows. found: gradients. beside: runs that are no row's."""
        question = self.question
        by_mark: dict[str, list[Reading]] = {}
        for reading in question.readings:
            by_mark.setdefault(reading.mark, []).append(reading)
        for b, branch in enumerate(question.branches):
            for mark, readings in by_mark.items():
                rows, weights = self._counting(mark, call)
                if mark not in found or not len(rows):
                    continue
                clean = self._of_run(CLEAN, branch, mark, given, beside)
                difference = clean.index_select(0, self.pair_of[rows])
                if question.estimator.difference == CORRUPT:
                    corrupt = self._of_run(CORRUPT, branch, mark, given, beside)
                    difference = difference - corrupt.index_select(0, self.pair_of[rows])
                else:
                    own = given.get(f"{mark}/before", given[mark])
                    difference = difference - self._half(own, branch)[rows].to(self.wide)
                product = difference * self._half(found[mark], branch)[rows].to(self.wide)
                for reading in readings:
                    site = reading.site
                    if reading.part == "key" and site in question.attentions:
                        scores = self._keys(site, branch, rows, given, found, beside, scales)
                    else:
                        scores = reading.reduce(product)
                    self._add(reading, b, call, rows, weights, scores)
        cond = question.branches.index("cond") if "cond" in question.branches else None
        for reading in question.texts if cond is not None else ():
            self._text(reading, cond or 0, call, found[reading.mark].to(self.wide))

    def _keys(
        self,
        site: str,
        branch: str,
        rows: Tensor,
        given: Activations,
        found: Activations,
        beside: Beside,
        scales: Mapping[str, float | None],
    ) -> Tensor:
        """[rows, n]: each token's key swapped alone, in every head."""
        query, keys, values = (
            self._half(given[f"{site}/{name}"], branch)[rows]
            for name in ("query", "keys", "values")
        )
        gradient = self._half(found[f"{site}/attended"], branch)[rows]
        new = self._of_run(CLEAN, branch, f"{site}/keys", given, beside)
        if self.question.estimator.difference == CORRUPT:
            # The same change of the key as the slope is multiplied by, from where the run is.
            new = new - self._of_run(CORRUPT, branch, f"{site}/keys", given, beside)
            new = keys.to(self.wide) + new.index_select(0, self.pair_of[rows])
        else:
            new = new.index_select(0, self.pair_of[rows])
        return swapped_keys(query, keys, new, values, gradient, scales[site]).sum(1)

    def _text(self, reading: Reading, branch: int, call: int, gradient: Tensor) -> None:
        given, texts = self.layout.given[reading.mark].to(self.wide), self.layout.texts
        pairs = range(len(self.layout.pairs))
        clean, corrupt = (
            given[self._index([texts.slot(p, run) for p in pairs])] for run in (CLEAN, CORRUPT)
        )
        rows, weights = self._counting(reading.mark, call)
        product = (clean - corrupt).index_select(0, self.pair_of) * gradient
        self._add(reading, branch, call, rows, weights, reading.reduce(product))
        weighted = gradient * weights.reshape(-1, *(1,) * (gradient.dim() - 1))
        self.found.text_gradients[reading.mark].index_add_(0, self.pair_of, weighted)

    def _add(
        self, reading: Reading, branch: int, call: int, rows: Tensor, weights: Tensor, new: Tensor
    ) -> None:
        target = self.found.scores[reading.key][:, branch, call]
        target.index_add_(0, self.pair_of[rows], new.to(self.wide) * weights[:, None])

    def _counting(self, place: str, call: int) -> tuple[Tensor, Tensor]:
        """Rows that count for a place in a call, and their weights."""
        rows = [
            (i, base.weight)
            for i, (_, base) in enumerate(self.layout.rows)
            if base.acts(call) and (base.counts is None or place in base.counts)
        ]
        weights = torch.tensor([w for _, w in rows], dtype=self.wide, device=self.device)
        return self._index([i for i, _ in rows]), weights

    def _of_run(
        self,
        run: str,
        branch: str,
        place: str,
        given: Activations,
        beside: Beside,
    ) -> Tensor:
        """Activations [P, ...] of a run: a base's own rows, or the run beside."""
        if (run, branch) in beside:
            return beside[run, branch][place].to(self.wide)
        mine = [i for i, (_, base) in enumerate(self.layout.rows) if base.run == run]
        return self._half(given[place], branch)[self._index(mine)].to(self.wide)

    def _half(self, tensor: Tensor, branch: str) -> Tensor:
        """A branch's rows."""
        if not self.machine.guided:
            return tensor
        lanes = len(self.pair_of)
        return tensor[lanes:] if branch == "cond" else tensor[:lanes]

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
