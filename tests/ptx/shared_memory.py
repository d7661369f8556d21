"""Shared memory that knows its barriers: what one thread may see of another's accesses.

Addresses are arrays of one entry a thread; `threads` says which threads of the block they are.
"""

from __future__ import annotations

import numpy as np

from .faults import Misaligned, NotArrived, OutOfBounds, Race
from .values import POISON, Array

WARP = 32
_POISON = np.frombuffer(POISON.to_bytes(8, "little"), np.uint8)
# More than one thread: none of them can be told apart from any other.
_MANY = -2


class SharedMemory:
    """One block's. For every byte it knows who touched it last and which barriers came since.

    PTX ISA, "Memory Consistency Model": accesses of different threads are ordered by barriers only.
    Also those within a warp, which may run its threads apart since sm_70.
    """

    def __init__(self, size: int) -> None:
        self.bytes = np.resize(_POISON, size)
        self._arriving = np.zeros(size, np.bool_)
        # A tick passes with every barrier.
        self._tick = self._block_tick = 0
        self._write_tick = np.full(size, -1)
        self._writer = np.full(size, -1)
        self._read_tick = np.full(size, -1)
        self._reader = np.full(size, -1)
        self._reader_warp = np.full(size, -1)

    def barrier(self, *, of_warp: bool = False) -> None:
        self._tick += 1
        if not of_warp:
            self._block_tick = self._tick

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        places = self._places(addresses, size, threads, "reads")
        self._refuse_arriving(places, threads, "reads")
        self._refuse_race(
            places, threads, "reads", "wrote", self._write_tick, self._writer, self._writer // WARP
        )
        self._note_read(places, threads)
        return self.bytes[places]

    def write(self, addresses: Array, data: Array, threads: Array) -> None:
        places = self._places(addresses, data.shape[1], threads, "writes")
        self._refuse_arriving(places, threads, "writes")
        self._write(places, data, threads)

    def expect(self, addresses: Array, size: int, threads: Array) -> Array:
        """An asynchronous copy starts: until `arrive` its bytes hold nothing. Returns [n, size]
        places."""
        places = self._places(addresses, size, threads, "copies to")
        self._refuse_arriving(places, threads, "copies to")
        self._write(places, np.broadcast_to(np.resize(_POISON, size), places.shape), threads)
        self._arriving[places] = True
        return places

    def arrive(self, places: Array, data: Array, threads: Array) -> None:
        self._arriving[places] = False
        self._write(places, data, threads)

    def _write(self, places: Array, data: Array, threads: Array) -> None:
        self._refuse_race(
            places, threads, "writes", "read", self._read_tick, self._reader, self._reader_warp
        )
        self._refuse_race(
            places, threads, "writes", "wrote", self._write_tick, self._writer, self._writer // WARP
        )
        self.bytes[places] = data
        self._writer[places] = threads[:, None]
        self._write_tick[places] = self._tick
        # Copies of a value may be written by several threads of one instruction; which is the
        # last isn't defined, so they have to agree.
        wrong = (self.bytes[places] != data).any(1)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise Race(
                f"thread {threads[first]} writes to shared memory at {places[first, 0]}, and "
                f"thread {self._writer[places[first, 0]]} something else in the same instruction"
            )

    def _note_read(self, places: Array, threads: Array) -> None:
        who, warps = threads[:, None], threads[:, None] // WARP
        tick, reader, warp = (
            old[places] for old in (self._read_tick, self._reader, self._reader_warp)
        )
        # What a barrier has put behind us needs no remembering.
        over = (tick < self._block_tick) | ((warp == warps) & (tick < self._tick))
        self._reader[places] = np.where(over | (reader == who), who, _MANY)
        self._reader_warp[places] = np.where(over | (warp == warps), warps, _MANY)
        # Of several threads that read one byte in this instruction the last was noted.
        self._reader[places[(self._reader[places] != who)]] = _MANY
        self._reader_warp[places[(self._reader_warp[places] != warps)]] = _MANY
        self._read_tick[places] = self._tick

    def _refuse_race(
        self,
        places: Array,
        threads: Array,
        verb: str,
        before: str,
        ticks: Array,
        owners: Array,
        warps: Array,
    ) -> None:
        tick = ticks[places]
        recent = tick >= self._block_tick
        if not recent.any():
            return
        other = owners[places] != threads[:, None]
        ordered = (warps[places] == threads[:, None] // WARP) & (tick < self._tick)
        wrong = recent & other & ~ordered
        if wrong.any():
            first, byte = (int(i) for i in np.argwhere(wrong)[0])
            place = places[first, byte]
            owner = "several threads" if owners[place] == _MANY else f"thread {owners[place]}"
            raise Race(
                f"thread {threads[first]} {verb} the byte of shared memory at {place}, which "
                f"{owner} {before} with no barrier since"
            )

    def _refuse_arriving(self, places: Array, threads: Array, verb: str) -> None:
        wrong = self._arriving[places].any(1)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise NotArrived(
                f"thread {threads[first]} {verb} shared memory at {places[first, 0]}, where an "
                "asynchronous copy has not been waited for"
            )

    def _places(self, addresses: Array, size: int, threads: Array, verb: str) -> Array:
        for fault, wrong in (
            (Misaligned, addresses % size != 0),
            (OutOfBounds, (addresses < 0) | (addresses + size > len(self.bytes))),
        ):
            if wrong.any():
                first = int(np.argmax(wrong))
                raise fault(
                    f"thread {threads[first]} {verb} {size} bytes of shared memory at "
                    f"{addresses[first]}, of {len(self.bytes)}"
                )
        return addresses[:, None] + np.arange(size)
