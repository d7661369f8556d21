"""Clean activations kept for lanes to read: on the device, or in the host's memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from fasttrace_kernels.prefetch import Part, Ring, make_ring

HOMES = ("device", "host")
SLOTS = 2  # of a cache in host memory: one is read while the other one is filled


def size_of(shapes: Mapping[str, tuple[int, ...]], rows: int, calls: int, itemsize: int) -> int:
    """Bytes of a cache."""
    return sum(prod(shape) for shape in shapes.values()) * rows * calls * itemsize


class Cache:
    """`rows` activations of each site at each call: a tensor [calls, rows, ...] a site.

    extra: rows that a site has beyond.

    home "device": a step reads a call's rows where they lie (on CUDA through one staging slot,
    since a captured graph reads fixed addresses). home "host": ordinary host memory and two staging
    slots; the graph reads slot call % 2 while the other one is filled for the next call. A thread
    fills them (`fasttrace_kernels.prefetch`), on CUDA by way of two pinned slots, see `Upload`, so
    that pinned memory is two calls' and not all calls'.

    Recording pays for that on CUDA: a copy from a device into ordinary memory ends before the host
    goes on, so the run that records waits once a site and call, and copies at the speed of
    unpinned memory. It is one batch; those that read the cache are many.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        rows: int,
        calls: int,
        dtype: torch.dtype,
        device: torch.device,
        home: str,
        staged: bool | None = None,
        extra: Mapping[str, int] | None = None,
    ) -> None:
        self.rows, self.calls, self.home, self.device = rows, calls, home, device
        self.extra = dict(extra or {})
        cuda = device.type == "cuda"
        self.staged = cuda if staged is None else staged
        self.slots = SLOTS if home == "host" else 1
        where = torch.device("cpu") if home == "host" else device
        self.kept = {
            site: torch.zeros((calls, self.rows_of(site), *shape), dtype=dtype, device=where)
            for site, shape in shapes.items()
        }
        self.stage = {
            site: torch.zeros((self.slots * self.rows_of(site), *shape), dtype=dtype, device=device)
            for site, shape in (shapes.items() if self.staged else ())
        }
        self._feed: Feed | Upload | None = None
        if self.staged and home == "host" and shapes:
            self._feed = self._make_feed(cuda)

    def _make_feed(self, cuda: bool) -> Feed | Upload:
        filled = self.stage
        if cuda:
            filled = {
                site: torch.zeros_like(stage, device="cpu", pin_memory=True)
                for site, stage in self.stage.items()
            }
        ring = make_ring([Part.of(self.kept[site], filled[site]) for site in filled], self.slots)
        # The ring's thread must be gone before the memory that it copies; so a cache that nobody
        # holds any more closes it first.
        weakref.finalize(self, ring.close)
        feed = Feed(ring, self.calls)
        return Upload(feed, filled, self.stage, self.device) if cuda else feed

    def rows_of(self, site: str) -> int:
        return self.rows + self.extra.get(site, 0)

    def row(self, call: int, row: int, site: str = "") -> int:
        """Where a step finds a row of a call; site: one that may have extra rows."""
        return row + (call % self.slots) * self.rows_of(site) if self.staged else row

    def source(self, site: str, call: int) -> Tensor:
        """What a step reads: fixed where it is staged, else the call's own rows."""
        return self.stage[site] if self.staged else self.kept[site][call]

    def target(self, site: str, call: int, start: int, stop: int) -> Tensor:
        """Where a call's rows start ... stop are kept; contiguous.

        Written in a run of its own: fetching begins at a run's first call, and stops in `begin`.
        """
        return self.kept[site][call, start:stop]

    def before(self, call: int) -> None:
        """Make a call's rows readable, and begin to fetch the next one's."""
        if self._feed is not None:
            self._feed.before(call)
        elif self.staged:
            for site, stage in self.stage.items():
                stage.copy_(self.kept[site][call], non_blocking=True)

    def after(self, call: int) -> None:
        """A call has been enqueued that reads its slot."""
        if self._feed is not None:
            self._feed.after(call)

    def begin(self) -> None:
        """A new run: what was fetched for another is forgotten."""
        if self._feed is not None:
            self._feed.begin()


class Feed:
    """Asks a ring for the calls of a run, one ahead of the one that is read."""

    def __init__(self, ring: Ring, calls: int) -> None:
        self.ring, self.calls = ring, calls
        self._asked: set[int] = set()

    def before(self, call: int) -> None:
        """Fill the call's slot, and have the next one's filled meanwhile."""
        self.ask(call)
        self.ask(call + 1)
        self.ring.wait(call)

    def after(self, call: int) -> None:
        """The call's slot has been read: it is filled with the next call's but one."""
        self._asked.discard(call)
        self.ring.release(call)
        self.ask(call + SLOTS)

    def begin(self) -> None:
        """Nothing is being fetched any more."""
        for call in sorted(self._asked):
            self.ring.release(call)
        self._asked.clear()

    def ask(self, call: int) -> None:
        if call < self.calls and call not in self._asked:
            self.ring.prefetch(call)
            self._asked.add(call)


class Upload:
    """A feed of pinned slots, and from there the way into the device's slots.

    Kept rows -> (the ring's thread) pinned slot -> (a side stream) device slot. On the device the
    copy for call t + 1 waits for the event recorded after call t - 1, which read that slot, and
    call t + 1 waits for the copy's event. On the host a pinned slot is filled again when its copy
    to the device has ended; the host waits for that where the call that reads it is already
    enqueued, with one more before it, so the device has work in the meantime.
    """

    def __init__(
        self,
        feed: Feed,
        pinned: Mapping[str, Tensor],
        stage: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.feed, self.pinned, self.stage, self.device = feed, pinned, stage, device
        self.stream = torch.cuda.Stream(device)
        self._copied: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, torch.cuda.Event] = {}

    def before(self, call: int) -> None:
        """The current stream waits for the call's rows; the next call's are on their way."""
        self._send(call)
        torch.cuda.current_stream(self.device).wait_event(self._copied[call])
        self._send(call + 1)

    def after(self, call: int) -> None:
        """The call's read of its device slot is enqueued; its pinned slot is filled again."""
        self._read[call] = _record(torch.cuda.current_stream(self.device))
        self._copied.pop(call).synchronize()
        self.feed.after(call)

    def begin(self) -> None:
        """The slots of both kinds are free, once what was enqueued has run."""
        for event in self._copied.values():
            event.synchronize()
        self.feed.begin()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._copied.clear()
        self._read.clear()

    def _send(self, call: int) -> None:
        """Enqueue a call's copy to the device, unless it has been."""
        if call in self._copied or call >= self.feed.calls:
            return
        self.feed.before(call)
        earlier = self._read.pop(call - SLOTS, None)
        if earlier is not None:
            self.stream.wait_event(earlier)
        with torch.cuda.stream(self.stream):
            self.copy(call)
        self._copied[call] = _record(self.stream)

    def copy(self, call: int) -> None:
        """Pinned slot to device slot, on the current stream."""
        for site, stage in self.stage.items():
            rows = len(stage) // SLOTS
            start = call % SLOTS * rows
            slot = self.pinned[site][start : start + rows]
            stage[start : start + rows].copy_(slot, non_blocking=True)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
