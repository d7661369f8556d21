from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """What is rounded to 32 bits whatever it is given stays in 64: a scheduler's latents, pictures.

    A difference of small strengths is less than that rounding (a score of 6000, a slope of 0.1).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = (*args[1:], *(kwargs or {}).values())
        narrows = func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in asked)
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def wide():
    with Wide() as mode:
        yield mode
