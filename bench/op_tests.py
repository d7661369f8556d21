"""Run by `op_bench.py` through pytest: a test a form, green if the form is right."""

from __future__ import annotations

from typing import Any

import pytest
from op_cases import Named


class Clock:
    """Shows pytest-benchmark the times that were measured while the forms took turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, measured: tuple[Named, list[float] | str]) -> None:
    named, samples = measured
    if isinstance(samples, str):
        pytest.fail(f"differs from the reference: {samples}", pytrace=False)
    benchmark.group = named.op
    left = iter(samples)

    def pass_time() -> None:
        CLOCK.now += next(left)

    benchmark.pedantic(pass_time, rounds=len(samples), iterations=1)
