"""The closed form against the formula, in more digits than it has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrace.edit.solver import (
    Change,
    InputChange,
    Moments,
    _by_eigenvalues,
    check_lam,
    readout,
    readout_path,
    solve,
    solve_inputs,
    solve_moments,
)
from fasttrace.errors import UsageError

D, M = 48, 20
EPS = 2.0**-53
NUMBERS = (1, 2, 7, 47, 48, 49, 130, 400)
LAMS = (1e-3, 1e-2, 1.0, 100.0)


def clip_like(n: int, d: int = D, seed: int = 0, spread: float = 0.05) -> Tensor:
    """Keys as a text encoder's: one large common mean, little around it; float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    return mean + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_formula(keys: Tensor, residuals: Tensor, lam: float) -> Tensor:
    """R^T K (lam I + K^T K)^-1 [m, d], whichever side is smaller, in 80-bit floats."""
    k, r = keys.double().numpy().astype(np.longdouble), residuals.double().numpy()
    system = k.T @ k + np.longdouble(lam) * np.eye(k.shape[1], dtype=np.longdouble)
    right = k.T @ r.astype(np.longdouble)
    for i in range(len(system)):  # Gauss; positive definite, so no pivots
        factors = (system[i + 1 :, i] / system[i, i])[:, None]
        system[i + 1 :] -= factors * system[i]
        right[i + 1 :] -= factors * right[i]
    for i in reversed(range(len(system))):
        right[i] = (right[i] - system[i, i + 1 :] @ right[i + 1 :]) / system[i, i]
    return torch.from_numpy(right.T.astype(np.float64).copy())


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def condition(keys: Tensor, lam: float) -> float:
    """Of lam I + K^T K: what rounding the inputs alone may cost, in units of EPS."""
    return float(keys.double().square().sum() + lam) / lam


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("n", NUMBERS)
def test_change_is_the_formula(n, lam):
    keys, residuals = clip_like(n), random(n, M)
    expected = by_formula(keys, residuals, lam)
    found = solve(keys, residuals, lam).dense
    assert found.dtype == torch.float64
    assert error(found, expected) <= 4 * EPS * condition(keys, lam)
    dense = torch.linalg.solve(
        lam * torch.eye(D, dtype=torch.float64) + keys.T @ keys, keys.T @ residuals
    ).T
    # and it has no fewer digits than the plain way
    assert error(found, expected) <= 4 * error(dense, expected) + 4 * EPS


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("n", NUMBERS)
def test_normal_equations(n, lam):
    keys, residuals = clip_like(n), random(n, M)
    change = solve(keys, residuals, lam).dense
    system, wanted = lam * torch.eye(D, dtype=torch.float64) + keys.T @ keys, residuals.T @ keys
    assert error(change @ system, wanted) <= 1e-11


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 80),
    d=st.integers(1, 60),
    lam=st.floats(1e-3, 100),
    spread=st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_any_shape(n, d, lam, spread):
    keys, residuals = clip_like(n, d, seed=n, spread=spread), random(n, 3)
    found = solve(keys, residuals, lam)
    assert found.left.shape[0] == 3
    assert found.right.shape[1] == d
    assert found.left.shape[1] == found.right.shape[0] == min(n, d)
    expected = by_formula(keys, residuals, lam)
    assert error(found.dense, expected) <= 8 * EPS * condition(keys, lam)


@pytest.mark.parametrize("n", [5, 48, 100])
def test_residual_left_is_what_lambda_leaves(n):
    """lam R^T (lam I + G)^-1, G the n x n Gram matrix whichever side was solved."""
    keys, residuals, lam = clip_like(n, spread=0.5), random(n, M), 0.1
    left = residuals - keys @ solve(keys, residuals, lam).dense.T
    gram = keys @ keys.T + lam * torch.eye(n, dtype=torch.float64)
    expected = lam * torch.linalg.solve(gram, residuals)
    assert error(left, expected) <= 4 * EPS * condition(keys, lam)
    assert 1e-3 < float(left.norm() / residuals.norm()) < 1


@pytest.mark.parametrize("n", [6, 48, 90])
def test_a_batch_is_one_by_one(n):
    keys = torch.stack([clip_like(n, seed=s) for s in range(5)])
    residuals = torch.stack([random(n, M, seed=s) for s in range(5)])
    together = solve(keys, residuals, 0.01).dense
    for i in range(5):
        alone = solve(keys[i], residuals[i], 0.01).dense
        assert error(together[i], alone) <= EPS * condition(keys[i], 0.01)


def test_inputs_of_a_batch_are_one_by_one():
    keys = torch.stack([clip_like(6, seed=s) for s in range(4)])
    goals = torch.stack([clip_like(6, seed=9 + s) for s in range(4)])
    weight = random(M, D)
    for lams in ([0.1], [0.1, 2.0]):
        together = solve_inputs(keys, goals, lams)
        for i in range(4):
            for j, alone in enumerate(solve_inputs(keys[i], goals[i], lams)):
                found = together[j]
                part = InputChange(found.left[i], found.right[i], found.pull[i])
                expected = alone.of(weight).dense
                assert error(part.of(weight).dense, expected) <= EPS * condition(keys[i], lams[j])


def test_inputs_of_a_batch_of_many_pairs_are_one_by_one():
    keys = torch.stack([clip_like(60, seed=s) for s in range(4)])
    goals = torch.stack([clip_like(60, seed=9 + s) for s in range(4)])
    weight = random(M, D)
    for lams in ([0.1], [0.1, 2.0]):
        together = solve_inputs(keys, goals, lams)
        for i in range(4):
            for found, lam, alone in zip(
                together, lams, solve_inputs(keys[i], goals[i], lams), strict=True
            ):
                part = InputChange(found.left[i], found.right, found.pull[i], found.whole)
                expected = alone.of(weight, weight[:, 0]).dense
                given = part.of(weight, weight[:, 0]).dense
                assert error(given, expected) <= 8 * EPS * condition(keys[i], lam)


@pytest.mark.parametrize("lams", [[1e-3], [1e-3, 100.0]])
@pytest.mark.parametrize("n", [5, 48, 49, 60, 300])
def test_what_a_target_too_high_adds_has_digits_of_its_own(n, lams):
    """The sum of a readout's rows is small beside them, so their errors must not add up to it."""
    keys = clip_like(n)
    expected = by_formula(keys, torch.ones(n, 1, dtype=torch.float64), 1e-3)[0]
    found = solve_inputs(keys, clip_like(n, seed=5), lams)[0].pull
    assert error(found, expected) <= EPS * condition(keys, 1e-3)


@pytest.mark.parametrize("lam", [1e-4, 0.01])
@pytest.mark.parametrize("n", [20, 47, 48])
def test_a_path_has_the_digits_of_a_single_solve(n, lam):
    """Those that forming the Gram matrix has lost come back from the keys."""
    keys, residuals = clip_like(n), random(n, M)
    expected = by_formula(keys, residuals, lam)
    root = 2 * EPS * condition(keys, lam) ** 0.5
    [found, _] = readout_path(keys, [lam, 7.0])
    assert error(residuals.T @ found, expected) <= root
    assert error(residuals.T @ readout(keys, lam), expected) <= root
    [unrefined] = _by_eigenvalues(keys @ keys.T, [lam])
    assert error(residuals.T @ unrefined(keys), expected) > root


@pytest.mark.parametrize("n", [3, 48, 200])
def test_path_is_single_solves(n):
    keys = clip_like(n)
    found = readout_path(keys, LAMS)
    assert len(found) == len(LAMS)
    for lam, each in zip(LAMS, found, strict=True):
        alone = readout(keys, lam)
        assert each.shape == alone.shape == (n, D)
        assert error(each, alone) <= 8 * EPS * condition(keys, lam)
        # Delta = R^T readout
        assert error(random(n, M).T @ each, by_formula(keys, random(n, M), lam)) <= (
            8 * EPS * condition(keys, lam)
        )


@pytest.mark.parametrize("n", [1, 30, 48, 49, 300])
@pytest.mark.parametrize("lams", [[1e-3], [0.01], [1e-3, 0.01, 100.0]])
def test_sums_over_pairs_do_as_well_as_pairs(n, lams):
    keys, goals, weight, bias = clip_like(n), clip_like(n, seed=5), random(M, D), random(M, seed=7)
    moments = Moments.zero(D, keys.device)
    for start in range(0, n, 17):
        moments.add_(keys[start : start + 17], goals[start : start + 17])
    summed, kept = solve_moments(moments, lams), solve_inputs(keys, goals, lams)
    assert len(summed) == len(kept) == len(lams)
    for lam, one, other in zip(lams, summed, kept, strict=True):
        tolerance = 8 * EPS * condition(keys, lam)
        for extra in (None, bias):
            # in the double bias the targets do not tend to lie in the keys' range
            expected = by_formula(
                keys, (goals - keys) @ weight.T + (0 if extra is None else extra), lam
            )
            assert error(one.of(weight, extra).dense, expected) <= tolerance
            assert error(other.of(weight, extra).dense, expected) <= tolerance
        assert error(one.pull, other.pull) <= tolerance


@pytest.mark.parametrize("n", [4, 90])
def test_a_doubled_bias(n):
    """The release's way: the target is v = W g + b, though the layer adds its b as well."""
    keys, goals, weight, bias = clip_like(n), clip_like(n, seed=3), random(M, D), random(M, seed=4)
    lam = 0.01
    values = goals @ weight.T + bias
    # (lam W0 + V K^T) (lam I + K K^T)^-1 with keys as columns
    system = lam * torch.eye(D, dtype=torch.float64) + keys.T @ keys
    released = torch.linalg.solve(system, (lam * weight + values.T @ keys).T).T
    [change] = solve_inputs(keys, goals, [lam])
    found = weight + change.of(weight, bias).dense
    assert error(found, released) <= 4 * EPS * condition(keys, lam)
    exact = weight + change.of(weight).dense
    values = goals @ weight.T
    plain = torch.linalg.solve(system, (lam * weight + values.T @ keys).T).T
    assert error(exact, plain) <= 4 * EPS * condition(keys, lam)
    assert error(exact, released) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_inputs_with_gradients_are_solved_in_float64(dtype):
    keys = clip_like(9, spread=0.5).to(dtype).requires_grad_()
    residuals = random(9, M).to(dtype)
    found = solve(keys, residuals, 0.1).dense.detach()
    assert found.dtype == torch.float64
    assert error(found, by_formula(keys.detach(), residuals, 0.1)) <= 4 * EPS * condition(
        keys.detach(), 0.1
    )
    [change] = solve_inputs(keys, keys * 2, [0.1])
    assert change.of(random(M, D).to(dtype)).dense.dtype == torch.float64
    moments = Moments.zero(D, keys.device)
    moments.add_(keys.detach(), keys.detach())
    assert moments.keys.dtype == torch.float64


def test_the_gradient_is_the_finite_difference():
    keys, residuals = clip_like(3, 5, spread=1.0), random(3, 2)
    assert torch.autograd.gradcheck(
        lambda k, r: solve(k, r, 0.3).dense, (keys.requires_grad_(), residuals.requires_grad_())
    )


def test_two_changes_add_up():
    one, other = (Change(random(M, r, seed=r), random(r, D, seed=r + 1)) for r in (3, 5))
    both = one + other
    assert both.left.shape == (M, 8)
    assert error(both.dense, one.dense + other.dense) <= 4 * EPS
    square = torch.eye(D, dtype=torch.float64)
    whole = Change(random(M, D, seed=9), square, whole=True)
    for both in (one + whole, whole + one, whole + whole):
        assert both.whole
        assert both.left.shape == (M, D)
    assert error((one + whole).dense, one.dense + whole.left) <= 4 * EPS
    assert torch.equal((one + whole).dense, (whole + one).dense)
    assert torch.equal((whole + whole).dense, 2 * whole.left)


@pytest.mark.parametrize("n", [48, 49])
def test_a_whole_change_is_multiplied_by_no_identity(n):
    keys, residuals = clip_like(n), random(n, M)
    weight = random(M, D)
    for change in (
        solve(keys, residuals, 0.1),
        solve_inputs(keys, clip_like(n, seed=2), [0.1])[0].of(weight),
        solve_inputs(keys, clip_like(n, seed=2), [0.1])[0].of(weight, weight[:, 0]),
    ):
        assert change.whole == (n > D)
        assert (change.dense is change.left) == (n > D)
        assert error(change.dense, change.left @ change.right) <= 4 * EPS


class TestNoLambda:
    def test_a_regular_system_has_its_interpolation(self):
        """Fewer pairs than inputs: every output is met, by the smallest change that does."""
        keys, residuals = random(6, D), random(6, M)
        change = solve(keys, residuals, 0).dense
        assert error(keys @ change.T, residuals) <= 1e-13
        smallest = (torch.linalg.pinv(keys) @ residuals).T
        assert error(change, smallest) <= 1e-13

    def test_more_pairs_than_inputs_have_least_squares(self):
        keys, residuals = random(90, D), random(90, M)
        expected = torch.linalg.lstsq(keys, residuals).solution.T
        assert error(solve(keys, residuals, 0).dense, expected) <= 1e-12
        [path, _] = solve_inputs(keys, keys + random(90, D, seed=3), [0, 1.0])
        [one] = solve_inputs(keys, keys + random(90, D, seed=3), [0])
        weight = random(M, D, seed=4)
        assert error(path.of(weight).dense, one.of(weight).dense) <= 1e-12

    @pytest.mark.parametrize("many", [False, True])
    def test_a_singular_system_is_refused(self, many):
        keys = random(6, D)
        keys[3] = keys[1]
        if many:  # more pairs than inputs, which span less than all of them
            keys = keys.repeat(12, 1)
        calls: list[Callable[[], object]] = [
            lambda: solve(keys, random(len(keys), M), 0),
            lambda: readout(keys, 0),
            lambda: readout_path(keys, [1.0, 0]),
            lambda: solve_inputs(keys, keys, [0]),
            lambda: solve_inputs(keys, keys, [0, 1.0]),
            lambda: solve_inputs(torch.stack([random(len(keys), D), keys]), keys, [0]),
        ]
        moments = Moments.zero(D, keys.device)
        moments.add_(keys, keys)
        calls += [lambda: solve_moments(moments, [0]), lambda: solve_moments(moments, [1.0, 0])]
        for call in calls:
            with pytest.raises(UsageError, match="lam 0 .* no single answer"):
                call()


@pytest.mark.parametrize(
    "lam", [-1, -1e-9, float("nan"), float("inf"), True, False, None, "0.1", 1j]
)
def test_a_wrong_lambda_is_refused(lam):
    keys = random(4, D)
    moments = Moments.zero(D, keys.device)
    moments.add_(keys, keys)
    calls: list[Callable[[], object]] = [
        lambda: check_lam(lam),
        lambda: solve(keys, random(4, M), lam),
        lambda: readout_path(keys, [0.1, lam]),
        lambda: solve_inputs(keys, keys, [lam]),
        lambda: solve_moments(moments, [lam]),
        lambda: solve_moments(moments, [0.1, lam]),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="lam is .* it has to be"):
            call()
