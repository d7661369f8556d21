"""Geometry of the report's charts: what the template draws as SVG.

Coordinates are in SVG user units. Colour is a class, `p0` .. `p31` for 0 to the chart's limit and
`n0` .. `n7` below zero, so that light and dark pages colour the same chart differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan

from fasttrace.report.names import block, depth, layer, up_blocks, words
from fasttrace.report.statistics import SiteEffect
from fasttrace.report.text import percent

SHADES, NEGATIVE_SHADES = 32, 8
RAMPS = {  # low to high; the first is a quiet surface, so that what restores nothing recedes
    "light": ("f1efe9", "fbe3bd", "fbbf7c", "f58c55", "dd4f4b", "ad2560", "6c1463", "2c0b40"),
    "dark": ("26242e", "43204f", "71206b", "a92c69", "dd4b57", "f6874c", "fcc571", "fff4cf"),
}
NEGATIVE = {"light": ("f1efe9", "a9cbe8", "3f7fb8"), "dark": ("26242e", "2b4d70", "5d9dd6")}


def ramp(theme: str, shades: int, colours: Sequence[str] | None = None) -> list[str]:
    """`shades` colours from low to high, "#rrggbb"."""
    anchors = [tuple(bytes.fromhex(c)) for c in colours or RAMPS[theme]]
    found = []
    for i in range(shades):
        place = i / (shades - 1) * (len(anchors) - 1)
        k = min(int(place), len(anchors) - 2)
        mixed = (
            round(a + (b - a) * (place - k))
            for a, b in zip(anchors[k], anchors[k + 1], strict=True)
        )
        found.append("#" + bytes(mixed).hex())
    return found


def shade(value: float, limit: float) -> str:
    """The class of a value; `none` where it is not a number."""
    if isnan(value):
        return "none"
    if value < 0:
        return f"n{min(NEGATIVE_SHADES - 1, round(-value / limit * (NEGATIVE_SHADES - 1)))}"
    return f"p{min(SHADES - 1, round(value / limit * (SHADES - 1)))}"


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    w: float
    h: float
    shade: str
    lines: tuple[str, ...]  # what hovering shows
    state: str = ""  # "floor": within the noise; "unrun": listed, not run
    rank: int = 0  # place among the most causal, from 1
    sheet: str = ""  # which contact sheet shows it, and where in it
    spot: int = -1


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: str = "start"
    role: str = "axis"


@dataclass(frozen=True)
class Chart:
    width: float
    height: float
    cells: list[Cell] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    rules: list[tuple[float, float, float, float]] = field(default_factory=list)
    title: str = ""


_CHARACTER = 8.5  # width of one in a group's name: 14 px, semibold
_LONGEST_NAME = 30

Ranks = dict[tuple[str, str, str, str], int]  # (group, component, site, selector) -> 1, 2, ...
Spots = dict[tuple[str, str, str, str], tuple[str, int]]


def limit_of(effects: Sequence[SiteEffect]) -> float:
    """The value that gets the strongest colour, shared by the charts of one component."""
    return max((e.normalised for e in effects if not isnan(e.normalised)), default=1.0) or 1.0


def hover_lines(e: SiteEffect) -> tuple[str, ...]:
    """What a cell says when pointed at, the essential first."""
    first = f"{e.group}: {words(e.site, e.kind)}"
    if e.selector != "all":
        first += f", {e.selector}"
    if e.status != "run":
        return (first, f"not run: {e.status}", e.site)
    if e.prompts == 0:
        return (first, "every pair was left out", e.site)
    lines = [first, f"restores {percent(e.normalised)} (effect {e.effect:.3g}, {e.interval_text})"]
    if e.below_floor:
        lines.append(f"within the noise floor of {e.noise_floor:.2g}")
    return (*lines, e.site)


def _cell(
    e: SiteEffect, box: tuple[float, float, float, float], limit: float, ranks: Ranks, spots: Spots
) -> Cell:
    key = (e.group, e.component, e.site, e.selector)
    name, spot = spots.get(key, ("", -1))
    run = e.status == "run"
    state = "" if run and not e.below_floor else "floor" if run else "unrun"
    value = e.normalised if run else float("nan")
    return Cell(*box, shade(value, limit), hover_lines(e), state, ranks.get(key, 0), name, spot)


def _shortened(name: str) -> str:
    """A group's name as it fits beside its band: with `by="prompt"` it is a whole caption."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1].rstrip()}…"


def execution_map(effects: Sequence[SiteEffect], ranks: Ranks, spots: Spots) -> Chart:
    """Sites left to right in execution order, one band a group, blocks named above."""
    groups = list(dict.fromkeys(e.group for e in effects))
    sites = list(dict.fromkeys((e.site, e.kind) for e in sorted(effects, key=_order)))
    names = {group: _shortened(group) for group in groups}
    widest = max(map(len, names.values()), default=0)
    left, top, band, gap = max(92.0, 12 + _CHARACTER * widest), 26.0, 40.0, 6.0
    width = 1060.0
    step = (width - left) / len(sites)
    column = {site: i for i, (site, _) in enumerate(sites)}
    limit = limit_of(effects)
    height = top + len(groups) * (band + gap) + 14
    chart = Chart(width, height)
    for e in effects:
        x, y = left + column[e.site] * step, top + groups.index(e.group) * (band + gap)
        chart.cells.append(_cell(e, (x, y, step - min(1.0, step / 8), band), limit, ranks, spots))
    for i, group in enumerate(groups):
        middle = top + i * (band + gap) + band / 2
        chart.labels.append(Label(left - 12, middle, names[group], "end", "group"))
    _block_labels(chart, [site for site, _ in sites], left, step, top, height)
    for i, (_, kind) in enumerate(sites):
        if step >= 9:
            x = left + (i + 0.5) * step
            chart.labels.append(Label(x, height - 4, KIND_LETTERS.get(kind, "?"), "middle", "tick"))
    return chart


KIND_LETTERS = {"resnet": "R", "attn1": "s", "attn2": "c", "ff": "f"}


def _order(e: SiteEffect) -> int:
    return e.site_index


def _block_labels(
    chart: Chart, sites: list[str], left: float, step: float, top: float, height: float
) -> None:
    names = [block(site) for site in sites]
    starts = [i for i, name in enumerate(names) if name and (i == 0 or name != names[i - 1])]
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else len(sites)
        x = left + start * step
        text = names[start] if (stop - start) * step > 34 else names[start].replace("down ", "d")
        chart.labels.append(Label(x + (stop - start) * step / 2, top - 11, text, "middle", "block"))
        if start:
            chart.rules.append((x - step * 0.06, top - 20, x - step * 0.06, height - 14))


def u_shape(effects: Sequence[SiteEffect], limit: float, ranks: Ranks, spots: Spots) -> Chart:
    """One group's sites along the U: left to right in execution order, as deep as their block."""
    ordered = sorted(effects, key=_order)
    ups = up_blocks([e.site for e in ordered])
    levels = 1 + max((depth(e.site, ups) for e in ordered), default=0)
    width, tall, drop, foot = 440.0, 30.0, 17.0, 18.0
    step = width / len(ordered)
    height = tall + drop * (levels - 1) + 4 + foot
    chart = Chart(width, height)
    ways: dict[str, list[int]] = {}
    for i, e in enumerate(ordered):
        box = (i * step, 2 + drop * depth(e.site, ups), step * 0.9, tall)
        chart.cells.append(_cell(e, box, limit, ranks, spots))
        ways.setdefault(block(e.site).split(" ")[0], []).append(i)
    for way, places in ways.items():
        middle = (places[0] + places[-1] + 1) / 2 * step
        chart.labels.append(Label(middle, height - foot / 2 + 2, way, "middle", "block"))
    return chart


def token_map(
    effects: Sequence[SiteEffect], limit: float, ranks: Ranks, spots: Spots, title: str = ""
) -> Chart:
    """One group's text-encoder sites of one kind: layers downwards, tokens to the right."""
    selectors = sorted({(_place(e), e.selector) for e in effects})
    names = list(dict.fromkeys(name for _, name in selectors))
    layers = sorted({layer(e.site) or 0 for e in effects})
    left, top, h = 24.0, 6.0, 15.0
    w = min(48.0, max(17.0, 190.0 / len(names)))
    foot = 8 + 5.2 * max(len(name) for name in names)
    chart = Chart(left + w * len(names) + 26, top + h * len(layers) + foot, title=title)
    for e in effects:
        x = left + names.index(e.selector) * w
        y = top + layers.index(layer(e.site) or 0) * h
        chart.cells.append(_cell(e, (x, y, w - 1.5, h - 1.5), limit, ranks, spots))
    for i, number in enumerate(layers):
        chart.labels.append(Label(left - 6, top + (i + 0.5) * h, str(number), "end", "tick"))
    for i, name in enumerate(names):
        x, y = left + (i + 0.5) * w, top + len(layers) * h + 9
        chart.labels.append(Label(x, y, name, "end", "slant"))
    return chart


def _place(e: SiteEffect) -> tuple[int, float]:
    # Padding and EOS stand at the end of every prompt, wherever that is.
    last = {"EOS": 1, "padding": 2}.get(e.selector, 0)
    return last, e.position if e.position is not None else -1.0


@dataclass(frozen=True)
class Whisker:
    """One line of an interval plot, in percent of its width; None where there is no interval."""

    at: float
    zero: float
    low: float | None
    high: float | None


def whiskers(effects: Sequence[SiteEffect]) -> list[Whisker]:
    """Normalised effects on one common axis from below zero to the largest upper end."""
    ends = [0.0]
    for e in effects:
        ends += [v for v in (e.normalised, e.normalised_low, e.normalised_high) if v is not None]
    ends = [v for v in ends if not isnan(v)]
    start, stop = min(ends), max(*ends, 1e-9)
    span = 1.06 * (stop - start)

    def place(value: float) -> float:
        return 100.0 * (value - start + 0.02 * span) / (1.04 * span)

    return [
        Whisker(
            place(e.normalised),
            place(0.0),
            None if e.normalised_low is None else place(e.normalised_low),
            None if e.normalised_high is None else place(e.normalised_high),
        )
        for e in effects
    ]
