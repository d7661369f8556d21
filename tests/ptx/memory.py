"""Global memory that knows its bounds.

Addresses are arrays of one entry a thread; `threads` says which threads of the block they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .faults import Misaligned, OutOfBounds
from .values import Array

# Every region of global memory lies in its own window of 2**48 bytes. A pointer that runs away
# meets nothing before it wraps around; its lowest bits, so its alignment, are those it has here.
_WINDOW = 48


@dataclass
class _Region:
    """Memory that arguments share, or that one has for itself."""

    start: int
    bytes: Array  # [n] uint8: the arguments' own memory
    allowed: Array  # [n] bool: elements of an argument; gaps between strided rows are not
    read: Array  # [n] bool, since the launch
    written: Array


class GlobalMemory:
    """Named arrays as a kernel sees them; it reads and writes the arrays themselves."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)
        self._addresses: dict[str, int] = {}
        self._regions: list[_Region] = []
        extents = {}
        for name, array in arrays.items():
            low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)
            extents[name] = (low, high)
        for group in _overlapping(extents):
            self._add(group, min(extents[n][0] for n in group), max(extents[n][1] for n in group))

    def _add(self, names: list[str], low: int, high: int) -> None:
        window = (len(self._regions) + 1) << _WINDOW
        size = high - low
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(low))
        allowed, read, written = np.zeros((3, max(size, 1)), np.bool_)
        self._regions.append(_Region(window + low, memory, allowed, read, written))
        for name in names:
            first = self._first(name)
            self._addresses[name] = window + (first if self._arrays[name].size else 0)
            _bytes_of(allowed, self._arrays[name], first - low)[...] = True

    def _first(self, name: str) -> int:
        return int(self._arrays[name].__array_interface__["data"][0])

    def address(self, name: str) -> int:
        """The pointer that a kernel gets for an argument."""
        return self._addresses[name]

    def was_read(self, name: str) -> Array:
        """bool, of the array's shape: which elements were read since the launch."""
        region = self._region_of(name)
        return self._any_byte(name, region, region.read)

    def was_written(self, name: str) -> Array:
        region = self._region_of(name)
        return self._any_byte(name, region, region.written)

    def _region_of(self, name: str) -> _Region:
        return self._regions[(self._addresses[name] >> _WINDOW) - 1]

    def _any_byte(self, name: str, region: _Region, flags: Array) -> Array:
        offset = self._addresses[name] - region.start
        return np.asarray(_bytes_of(flags, self._arrays[name], offset).any(-1))

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        """[n] addresses to [n, size] bytes."""
        result = np.empty((len(addresses), size), np.uint8)
        for region, chosen, places in self._find(addresses, size, threads, "reads"):
            result[chosen] = region.bytes[places]
            region.read[places] = True
        return result

    def write(self, addresses: Array, data: Array, threads: Array) -> None:
        """data [n, size] bytes."""
        for region, chosen, places in self._find(addresses, data.shape[1], threads, "writes"):
            region.bytes[places] = data[chosen]
            region.written[places] = True

    def _find(
        self, addresses: Array, size: int, threads: Array, verb: str
    ) -> Iterator[tuple[_Region, Array | slice, Array]]:
        """The regions that an access touches, which threads touch each, and [n, size] offsets."""
        self._refuse(addresses % size != 0, Misaligned, addresses, size, threads, verb)
        windows = addresses >> _WINDOW
        nowhere = (windows < 1) | (windows > len(self._regions))
        self._refuse(nowhere, OutOfBounds, addresses, size, threads, verb)
        for window in np.unique(windows):
            region = self._regions[window - 1]
            chosen = windows == window
            places = addresses[chosen, None] - region.start + np.arange(size)
            inside = (places >= 0) & (places < len(region.bytes))
            wrong = ~(inside & region.allowed[np.where(inside, places, 0)]).all(1)
            if wrong.any():
                outside = np.zeros(len(addresses), np.bool_)
                outside[chosen] = wrong
                self._refuse(outside, OutOfBounds, addresses, size, threads, verb)
            yield region, chosen, places

    def _refuse(
        self,
        wrong: Array,
        fault: type[Misaligned] | type[OutOfBounds],
        addresses: Array,
        size: int,
        threads: Array,
        verb: str,
    ) -> None:
        if not wrong.any():
            return
        first = int(np.argmax(wrong))
        where = self._describe(int(addresses[first]))
        count = f"{int(wrong.sum())} of {len(wrong)} threads do so"
        raise fault(f"thread {threads[first]} {verb} {size} bytes at {where} ({count})")

    def _describe(self, address: int) -> str:
        def distance(name: str) -> int:
            low = self._addresses[name]
            return max(low - address, address - low - self._arrays[name].nbytes, 0)

        window = address >> _WINDOW
        near = [name for name, start in self._addresses.items() if start >> _WINDOW == window]
        if not near:
            return f"address {address:#x}, which belongs to no argument"
        name = min(near, key=distance)
        array = self._arrays[name]
        return (
            f"{name} {address - self._addresses[name]:+d}, where {name} is "
            f"{list(array.shape)} elements of {array.itemsize} bytes with strides {array.strides}"
        )


def _overlapping(extents: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    groups: list[list[str]] = []
    end = -1
    for name in sorted(extents, key=lambda name: extents[name]):
        low, high = extents[name]
        if groups and low < end:
            groups[-1].append(name)
        else:
            groups.append([name])
        end = max(end, high)
    return groups


def _bytes_of(flat: Array, array: Array, offset: int) -> Array:
    """The entries of `flat`, one a byte, that belong to an array's elements: [*shape, itemsize]."""
    shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
    return np.lib.stride_tricks.as_strided(flat[max(offset, 0) :], shape, strides)
