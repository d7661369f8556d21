"""The fast engine: lanes of many pairs in one compiled step, sharing the clean runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.base import Finished, Pair
from fasttrace.engine.compiled import Denoiser
from fasttrace.engine.job import Job
from fasttrace.engine.options import Options
from fasttrace.engine.workshop import Workshop
from fasttrace.types import Sampling


class FastEngine:
    """Batches of lanes through one compiled step. `options` are the fields of `Options`."""

    name = "fast"

    def __init__(self, model: Model, **options: Any) -> None:
        self.options = Options(**options)
        self.workshop = Workshop(model, self.options)
        self._busy = False

    @property
    def at_once(self) -> int:
        return self.options.pairs

    @property
    def executed(self) -> int:
        """FLOPs of all runs so far."""
        return self.workshop.executed

    def denoiser(self, sampling: Sampling, text: Text) -> Denoiser:
        """The compiled denoiser, up to date with the model."""
        if not self._busy:
            self.workshop.renew()
        return self.workshop.denoiser(sampling, text)

    def run(self, pairs: Sequence[Pair]) -> Iterator[Finished]:
        if self._busy:
            # Another run is suspended, and its tables and cache must stay as they are.
            other = FastEngine(self.workshop.model, **vars(self.options))
            try:
                yield from other.run(pairs)
            finally:
                self.workshop.stepped += other.executed
            return
        self._busy = True
        try:
            self.workshop.renew()
            start = 0
            while start < len(pairs):
                job = Job(self.workshop, pairs[start:])
                for finished in job.run():
                    runs = tuple((start + pair, run) for pair, run in finished.runs)
                    yield replace(finished, runs=runs)
                start += len(job.pairs)
        finally:
            self._busy = False
