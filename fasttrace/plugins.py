"""Families, metrics and kinds of sites that other packages register as entry points.

A broken one is left out with a warning and breaks nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Literal

Group = Literal["fasttrace.families", "fasttrace.metrics", "fasttrace.site_kinds"]
FAMILIES: Group = "fasttrace.families"
METRICS: Group = "fasttrace.metrics"
SITE_KINDS: Group = "fasttrace.site_kinds"
# Kinds of our own, and the words that ask for several of them.
TAKEN = {"resnet", "attn1", "attn2", "ff", "transformer", "block", "attn", "mlp", "hidden", "swap"}
TAKEN |= {"text", "paper", "all"}


class PluginWarning(UserWarning):
    """Something another package registered can't be used."""


@cache
def plugins(group: Group) -> Mapping[str, Any]:
    """What the entry points of a group name, by their names; read once a process.

    `plugins.cache_clear()` reads them anew.
    """
    found: dict[str, Any] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        owner = point.dist.name if point.dist is not None else "an unknown package"
        if point.name in found or (group == SITE_KINDS and point.name in TAKEN):
            warn(group, point.name, f"of '{owner}' has a name that is taken")
            continue
        try:
            found[point.name] = point.load()
        except (Exception, SystemExit) as error:
            warn(group, point.name, f"of '{owner}' can't be loaded ({brief(error)})")
    return MappingProxyType(found)


def warn(group: Group, name: str, reason: str) -> None:
    """Say why something is left out."""
    what = {FAMILIES: "family", METRICS: "metric", SITE_KINDS: "site kind"}[group]
    warnings.warn(f"The {what} '{name}' {reason}, so it is left out.", PluginWarning, stacklevel=3)


def brief(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
