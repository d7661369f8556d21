"""Clean activations in host memory: what a step finds in the slots, and on CUDA when."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.cache import SLOTS, Cache, Feed, Upload
from fasttrace.engine.fast import FastEngine
from fasttrace.testing import runs_of_pairs
from fasttrace.types import Corruption, Lane, Patch, Probe, Sampling, Selector
from fasttrace_kernels import prefetch
from fasttrace_kernels.prefetch import PrefetchRing

SHAPES = {"wide": (5, 3), "flat": (7,)}
ROWS, CALLS = 3, 6


def host_cache(calls: int = CALLS) -> Cache:
    cpu = torch.device("cpu")
    return Cache(SHAPES, ROWS, calls, torch.float32, cpu, "host", staged=True)


def record(cache: Cache, seed: int) -> None:
    """A run that writes every row, as a trunk does."""
    cache.begin()
    generator = torch.Generator().manual_seed(seed)
    for site in SHAPES:
        for call in range(cache.calls):
            rows = cache.target(site, call, 0, ROWS)
            rows.copy_(torch.randn(rows.shape, generator=generator))


def read(cache: Cache, start: int, stop: int) -> None:
    """A run of calls start ... stop - 1, which finds its own rows at each."""
    cache.begin()
    for call in range(start, stop):
        cache.before(call)
        for site in SHAPES:
            found = cache.source(site, call)[[cache.row(call, row) for row in range(ROWS)]]
            assert torch.equal(found, cache.kept[site][call]), (site, call)
        cache.after(call)


@pytest.fixture(params=["compiled", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        off = prefetch.ExtensionStatus(False, "")
        monkeypatch.setattr(prefetch, "host_status", lambda: off)
    else:
        assert prefetch.host_status().loaded, prefetch.host_status().sentence
    return str(request.param)


def test_runs_over_a_cache(form):
    cache = host_cache()
    assert isinstance(cache._feed, Feed)
    assert isinstance(cache._feed.ring, PrefetchRing) == (form == "python")
    for seed, (start, stop) in enumerate([(0, CALLS), (2, CALLS), (0, 3), (5, CALLS), (0, 1)]):
        record(cache, seed)
        read(cache, start, stop)
        read(cache, start, CALLS)


def test_an_abandoned_run(form):
    """It ended between `before` and `after`, as a failed allocation does; then others are kept."""
    cache = host_cache()
    for seed in range(3):
        record(cache, seed)
        cache.before(seed)
    record(cache, 9)
    read(cache, 0, CALLS)


def test_few_calls(form):
    for calls in (1, 2):
        cache = host_cache(calls)
        record(cache, 0)
        read(cache, 0, calls)


DROPPED = """
import torch
from fasttrace.engine.cache import Cache
for form in ("compiled", "python"):
    for _ in range(5):
        cache = Cache({"a": (8 << 20,)}, 1, 6, torch.float32, torch.device("cpu"), "host", True)
        cache.begin()
        cache.before(0)
        kept, stage, ring = cache.kept, cache.stage, cache._feed.ring
        del cache  # in the middle of a copy
        del kept, stage  # given back to the system: they are large
        try:
            ring.wait(0)
        except RuntimeError as error:
            assert "it is closed" in str(error), error
        else:
            raise AssertionError("the ring outlives its memory")
    from fasttrace_kernels import prefetch
    prefetch.host_status = lambda: prefetch.ExtensionStatus(False, "")
held = cache = Cache({"a": (8 << 20,)}, 1, 6, torch.float32, torch.device("cpu"), "host", True)
cache.before(0)  # and here the process ends
"""


def test_a_cache_that_is_dropped():
    ran = subprocess.run(
        [sys.executable, "-c", DROPPED], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_device_home_has_no_ring():
    cpu = torch.device("cpu")
    for staged in (False, True):
        cache = Cache(SHAPES, ROWS, CALLS, torch.float32, cpu, "device", staged)
        assert cache._feed is None
        record(cache, 0)
        read(cache, 0, CALLS)


# ---- a whole run


def pairs_of(model: Model) -> list[Pair]:
    """Two pairs; every third site, in part of the calls, at half strength, of another run."""
    size = model.default("height")
    sampling = Sampling(4, 3.0, size, size)
    probes = (Probe("a photo of a dog in the house", "dog"), Probe("a red car", "car"))
    corruption = resolve(model, list(probes), Corruption())
    sites = model.sites(size, size).sites
    lanes = [Lane((Patch(site),)) for site in sites[::3]]
    lanes += [
        Lane((Patch(sites[3], Selector(window=(1, 3))),)),
        Lane((Patch(sites[5], Selector(branch="both"), strength=0.5),)),
        Lane((Patch(sites[0]), Patch(sites[-2], Selector(window=(2, 4))))),
        Lane((Patch(sites[4], source=CORRUPT),)),
    ]
    pairs = []
    for seed, probe in enumerate(probes):
        clean = model.text(probe.prompt, probe.negative_prompt, model.guided(sampling))
        texts = {CLEAN: clean, CORRUPT: corrupt_text(model, probe, corruption, clean)}
        start = model.start(sampling, seed)
        pairs.append(Pair(texts, CORRUPT, start, sampling, tuple(lanes)))
    return pairs


def test_a_run_is_the_same_bit_for_bit(form, sd):
    """As without slots: the rows are the same, and only how they come to the step differs."""
    model = Model(sd)
    with scope(sd):
        pairs = pairs_of(model)
        plain = runs_of_pairs(FastEngine(model, clean="cache", lanes=8), pairs)
        engine = FastEngine(model, clean="cache", lanes=8, home="host", staged=True)
        for _ in range(2):
            found = runs_of_pairs(engine, pairs)
            assert found.keys() == plain.keys()
            assert all(torch.equal(found[key], plain[key]) for key in plain)
        cache = engine.workshop._kept["cache"][1]
        assert isinstance(cache._feed, Feed)


# ---- CUDA's streams, acted: what is enqueued runs as late, and in as odd an order, as it may


class Machine:
    """Streams whose work runs when somebody waits for it, or when the dice say so."""

    def __init__(self, seed: int, broken: str = "") -> None:
        self.dice, self.broken = random.Random(seed), broken
        self.streams: list[Stream] = []
        self.main = self.current = Stream(self)

    def step(self) -> bool:
        """Run one piece of work that nothing holds up; False where there is none."""
        ready = [s for s in self.streams if s.work and s.work[0][0].done]
        if not ready:
            return False
        self.dice.choice(ready).work.popleft()[1]()
        return True

    def idle(self) -> None:
        for _ in range(self.dice.randrange(4)):
            self.step()

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Event:
    """As CUDA's: done once all that its stream was given before `record` has run."""

    machine: Machine

    def __init__(self, done: bool = False) -> None:
        self.done = done

    def record(self, stream: Stream) -> None:
        stream.enqueue(lambda: setattr(self, "done", True))

    def synchronize(self) -> None:
        while not self.done and self.machine.broken != "synchronize":
            assert self.machine.step(), "everything waits for something"


class Stream:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.broken = machine, machine.broken
        self.work: deque[tuple[Event, Callable[[], None]]] = deque()
        machine.streams.append(self)

    def enqueue(self, work: Callable[[], None], after: Event | None = None) -> None:
        self.work.append((after or Event(done=True), work))

    def wait_event(self, event: Event) -> None:
        of = "the side stream waits" if self is not self.machine.main else "the call waits"
        if self.broken != of:
            self.enqueue(lambda: None, event)

    def wait_stream(self, other: Stream) -> None:
        if self.broken != "begin waits":
            event = Event()
            event.record(other)
            self.enqueue(lambda: None, event)


class EagerRing:
    """Copies as early as a ring may: at once, or when its slot is released."""

    def __init__(self, kept: Tensor, slots: Tensor) -> None:
        self.kept, self.slots = kept, slots
        self.asked: dict[int, list[int]] = {slot: [] for slot in range(SLOTS)}

    def prefetch(self, call: int) -> None:
        self.asked[call % SLOTS].append(call)
        self._fill(call % SLOTS)

    def wait(self, call: int) -> None:
        assert self.asked[call % SLOTS][0] == call

    def release(self, call: int) -> None:
        self.asked[call % SLOTS].remove(call)
        self._fill(call % SLOTS)

    def close(self) -> None: ...

    def _fill(self, slot: int) -> None:
        if self.asked[slot]:
            self.slots[slot] = self.kept[self.asked[slot][0]]


class Acted(Upload):
    """Its copies run when the machine gets to them."""

    machine: Machine

    def copy(self, call: int) -> None:
        self.machine.current.enqueue(lambda: super(Acted, self).copy(call))


def acted_runs(monkeypatch: pytest.MonkeyPatch, seed: int, broken: str = "") -> list[bool]:
    """Whether each call of some runs, one of them abandoned, found its own rows in its slot."""
    machine = Machine(seed, broken)
    monkeypatch.setattr(Event, "machine", machine, raising=False)
    monkeypatch.setattr(Acted, "machine", machine, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(machine))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.main)
    monkeypatch.setattr(torch.cuda, "stream", machine.use)
    kept = torch.arange(CALLS * 4.0).reshape(CALLS, 4)
    pinned, stage = torch.zeros(SLOTS, 4), torch.zeros(SLOTS, 4)
    ring = EagerRing(kept, pinned)
    upload = Acted(Feed(ring, CALLS), {"a": pinned}, {"a": stage}, torch.device("cpu"))
    found: list[bool] = []

    def compute(call: int) -> None:
        found.append(torch.equal(stage[call % SLOTS], kept[call]))

    for start, stop in ((0, CALLS), (1, CALLS), (0, 3), (0, CALLS)):
        upload.begin()
        for call in range(start, stop):
            upload.before(call)
            machine.idle()
            machine.main.enqueue(lambda call=call: compute(call))
            if stop == 3 and call == 2:
                break  # abandoned before `after`
            upload.after(call)
            machine.idle()
    while machine.step():
        pass
    assert not any(stream.work for stream in machine.streams)
    return found


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_every_call_finds_its_rows(seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert acted_runs(monkeypatch, seed) == [True] * (CALLS + CALLS - 1 + 3 + CALLS)


WAITS = ["synchronize", "the side stream waits", "the call waits", "begin waits"]


@pytest.mark.parametrize("wait", WAITS)
def test_every_wait_is_needed(wait, monkeypatch):
    """With one of them left out some order gives a call another one's rows."""
    assert any(not all(acted_runs(monkeypatch, seed, wait)) for seed in range(300))
