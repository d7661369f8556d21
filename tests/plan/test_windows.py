"""Step windows: call numbers, fractions, and what is refused."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.errors import UsageError
from fasttrace.plan.windows import resolve_window, resolve_windows


@pytest.mark.parametrize(
    ("window", "calls", "expected"),
    [
        (None, 51, [(0, 51)]),
        ((0, 1), 51, [(0, 1)]),
        ((0.0, 0.25), 51, [(0, 13)]),
        ((0, 0.5), 10, [(0, 5)]),
        ((0.0, 1.0), 19, [(0, 19)]),
        ([(0, 1), (1, 2), (0, 1)], 2, [(0, 1), (1, 2)]),
        ([0, 3], 3, [(0, 3)]),
    ],
)
def test_windows(window, calls, expected):
    assert resolve_windows(window, calls) == expected


@given(calls=st.integers(1, 60), low=st.floats(0, 1), high=st.floats(0, 1))
def test_fractions_are_inside_and_not_empty(calls, low, high):
    try:
        start, stop = resolve_window((low, high), calls)
    except UsageError:
        assert low >= high or round(low * calls) == round(high * calls)
    else:
        assert 0 <= start < stop <= calls


@given(calls=st.integers(1, 60), cuts=st.lists(st.floats(0.01, 0.99), unique=True, max_size=4))
def test_neighbouring_fractions_tile_the_run(calls, cuts):
    edges = [0.0, *sorted(cuts), 1.0]
    covered = []
    for low, high in pairwise(edges):
        try:
            covered += range(*resolve_window((low, high), calls))
        except UsageError:
            continue
    assert covered == list(range(calls))


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ((0, 52), "it makes 51 denoiser calls"),
        ((3, 3), "outside the run"),
        ((5, 3), "outside the run"),
        ((-1, 3), "outside the run"),
        ((0.5, 1.5), "read as fractions"),
        ((0.5, 0.5), "read as fractions"),
        ((0.0, 0.001), "holds none of the 51 calls"),
        ((0, float("nan")), "holds two numbers"),
        ((0, "1"), "holds two numbers"),
        ((1, 2, 3), "is a pair"),
        ("01", "is a pair"),
        (3, "is a pair"),
    ],
)
def test_refusals(window, words):
    with pytest.raises(UsageError, match=words):
        resolve_windows(window, 51)
