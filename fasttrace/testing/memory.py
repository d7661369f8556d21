"""How much memory tensors take at one time, counted as ops make and drop them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """`peak` is the most that tensors made in the scope took together, the way back included.

    What an op takes for itself while it runs, and what was there before, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _counted(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if _counted(tensor):
                self._add(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: Any, given: set[int]) -> None:
        key = id(storage)
        if key in self._live or key in given:  # a view, or a write in place
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._live[key]
            self.now -= size

        self._live[key] = weakref.ref(storage, gone)
        self.now += size


def _counted(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value) is not torch._subclasses.FakeTensor
