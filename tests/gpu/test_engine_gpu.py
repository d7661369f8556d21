"""The engine on a real device: captured graphs, caches, our kernels, against the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrace_fast_engine import assert_same, make_pairs, mixed_lanes, rms, sites_of
from torch import Tensor

import fasttrace
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.testing import runs_of_pairs
from fasttrace.types import Lane, Patch

OPTIONS: dict[str, dict[str, Any]] = {
    "captured": {},
    "captured, our attention": {"attention": "fused"},
    "captured, cache on the host": {"home": "host", "clean": "cache"},
    "captured, leader": {"clean": "leader"},
    "captured, small batches": {"lanes": 6},
    "captured, nothing shared": {"sharing": False, "pruning": False},
    "generated code": {"runner": "eager"},
    "generated code, read in place": {"runner": "eager", "staged": False},
}


@pytest.fixture(scope="module", params=["sd", "sdxl", "embedded"])
def pipe(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Any]:
    name = request.param
    yield fasttrace.load(str(folders.get(name, name)), device="cuda")
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def half(folders: dict[str, Path]) -> Any:
    return fasttrace.load("embedded", device="cuda", dtype="float16")


@pytest.fixture
def expected(pipe: Any) -> tuple[Any, dict[Any, Tensor]]:
    model = Model(pipe)
    with scope(pipe):
        pairs = make_pairs(model, mixed_lanes(model), steps=6)
        return pairs, runs_of_pairs(ReferenceEngine(model), pairs)


def test_every_lane_is_the_reference(pipe: Any, expected: Any, subtests: Any) -> None:
    """Six calls: three warm a graph up, the fourth captures it, the rest are replays."""
    pairs, latents = expected
    for name, options in OPTIONS.items():
        with subtests.test(name), scope(pipe):
            engine = FastEngine(Model(pipe), **options)
            for _ in range(2):  # the second run replays from its first call on
                assert_same(runs_of_pairs(engine, pairs), latents)


def test_without_patches_it_is_the_corrupt_run_bit_for_bit(half: Any) -> None:
    """In one graph and batch shape; and copies in other rows and shapes are the floor."""
    model = Model(half)
    sites = sites_of(model)
    with scope(half):
        lanes = [
            Lane(),
            *(Lane((Patch(site, strength=0.0),)) for site in sites[:3]),
            *(Lane((Patch(site, source=CORRUPT),)) for site in sites[:3]),
        ]
        pairs = make_pairs(model, lanes, steps=6)
        runs = runs_of_pairs(FastEngine(model, pruning=False, sharing=False), pairs)
    for n in range(len(pairs)):
        corrupt = runs[n, CORRUPT]
        for lane in range(len(lanes)):
            difference = float((runs[n, lane] - corrupt).abs().max())
            assert difference <= 3 * _floor(runs), (n, lane, difference)


def _floor(runs: dict[Any, Tensor]) -> float:
    """Of the first pair, the one that has copies."""
    return float((runs[0, FLOOR] - runs[0, CORRUPT]).abs().max())


def test_half_precision_with_our_attention(half: Any) -> None:
    """Against torch's attention: effects agree far better than they are large."""
    model = Model(half)
    with scope(half):
        pairs = make_pairs(model, [Lane((Patch(s),)) for s in sites_of(model)], steps=8)
        ours, torchs = (
            runs_of_pairs(FastEngine(model, attention=name), pairs) for name in ("fused", "torch")
        )
    for n in range(len(pairs)):
        whole = rms(torchs[n, CLEAN].float() - torchs[n, CORRUPT].float())
        for lane in range(len(pairs[n].lanes)):
            assert rms(ours[n, lane].float() - torchs[n, lane].float()) < 0.05 * whole


def test_memory_is_what_was_predicted(half: Any) -> None:
    """By generated code: a captured graph keeps its memory in a pool of its own."""
    probe = fasttrace.Probe("a rocket on a red ground", "rocket")
    tracer = fasttrace.Tracer(half, runner="eager", lanes=16)
    plan = tracer.plan(probe, steps=3, metric="latent_recovery", height=128, width=128)
    list(tracer.iter_rows(plan, pictures=False))  # libraries take their workspaces
    tracer = fasttrace.Tracer(half, runner="eager", lanes=16)
    predicted = tracer.forecast(plan, measure=False).peak_bytes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    list(tracer.iter_rows(plan, pictures=False))
    took = torch.cuda.max_memory_allocated() - before
    assert took == pytest.approx(predicted, rel=0.2)


def test_a_trace_and_an_edit_agree_with_the_cpu(folders: dict[str, Path]) -> None:
    def answers(device: str) -> tuple[dict[str, float], Tensor]:
        pipe = fasttrace.load("embedded", device=device)
        tracer = fasttrace.Tracer(pipe)
        # The CPU's generator on either device: a pipeline's own is its device's, and draws others.
        result = tracer.trace(
            "a rocket on a red ground",
            "rocket",
            generator=torch.Generator().manual_seed(0),
            steps=6,
            metric="latent_recovery",
        )
        effects = {row.site: row.score for row in result.rows}
        edit = fasttrace.Editor(pipe).edit([("rocket", "house")], tokens="last")
        [change] = edit.changes.values()
        return effects, change.dense.double().cpu()

    (here, mine), (there, yours) = answers("cuda"), answers("cpu")
    assert here.keys() == there.keys()
    assert max(abs(here[k] - there[k]) for k in here) < 1e-3
    assert (mine - yours).norm() < 1e-5 * yours.norm()


def test_the_closed_form_never_waits(device: torch.device) -> None:
    from fasttrace.edit import solver

    generator = torch.Generator(device).manual_seed(0)
    keys, residual = (
        torch.randn(50, 96, dtype=torch.float64, device=device, generator=generator)
        for _ in range(2)
    )
    solve: Callable[..., Any] = solver.solve
    solve(keys, residual, 0.1)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = solve(keys, residual, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found is not None
