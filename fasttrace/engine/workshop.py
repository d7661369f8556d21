"""What the fast engine keeps from job to job."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.cache import Cache
from fasttrace.engine.compiled import Denoiser, Tables, of_model
from fasttrace.engine.kernels import use_fused
from fasttrace.engine.memory import available_bytes
from fasttrace.engine.options import Options
from fasttrace.engine.runners import Ground, check_runner
from fasttrace.engine.stale import structure_of
from fasttrace.errors import UsageError
from fasttrace.types import Sampling

# Of the free memory: decoding comes on top, and on a CPU what the allocator doesn't give back.
SHARE = {"cuda": 0.8, "cpu": 0.4}


class Workshop:
    """What outlives a job: compiled denoisers, tables, steps, one cache of clean activations."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        # Less after a failed allocation.
        self.lanes, self.cache_bytes = options.lanes, options.cache
        cuda = model.device.type == "cuda"
        self.runner = options.runner or ("cudagraph" if cuda else "eager")
        check_runner(self.runner, model.device)
        self.fused = use_fused(options.attention, model.device, model.dtype)
        if options.staged is False and (self.runner == "cudagraph" or options.home == "host"):
            raise UsageError(
                "A captured graph, and a cache in host memory, are read through staging slots: "
                "staged can't be False."
            )
        self.ground = Ground(model.device)
        self.stepped = 0  # FLOPs of steps, and of tables that are gone
        self._structure: Any = None
        self._denoisers: dict[Any, Denoiser] = {}
        self._tables: Tables | None = None
        self._kept: dict[Any, Any] = {}

    @cached_property
    def memory(self) -> int | None:
        """Bytes that were free before the first job; steps and caches are kept and used again."""
        free = available_bytes(self.model.device)
        return None if free is None else int(SHARE[self.model.device.type] * free)

    @property
    def executed(self) -> int:
        """FLOPs so far."""
        return self.stepped + (self._tables.flops if self._tables else 0)

    def renew(self) -> None:
        """Trace again if the model is built otherwise than when it was traced."""
        structure = structure_of(self.model.unet)
        if structure != self._structure:
            self._denoisers.clear()
            self.forget()
            self._structure = structure

    def denoiser(self, sampling: Sampling, text: Text) -> Denoiser:
        """Traced once for a picture size, a shape of text, and what a scheduler reads of it."""
        kept = self.model.family.kept_channels()
        key = (sampling.height, sampling.width, tuple(text.cond.shape), kept)
        if key not in self._denoisers:
            self._denoisers[key] = of_model(self.model, sampling, text)
        return self._denoisers[key]

    def tables(self, denoiser: Denoiser, slots: int, calls: int) -> Tables:
        """At least so many slots. Steps are bound to the tables they read and go with them."""
        held = self._tables
        if held and held.denoiser is denoiser and held.calls == calls and held.slots >= slots:
            return held
        self.forget()
        self._tables = Tables(denoiser, -(-slots // 8) * 8, calls, self.model.device)
        return self._tables

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A step by its key; made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def cache(self, key: tuple[Any, ...], make: Callable[[], Cache]) -> Cache:
        """The cache, if it is of this kind; else another one, and the steps that read it go."""
        held = self._kept.get("cache")
        if held is None or held[0] != key:
            self.forget_steps(cache=True)
            self._kept["cache"] = (key, make())
        found: Cache = self._kept["cache"][1]
        return found

    def steps(self) -> list[Any]:
        """What has been compiled."""
        return [kept for key, kept in self._kept.items() if key != "cache"]

    def forget(self) -> None:
        """Drop everything but denoisers."""
        self.stepped += self._tables.flops if self._tables else 0
        self._tables = None
        self.forget_steps(cache=True)

    def forget_steps(self, *, cache: bool = False) -> None:
        """Drop compiled steps, which hold buffers of their size, and perhaps the cache."""
        held = None if cache else self._kept.get("cache")
        self._kept = {} if held is None else {"cache": held}
        self.ground = Ground(self.model.device)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
