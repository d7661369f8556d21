"""FLOPs of what runs under autograd, counted as it is executed. A multiply-add counts as two.

torch's counter knows the products and convolutions, forward and backward, but nothing of attention
on a CPU, for which two formulas are given here. As in `engine/flops.py` elementwise work is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


class Counted:
    """FLOPs of a `counting()` scope, once it has ended."""

    flops = 0


@contextmanager
def counting() -> Iterator[Counted]:
    found = Counted()
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        yield found
    found.flops = int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return _products(query, key, value, with_keys=1, with_values=1)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any
) -> int:
    """Logits anew, gradients of probabilities, query, key and value."""
    return _products(query, key, value, with_keys=3, with_values=2)


def _products(query: Any, key: Any, value: Any, *, with_keys: int, with_values: int) -> int:
    pairs = int(torch.Size(query[:-1]).numel()) * int(key[-2])
    return 2 * pairs * (with_keys * int(query[-1]) + with_values * int(value[-1]))


_ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
