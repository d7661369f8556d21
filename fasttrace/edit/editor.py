"""`Editor`: from phrases to an `Edit`, for one pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from fasttrace.adapters.fingerprint import tensor_digest
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.edit.checks import parse_number, parse_positive, parse_texts
from fasttrace.edit.edit import Edit
from fasttrace.edit.inputs import Read, read_embedding, read_text
from fasttrace.edit.matrices import Matrix, encoder_of, find_sites, matrices_at
from fasttrace.edit.methods import BIASES, Bias, Method, parse_method
from fasttrace.edit.phrases import (
    Replacement,
    Tokens,
    collect,
    parse_replacements,
    parse_templates,
)
from fasttrace.edit.solver import Change, InputChange, solve_inputs, solve_moments
from fasttrace.errors import ModelError, UsageError
from fasttrace.plan.build import software
from fasttrace.plan.options import parse_choice

SCHEMA = 1
_PRESERVE = "preserve is a list of phrases, such as ['monet', 'a dog']"
_MOST_WEIGHT = 1e12
Pairs = Sequence[tuple[str, str] | Replacement]


def again(pipe: Any, edit: Edit, lams: Sequence[float]) -> list[Edit]:
    """The same edit with other lambdas. Raises `UsageError` for one made on top of another."""
    about = edit.manifest
    if about["after"]:
        raise UsageError("An edit on top of another has no path of lambdas of its own.")
    pairs = [
        Replacement(
            p["old"],
            p["new"][0] if len(p["new"]) == 1 else tuple(p["new"]),
            p["strength"],
            tuple(p["shares"]),
        )
        for p in about["pairs"]
    ]
    return Editor(pipe).path(
        pairs,
        list(lams),
        **{n: about[n] for n in ("method", "templates", "tokens", "bias", "preserve")},
        site=about["sites"],
        preserve_weight=about["preserve_weight"],
    )


class Editor:
    """Edits of one pipeline, which it leaves as it found it: an `Edit` is applied by itself."""

    def __init__(self, pipe: Any) -> None:
        self.model = Model(pipe)

    def edit(self, pairs: Pairs, *, lam: float | None = None, **options: Any) -> Edit:
        """One edit that makes every pair's first phrase read as its second.

        pairs: ("van gogh", "painting") or a `Replacement` each. method: "diffquickfix", "mlp",
        "uce", "time" or "locoedit"; where not given, by the kind of `site`. site: a site's name, a
        glob or several. lam: weight of the change's own size. templates: sentences with {} for the
        phrase. tokens: "last" of the phrase, "last_to_end", or "aligned". bias: "exact", or
        "as_released" to count the bias twice as the public release does. preserve: phrases whose
        output is to stay, with weight `preserve_weight`. after: an edit that this one goes on top
        of. Raises `UsageError` for a wrong call, `ModelError` for weights that can't be edited.
        """
        return self.path(pairs, [lam], **options)[0]

    def path(self, pairs: Pairs, lams: Sequence[float | None], **options: Any) -> list[Edit]:
        """`edit` for several lambdas, which cost one decomposition."""
        numbers = _list_of(lams, "lams is a list of numbers, such as [0.01, 0.1]")
        if not numbers:
            raise UsageError("lams is empty; give at least one.")
        _check_names(options)
        [found] = self._edits([pairs], numbers, **options)
        return found

    def edit_each(
        self, lists: Sequence[Pairs], *, lam: float | None = None, **options: Any
    ) -> list[Edit]:
        """Independent edits, one for each list of pairs, solved in one batch."""
        _check_names(options)
        each = _list_of(
            lists,
            "edit_each takes a list of lists of pairs, such as "
            '[[("van gogh", "painting")], [("a dog", "a cat")]]',
        )
        return [found[0] for found in self._edits(each, [lam], **options)]

    def _edits(
        self,
        lists: Sequence[Pairs],
        lams: Sequence[float | None],
        *,
        method: str | None = None,
        site: str | Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        tokens: Tokens | None = None,
        bias: Bias = "exact",
        preserve: Sequence[str] = (),
        preserve_weight: float = 1.0,
        after: Edit | None = None,
    ) -> list[list[Edit]]:
        """[list][lambda]"""
        if not lists:
            return []
        model = self.model
        chosen = parse_method(method, find_sites(model, site) if site is not None else [])
        task = _Task(
            chosen,
            matrices_at(model, chosen.sites(model, site)),
            parse_templates(chosen.templates if templates is None else templates),
            tokens or chosen.tokens,
            bias,
            tuple(dict.fromkeys(parse_texts(preserve, _PRESERVE))),
            parse_positive(preserve_weight, "preserve_weight", _MOST_WEIGHT),
        )
        if not isinstance(bias, str) or bias not in BIASES:
            raise UsageError(f"bias is {bias!r}; expected {' or '.join(BIASES)}.")
        if bias == "as_released" and task.preserve:
            raise UsageError("bias='as_released' is the released method, which preserves nothing.")
        if after is not None and not isinstance(after, Edit):
            raise UsageError(
                f"after is {after!r}; expected an Edit (fasttrace.load_edit reads a saved one)."
            )
        parsed = [parse_replacements(pairs, empty_new=not chosen.of_text) for pairs in lists]
        numbers = [chosen.lam if lam is None else parse_number(lam, "lam") for lam in lams]
        before = {m.name: tensor_digest(m.weight) for m in task.matrices}
        with nullcontext() if after is None else after.applied(model.pipe), scope(model.pipe):
            solved = task.solve(model, parsed, numbers)
        return [
            [
                self._made(task, pairs, lam, changes, before, after)
                for lam, changes in zip(numbers, found, strict=True)
            ]
            for pairs, found in zip(parsed, solved, strict=True)
        ]

    def _made(
        self,
        task: _Task,
        pairs: Sequence[Replacement],
        lam: float,
        changes: dict[str, Change],
        before: Mapping[str, str],
        after: Edit | None,
    ) -> Edit:
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model.name,
            "encoders": len(self.model.encoders),
            "lora": self.model.family.loads_lora,
            "method": task.method.name,
            "source": task.method.source,
            "sites": list(dict.fromkeys(m.site.name for m in task.matrices)),
            "pairs": [
                {
                    "old": p.old,
                    "new": list(p.news),
                    "strength": p.strength,
                    "shares": list(p.shares),
                }
                for p in pairs
            ],
            "lam": lam,
            "tokens": task.tokens,
            "templates": list(task.templates),
            "bias": task.bias,
            "preserve": list(task.preserve),
            "preserve_weight": task.preserve_weight,
            "base": dict(before),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": software(),
            "after": [],
        }
        if after is not None:
            manifest["after"] = [*after.manifest["after"], copy.deepcopy(dict(after.manifest))]
            manifest["base"] = {**after.manifest["base"], **before}
            changes = dict(after.changes) | {
                name: after.changes[name] + change if name in after.changes else change
                for name, change in changes.items()
            }
        for name, change in changes.items():
            if not bool(torch.isfinite(change.left).all() & torch.isfinite(change.right).all()):
                raise ModelError(f"The edit of {name} came out as NaN or infinite.")
        return Edit(changes, manifest)


class _Task:
    """What one call of the editor solves."""

    def __init__(
        self,
        method: Method,
        matrices: list[Matrix],
        templates: tuple[str, ...],
        tokens: Tokens,
        bias: Bias,
        preserve: tuple[str, ...],
        preserve_weight: float,
    ) -> None:
        self.method, self.matrices, self.templates = method, matrices, templates
        self.tokens, self.bias = tokens, bias
        self.preserve, self.preserve_weight = preserve, preserve_weight

    def solve(
        self, model: Model, lists: Sequence[Sequence[Replacement]], lams: Sequence[float]
    ) -> list[list[dict[str, Change]]]:
        """[list][lambda] of changes by matrix name."""
        reads = [self._read(model, pairs) for pairs in lists]
        found: list[list[dict[str, Change]]] = [[{} for _ in lams] for _ in lists]
        for group in reads[0]:
            if not all(read[group].is_finite for read in reads):
                raise ModelError(f"{group or 'The text embedding'} reads NaN or infinite numbers.")
            solved = _solve([read[group] for read in reads], lams)
            for matrix in self.matrices:
                if group not in (matrix.name, ""):
                    continue
                extra = matrix.bias if self.bias == "as_released" else None
                for i, by_lam in enumerate(solved):
                    for j, change in enumerate(by_lam):
                        found[i][j][matrix.name] = change.of(matrix.weight, extra)
        return found

    def _read(self, model: Model, pairs: Sequence[Replacement]) -> dict[str, Read]:
        """By the matrix that reads it; "" where all of them read the text embedding."""
        keep = self.preserve_weight
        if not self.method.of_text:
            facts = collect(model.encoders[0], pairs, self.templates, self.tokens, self.preserve)
            return {"": read_embedding(model, facts, keep)}
        reads: dict[str, Read] = {}
        for name in dict.fromkeys(m.site.component for m in self.matrices):
            own = [m for m in self.matrices if m.site.component == name]
            encoder = encoder_of(model, own[0].site)
            facts = collect(encoder, pairs, self.templates, self.tokens, self.preserve)
            reads |= read_text(encoder, {m.name: m.module for m in own}, facts, keep)
        return reads


def _solve(reads: Sequence[Read], lams: Sequence[float]) -> list[list[InputChange]]:
    """[read][lambda]. Those whose pairs are kept are solved in one batch."""
    found: dict[int, list[InputChange]] = {
        i: solve_moments(read.moments, lams)
        for i, read in enumerate(reads)
        if read.moments is not None
    }
    small = [i for i in range(len(reads)) if i not in found]
    if 0 in lams:  # padding would make the system singular
        found |= {
            i: solve_inputs(torch.cat(reads[i].keys), torch.cat(reads[i].goals), lams)
            for i in small
        }
    elif small:
        # A row of zeros is a pair that asks for nothing and answers nothing.
        keys, goals = (
            torch.nn.utils.rnn.pad_sequence([torch.cat(rows) for rows in each], batch_first=True)
            for each in ([reads[i].keys for i in small], [reads[i].goals for i in small])
        )
        solved = solve_inputs(keys, goals, lams)
        for number, i in enumerate(small):
            n = reads[i].pairs
            found[i] = [
                InputChange(c.left[number, :, :n], c.right[number, :n], c.pull[number])
                for c in solved
            ]
    return [found[i] for i in range(len(reads))]


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a name that is no keyword of an edit."""
    parameters = inspect.signature(Editor._edits).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in given:
        parse_choice(name, known, "argument")


def _list_of(given: Any, expected: str) -> list[Any]:
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise UsageError(f"{expected}; not {given!r}.")
    return list(given)
