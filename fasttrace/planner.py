"""From the words of a call to a plan: the part of the tracer that runs nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import TYPE_CHECKING, Any

from fasttrace.adapters.corruption import corrupt_prompt, resolve
from fasttrace.adapters.fingerprint import canonical_json
from fasttrace.adapters.pipeline import Model, Start, generators_of
from fasttrace.adapters.scope import scope
from fasttrace.adapters.selection import select_sites
from fasttrace.adapters.unet import UnetSites
from fasttrace.errors import UsageError
from fasttrace.metrics.registry import Metrics
from fasttrace.plan import options
from fasttrace.plan.build import Setting, build_plan, sampling_json
from fasttrace.plan.lanes import Planned, swap_lanes, text_lanes, unet_lanes
from fasttrace.plan.plan import Plan
from fasttrace.plan.sources import Asked, Written, parse_sources
from fasttrace.plan.windows import resolve_windows
from fasttrace.types import Corruption, Metric, Probe, Sampling, Site

if TYPE_CHECKING:
    import torch

MOST_NOISE = 2 << 30  # bytes of first latents that one plan holds
Seeds = int | Sequence[int] | Mapping[Probe, Sequence[int]] | None


class Planner:
    """Plans traces of one model for one engine."""

    def __init__(self, model: Model, engine: str) -> None:
        self.model = model
        self.metrics = Metrics(model)
        self._engine_name = engine

    @property
    def name(self) -> str:
        """What the model was loaded as: "embedded", a folder's name, a hub id."""
        return self.model.name

    @property
    def fingerprint(self) -> str:
        """sha256 over configurations and weights; one changed weight changes it."""
        return self.model.fingerprint()

    def sites(self, component: str = "unet", sites: str | Sequence[str] = "paper") -> list[Site]:
        """Sites in execution order. `component` is "unet" or "text_encoder" (every encoder)."""
        options.parse_choice(component, options.COMPONENTS, "component")
        if component == "text_encoder":
            return select_sites([s for e in self.model.encoders for s in e.sites()], sites)
        layout = self._layout(self.model.default("height"), self.model.default("width"))
        return select_sites(layout.every, sites)

    def plan(
        self,
        probes: Probe | Sequence[Probe],
        *,
        component: str = "unet",
        sites: str | Sequence[str] = "paper",
        tokens: str | Sequence[str | int] = "default",
        seeds: Seeds = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        corruption: Corruption | str | None = None,
        branch: str = "cond",
        window: Any = None,
        metric: str | Metric | Callable[..., Any] | Sequence[Any] | None = None,
        source: Asked = "clean",
        base: str = "corrupt",
    ) -> Plan:
        """Everything the trace will ask, before anything heavy runs; `UsageError` on bad input.

        probes: the captions; their subjects must be in them.
        sites: "paper" (the default set), "all attn2" or "attn2" (a kind), names, aliases, globs;
            "transformer" and "block" (up and middle) are kinds beyond the default set.
        tokens: text-encoder tracing only: "default", or of "subject", "last subject", "later",
            "EOS", "padding", "earlier" and positions.
        seeds: a count (0 .. n-1), the seeds themselves, or a mapping of each probe to its own; None
            is seed 0, or the generators' own.
        steps, guidance, height, width, eta, generator, latents: as in the pipeline's own call;
            None takes the model's default. `latents` [n, C, h, w] and generators: one per seed.
        corruption: a record, or its kind's name.
        branch: "cond", "uncond" or "both".
        window: half-open range of denoiser calls, or fractions; a list asks every site in each.
        metric: a registered key ("clip_score", "picture_similarity", "latent_distance",
            "latent_recovery", "attribute", "clip:<folder or hub id>"), a record, a callable,
            several.
        source: what is written: "clean", "zero", "mean", "prompt:<text>" or a `Source`, or several.
        base: the run it is written into. On "clean" an effect is what is lost: clean - score.
        """
        options.parse_choice(component, options.COMPONENTS, "component")
        options.parse_choice(base, ("corrupt", "clean"), "base")
        sources = parse_sources(source, base)
        captions = options.parse_probes(probes)
        for probe in captions:
            options.check_text(self.model, probe)
        asked = options.parse_corruption(corruption)
        of_text = component == "text_encoder"
        if asked.kind == "output_noise" and not self.model.family.swaps_text:
            raise UsageError(
                "Corruption 'output_noise' is noise on the text that the denoiser reads, and "
                "Kandinsky's reads an image embedding; use 'embedding_noise' or 'replace'."
            )
        if of_text and asked.kind == "output_noise":
            raise UsageError(
                "Corruption 'output_noise' comes after every text-encoder site, so no site could "
                "undo it; use 'embedding_noise' or 'replace'."
            )
        if of_text and (branch != "cond" or window is not None):
            raise UsageError(
                "Text-encoder tracing puts the caption's encoding right for a whole run: branch "
                "stays 'cond' and there is no window."
            )
        if not of_text and tokens != "default":
            raise UsageError("tokens choose text-encoder sites; use component='text_encoder'.")
        sampling = options.parse_sampling(
            self.model, steps=steps, guidance=guidance, height=height, width=width, eta=eta
        )
        starts, seeds_of = self._starts(sampling, seeds, generator, latents)
        calls = len(self.model.scheduler(sampling.steps).timesteps)
        found = options.parse_branch(branch, self.model.guided(sampling))
        windows = resolve_windows(window, calls)
        for prompt in {one.prompt for one in sources if one.prompt}:
            options.check_text(self.model, Probe(prompt, ""), with_subject=False)
        written = Written(sources, 1 if of_text else calls)
        for probe in captions if asked.replacement else ():
            corrupt = replace(probe, prompt=corrupt_prompt(probe, asked))
            options.check_text(self.model, corrupt, with_subject=False)
        with scope(self.model.pipe):
            resolved = resolve(self.model, captions, asked)
        if of_text:
            chosen = self.sites(component, sites)
            written.check(chosen)

            def lanes_of(probe: Probe) -> list[Planned]:
                return text_lanes(self.model, probe, chosen, tokens, resolved, written)
        else:
            layout = self._layout(sampling.height, sampling.width)
            chosen = select_sites(layout.every, sites)
            written.check(chosen)
            pooled = self.model.family.reads_pooled
            unet = unet_lanes(chosen, found, windows, calls, layout, pooled=pooled, written=written)

            def lanes_of(probe: Probe) -> list[Planned]:
                return unet

        # What an effect is measured from is part of what a row is; an ordinary one says nothing.
        about = asdict(resolved) | ({} if base == "corrupt" else {"base": base})
        return build_plan(
            self.model,
            setting=self._setting(component, canonical_json(about), sampling),
            probes=captions,
            starts=starts,
            seeds_of=seeds_of,
            corruption=resolved,
            sampling=sampling,
            metrics=self.metrics.resolve(metric, captions),
            calls=calls,
            lanes_of=lanes_of,
            extra={
                "sites": len(chosen),
                "branch": found,
                "windows": [list(w) for w in windows],
                "sources": [one.title for one in sources],
                "base": base,
            },
            base=base,
            tensors=written.tensors,
        )

    def plan_swap(
        self,
        probes: Probe | Sequence[Probe],
        other_prompt: str,
        *,
        neighbours: int = 2,
        sites: str | Sequence[str] = "paper",
        branch: str = "cond",
        window: Any = None,
        seeds: Seeds = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        metric: Any = None,
    ) -> Plan:
        """The plan of a `swap`; arguments as in `plan`. The probes' subjects may be empty."""
        if not self.model.family.swaps_text:
            raise UsageError(
                "A swap gives cross-attention layers another prompt's text; Kandinsky's attention "
                "reads an image embedding beside the picture, so it has none to swap."
            )
        captions = options.parse_probes(probes)
        for probe in captions:
            options.check_text(self.model, probe, with_subject=bool(probe.subject))
        options.check_text(self.model, Probe(other_prompt, ""), with_subject=False)
        sampling = options.parse_sampling(
            self.model, steps=steps, guidance=guidance, height=height, width=width, eta=eta
        )
        starts, seeds_of = self._starts(sampling, seeds, generator, latents)
        calls = len(self.model.scheduler(sampling.steps).timesteps)
        found = options.parse_branch(branch, self.model.guided(sampling))
        windows = resolve_windows(window, calls)
        layout = self._layout(sampling.height, sampling.width)
        lanes = swap_lanes(select_sites(layout.sites, sites), neighbours, found, windows)
        swap = {"kind": "swap", "neighbours": neighbours, "other_prompt": other_prompt}
        return build_plan(
            self.model,
            setting=self._setting("unet", canonical_json(swap), sampling),
            probes=captions,
            starts=starts,
            seeds_of=seeds_of,
            corruption=Corruption(kind="replace", replacement=other_prompt),
            sampling=sampling,
            metrics=self.metrics.resolve(metric, captions),
            calls=calls,
            lanes_of=lambda _probe: lanes,
            extra={"sites": len(lanes), "branch": found, "windows": [list(w) for w in windows]},
            other_prompt=other_prompt,
            base="clean",
        )

    def _layout(self, height: int, width: int) -> UnetSites:
        return self.model.sites(height, width)

    def _setting(self, component: str, corruption: str, sampling: Sampling) -> Setting:
        return Setting(
            model=self.name,
            fingerprint=self.fingerprint,
            engine=self._engine_name,
            dtype=str(self.model.dtype).removeprefix("torch."),
            component=component,
            corruption=corruption,
            sampling=sampling_json(
                sampling, self.model.pipe.scheduler, self.model.family.sampling_facts()
            ),
        )

    def _starts(
        self,
        sampling: Sampling,
        seeds: Seeds,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> tuple[dict[int, Start], Callable[[Probe], Sequence[int]]]:
        """First latents by seed, and which seeds each probe is traced with."""
        given = generators_of(generator)
        by_probe = None
        if isinstance(seeds, Mapping):
            by_probe = {p: options.parse_seeds(list(s)) for p, s in seeds.items()}
            numbers = tuple(dict.fromkeys(s for group in by_probe.values() for s in group))
        elif seeds is None:
            numbers = tuple(g.initial_seed() for g in given) or (0,)
        else:
            numbers = options.parse_seeds(seeds)
        for name, count in (("generators", len(given)), ("latents", _rows(latents))):
            if count is not None and count != len(numbers) and (name == "latents" or given):
                raise UsageError(f"{count} {name} were given for {len(numbers)} seeds.")
        size = 4 * len(numbers) * prod(self.model.latent_shape(sampling))
        if size > MOST_NOISE:
            raise UsageError(
                f"The first latents of {len(numbers)} seeds take {size >> 30} GiB at this size; "
                "split them into several plans."
            )
        starts = {
            seed: self.model.start(
                sampling,
                seed,
                given[i] if given else None,
                None if latents is None else latents[i : i + 1],
            )
            for i, seed in enumerate(numbers)
        }
        if len(starts) != len(numbers):
            raise UsageError("Two generators have the same seed; give each its own.")
        return starts, lambda probe: numbers if by_probe is None else by_probe.get(probe, ())


def _rows(latents: torch.Tensor | None) -> int | None:
    return None if latents is None else int(latents.shape[0])
