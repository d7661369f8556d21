"""Clean activations kept for lanes to read: on the device, or in pinned host memory."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

HOMES = ("device", "host")


def size_of(shapes: Mapping[str, tuple[int, ...]], rows: int, calls: int, itemsize: int) -> int:
    """Bytes of a cache."""
    return sum(prod(shape) for shape in shapes.values()) * rows * calls * itemsize


class Cache:
    """`rows` activations of each site at each call: a tensor [calls, rows, ...] a site.

    home "device": a step reads a call's rows where they lie (on CUDA through one staging slot,
    since a captured graph reads fixed addresses). home "host": pinned memory, and two staging
    slots: the graph reads slot call % 2 while the other one is filled for the next call. The copy
    for call t + 1 waits for the event recorded after call t - 1, which read that slot, and call
    t + 1 waits for the copy's event.
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
    ) -> None:
        self.rows, self.calls, self.home, self.device = rows, calls, home, device
        cuda = device.type == "cuda"
        self.staged = cuda if staged is None else staged
        self.slots = 2 if home == "host" else 1
        where = torch.device("cpu") if home == "host" else device
        self.kept = {
            site: torch.zeros(
                (calls, rows, *shape), dtype=dtype, device=where, pin_memory=cuda and home == "host"
            )
            for site, shape in shapes.items()
        }
        self.stage = {
            site: torch.zeros((self.slots * rows, *shape), dtype=dtype, device=device)
            for site, shape in (shapes.items() if self.staged else ())
        }
        self._stream = torch.cuda.Stream(device) if cuda and home == "host" else None
        self._copied: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, torch.cuda.Event] = {}

    def row(self, call: int, row: int) -> int:
        """Where a step finds a row of a call."""
        return row + (call % self.slots) * self.rows if self.staged else row

    def source(self, site: str, call: int) -> Tensor:
        """What a step reads: fixed where it is staged, else the call's own rows."""
        return self.stage[site] if self.staged else self.kept[site][call]

    def target(self, site: str, call: int, start: int, stop: int) -> Tensor:
        """Where a call's rows start ... stop are kept; contiguous."""
        return self.kept[site][call, start:stop]

    def before(self, call: int) -> None:
        """Make a call's rows readable, and begin to fetch the next one's."""
        if not self.staged:
            return
        if self._stream is None:
            self._copy(call)
            return
        if call not in self._copied:  # the first call of a run
            self._fetch(call)
        torch.cuda.current_stream(self.device).wait_event(self._copied.pop(call))
        if call + 1 < self.calls:
            self._fetch(call + 1)

    def after(self, call: int) -> None:
        """A call has been enqueued that reads its slot."""
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._read[call] = event

    def begin(self) -> None:
        """A new run: what was fetched for another is forgotten."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._copied.clear()
        self._read.clear()

    def _fetch(self, call: int) -> None:
        assert self._stream is not None
        earlier = self._read.pop(call - 2, None)
        if earlier is not None:
            self._stream.wait_event(earlier)
        with torch.cuda.stream(self._stream):
            self._copy(call)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._copied[call] = event

    def _copy(self, call: int) -> None:
        start = (call % self.slots) * self.rows
        for site, stage in self.stage.items():
            stage[start : start + self.rows].copy_(self.kept[site][call], non_blocking=True)
