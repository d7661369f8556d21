"""An edit: what it changes, whose it is, and how it goes in and comes out byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import digest, tensor_digest
from fasttrace.adapters.pipeline import Model
from fasttrace.edit.matrices import Matrix, find_matrix
from fasttrace.edit.solver import Change
from fasttrace.errors import ModelError, UsageError


@dataclass
class _Undo:
    """What one application overwrote. version, after: of the weight just after it was written."""

    matrix: Matrix
    before: Tensor
    version: int
    after: str

    @property
    def is_on_top(self) -> bool:
        """Whether the weight is what was written; what came and went since doesn't matter."""
        weight = self.matrix.module.weight
        if weight.dtype != self.before.dtype:  # the pipeline was cast meanwhile
            return bool(weight._version == self.version)
        return tensor_digest(weight) == self.after

    def revert(self) -> None:
        with torch.no_grad():
            self.matrix.module.weight.copy_(self.before)


@dataclass(frozen=True, repr=False)
class Edit:
    """A finished edit of some weight matrices.

    changes: by matrix name, factors [m, r] and [r, d] in float64. manifest: JSON-like; `base` in it
    holds the sha256 of every matrix as it was, the model that the edit fits.
    """

    changes: Mapping[str, Change]
    manifest: Mapping[str, Any]
    _applied: list[tuple[Any, list[_Undo]]] = field(default_factory=list, repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """How many numbers of the model it touches."""
        return sum(c.left.shape[-2] * c.right.shape[-1] for c in self.changes.values())

    @property
    def fingerprint(self) -> str:
        """Of the base model's matrices that it changes."""
        return digest(self.manifest["base"])

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Every pair, those of the edits below it too; the last word on a phrase counts."""
        stages = [*self.manifest["after"], self.manifest]
        return list({p["old"]: p for stage in stages for p in stage["pairs"]}.values())

    def __repr__(self) -> str:
        return f"<Edit: {self}>"

    def __str__(self) -> str:
        m = self.manifest
        shown = _in_words(self.pairs)
        number = len(self.changes)
        matrices = "1 matrix" if number == 1 else f"{number} matrices"
        return (
            f"{m['method']} of {shown}: {matrices}, {self.parameters:,} numbers, lam {m['lam']:g}"
        )

    def apply_(self, pipe: Any, *, force: bool = False) -> None:
        """Write the edit into the weights, in place; added in float32, cast last.

        Raises `ModelError` where the matrices are not those it was made for, unless `force`.
        """
        if any(other is pipe for other, _ in self._applied):
            raise UsageError("This edit is already applied to this pipeline; revert it first.")
        matrices = self.matrices(Model(pipe), force=force)
        written: list[_Undo] = []
        try:
            written.extend(map(self._write, matrices))
        except BaseException:
            for undo in written:
                undo.revert()
            raise
        self._applied.append((pipe, written))

    def matrices(self, model: Model, *, force: bool = False) -> list[Matrix]:
        """What it changes there, in the order of `changes`. Raises as `apply_` does."""
        matrices = [find_matrix(model, name) for name in self.changes]
        for matrix in matrices:
            change = self.changes[matrix.name]
            shape = (change.left.shape[-2], change.right.shape[-1])
            if tuple(matrix.weight.shape) != shape:
                raise ModelError(
                    f"{matrix.name} is {tuple(matrix.weight.shape)} here, but {shape} in the edit: "
                    "it was made on another architecture."
                )
        if not force:
            self._check_base(matrices, len(model.encoders))
        return matrices

    def revert_(self, pipe: Any) -> None:
        """Put the bytes back that `apply_` overwrote.

        Raises `UsageError` where it isn't applied, `ModelError` where the weights were written to
        since (a later edit has to be reverted first).
        """
        found = next((entry for entry in self._applied if entry[0] is pipe), None)
        if found is None:
            raise UsageError("This edit is not applied to this pipeline.")
        for undo in found[1]:
            if not undo.is_on_top:
                raise ModelError(
                    f"{undo.matrix.name} was changed since the edit was applied; revert what came "
                    "later first."
                )
        for undo in found[1]:
            undo.revert()
        self._applied[:] = [entry for entry in self._applied if entry is not found]

    @contextmanager
    def applied(self, pipe: Any, *, force: bool = False) -> Iterator[Any]:
        """`with edit.applied(pipe):` the edit is in; afterwards every byte is as before."""
        self.apply_(pipe, force=force)
        try:
            yield pipe
        finally:
            self.revert_(pipe)

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write it to a new folder, as `fasttrace.edit.export.save` says."""
        from fasttrace.edit.export import save

        return save(self, folder, **options)

    def _check_base(self, matrices: list[Matrix], encoders: int) -> None:
        base = self.manifest["base"]
        other = [f"first: {m.name}" for m in matrices if tensor_digest(m.weight) != base[m.name]]
        if self.manifest["encoders"] != encoders:  # SDXL's first encoder is that of SD 1.x
            other.append(f"a pipeline with text encoders: {self.manifest['encoders']}")
        if not other:
            return
        remedy = f"Load the base model it names ({self.manifest['model']}), or force it."
        if self.manifest["after"]:
            below = "; ".join(_in_words(m["pairs"]) for m in self.manifest["after"])
            remedy = (
                f"It holds what it was made on top of as well ({below}), so it goes onto the "
                f"unedited model: where that is applied here, revert it first. Else: {remedy}"
            )
        raise ModelError(
            f"The edit was made on other weights than these ({other[0]}); on this model it is not "
            f"the same edit. {remedy}"
        )

    def _write(self, matrix: Matrix) -> _Undo:
        weight = matrix.module.weight
        before = weight.detach().clone()
        new = edited(before, self.changes[matrix.name]).to(weight.dtype)
        with torch.no_grad():
            weight.copy_(new)
        return _Undo(matrix, before, weight._version, tensor_digest(new))


def _in_words(pairs: Sequence[Mapping[str, Any]]) -> str:
    """The first three, and how many more."""
    words = [f"{p['old']} -> {' + '.join(p['new']) or '(nothing)'}" for p in pairs]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def edited(weight: Tensor, change: Change) -> Tensor:
    """weight [m, d] with the change, in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + change.dense.to(weight.device, wide)
