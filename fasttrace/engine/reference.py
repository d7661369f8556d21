"""The reference engine: diffusers modules, plain hooks, one run after another.

What it computes is the definition (Basu et al. 2024, section 3); other engines are held against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.hooks import rereading, rewriting, watching, write_rows
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Finished, Pair
from fasttrace.engine.graph.capture import flatten
from fasttrace.engine.sources import check_sources, prompts_of, run_of, written
from fasttrace.errors import ModelError
from fasttrace.types import Lane, Patch

Slot = tuple[str, str, int]  # site, branch, call
Recording = dict[Slot, Tensor]


@dataclass
class Run:
    """One run under way: what its hooks need to know."""

    name: str
    guided: bool
    copies: int = 1
    call: int = 0
    written: set[Patch] = field(default_factory=set)

    def rows(self, branch: str) -> slice:
        """Rows of a branch in the UNet's batch: unconditional copies first, then conditional."""
        if not self.guided or branch == "both":
            return slice(None)
        return slice(self.copies, None) if branch == "cond" else slice(None, self.copies)


class ReferenceEngine:
    """One run at a time. Clean activations are kept for as many sites as `cache` bytes hold.

    Sites beyond that wait for another pass over the clean run: slower, never larger.
    """

    name = "reference"
    at_once = 1

    def __init__(self, model: Model, cache: int = 2 << 30) -> None:
        self.model = model
        self.cache_bytes = cache

    def run(self, pairs: Sequence[Pair]) -> Iterator[Finished]:
        for number, pair in enumerate(pairs):
            for run, latents in self._run(pair):
                yield Finished(((number, run),) * len(latents), latents)

    def _run(self, pair: Pair) -> Iterator[tuple[str | int, Tensor]]:
        texts = pair.texts
        patches = [p for lane in pair.lanes for p in lane.patches]
        if pair.lane_texts is None:
            check_sources(patches, pair.tensors, self._calls(pair), tuple(texts))
        portions, sources = self._portions(pair), _sources(pair)
        for n, portion in enumerate(portions):
            lanes = [pair.lanes[i] for i in portion]
            recordings: dict[str, Recording] = {}
            for source in sources:
                slots = _slots(lanes, source, self._calls(pair))
                scored = n == 0 and source in (CLEAN, CORRUPT)
                if scored or slots:
                    recordings[source] = {}
                    latents = self.denoise(
                        source, texts[source], pair, record=recordings[source], slots=slots
                    )
                    if scored:
                        yield source, latents
            if n == 0:
                yield FLOOR, self.denoise(CORRUPT, texts[CORRUPT], pair, copies=2)
            for i in portion:
                yield i, self._lane(pair, pair.lanes[i], recordings)

    def _lane(self, pair: Pair, lane: Lane, recordings: dict[str, Recording]) -> Tensor:
        if pair.lane_texts is not None:
            return self.denoise("patched", pair.lane_texts([lane])[0], pair)
        return self.denoise(
            "patched", pair.texts[pair.base], pair, patches=lane.patches, recordings=recordings
        )

    def denoise(
        self,
        name: str,
        text: Text,
        pair: Pair,
        *,
        copies: int = 1,
        record: Recording | None = None,
        slots: set[Slot] = frozenset(),  # type: ignore[assignment]
        patches: Sequence[Patch] = (),
        recordings: dict[str, Recording] | None = None,
    ) -> Tensor:
        """The diffusers sampling loop with hooks: final latents [copies, C, h, w].

        `slots` are written to `record` as the run passes them; `patches` are read from
        `recordings`. Raises `ModelError` for a patch that reached no tensor and for NaN.
        """
        model, sampling = self.model, pair.sampling
        run = Run(name, model.guided(sampling), copies)
        scheduler = model.scheduler(sampling.steps)
        generators = [pair.start.generator() for _ in range(copies)]
        options = model.step_options(
            scheduler, sampling.eta, generators[0] if copies == 1 else generators
        )
        inputs = model.conditioning(text, sampling, copies)
        latents = pair.start.latents.repeat(copies, 1, 1, 1) * scheduler.init_noise_sigma
        with ExitStack() as hooks:
            if record is not None and slots:
                self._enter_recorder(hooks, run, record, slots)
            if patches:
                self._enter_writers(hooks, run, patches, recordings or {}, pair)
            for run.call, t in enumerate(scheduler.timesteps):
                batch = torch.cat([latents] * 2) if run.guided else latents
                batch = scheduler.scale_model_input(batch, t)
                noise: Tensor = model.unet(batch, t, **inputs)[0]
                if not torch.isfinite(noise).all():
                    raise self._explain(run, batch, t, inputs)
                noise = model.guide(noise, sampling)
                latents = scheduler.step(noise, t, latents, **options, return_dict=False)[0]
                if pair.on_step is not None:
                    pair.on_step(run.call, t, copies)
        for patch in patches:
            if patch not in run.written and patch.strength != 0:
                raise ModelError(
                    f"The patch at {patch.site.name} reached no tensor in calls "
                    f"{patch.selector.window}: the module was not called."
                )
        if not torch.isfinite(latents).all():
            raise ModelError(
                f"The scheduler {type(scheduler).__name__} gives NaN in the {name} run, though "
                "every prediction of the UNet is finite."
            )
        return latents

    def _enter_recorder(
        self, hooks: ExitStack, run: Run, record: Recording, slots: set[Slot]
    ) -> None:
        branches: dict[str, set[str]] = {}
        for site, branch, _ in slots:
            branches.setdefault(site, set()).add(branch)

        def keep(site: str, out: Tensor) -> None:
            for branch in branches[site]:
                if (site, branch, run.call) in slots:
                    record[site, branch, run.call] = out[run.rows(branch)].clone()

        modules = self.model.unet_modules()
        hooks.enter_context(watching({n: modules[n] for n in branches}, keep))

    def _enter_writers(
        self,
        hooks: ExitStack,
        run: Run,
        patches: Sequence[Patch],
        recordings: dict[str, Recording],
        pair: Pair,
    ) -> None:
        calls = self._calls(pair)

        def write(site: str, out: Tensor, of_text: bool) -> Tensor | None:
            new = out
            for patch in patches:
                start, stop = patch.selector.window or (0, calls)
                reads_text = patch.source.startswith("text:")
                here = patch.site.name == site and reads_text == of_text
                if not here or not start <= run.call < stop or patch.strength == 0:
                    continue
                branch = patch.selector.branch
                if reads_text:
                    other = pair.texts[patch.source.removeprefix("text:")]
                    source = self.model.conditioning(other, pair.sampling, run.copies)[
                        "encoder_hidden_states"
                    ][run.rows(branch)]
                    strength = patch.strength
                else:
                    slot = (site, branch, run.call)
                    source, strength = written(
                        patch,
                        new[run.rows(branch)],
                        lambda name, slot=slot: recordings[name][slot],  # type: ignore[misc]
                        pair.tensors,
                        run.call,
                    )
                new = write_rows(
                    new,
                    source,
                    rows=run.rows(branch),
                    tokens=patch.selector.tokens,
                    strength=strength,
                )
                run.written.add(patch)
            return None if new is out else new

        modules = self.model.unet_modules()
        named = {p.site.name: modules[p.site.name] for p in patches}
        hooks.enter_context(rewriting(named, lambda site, out: write(site, out, False)))
        hooks.enter_context(rereading(named, lambda site, text: write(site, text, True)))

    def _explain(self, run: Run, batch: Tensor, t: Any, inputs: dict[str, Any]) -> ModelError:
        """Run the call again and name the first site that isn't finite."""
        dtype = self.model.dtype
        advice = f"; the model runs in {dtype}"
        advice += (
            ", so its weights, the noise, the guidance, given latents or a source are at fault."
            if dtype == torch.float32
            else ", try float32."
        )
        given = flatten(inputs).values()
        if not all(bool(torch.isfinite(value).all()) for value in given):
            return ModelError(f"The text embedding of the {run.name} run holds NaN{advice}")
        order: list[str] = []

        def see(site: str, out: Tensor) -> None:
            if not torch.isfinite(out).all():
                order.append(site)

        with watching(self.model.unet_modules(), see):
            self.model.unet(batch, t, **inputs)
        where = order[0] if order else "the UNet's last layers"
        return ModelError(f"The {run.name} run gives NaN at {where} in call {run.call}{advice}")

    def _calls(self, pair: Pair) -> int:
        return len(self.model.scheduler(pair.sampling.steps).timesteps)

    def _portions(self, pair: Pair) -> list[list[int]]:
        """Lanes split so that what each portion records fits the cache; at least one portion."""
        calls, sources = self._calls(pair), _sources(pair)
        rows = {"both": 2 if self.model.guided(pair.sampling) else 1}
        width = self.model.dtype.itemsize
        portions: list[list[int]] = [[]]
        slots: set[tuple[str, Slot]] = set()
        used = 0
        for i, lane in enumerate(pair.lanes):
            size = {p.site.name: math.prod(p.site.shape) * width for p in lane.patches}
            asked = {(source, slot) for source in sources for slot in _slots([lane], source, calls)}
            need = sum(size[s[0]] * rows.get(s[1], 1) for key in asked - slots for s in [key[1]])
            if portions[-1] and used + need > self.cache_bytes:
                portions.append([])
                slots, used = set(), 0
                need = sum(size[s[0]] * rows.get(s[1], 1) for _, s in asked)
            portions[-1].append(i)
            slots |= asked
            used += need
        return portions


def _sources(pair: Pair) -> tuple[str, ...]:
    """The runs that may be recorded."""
    return (CLEAN, CORRUPT, *prompts_of(pair.lanes))


def _slots(lanes: Sequence[Lane], source: str, calls: int) -> set[Slot]:
    """What has to be recorded of a source run for these lanes."""
    return {
        (p.site.name, p.selector.branch, call)
        for lane in lanes
        for p in lane.patches
        if run_of(p.source) == source and p.site.component == "unet" and p.strength != 0
        for call in range(*(p.selector.window or (0, calls)))
    }
