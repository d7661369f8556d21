"""Figures of jobs that are planned, not run: Stable Diffusion 1.5, SDXL, the bundled model."""

from __future__ import annotations

from collections.abc import Iterator

from report import PLAIN, PLANNED, Row

import fasttrace
from fasttrace.adapters.catalogue import list_sites
from fasttrace.adapters.pipeline import embedded_folder
from fasttrace.engine.options import Options
from fasttrace.engine.predict import Prediction
from fasttrace.forecast import forecast_architecture
from fasttrace.store.probes import read_probes

PROMPTS = 24
# Everything recorded once, whatever it takes.
OPTIONS = Options(clean="cache", cache=1 << 62)
WHOLE = ("transformer", "block")  # kinds of sites whose replacement makes much superfluous
# (architecture, steps). PNDM, which SD 1.5 comes with, makes one call more than it has steps.
LONG = [("sd15", 50), ("sdxl", 50)]
SHORT = [("sd15", 3), ("sd21", 1), ("sd21", 4), ("sdxl", 1), ("sdxl", 4)]


def planned(quick: bool) -> Iterator[Row]:
    """`useful_flops / bound_flops` and `flops / useful_flops`, exact, and of plain N+2."""
    for name, steps in LONG[:1] if quick else LONG + SHORT:
        found = forecast_architecture(name, prompts=PROMPTS, seeds=1, steps=steps, options=OPTIONS)
        yield from _rows(name, len(list_sites(name)), steps, found)
    for kind in WHOLE if not quick else ():
        sites = len(list_sites("sd15", sites=kind))
        found = forecast_architecture("sd15", prompts=PROMPTS, seeds=1, sites=kind, options=OPTIONS)
        yield from _rows(f"sd15, {kind} sites", sites, 50, found)
    tracer = fasttrace.Tracer(fasttrace.load("embedded"))
    entries = read_probes(embedded_folder("model").parent / "probes.json")[:PROMPTS]
    plan = tracer.plan([e.probe() for e in entries], seeds=1, metric="latent_recovery")
    found = tracer.forecast(plan, OPTIONS, measure=False)
    yield from _rows("bundled", len(tracer.sites()), plan.sampling.steps, found)


def _rows(name: str, sites: int, steps: int, found: Prediction) -> Iterator[Row]:
    sweep = f"unet, {found.calls} calls"
    row = Row(name, sweep, PLANNED, PROMPTS, sites, steps, bound_flops=found.bound_flops)
    row.flops, row.useful_flops = found.flops, found.useful_flops
    row.peak_bytes = found.peak_bytes
    yield row
    plain = Row(name, sweep, PLAIN, PROMPTS, sites, steps, bound_flops=found.bound_flops)
    plain.flops = plain.useful_flops = found.plain_flops
    yield plain
