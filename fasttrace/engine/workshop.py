"""What the fast engine keeps from job to job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fasttrace.adapters.pipeline import Model
from fasttrace.engine.base import CLEAN, Pair
from fasttrace.engine.compiled import Denoiser, Tables, of_model
from fasttrace.engine.options import Options
from fasttrace.engine.runners import check_runner
from fasttrace.engine.stale import structure_of


class Workshop:
    """What outlives a job: compiled denoisers, tables, steps. `executed` counts FLOPs."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options, self.lanes = model, options, options.lanes
        cuda = model.device.type == "cuda"
        self.runner = options.runner or ("cudagraph" if cuda else "eager")
        check_runner(self.runner, model.device)
        self.executed = 0
        self._structure: Any = None
        self._denoisers: dict[Any, Denoiser] = {}
        self._tables: dict[Any, Tables] = {}
        self._kept: dict[Any, Any] = {}

    def renew(self) -> None:
        """Trace again if the model is built otherwise than when it was traced."""
        structure = structure_of(self.model.unet)
        if structure != self._structure:
            self._denoisers.clear()
            self._tables.clear()
            self._kept.clear()
            self._structure = structure

    def denoiser(self, pair: Pair) -> Denoiser:
        """Traced once for a picture size and a shape of text."""
        sampling, text = pair.sampling, pair.texts[CLEAN]
        key = (sampling.height, sampling.width, tuple(text.cond.shape))
        if key not in self._denoisers:
            self._denoisers[key] = of_model(self.model, sampling, text)
        return self._denoisers[key]

    def tables(self, denoiser: Denoiser, slots: int, calls: int) -> Tables:
        """Steps are bound to the tables they read, so other tables mean other steps."""
        key = (id(denoiser), slots, calls)
        if key not in self._tables:
            self._tables.clear()
            self._kept.clear()
            self._tables[key] = Tables(denoiser, slots, calls, self.model.device)
        return self._tables[key]

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A step, or a cache, by its key; made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def forget_steps(self) -> None:
        """Drop compiled steps, which hold buffers of their size."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] == "cache"}
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
