"""Ranges for NVIDIA's tools, seen by a module in the place of nvtx."""

import sys
from types import ModuleType

import pytest

from fasttrace.profile.clock import Clock, find_ranges, make_clock, memory_reader
from fasttrace.profile.collect import ProfiledTracer
from fasttrace.profile.measure import run_with_ranges
from fasttrace.profile.recorder import Recorder


@pytest.fixture
def log(monkeypatch):
    """(depth, name) of every range, in the order in which they are opened; -1 closes one."""
    found: list[tuple[int, str]] = []
    stack: list[str] = []
    module = ModuleType("nvtx")

    def push_range(name):
        found.append((len(stack), name))
        stack.append(name)

    def pop_range():
        found.append((-1, stack.pop()))

    module.push_range, module.pop_range = push_range, pop_range
    monkeypatch.setitem(sys.modules, "nvtx", module)
    yield found
    assert stack == []


def test_nesting(traced, log):
    """A site's range lies in a call's, that in a batch's, that in the run's."""
    tracer, plan = traced
    run_with_ranges(tracer, plan, find_ranges())
    last = max(i for i, entry in enumerate(log) if entry == (0, "run"))
    inside = log[last:]
    sites = {site.name for site in tracer.sites()}
    assert inside[0] == (0, "run")
    assert inside[-1] == (-1, "run")
    names = {depth: {name for d, name in inside if d == depth} for depth in range(4)}
    assert any(name.startswith("batch of") for name in names[1])
    assert {"clean and corrupt of 1", "VAE", "text encoder"} <= names[1]
    assert {f"call {n}" for n in range(plan.calls)} <= names[2]
    assert names[3] == sites
    assert max(depth for depth, _ in inside) == 3


def test_without_a_clock_nothing_is_read(traced, log):
    tracer, plan = traced
    recorder = Recorder(None, find_ranges())
    rows = [row for row, _ in ProfiledTracer(tracer, recorder).iter_rows(plan)]
    expected = {row.key: row.score for row, _ in tracer.iter_rows(plan)}
    assert {row.key: row.score for row in rows} == expected
    assert log
    assert (recorder.steps, recorder.spans, recorder.totals, recorder.samples) == (0, [], {}, [])


def test_a_range_is_closed_where_the_run_fails(log):
    recorder = Recorder(None, find_ranges())
    with pytest.raises(MemoryError), recorder.inside("batch", "batch"), recorder.phase("VAE"):
        raise MemoryError
    assert log == [(0, "batch"), (1, "VAE"), (-1, "VAE"), (-1, "batch")]


def test_none_without_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # as if it weren't installed
    monkeypatch.setattr("torch.version.cuda", None)
    assert find_ranges() is None


def test_torchs_own_where_it_is_a_cuda_build(monkeypatch):
    called = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.nvtx.range_push", called.append)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: called.append("pop"))
    with find_ranges().inside("run"):
        pass
    assert called == ["run", "pop"]


def test_the_hosts_clock():
    import torch

    clock = make_clock(torch.device("cpu"))
    assert type(clock) is Clock
    clock.tick()
    assert 0 < clock.cost() < 1e-3
    assert len(clock.take()) == 1  # measuring its cost leaves its notes alone
    assert clock.take() == []
    read = memory_reader(torch.device("cpu"))
    assert read is None or read() > 1 << 20
