"""Which sites are meant: groups, kinds, names, aliases, globs; suggestions for misspelt ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from fasttrace.errors import UsageError
from fasttrace.plugins import SITE_KINDS, plugins
from fasttrace.types import Site

EVERY = ("paper", "all")
BEYOND = ("transformer", "block")  # kinds that "paper" leaves out, beside registered ones


def select_sites(known: Sequence[Site], wanted: str | Sequence[str]) -> list[Site]:
    """The wanted sites in execution order, each once.

    `wanted`: "paper" (the default set), "all" (every known site), a kind ("attn2", "all attn2"), a
    site's name with or without its component, a paper alias, a glob ("unet.mid_block.*", of the
    default set where that has one), or a list of these. Raises `UsageError` for words that match
    nothing, with close matches.
    """
    words = [wanted] if isinstance(wanted, str) else list(wanted)
    if not words:
        raise UsageError("The site list is empty; give 'paper', a kind, or names of sites.")
    chosen = {site.name for word in words for site in _matching(known, word)}
    return [site for site in known if site.name in chosen]


def suggestion(word: str, choices: Iterable[str], n: int = 3) -> str:
    """ " Did you mean ...?" with the nearest choices, or nothing."""
    close = get_close_matches(word, list(choices), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _matching(known: Sequence[Site], word: str) -> list[Site]:
    text = word.strip()
    kind = text.removeprefix("all ").strip()
    kinds = list(dict.fromkeys(s.kind for s in known))
    beyond = {*BEYOND, *plugins(SITE_KINDS)}
    if text in EVERY:
        return [s for s in known if text == "all" or s.kind not in beyond]
    found = [s for s in known if s.kind == kind]
    found = found or [s for s in known if text in _names(s)]
    matched = [s for s in known if any(fnmatchcase(n, text) for n in _names(s))]
    found = found or [s for s in matched if s.kind not in beyond] or matched
    if found:
        return found
    if text.startswith("all "):
        raise UsageError(
            f"Unknown kind of site '{kind}'; this model has {', '.join(kinds)}."
            f"{suggestion(kind, kinds)}"
        )
    names = [*EVERY, *kinds, *(n for s in known for n in _names(s))]
    raise UsageError(
        f"No site matches '{word}'; `fasttrace sites` lists them.{suggestion(text, names)}"
    )


def _names(site: Site) -> tuple[str, ...]:
    return (site.name, site.name.split(".", 1)[1], *site.aliases)
