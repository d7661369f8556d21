"""The closed form behind every edit: a ridge regression for the *change* of a weight matrix.

Basu et al. (arXiv 2310.13730, section 5) invert lam I + K K^T for the whole new matrix. Here
`Delta = R (lam I + G)^-1 K^T` is solved for alone, on the smaller of its two sides, in float64:
that loses no digits to the old weights. Rows are pairs: keys are [n, d], so G = K K^T is [n, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fasttrace.edit.checks import parse_number
from fasttrace.errors import UsageError

# Of the largest eigenvalue: below this a system without lambda has no digits left.
_SINGULAR = 1e-12
Solved: TypeAlias = Callable[[Tensor], Tensor]  # a system's inverse, times what it is given


@dataclass(frozen=True)
class Change:
    """A change of a matrix, `left @ right`: left [..., m, r], right [..., r, d], float64.

    whole: left is the change itself and right the identity, which nothing is multiplied by.
    """

    left: Tensor
    right: Tensor
    whole: bool = False

    @property
    def dense(self) -> Tensor:
        """[..., m, d]"""
        return self.left if self.whole else self.left @ self.right

    def __add__(self, other: Change) -> Change:
        """Both, one beside the other; where one of them is whole, their sum."""
        for one in (self, other):
            if one.whole:
                return Change(self.dense + other.dense, one.right, True)
        left = torch.cat([self.left, other.left], dim=-1)
        return Change(left, torch.cat([self.right, other.right], dim=-2))


@dataclass(frozen=True)
class Moments:
    """Sums over pairs, where there are more of them than are worth keeping; float64.

    keys [..., d, d] = sum of k k^T; steps [..., d, d] = sum of (g - k) k^T with g the input whose
    output is wanted; mean [..., d] = sum of k.
    """

    keys: Tensor
    steps: Tensor
    mean: Tensor

    @classmethod
    def zero(cls, width: int, device: torch.device) -> Moments:
        square = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(square, square.clone(), square[0].clone())

    def add_(self, keys: Tensor, goals: Tensor) -> None:
        """keys, goals [n, d]."""
        keys, goals = keys.double(), goals.double()
        self.keys.addmm_(keys.mT, keys)
        self.steps.addmm_((goals - keys).mT, keys)
        self.mean.add_(keys.sum(0))


def solve(keys: Tensor, residuals: Tensor, lam: float) -> Change:
    """The Delta that minimises `sum_i |Delta k_i - r_i|^2 + lam |Delta|^2`.

    keys [..., n, d], a pair a row; residuals [..., n, m]: what the output there has to change by.
    Leading dimensions are independent edits, solved in one batch. Raises `UsageError` where lam is
    0 and the system singular; no other case waits for a device.
    """
    change = Change(residuals.double().mT, readout(keys, lam))
    if keys.shape[-2] <= keys.shape[-1]:
        return change
    return Change(change.dense, _eye(keys.shape[-1], keys), whole=True)


def readout(keys: Tensor, lam: float) -> Tensor:
    """`(lam I + K K^T)^-1 K` [..., n, d]: which pairs a key resembles, and how much.

    All that is solved for; matrices that read the same inputs share it. `Delta = R^T readout`.
    """
    keys = keys.double()
    check_lam(lam)
    n, d = keys.shape[-2:]
    small = n <= d
    gram = keys @ keys.mT if small else keys.mT @ keys
    system = gram + lam * _eye(gram.shape[-1], gram)
    if not small:
        return _improved(system, keys.mT, _by_cholesky(system, lam)).mT
    return _refined(keys, _by_cholesky(system, lam), lam)


def _refined(keys: Tensor, solved: Solved, lam: float) -> Tensor:
    """A readout [..., n, d], made right to about `eps |K| / sqrt(lam)`, the root of what G allows.

    It obeys two equations, (lam I + K K^T) X = K and X (lam I + K^T K) = K, and rounding can break
    either alone. Both remainders are taken from the keys: forming G has lost digits.
    """
    found = solved(keys)
    # So many columns at once: K^T X as a whole is [d, d], far larger than few keys.
    parts = found.split(max(keys.shape[-2], 64), dim=-1)
    twice = torch.cat([keys @ (keys.mT @ part) for part in parts], dim=-1)
    found = found + solved(keys - lam * found - twice)
    rest = keys - lam * found - (found @ keys.mT) @ keys
    return found + solved(keys @ rest.mT).mT @ found


@dataclass(frozen=True)
class InputChange:
    """An edit before it meets a matrix: inputs move by `left @ right`, so `Delta = W left right`.

    left [..., d, r], right [..., r, d], float64; every matrix that reads these inputs shares them.
    pull [..., d]: the sum of the readout's rows, what a target too high by b adds (`b pull^T`).
    whole: right is the identity.
    """

    left: Tensor
    right: Tensor
    pull: Tensor
    whole: bool = False

    def of(self, weight: Tensor, extra: Tensor | None = None) -> Change:
        """The change of weight [m, d]; extra [m] was counted into every target."""
        change = Change(weight.to(self.left) @ self.left, self.right, self.whole)
        if extra is None:
            return change
        return change + Change(extra.to(self.left)[:, None], self.pull[None])


def solve_inputs(keys: Tensor, goals: Tensor, lams: Sequence[float]) -> list[InputChange]:
    """For each lambda the change that makes keys [..., n, d] read like goals [..., n, d].

    Raises as `solve` does.
    """
    keys, goals = keys.double(), goals.double()
    left = (goals - keys).mT
    if keys.shape[-2] > keys.shape[-1]:
        # Their sums are fewer columns to solve for, and a pull solved for has more digits than one
        # added up from the readouts of many pairs, whose own errors do not cancel.
        return solve_moments(Moments(keys.mT @ keys, left @ keys, keys.sum(-2)), lams)
    found = [readout(keys, lams[0])] if len(lams) == 1 else readout_path(keys, lams)
    return [InputChange(left, right, right.sum(-2)) for right in found]


def solve_moments(moments: Moments, lams: Sequence[float]) -> list[InputChange]:
    """`solve_inputs` from sums over pairs."""
    for lam in lams:
        check_lam(lam)
    eye = _eye(moments.keys.shape[-1], moments.keys)
    wanted = torch.cat([moments.steps, moments.mean[..., None, :]], dim=-2).mT
    if len(lams) == 1:
        ways = [_by_cholesky(moments.keys + lams[0] * eye, lams[0])]
    else:
        ways = _by_eigenvalues(moments.keys, lams)
    found = [
        _improved(moments.keys + lam * eye, wanted, way)
        for lam, way in zip(lams, ways, strict=True)
    ]
    return [InputChange(f[..., :-1].mT, eye, f[..., -1], whole=True) for f in found]


def readout_path(keys: Tensor, lams: Sequence[float]) -> list[Tensor]:
    """`readout` for many lambdas, from one eigendecomposition of the smaller Gram matrix."""
    keys = keys.double()
    for lam in lams:
        check_lam(lam)
    small = keys.shape[-2] <= keys.shape[-1]
    gram = keys @ keys.mT if small else keys.mT @ keys
    ways = _by_eigenvalues(gram, lams)
    if small:
        return [_refined(keys, way, lam) for lam, way in zip(lams, ways, strict=True)]
    eye = _eye(gram.shape[-1], gram)
    return [
        _improved(gram + lam * eye, keys.mT, way).mT for lam, way in zip(lams, ways, strict=True)
    ]


def check_lam(lam: float) -> None:
    """Raise `UsageError` unless it is a finite number that is not negative."""
    number = parse_number(lam, "lam")
    if not math.isfinite(number) or number < 0:
        raise UsageError(f"lam is {lam}; it has to be finite and not negative.")


def _improved(system: Tensor, wanted: Tensor, solved: Solved) -> Tensor:
    """With one step of refinement: half a digit for a tenth of the time."""
    found = solved(wanted)
    return found + solved(wanted - system @ found)


def _by_cholesky(system: Tensor, lam: float) -> Solved:
    """Its inverse, as a function of what it is multiplied by."""
    if lam == 0 and _is_singular(torch.linalg.eigvalsh(system)):
        raise _singular()
    factor = torch.linalg.cholesky_ex(system).L
    return lambda wanted: torch.cholesky_solve(wanted, factor)


def _by_eigenvalues(gram: Tensor, lams: Sequence[float]) -> list[Solved]:
    """The inverse of lam I + gram for each lambda, from one decomposition."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)  # rounding: a Gram matrix has none below
    if 0 in lams and _is_singular(values):
        raise _singular()

    def inverse(lam: float) -> Solved:
        shifted = (values + lam)[..., None]
        return lambda wanted: vectors @ ((vectors.mT @ wanted) / shifted)

    return [inverse(lam) for lam in lams]


def _is_singular(values: Tensor) -> bool:
    low, high = values.amin(-1), values.amax(-1)
    return bool((low <= high * _SINGULAR).any())


def _singular() -> UsageError:
    return UsageError(
        "With lam 0 the edit has no single answer: some pairs have the same key, or one that "
        "others add up to. Give a lam above 0, such as 0.01."
    )


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=like.device)
