"""Exact patches that a screen is held against, each kept in a file so that a run can be resumed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasttrace import Probe, Tracer
from fasttrace.adapters.pipeline import embedded_folder
from fasttrace.store.probes import read_probes
from fasttrace.types import Row

METRICS = ("latent_recovery", "clip_score", "attribute")
ALL = (0, 12)
ONE_CALL = ((0, 1), (5, 6), (10, 11))
ATTRIBUTES = ("object", "style", "colour", "action")


def say(words: str) -> None:
    """Progress: not part of what is printed for the README."""
    print(words, file=sys.stderr, flush=True)


def probes_of(seeds: int) -> list[tuple[Probe, int]]:
    """(probe, seed) of the bundled probe set: 8 prompts an attribute, up to 3 seeds each."""
    entries = read_probes(embedded_folder("model").parent / "probes.json")
    return [(e.probe(), seed) for e in entries for seed in (e.seeds or [0])[:seeds]]


@dataclass
class Kept:
    """Arrays by name, in files below `folder` whose names say what they were asked."""

    folder: Path
    fingerprint: str

    def get(self, what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{self.fingerprint} {what}".encode()).hexdigest()[:20]
        file = self.folder / f"{name}.npz"
        if not file.is_file():
            found = make()
            part = file.with_suffix(".part.npz")
            np.savez(part, **found)
            part.replace(file)
        with np.load(file) as held:
            return {key: held[key] for key in held.files}


@dataclass
class Exact:
    """Exact effects of one (probe, seed): by metric [windows, sites], total effects, floors."""

    probe: Probe
    seed: int
    sites: list[str]
    windows: list[tuple[int, int]]
    effects: dict[str, np.ndarray]
    totals: dict[str, float]
    floors: dict[str, float]

    def of(self, metric: str, window: tuple[int, int]) -> np.ndarray:
        found: np.ndarray = self.effects[metric][self.windows.index(window)]
        return found

    def says(self, metric: str) -> bool:
        """Whether the corruption did anything at all to this score."""
        return self.totals[metric] > max(3 * self.floors[metric], 1e-3)


def exact_sites(
    tracer: Tracer, kept: Kept, probe: Probe, seed: int, windows: Sequence[tuple[int, int]]
) -> Exact:
    """Every paper site patched alone, in each window."""
    sites = [site.name for site in tracer.sites()]

    def make(window: tuple[int, int]) -> dict[str, np.ndarray]:
        rows: list[Row] = list(
            tracer.trace(
                [probe], seeds=[seed], window=[window], metric=list(METRICS), pictures=False
            ).rows
        )
        found = {}
        for metric in METRICS:
            own = {row.site: row for row in rows if row.metric == metric}
            found[metric] = np.array([own[site].effect for site in sites])
            any_row = own[sites[0]]
            found[f"{metric}/total"] = np.array(any_row.total_effect)
            found[f"{metric}/floor"] = np.array(any_row.noise_floor)
        return found

    parts = [
        kept.get(f"sites {probe} {seed} {window}", lambda w=window: make(w))  # type: ignore[misc]
        for window in windows
    ]
    first = parts[0]
    return Exact(
        probe,
        seed,
        sites,
        list(windows),
        {m: np.stack([part[m] for part in parts]) for m in METRICS},
        {m: float(first[f"{m}/total"]) for m in METRICS},
        {m: float(max(part[f"{m}/floor"] for part in parts)) for m in METRICS},
    )


def exact_text(tracer: Tracer, kept: Kept, probe: Probe, seed: int) -> dict[str, np.ndarray]:
    """Text-encoder sites by token: "layer|kind" strings, positions, effects of lanes that run."""

    def make() -> dict[str, np.ndarray]:
        plan = tracer.plan(
            [probe], seeds=[seed], component="text_encoder", metric=["latent_recovery"]
        )
        rows = [row for row, _ in tracer.iter_rows(plan, pictures=False)]
        rows = [row for row in rows if row.status == "run"]
        return {
            "site": np.array([row.site for row in rows]),
            "kind": np.array([row.kind for row in rows]),
            "label": np.array([row.selector for row in rows]),
            "tokens": np.array([",".join(map(str, row.tokens or ())) for row in rows]),
            "effect": np.array([row.effect for row in rows]),
        }

    return kept.get(f"text {probe} {seed}", make)
