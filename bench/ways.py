"""Ways to run one sweep: the authors', three that people use, and fasttrace.

Each takes a sweep and gives the final latents [1, C, h, w] of every run, by (pair, run); a run is
"clean", "corrupt" or a lane's number. They share the text embeddings, the first latents and the
scheduler's settings, and nothing else. Guided, deterministic sampling is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Sweep, Workload

from fasttrace.adapters.corruption import enter_corruption
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import encode_cond
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.testing import runs_of_pairs
from fasttrace.types import Probe

Runs = dict[tuple[int, str | int], Tensor]
Runner = Callable[[Sweep], Runs]
LANES = 48  # of a batch by hand, as many as fasttrace takes


@contextmanager
def hooked(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see(name, output)` after each module; it may write into the output."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            see(name, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(model: Model, pair: Pair, conds: Tensor) -> Tensor:
    """The loop of diffusers' StableDiffusionPipeline: final latents [L, C, h, w].

    conds [L, n, D]: the text of each lane. The UNet sees L unconditional rows, then L conditional.
    """
    lanes, sampling = len(conds), pair.sampling
    scheduler = model.scheduler(sampling.steps)
    uncond = pair.texts[CLEAN].uncond
    text = torch.cat([uncond.expand(lanes, -1, -1), conds])
    latents = pair.start.latents.repeat(lanes, 1, 1, 1) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        rows = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        noise = model.unet(rows, t, encoder_hidden_states=text, return_dict=False)[0]
        without, with_text = noise.chunk(2)
        noise = without + sampling.guidance * (with_text - without)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def sites_of(pair: Pair) -> list[str]:
    """The site of each lane."""
    return [lane.patches[0].site.name for lane in pair.lanes]


# ---- a. the authors' way


def authors(sweep: Sweep) -> Runs:
    """A generation for every site: clean, corrupt and patched rows in one batch.

    Basu et al. 2024, section 3.2: the patched row takes the clean row's output, at every call.
    """
    model, runs = sweep.workload.model, Runs()
    modules = model.unet_modules()

    def patch(_site: str, out: Tensor) -> None:
        out[5] = out[3]  # rows: three unconditional, then clean, corrupt, patched

    for n, pair in enumerate(sweep.pairs):
        clean, corrupt = (pair.texts[run].cond for run in (CLEAN, CORRUPT))
        for i, site in enumerate(sites_of(pair)):
            with hooked({site: modules[site]}, patch):
                latents = generate(model, pair, torch.cat([clean, corrupt, corrupt]))
            runs[n, CLEAN], runs[n, CORRUPT], runs[n, i] = latents.split(1)
    return runs


# ---- b. one lane after another


def sequential(sweep: Sweep) -> Runs:
    """Clean once with its activations kept, corrupt once, then lane after lane: N + 2 runs."""
    runs = Runs()
    for n, pair in enumerate(sweep.pairs):
        own = _text_runs(sweep, n) if sweep.of_text else _unet_runs(sweep, pair)
        runs |= {(n, run): latents for run, latents in own}
    return runs


def _unet_runs(sweep: Sweep, pair: Pair) -> Iterator[tuple[str | int, Tensor]]:
    model, corrupt = sweep.workload.model, pair.texts[CORRUPT].cond
    modules = model.unet_modules()
    latents, kept = clean_run(model, pair)
    yield CLEAN, latents
    yield CORRUPT, generate(model, pair, corrupt)
    for i, site in enumerate(sites_of(pair)):
        with hooked({site: modules[site]}, writer({site: (1, kept[site])})):
            yield i, generate(model, pair, corrupt)


def clean_run(model: Model, pair: Pair) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The clean run's latents, and every site's conditional output, a tensor a call."""
    modules = model.unet_modules()
    kept: dict[str, list[Tensor]] = {site: [] for site in sites_of(pair)}
    with hooked(
        {site: modules[site] for site in kept},
        lambda site, out: kept[site].append(out[1:].clone()),
    ):
        return generate(model, pair, pair.texts[CLEAN].cond), kept


def writer(lanes: Mapping[str, tuple[int, Sequence[Tensor]]]) -> Callable[[str, Tensor], None]:
    """For `hooked`: by site the row to write, and what: a tensor [1, ...] a call."""
    left = {site: (row, iter(source)) for site, (row, source) in lanes.items()}

    def write(site: str, out: Tensor) -> None:
        row, source = left[site]
        out[row] = next(source)[0]

    return write


def _text_runs(sweep: Sweep, n: int) -> Iterator[tuple[str | int, Tensor]]:
    """A pass of the text encoder and a picture for every lane."""
    workload, pair, probe = sweep.workload, sweep.pairs[n], sweep.workload.probes[n]
    model = workload.model
    for run in (CLEAN, CORRUPT):
        yield run, generate(model, pair, pair.texts[run].cond)
    for i, cond in enumerate(_patched_texts(workload, pair, probe)):
        yield i, generate(model, pair, cond)


def _patched_texts(workload: Workload, pair: Pair, probe: Probe) -> Iterator[Tensor]:
    """The corrupt prompt's encoding [1, n, D] with one clean activation put back, a lane each."""
    model = workload.model
    modules = {name: m for e in model.encoders for name, m in e.modules().items()}
    kept: dict[str, Tensor] = {}
    with hooked(modules, lambda site, out: kept.__setitem__(site, out.clone())):
        encode_cond(model.pipe, probe.prompt, model.device)
    for lane in pair.lanes:
        (patch,) = lane.patches
        tokens, site = list(patch.selector.tokens or ()), patch.site.name

        def write(site: str, out: Tensor, tokens: list[int] = tokens) -> None:
            out[:, tokens] = kept[site][:, tokens]

        with ExitStack() as hooks:
            enter_corruption(hooks, model, probe, workload.corruption)
            hooks.enter_context(hooked({site: modules[site]}, write))
            yield encode_cond(model.pipe, probe.prompt, model.device)[0]


# ---- c. nnsight


class Nnsight:
    """nnsight's "Sweep over layers" (its documentation, patterns/activation-patching): a trace for
    every site, the clean and the corrupt prompt two invokes of it, a barrier between reading and
    writing; here around a whole pipeline (models/diffusion-model), at every denoiser call.

    It loads its own copy of the weights, since it instruments the modules that it wraps.
    """

    def __init__(self, workload: Workload) -> None:
        from nnsight import DiffusionModel

        self.traced = DiffusionModel(
            str(workload.folder), dispatch=True, dtype=workload.model.dtype
        )
        self.traced.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, sweep: Sweep) -> Runs:
        runs, calls = Runs(), sweep.workload.calls
        for n, pair in enumerate(sweep.pairs):
            clean, corrupt = (pair.texts[run].cond for run in (CLEAN, CORRUPT))
            with self.traced.generate(prompt_embeds=corrupt, **self._arguments(pair, 1)) as tracer:
                latents = tracer.result.images.save()
            runs[n, CORRUPT] = latents
            for i, site in enumerate(sites_of(pair)):
                module = self.traced.get(site)
                with self.traced.generate(**self._arguments(pair, 2)) as tracer:
                    barrier = tracer.barrier(2)
                    with tracer.invoke(prompt_embeds=clean):
                        for _ in tracer.iter[:calls]:
                            found = module.output
                            barrier()
                    with tracer.invoke(prompt_embeds=corrupt):
                        for _ in tracer.iter[:calls]:
                            barrier()
                            module.output = torch.cat([module.output[:1], found[1:]])
                    with tracer.invoke():
                        latents = tracer.result.images.save()
                runs[n, CLEAN], runs[n, i] = latents.split(1)
        return runs

    def _arguments(self, pair: Pair, rows: int) -> dict[str, Any]:
        """Of the pipeline's own call, apart from the prompts."""
        sampling = pair.sampling
        return {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance,
            "height": sampling.height,
            "width": sampling.width,
            "latents": pair.start.latents.repeat(rows, 1, 1, 1),
            "negative_prompt_embeds": pair.texts[CLEAN].uncond.repeat(rows, 1, 1),
            "output_type": "latent",
        }


# ---- d. lanes in batches


def batched(sweep: Sweep) -> Runs:
    """A good engineer's afternoon: clean once, then the corrupt run and all lanes in batches.

    Hooks write each lane's clean activation into its conditional row.
    """
    model, runs = sweep.workload.model, Runs()
    modules = model.unet_modules()
    for n, pair in enumerate(sweep.pairs):
        runs[n, CLEAN], kept = clean_run(model, pair)
        lanes = [(CORRUPT, None), *enumerate(sites_of(pair))]
        for start in range(0, len(lanes), LANES):
            part = lanes[start : start + LANES]
            written = {
                site: (len(part) + row, kept[site])
                for row, (_, site) in enumerate(part)
                if site is not None
            }
            with hooked({site: modules[site] for site in written}, writer(written)):
                latents = generate(model, pair, pair.texts[CORRUPT].cond.repeat(len(part), 1, 1))
            runs |= {(n, run): row for (run, _), row in zip(part, latents.split(1), strict=True)}
    return runs


# ---- e. fasttrace


class Fast:
    """The fast engine with its default options."""

    def __init__(self, workload: Workload) -> None:
        self.engine = FastEngine(Model(workload.model.pipe))

    def __call__(self, sweep: Sweep) -> Runs:
        return runs_of_pairs(self.engine, sweep.engine_pairs())


def fast_cold(sweep: Sweep) -> Runs:
    """An engine that has traced nothing yet."""
    return Fast(sweep.workload)(sweep)


@dataclass(frozen=True)
class Way:
    """make: what a way does once for a loaded model, before any sweep. sweeps: it can run."""

    label: str
    make: Callable[[Workload], Runner]
    sweeps: tuple[str, ...] = ("unet",)


FAST, COLD = "fast", "fast cold"
WAYS = {
    "authors": Way("a. the authors': clean, corrupt, patched in one batch", lambda _: authors),
    "sequential": Way(
        "b. clean kept, one lane at a time", lambda _: sequential, sweeps=("unet", "text")
    ),
    "nnsight": Way("c. nnsight's layer sweep", Nnsight),
    "batched": Way("d. lanes batched by hand", lambda _: batched),
    FAST: Way("e. fasttrace", Fast, sweeps=("unet", "text", "window")),
    COLD: Way("e. fasttrace, tracing included", lambda _: fast_cold, sweeps=("unet", "text")),
}
