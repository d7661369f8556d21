"""Staging slots that a background thread fills ahead of their reader: kept rows -> slot.

Not a tensor op: it moves bytes between two places of host memory. `PrefetchRing` is the reference;
the compiled ring (csrc/prefetch_ring.h) does the same and is used where it was built.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ._registry import ExtensionStatus

Copy = Callable[[int, int, int], object]  # (to, from, bytes)


class Part(NamedTuple):
    """One site's memory, which the caller owns and keeps alive; addresses and bytes.

    kept: the rows of its calls, one call after another; pageable memory or a mapped file will do.
    staged: its slots, one after another, each as large as a call.
    """

    kept: int
    kept_bytes: int
    staged: int
    staged_bytes: int

    @classmethod
    def of(cls, kept: Tensor, staged: Tensor) -> Part:
        """kept [calls, ...] and staged, its slots, both contiguous and on the CPU."""
        for name, tensor in (("kept", kept), ("staged", staged)):
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(f"prefetch_ring: {name} must be contiguous and on the CPU")
        if kept.dtype != staged.dtype:
            raise ValueError(
                f"prefetch_ring: kept is {kept.dtype}, but its slots are {staged.dtype}"
            )
        return cls(kept.data_ptr(), kept.nbytes, staged.data_ptr(), staged.nbytes)


class Ring(Protocol):
    """What both forms are. Call t goes to slot t % slots; any thread may call any method.

    Nothing about a call is remembered once it is released, so it can be asked for again. After a
    copy has failed, `prefetch` and `wait` say so; after `close` everything but `close` does.
    RuntimeError for what comes at a wrong time, ValueError for a call that isn't kept.
    """

    def prefetch(self, call: int) -> None:
        """Begin to copy a call, as soon as its slot is free. Kept rows must be written by now."""

    def wait(self, call: int) -> None:
        """Return when the slot holds the call. Other Python threads run meanwhile.

        Waits for ever if another call holds the slot and nobody releases it.
        """

    def release(self, call: int) -> None:
        """Free the call's slot, or drop the wish.

        Afterwards neither its slot nor its kept rows are touched on this call's behalf: if it is
        being copied, this waits until that has ended.
        """

    def close(self) -> None:
        """End the thread; a copy in progress is not completed. Afterwards no memory is touched."""


@functools.cache
def host_status() -> ExtensionStatus:
    """Whether the compiled ring is in use."""
    if os.environ.get("FASTTRACE_NO_EXT", "0") not in ("", "0"):
        return ExtensionStatus(False, "switched off by the environment variable FASTTRACE_NO_EXT")
    try:
        importlib.import_module("fasttrace_kernels._host")
    except ImportError as error:
        return ExtensionStatus(
            False, f"not built, or not for this Python ({error}); plain Python is used instead"
        )
    return ExtensionStatus(True, "fasttrace_kernels._host is loaded")


def make_ring(parts: Sequence[Part], slots: int = 2) -> Ring:
    """The compiled ring, or the Python one where it wasn't built.

    Raises ValueError where addresses or sizes don't fit. The ring doesn't keep the parts' memory
    alive: close it before that goes, also where it goes because the process ends.
    """
    if not host_status().loaded:
        return PrefetchRing(parts, slots)
    from . import _host

    return _host.PrefetchRing(parts, slots)


class PrefetchRing:
    """`Ring` in plain Python. copy(to, from, bytes) moves the bytes, in the ring's thread."""

    def __init__(self, parts: Sequence[Part], slots: int = 2, copy: Copy = ctypes.memmove) -> None:
        parts = [Part(*part) for part in parts]  # plain tuples will do
        self._calls = _count_calls(parts, slots)
        self._state = _State(parts, slots, copy)
        # The thread knows the state alone, so a ring that nobody holds any more is closed.
        self._worker = threading.Thread(target=_work, args=(self._state,), daemon=True)
        self._worker.start()
        self._close = weakref.finalize(self, _close, self._state, self._worker)

    def prefetch(self, call: int) -> None:
        state = self._state
        with state.changed:
            self._check(call)
            if state.is_known(call):
                raise _misuse(f"call {call} has been asked for already; release it first")
            state.waiting.append(call)
            state.changed.notify_all()

    def wait(self, call: int) -> None:
        state = self._state
        with state.changed:
            self._check(call)
            if not state.is_known(call):
                raise _misuse(f"call {call} was not asked for; prefetch({call}) comes first")
            state.changed.wait_for(
                lambda: (
                    state.is_ready(call)
                    or not state.is_known(call)
                    or state.closed
                    or state.failure
                )
            )
            self._check(call)
            if not state.is_known(call):
                raise _misuse(f"call {call} was released while it was waited for")

    def release(self, call: int) -> None:
        state = self._state
        with state.changed:
            self._check(call, need_worker=False)
            if not state.is_known(call):
                raise _misuse(f"call {call} is not held, so it can't be released")
            if call in state.waiting:
                state.waiting.remove(call)
            state.changed.wait_for(lambda: state.copying != call)
            slot = call % state.slots
            if state.holders[slot] == call:
                state.holders[slot] = None
            state.changed.notify_all()

    def close(self) -> None:
        self._close()
        _join(self._worker)

    def _check(self, call: int, *, need_worker: bool = True) -> None:
        if not 0 <= call < self._calls:
            raise ValueError(f"prefetch_ring: there is no call {call}; {self._calls} are kept")
        if self._state.closed:
            raise _misuse("it is closed")
        if need_worker and self._state.failure:
            raise _misuse(self._state.failure)


class _State:
    """What ring and thread share; `changed` guards it."""

    def __init__(self, parts: Sequence[Part], slots: int, copy: Copy) -> None:
        self.parts, self.slots, self.copy = parts, slots, copy
        self.changed = threading.Condition()
        self.waiting: list[int] = []  # asked for, in that order; not begun
        # Of each slot: the call that it holds, or is filled with.
        self.holders: list[int | None] = [None] * slots
        self.copying: int | None = None
        self.failure = ""
        self.closed = False

    def is_known(self, call: int) -> bool:
        return self.holders[call % self.slots] == call or call in self.waiting

    def is_ready(self, call: int) -> bool:
        return self.holders[call % self.slots] == call and self.copying != call

    def next(self) -> int | None:
        return next((c for c in self.waiting if self.holders[c % self.slots] is None), None)


def _work(state: _State) -> None:
    while not state.failure:
        with state.changed:
            state.changed.wait_for(lambda: state.closed or state.next() is not None)
            call = state.next()
            if state.closed or call is None:
                return
            state.waiting.remove(call)
            state.holders[call % state.slots] = state.copying = call
        failure = ""
        try:
            _copy(state, call)
        except Exception as error:  # whatever it is, it is told to whoever waits
            failure = f"the copy of call {call} failed: {type(error).__name__}: {error}"
        with state.changed:
            state.copying, state.failure = None, failure
            state.changed.notify_all()


def _copy(state: _State, call: int) -> None:
    for part in state.parts:
        if state.closed:
            return
        size = part.staged_bytes // state.slots
        to = part.staged + call % state.slots * size
        state.copy(to, part.kept + call * size, size)


def _close(state: _State, worker: threading.Thread) -> None:
    with state.changed:
        state.closed = True
        state.changed.notify_all()
    _join(worker)


def _join(worker: threading.Thread) -> None:
    # A thread can't wait for itself; it comes here if it happens to collect the ring, or a cache
    # that closes it, as garbage.
    if threading.current_thread() is not worker:
        worker.join()


def _misuse(words: str) -> RuntimeError:
    return RuntimeError(f"prefetch_ring: {words}")


def _count_calls(parts: Sequence[Part], slots: int) -> int:
    """How many calls every part keeps."""

    def require(condition: bool, words: str) -> None:
        if not condition:
            raise ValueError(f"prefetch_ring: {words}")

    require(slots >= 1, f"slots is {slots}; at least 1 is needed")
    require(len(parts) > 0, "there are no parts")
    calls = 0
    for i, part in enumerate(parts):
        require(part.kept > 0, f"part {i}: its kept rows are at address {part.kept}")
        require(part.staged > 0, f"part {i}: its slots are at address {part.staged}")
        require(
            part.staged_bytes > 0 and part.staged_bytes % slots == 0,
            f"part {i}: expected bytes of {slots} slots of one size, got {part.staged_bytes}",
        )
        size = part.staged_bytes // slots
        require(
            part.kept_bytes > 0 and part.kept_bytes % size == 0,
            f"part {i}: expected kept bytes of calls of {size} each, got {part.kept_bytes}",
        )
        kept = part.kept_bytes // size
        calls = calls or kept
        require(kept == calls, f"part {i} keeps {kept} calls, but part 0 keeps {calls}")
    return calls
