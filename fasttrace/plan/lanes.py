"""The lanes a trace asks for, and which of them are provably the corrupt run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fasttrace.adapters.corruption import corrupt_prompt
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.selection import suggestion
from fasttrace.adapters.spans import Tokens, token_text
from fasttrace.adapters.text import TextEncoder
from fasttrace.adapters.unet import UnetSites
from fasttrace.errors import UsageError
from fasttrace.plan.sources import Written
from fasttrace.plan.windows import Window
from fasttrace.types import Branch, Corruption, Lane, Patch, Probe, Selector, Site, Span

RUN = "run"
CAUSAL = "zero: causal mask"
UNREACHABLE = "unreachable"
SAME_INPUT = "zero: nothing differs before it"

TOKEN_WORDS = ("default", "subject", "last subject", "later", "EOS", "padding", "earlier")
CLEAN_ALONE = (("clean", 1.0, "all"),)
EITHER_RUN = ("clean", "corrupt")
Planned = tuple[Lane, str]


def unet_lanes(
    sites: Sequence[Site],
    branch: Branch,
    windows: Sequence[Window],
    calls: int,
    layout: UnetSites,
    *,
    pooled: bool,
    written: Written | None = None,
) -> list[Planned]:
    """One lane per window, site and source; `written` None is the clean activation."""
    lanes = []
    for window in windows:
        for site in sites:
            same = _same_input(site, branch, window, layout, pooled)
            for source, strength, title in written.at(site) if written else CLEAN_ALONE:
                selector = Selector(title, branch=branch, window=window)
                status = SAME_INPUT if same and source in EITHER_RUN else RUN
                lanes.append((Lane((Patch(site, selector, source, strength),)), status))
    return lanes


def _same_input(
    site: Site, branch: Branch, window: Window, layout: UnetSites, pooled: bool
) -> bool:
    """In the first call clean and corrupt read the same latent and the same unconditional text.

    So unconditional rows agree there, and conditional ones up to the first module that reads text
    (every ResNet does where a pooled vector enters).
    """
    if window != (0, 1):
        return False
    if branch == "uncond":
        return True
    first = min((s.index for s in layout.sites if s.name in layout.text_fed), default=0)
    return not pooled and site.index < first


def swap_lanes(
    sites: Sequence[Site], neighbours: int, branch: Branch, windows: Sequence[Window]
) -> list[Planned]:
    """Every run of `neighbours` consecutive cross-attention layers reads the other prompt."""
    layers = [s for s in sites if s.kind == "attn2"]
    if not 1 <= neighbours <= len(layers):
        raise UsageError(
            f"{neighbours!r} neighbouring layers were asked for, of {len(layers)} cross-attention "
            "layers chosen."
        )
    label = f"K/V of {neighbours}"
    return [
        (
            Lane(
                tuple(
                    Patch(s, Selector(label, None, branch, window), source="text:corrupt")
                    for s in layers[i : i + neighbours]
                )
            ),
            RUN,
        )
        for window in windows
        for i in range(len(layers) - neighbours + 1)
    ]


def text_lanes(
    model: Model,
    probe: Probe,
    sites: Sequence[Site],
    tokens: str | Sequence[str | int],
    corruption: Corruption,
    written: Written | None = None,
) -> list[Planned]:
    """One lane per site, token group and source of one probe.

    Raises `UsageError` for positions outside the window and for a replacement that changes the
    number of tokens (positions of the two runs would not match).
    """
    lanes = []
    encoders = {e.name: e for e in model.encoders}
    selectors = {e.name: _selectors(e, probe, tokens, corruption) for e in model.encoders}
    for site in sites:
        encoder = encoders[site.component]
        eos = encoder.tokens(probe.prompt).eos
        first = encoder.span(probe.prompt, probe.subject, probe.occurrence).start
        for selector in selectors[site.component]:
            positions = selector.tokens or ()
            reached = any(encoder.reached(site, p, eos) for p in positions)
            hidden = encoder.causal and max(positions, default=0) < first
            for source, strength, title in written.at(site) if written else CLEAN_ALONE:
                status = CAUSAL if hidden and source in EITHER_RUN else RUN
                label = selector.label if title == "all" else f"{selector.label}; {title}"
                patch = Patch(site, replace(selector, label=label), source, strength)
                lanes.append((Lane((patch,)), status if reached else UNREACHABLE))
    return lanes


def _selectors(
    encoder: TextEncoder, probe: Probe, tokens: str | Sequence[str | int], corruption: Corruption
) -> list[Selector]:
    """Token groups with labels that mean the same in every prompt."""
    seen = encoder.tokens(probe.prompt)
    other = encoder.tokens(corrupt_prompt(probe, corruption))
    if len(other.ids) != len(seen.ids):
        raise UsageError(
            f"'{corruption.replacement}' has another number of tokens than '{probe.subject}', so "
            "token positions don't match; choose a replacement of the same length, or noise."
        )
    span = encoder.span(probe.prompt, probe.subject, probe.occurrence)
    words = [tokens] if isinstance(tokens, str | int) else list(tokens)
    chosen: dict[tuple[int, ...], Selector] = {}
    for word in words:
        for label, positions in _group(encoder, seen, span, word):
            if positions:
                chosen.setdefault(positions, Selector(label, positions))
    if not chosen:
        raise UsageError(f"The tokens {tokens!r} pick nothing of '{probe.prompt}'.")
    return list(chosen.values())


def _group(
    encoder: TextEncoder, seen: Tokens, span: Span, word: str | int
) -> list[tuple[str, tuple[int, ...]]]:
    if isinstance(word, int):
        if not 0 <= word < seen.window:
            raise UsageError(f"Token {word} is outside the text window of {seen.window}.")
        text = token_text(encoder.tokenizer, seen.ids[word]) if word < len(seen.ids) else "padding"
        return [(f"token {word} '{text}'", (word,))]
    last = span.stop - 1
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "earlier": [("earlier", tuple(range(span.start)))],
        # Counted from the end, so that "last subject" means the same for subjects of any length.
        "subject": [
            ("last subject" if p == last else f"subject -{span.stop - p}", (p,))
            for p in range(span.start, span.stop)
        ],
        "last subject": [("last subject", (last,))],
        "later": [(f"later +{p - last}", (p,)) for p in range(span.stop, seen.eos)],
        "EOS": [("EOS", (seen.eos,))],
        "padding": [("padding", seen.padding)],
    }
    if word == "default":
        order = ("earlier", "subject", "later", "EOS", "padding")
        return [group for name in order for group in groups[name]]
    if word not in groups:
        raise UsageError(
            f"Unknown tokens {word!r}; expected positions or {', '.join(TOKEN_WORDS)}."
            f"{suggestion(word, TOKEN_WORDS, n=1)}"
        )
    return groups[word]
