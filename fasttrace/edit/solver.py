"""The closed form behind every edit: a ridge regression for the *change* of a weight matrix.

Basu et al. (arXiv 2310.13730, section 5) invert lam I + K K^T for the whole new matrix. Here
`Delta = R (lam I + G)^-1 K^T` is solved for alone, on the smaller of its two sides, in float64:
that loses no digits to the old weights. Rows are pairs: keys are [n, d], so G = K K^T is [n, n].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrace.errors import UsageError

# Of the largest eigenvalue: below this a system without lambda has no digits left.
_SINGULAR = 1e-12


@dataclass(frozen=True)
class Change:
    """A change of a matrix, `left @ right`: left [..., m, r], right [..., r, d], float64."""

    left: Tensor
    right: Tensor

    @property
    def dense(self) -> Tensor:
        """[..., m, d]"""
        return self.left @ self.right

    def __add__(self, other: Change) -> Change:
        """Both, one beside the other."""
        left = torch.cat([self.left, other.left], dim=-1)
        return Change(left, torch.cat([self.right, other.right], dim=-2))


@dataclass(frozen=True)
class Moments:
    """Sums over pairs, where there are more of them than are worth keeping; float64.

    keys [d, d] = sum of k k^T; steps [d, d] = sum of (g - k) k^T with g the input whose output is
    wanted; mean [d] = sum of k.
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
    return Change(change.dense, _eye(keys.shape[-1], keys))


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
        return _solved(system, keys.mT, lam).mT
    factor = _factor(system, lam)
    return _refined(keys, torch.cholesky_solve(keys, factor), factor, lam)


def _refined(keys: Tensor, found: Tensor, factor: Tensor, lam: float) -> Tensor:
    """A readout [..., n, d], made right to about `eps |K| / sqrt(lam)`, the root of what G allows.

    It obeys two equations, (lam I + K K^T) X = K and X (lam I + K^T K) = K, and rounding can break
    either alone. Both remainders are taken from the keys: forming G has lost digits.
    """
    # So many columns at once: K^T X as a whole is [d, d], far larger than few keys.
    parts = found.split(max(keys.shape[-2], 64), dim=-1)
    twice = torch.cat([keys @ (keys.mT @ part) for part in parts], dim=-1)
    found = found + torch.cholesky_solve(keys - lam * found - twice, factor)
    rest = keys - lam * found - (found @ keys.mT) @ keys
    return found + torch.cholesky_solve(keys @ rest.mT, factor).mT @ found


@dataclass(frozen=True)
class InputChange:
    """An edit before it meets a matrix: inputs move by `left @ right`, so `Delta = W left right`.

    left [..., d, r], right [..., r, d], float64; every matrix that reads these inputs shares them.
    pull [..., d]: the sum of the readout's rows, what a target too high by b adds (`b pull^T`).
    """

    left: Tensor
    right: Tensor
    pull: Tensor

    def of(self, weight: Tensor, extra: Tensor | None = None) -> Change:
        """The change of weight [m, d]; extra [m] was counted into every target."""
        change = Change(weight.to(self.left) @ self.left, self.right)
        if extra is None:
            return change
        return change + Change(extra.to(self.left)[:, None], self.pull[None])


def solve_inputs(keys: Tensor, goals: Tensor, lams: Sequence[float]) -> list[InputChange]:
    """For each lambda the change that makes keys [..., n, d] read like goals [..., n, d].

    Raises as `solve` does.
    """
    keys, goals = keys.double(), goals.double()
    left = (goals - keys).mT
    found = [readout(keys, lams[0])] if len(lams) == 1 else readout_path(keys, lams)
    changes = [InputChange(left, right, right.sum(-2)) for right in found]
    if keys.shape[-2] <= keys.shape[-1]:
        return changes
    eye = _eye(keys.shape[-1], keys)
    return [InputChange(c.left @ c.right, eye, c.pull) for c in changes]


def solve_moments(moments: Moments, lams: Sequence[float]) -> list[InputChange]:
    """`solve_inputs` from sums over pairs."""
    for lam in lams:
        check_lam(lam)
    eye = _eye(len(moments.keys), moments.keys)
    wanted = torch.cat([moments.steps, moments.mean[None]]).mT
    if len(lams) == 1:
        found = [_solved(moments.keys + lams[0] * eye, wanted, lams[0])]
    else:
        values, vectors = torch.linalg.eigh(moments.keys)
        if 0 in lams and _is_singular(values.clamp_min(0)):
            raise _singular()
        turned = vectors.mT @ wanted
        found = [vectors @ (turned / (values.clamp_min(0) + lam)[:, None]) for lam in lams]
    return [InputChange(f.mT[:-1], eye, f.mT[-1]) for f in found]


def readout_path(keys: Tensor, lams: Sequence[float]) -> list[Tensor]:
    """`readout` for many lambdas, from one eigendecomposition of the smaller Gram matrix."""
    keys = keys.double()
    for lam in lams:
        check_lam(lam)
    small = keys.shape[-2] <= keys.shape[-1]
    values, vectors = torch.linalg.eigh(keys @ keys.mT if small else keys.mT @ keys)
    values = values.clamp_min(0)  # rounding: a Gram matrix has none below
    if 0 in lams and _is_singular(values):
        raise _singular()
    turned = vectors.mT @ keys if small else keys @ vectors
    shifted = [values + lam for lam in lams]
    if small:
        return [vectors @ (turned / s[..., None]) for s in shifted]
    return [(turned / s[..., None, :]) @ vectors.mT for s in shifted]


def check_lam(lam: float) -> None:
    """Raise `UsageError` unless it is a finite number that is not negative."""
    if isinstance(lam, bool) or not isinstance(lam, int | float):
        raise UsageError(f"lam is {lam!r}; it has to be a number.")
    if not math.isfinite(lam) or lam < 0:
        raise UsageError(f"lam is {lam}; it has to be finite and not negative.")


def _solved(system: Tensor, wanted: Tensor, lam: float) -> Tensor:
    """With one step of refinement: half a digit for a tenth of the time."""
    factor = _factor(system, lam)
    found = torch.cholesky_solve(wanted, factor)
    return found + torch.cholesky_solve(wanted - system @ found, factor)


def _factor(system: Tensor, lam: float) -> Tensor:
    if lam == 0 and _is_singular(torch.linalg.eigvalsh(system)):
        raise _singular()
    factor: Tensor = torch.linalg.cholesky_ex(system).L
    return factor


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
