"""Clocks that can be read between two operators, and ranges that NVIDIA's tools show."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

now = time.perf_counter_ns
Ticks = np.ndarray[Any, np.dtype[np.int64]]


class Clock:
    """The host's clock. `tick` notes the time; `take` gives the notes since the last `take`."""

    def __init__(self) -> None:
        times: list[Any] = []
        note = times.append

        def tick() -> None:
            note(now())

        self.times, self.tick = times, tick
        self.ticks = 0

    def take(self) -> list[Any]:
        found = self.times[:]
        self.times.clear()
        self.ticks += len(found)
        return found

    def wait(self) -> None:
        """Until everything that was started has ended."""

    def resolve(self, taken: list[Any]) -> Ticks:
        """Nanoseconds of the host's clock."""
        return np.array(taken, dtype=np.int64)

    def cost(self, repeats: int = 2000) -> float:
        """Seconds of one tick."""
        kept = self.times[:]
        start = now()
        for _ in range(repeats):
            self.tick()
        took = now() - start
        self.times[:] = kept
        return took / repeats / 1e9


class DeviceClock(Clock):
    """Events in a CUDA stream. An interval has the gap in it in which the device waits for the
    host. Never run on a GPU by us."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        note, stream = self.times.append, torch.cuda.current_stream

        def tick() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream(device))
            note(event)

        self.tick = tick
        self.wait()
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record(stream(device))
        self.wait()
        self._host = now()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def resolve(self, taken: list[Any]) -> Ticks:
        # An event's time is a float32 number of milliseconds, so ticks are counted from the first.
        first = int(1e6 * self._start.elapsed_time(taken[0])) + self._host
        after = [int(1e6 * taken[0].elapsed_time(event)) for event in taken[1:]]
        return np.array([first, *(first + t for t in after)], dtype=np.int64)


def make_clock(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else Clock()


class Ranges:
    """Named ranges, nested, as Nsight Systems and Nsight Compute show them."""

    def __init__(self, push: Callable[[str], Any], pop: Callable[[], Any]) -> None:
        def start(name: str) -> None:
            push(name)

        def end() -> None:
            pop()

        self.push, self.pop = start, end

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.push(name)
        try:
            yield
        finally:
            self.pop()


def find_ranges() -> Ranges | None:
    """By the nvtx package, else by a CUDA build of torch; None where there is neither."""
    with suppress(ImportError):
        nvtx = importlib.import_module("nvtx")
        return Ranges(nvtx.push_range, nvtx.pop_range)
    if torch.version.cuda is None:
        return None
    return Ranges(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)


def memory_reader(device: torch.device) -> Callable[[], int] | None:
    """Bytes in use: on CUDA what torch has allocated, else the process's resident memory.

    None where the system doesn't say.
    """
    if device.type == "cuda":
        return lambda: int(torch.cuda.memory_allocated(device))
    try:
        handle = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    os.close(handle)
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * page

    return resident
