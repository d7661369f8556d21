"""The published edits, as what they differ in: where, at which tokens, with which lambda."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttrace.adapters.pipeline import Model
from fasttrace.edit.matrices import find_sites
from fasttrace.edit.phrases import TEMPLATES, Tokens
from fasttrace.errors import UsageError
from fasttrace.types import Site

Bias = Literal["exact", "as_released"]
BIASES = ("exact", "as_released")


@dataclass(frozen=True)
class Method:
    """kind: of sites that it edits; by default all of them, of layer 0 alone where `first`.

    located: sites have to be named, since the method is about those that tracing found.
    """

    name: str
    source: str
    kind: str
    lam: float
    tokens: Tokens
    templates: tuple[str, ...] = TEMPLATES
    first: bool = False
    located: bool = False

    @property
    def of_text(self) -> bool:
        return self.kind != "attn2"

    def sites(self, model: Model, wanted: str | Sequence[str] | None) -> list[Site]:
        """Raises `UsageError` for sites of another kind."""
        if wanted is None:
            if self.located:
                raise UsageError(
                    f"{self.name} edits the cross-attention that tracing found: name it with "
                    "site= (--site), such as "
                    "'unet.mid_block.attentions.0.transformer_blocks.0.attn2'."
                )
            found = find_sites(model, self.kind)
            return [s for s in found if not self.first or ".layers.0." in s.name]
        found = find_sites(model, wanted)
        wrong = next((s for s in found if s.kind != self.kind), None)
        if wrong is not None:
            raise UsageError(
                f"{self.name} edits sites of kind '{self.kind}'; {wrong.name} is of kind "
                f"'{wrong.kind}'. {_other(wrong.kind)}"
            )
        return found


METHODS = {
    method.name: method
    for method in (
        Method(
            "diffquickfix", "Basu et al., arXiv 2310.13730", "attn", 0.01, "last_to_end", first=True
        ),
        Method("mlp", "the same solution at fc2", "mlp", 0.01, "last_to_end", first=True),
        Method("uce", "Gandikota et al., arXiv 2308.14761", "attn2", 0.1, "last_to_end"),
        Method("time", "Orgad et al., arXiv 2303.08084", "attn2", 0.1, "aligned", ("{}",)),
        Method(
            "locoedit",
            "Basu et al., arXiv 2405.01008",
            "attn2",
            0.01,
            "last_to_end",
            located=True,
        ),
    )
}


def parse_method(name: str | None, sites: Sequence[Site]) -> Method:
    """By name; where none is given by the kind of the sites. Raises `UsageError`."""
    if name is None:
        kind = sites[0].kind if sites else "attn"
        name = {"mlp": "mlp", "attn2": "locoedit"}.get(kind, "diffquickfix")
    if not isinstance(name, str) or name not in METHODS:
        raise UsageError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    return METHODS[name]


def _other(kind: str) -> str:
    fitting = [m.name for m in METHODS.values() if m.kind == kind]
    if fitting:
        return f"For that, use {' or '.join(fitting)}."
    kinds = ", ".join(dict.fromkeys(m.kind for m in METHODS.values()))
    return f"What can be edited is of kind {kinds}."
