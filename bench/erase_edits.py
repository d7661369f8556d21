"""The ways to erase a concept: settings of the closed form, and fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import finetuned
from erase_world import LOOKS, NOUNS, Concept, carriers, noun
from torch import Tensor

from fasttrace.edit.edit import Edit
from fasttrace.edit.editor import Editor


@dataclass(frozen=True)
class Stage:
    """One solution; a setting has one or more, each on top of those before.

    templates: by name, see `carriers`; None is the method's own. keep: how many other phrases of
    the concept's kind are to stay, with their weight.
    """

    method: str
    tokens: str
    templates: str | int | None = None
    lam: float | None = None
    keep: int = 0
    weight: float = 1.0
    site: str | None = None


Setting = tuple[Stage, ...]
KINDS = ("object", "style")
ESD, ABLATION = "esd", "concept ablation"
FIRST = "diffquickfix"
# name -> kind of concept -> setting. The first was chosen on `erase_world.TUNING` and on ink, flat
# and cartoon, the second is the same with less to read; the others are as published.
CLOSED: dict[str, dict[str, Setting]] = {
    "closed form": {
        "object": (Stage(FIRST, "last_to_end", 18, keep=69),),
        "style": (Stage(FIRST, "last_to_end", 96, keep=3, lam=0.1),),
    },
    "closed form, quick": {
        "object": (Stage(FIRST, "last_to_end", 9, keep=20),),
        "style": (Stage(FIRST, "last_to_end", 24, keep=3, lam=0.1),),
    },
    "diffquickfix, last to end": dict.fromkeys(KINDS, (Stage(FIRST, "last_to_end"),)),
    "diffquickfix, last": dict.fromkeys(KINDS, (Stage(FIRST, "last"),)),
}
BEST = "closed form"


@dataclass(frozen=True)
class Tuned(Edit):
    """Weights that fine-tuning found, as the evaluator takes an edit."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def applied(self, pipe: Any, *, force: bool = False) -> Iterator[Any]:
        with finetuned.applied(pipe, self.weights):
            yield pipe


def closed(editor: Editor, of: Sequence[Concept], setting: Setting, removed: bool = False) -> Edit:
    """One edit of all these concepts. removed: they become "a" instead of their targets."""
    edit = None
    for stage in setting:
        edit = editor.edit(
            [(c.pair[0], "a" if removed else c.pair[1]) for c in of],
            method=stage.method,
            tokens=stage.tokens,
            site=stage.site,
            lam=stage.lam,
            templates=None if stage.templates is None else carriers(of, stage.templates),
            preserve=kept(of, stage.keep),
            preserve_weight=stage.weight,
            after=edit,
        )
    assert edit is not None
    return edit


def kept(of: Sequence[Concept], number: int) -> list[str]:
    """Other phrases of the same kind, evenly taken."""
    names = [c.name for c in of]
    if of[0].kind == "style":
        return [look for look in LOOKS if look not in names][:number]
    others = [noun(name) for name in NOUNS if name not in names]
    return [others[i * len(others) // number] for i in range(number)] if number else []


def tuned(pipe: Any, of: Concept, method: str, steps: int, seed: int = 0) -> Tuned:
    """Trained on the carriers that the closed form is told."""
    which = carriers([of], "prefixes" if of.kind == "object" else 24)
    old, new = ([c.format(phrase) for c in which] for phrase in of.pair)
    if method == ESD:
        weights = finetuned.esd(pipe, old, steps=steps, seed=seed)
    else:
        weights = finetuned.concept_ablation(pipe, old, new, steps=steps, seed=seed)
    manifest = {"method": method, "concept": of.name, "steps": steps, "seed": seed}
    return Tuned({f"unet.{name}": None for name in weights}, manifest, weights=weights)  # type: ignore[arg-type]  # only names are read


def rate_of(method: str) -> float:
    return finetuned.ESD_RATE if method == ESD else finetuned.ABLATION_RATE


def as_json(setting: Any) -> str:
    """A setting as a row has it."""
    if isinstance(setting, tuple):
        setting = [
            {name: value for name, value in asdict(stage).items() if value is not None}
            for stage in setting
        ]
    return json.dumps(setting)


def moved(setting: Setting, method: str, site: str | None) -> Setting:
    """The same edit at another place; None is everywhere that the method edits."""
    return tuple(replace(stage, method=method, site=site) for stage in setting)
