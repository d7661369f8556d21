"""Checks a way against the reference engine, and only then measures it."""

from __future__ import annotations

import ctypes
import gc
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from ways import WAYS, Fast, Runner, Runs
from workloads import Sweep, load, make_sweep, scratch_folder

from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR
from fasttrace.engine.compiled import Denoiser
from fasttrace.engine.options import Options
from fasttrace.engine.predict import Prediction, predict
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.metrics.latent import recovery
from fasttrace.testing import runs_of_pairs
from fasttrace.types import MetricContext

SAME = 1e-4  # largest difference of a score from the reference's, or 3 noise floors (DESIGN 3.6)
FLOORS = 3
TELLING = 0.01  # some lane has to recover as much, or agreement would mean nothing
Scores = dict[tuple[int, int], float]  # by (pair, lane)


@dataclass(frozen=True)
class Checked:
    """A way's answers held against the reference's. rows: that went through the UNet."""

    worst: float
    floor: float | None
    rows: int


def scores(sweep: Sweep, runs: Runs) -> Scores:
    """How much of the way from the corrupt to the clean latent each lane recovers."""
    return {
        (n, i): float(recovery(runs[n, i], _context(sweep, runs, n)))
        for n, pair in enumerate(sweep.pairs)
        for i in range(len(pair.lanes))
    }


def _context(sweep: Sweep, runs: Runs, n: int) -> MetricContext:
    return MetricContext(sweep.workload.probes[n], None, runs[n, CLEAN], runs[n, CORRUPT])


def reference_scores(sweep: Sweep) -> Scores:
    """The reference engine's. Raises `RuntimeError` where the scores are all next to zero."""
    runs = runs_of_pairs(ReferenceEngine(sweep.workload.model), sweep.engine_pairs())
    found = scores(sweep, runs)
    if max(map(abs, found.values())) < TELLING:
        raise RuntimeError(f"{sweep.workload.name}, {sweep.name}: no site recovers anything.")
    return found


def check(run: Runner, sweep: Sweep, reference: Scores, *, count: bool) -> Checked:
    """Run it once. Raises `RuntimeError` where it ran other lanes.

    count: the rows that go through the UNet; fasttrace runs no UNet, and would trace the counter.
    """
    with rows_counted() if count else nullcontext([0]) as rows:
        runs = run(sweep)
    found = scores(sweep, runs)
    if found.keys() != reference.keys():
        raise RuntimeError("It did not run the lanes that it was asked for.")
    worst = max(abs(found[key] - reference[key]) for key in found)
    return Checked(math.inf if math.isnan(worst) else worst, noise_floor(sweep, runs), rows[0])


def noise_floor(sweep: Sweep, runs: Runs) -> float | None:
    """The largest score of a copy of the corrupt run, whose score is 0; None without copies."""
    copies = {n: latents for (n, run), latents in runs.items() if run == FLOOR}
    if not copies:
        return None
    return max(
        float(recovery(latents, _context(sweep, runs, n)).abs().max())
        for n, latents in copies.items()
    )


@contextmanager
def rows_counted() -> Iterator[list[int]]:
    """How many rows go through any UNet, in the list's one place."""
    rows = [0]

    def see(module: nn.Module, args: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            rows[0] += len(args[0])

    handle = register_module_forward_pre_hook(see)
    try:
        yield rows
    finally:
        handle.remove()


def denoiser_of(fast: Fast, sweep: Sweep) -> Denoiser:
    first = sweep.pairs[0]
    return fast.engine.denoiser(first.sampling, first.texts[CLEAN])


def row_flops(fast: Fast, sweep: Sweep) -> int:
    """FLOPs of one row of one call of the UNet as diffusers runs it, nothing hoisted."""
    denoiser = denoiser_of(fast, sweep)
    return denoiser.cost.whole + denoiser.text_cost + denoiser.step_cost


def predicted(fast: Fast, sweep: Sweep) -> Prediction:
    """What `fasttrace plan` says of the sweep."""
    return predict(
        [pair.lanes for pair in sweep.pairs],
        denoiser_of(fast, sweep),
        Options(),
        calls=sweep.workload.calls,
        guided=True,
        own_texts=sweep.of_text,
        itemsize=sweep.workload.model.dtype.itemsize,
    )


def timed(ways: Mapping[str, Runner], sweep: Sweep, runs: int) -> dict[str, list[float]]:
    """Seconds of each run; the ways take turns, so that a slow minute hits them all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, run in ways.items():
            gc.collect()
            start = time.perf_counter()
            scores(sweep, run(sweep))
            found[name].append(time.perf_counter() - start)
    return found


def spread(seconds: list[float]) -> dict[str, Any]:
    return {
        "seconds_median": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "runs": len(seconds),
    }


# ---- memory


def peak_in_fresh_process(sweep: Sweep, way: str) -> int | None:
    """Peak resident bytes over the loaded model's; None where /proc doesn't tell (not Linux).

    An engine traces in it, so a warm fasttrace is not told from a cold one.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    work = sweep.workload
    numbers = (len(work.probes), work.sampling.steps, work.every)
    script = Path(__file__).with_name("sweeps.py")
    done = subprocess.run(
        [sys.executable, str(script), "--peak", work.name, sweep.name, way, *map(str, numbers)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def peak(workload: str, sweep: str, way: str, prompts: int, steps: int, every: int) -> int:
    """The same in this process.

    A run on a tiny model goes before: code imported on first use is no memory of a sweep's.
    """
    chosen = WAYS[way]
    with scratch_folder() as folder, torch.no_grad():
        small = load("tiny", 1, 4, Path(folder))
        with scope(small.model.pipe):
            chosen.make(small)(make_sweep(small, sweep))
        work = load(workload, prompts, steps, Path(folder), every)
        with scope(work.model.pipe):
            asked = make_sweep(work, sweep)
            run = chosen.make(work)
            gc.collect()
            give_back_memory()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            before = _status("VmRSS")
            run(asked)
            return _status("VmHWM") - before


def give_back_memory() -> None:
    """Pages that the allocator holds would be handed out again without counting."""
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
