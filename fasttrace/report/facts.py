"""The page's lists: how much there is, how far to trust it, with which settings it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isnan
from typing import Any

from fasttrace.report.names import component_words
from fasttrace.report.result import Result
from fasttrace.report.statistics import SiteEffect
from fasttrace.report.uncertainty import rank_correlation
from fasttrace.store.manifest import Manifest
from fasttrace.types import Row


def facts(result: Result, pairs: int) -> list[tuple[str, str]]:
    rows = result.rows
    return [
        ("prompts", str(len({(r.prompt, r.subject, r.occurrence) for r in rows}))),
        ("pairs of prompt and seed", str(pairs)),
        ("sites", str(len({(r.component, r.site) for r in rows}))),
        ("rows", f"{len(rows):,}"),
        ("noise floor", f"{result.noise_floor:.2g}"),
    ]


def below(effects: Sequence[SiteEffect], component: str) -> tuple[str, int, int]:
    run = [e for e in effects if e.component == component and e.status == "run" and e.prompts]
    return component_words(component), sum(e.below_floor for e in run), len(run)


def unrun(effects: Sequence[SiteEffect]) -> list[tuple[str, str, int]]:
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for e in effects:
        if e.status != "run":
            found.setdefault((component_words(e.component), e.status), set()).add(
                (e.site, e.selector)
            )
    return [(component, why, len(sites)) for (component, why), sites in found.items()]


def correlations(
    effects: Sequence[SiteEffect], names: list[str], components: list[str]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """How alike the groups' maps are: Spearman's rho over the sites both have."""
    found = []
    for component in components:
        maps = {
            name: {
                (e.site, e.selector): e.normalised
                for e in effects
                if e.group == name and e.component == component and e.status == "run"
                and not isnan(e.normalised)
            }
            for name in names
        }  # fmt: skip
        lines = []
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                both = [key for key in maps[first] if key in maps[second]]
                rho = rank_correlation(
                    [maps[first][k] for k in both], [maps[second][k] for k in both]
                )
                if not isnan(rho):
                    lines.append((f"{first} and {second}", f"{rho:+.2f}"))
        if lines:
            found.append((component_words(component), lines))
    return found


def settings(result: Result, manifest: Manifest) -> list[tuple[str, str]]:
    row = result.rows[0]
    found = [("model", row.model), ("fingerprint", row.fingerprint), ("engine", row.engine)]
    for title, text in (("sampling", row.sampling), ("corruption", row.corruption)):
        found += [(f"{title}: {name}", _plain(value)) for name, value in json.loads(text).items()]
    seeds = sorted({r.seed for r in result.rows})
    found += [
        ("branch", ", ".join(sorted({r.branch for r in result.rows}))),
        ("calls patched", ", ".join(sorted({_window(r) for r in result.rows}))),
        ("seeds", ", ".join(str(s) for s in seeds[:40]) + (" ..." if len(seeds) > 40 else "")),
    ]
    if "dtype" in manifest.fixed:
        found.append(("dtype", _plain(manifest.fixed["dtype"])))
    return found


def _window(row: Row) -> str:
    return f"{row.window_start} to {row.window_stop - 1}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
