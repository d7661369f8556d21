"""Exact patches that a screen is held against, each kept in a file so that a run can be resumed."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasttrace import Corruption, Probe, Tracer
from fasttrace.attribution.parts import Part, Parts
from fasttrace.plan.plan import Plan

METRIC = "latent_recovery"
ALL = (0, 12)
ONE_CALL = ((0, 1), (5, 6), (10, 11))
ATTRIBUTES = ("object", "style", "colour", "action")
Named = tuple[Probe, int]  # a pair: probe and seed
Arrays = dict[str, np.ndarray]


def say(words: str) -> None:
    """Progress: not part of what is printed for the README."""
    print(words, file=sys.stderr, flush=True)


@dataclass
class Kept:
    """Arrays by name, in files below `folder` whose names say what they were asked.

    Several processes may share a folder: a file appears whole, and what two make is the same.
    """

    folder: Path
    fingerprint: str

    def get(self, what: str, make: Callable[[], Arrays]) -> Arrays:
        if not self.has(what):
            self.put(what, make())
        return self.read(what)

    def has(self, what: str) -> bool:
        return self._file(what).is_file()

    def read(self, what: str) -> Arrays:
        with np.load(self._file(what)) as held:
            return {key: held[key] for key in held.files}

    def put(self, what: str, found: Arrays) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(what)
        part = file.with_suffix(f".{os.getpid()}.part.npz")
        np.savez(part, **found)
        part.replace(file)

    def _file(self, what: str) -> Path:
        name = hashlib.sha256(f"{self.fingerprint} {what}".encode()).hexdigest()[:20]
        return self.folder / f"{name}.npz"


def keep_all(
    kept: Kept,
    pairs: Sequence[Named],
    name: Callable[[Named], str],
    make: Callable[[list[Named]], dict[Named, Arrays]],
) -> dict[Named, Arrays]:
    """A file a pair; those that are missing are made together."""
    missing = [pair for pair in pairs if not kept.has(name(pair))]
    for pair, found in make(missing).items() if missing else ():
        kept.put(name(pair), found)
    return {pair: kept.read(name(pair)) for pair in pairs}


def seeds_of(pairs: Sequence[Named]) -> dict[Probe, list[int]]:
    """As `Tracer.plan` takes them."""
    found: dict[Probe, list[int]] = {}
    for probe, seed in pairs:
        found.setdefault(probe, []).append(seed)
    return found


def exact_windows(
    tracer: Tracer,
    kept: Kept,
    pairs: Sequence[Named],
    sigma: float,
    windows: Sequence[tuple[int, int]] = ONE_CALL,
) -> dict[Named, np.ndarray]:
    """Latent recovery of every paper site patched alone in each window: [windows, sites].

    sigma: of the corruption, here and below the one that screens are made with.
    """
    sites = {site.name: i for i, site in enumerate(tracer.sites())}

    def make(missing: list[Named]) -> dict[Named, Arrays]:
        seeds = seeds_of(missing)
        result = tracer.trace(
            list(seeds),
            seeds=seeds,
            window=list(windows),
            metric=METRIC,
            corruption=Corruption(sigma=sigma),
            pictures=False,
        )
        named = {(p.prompt, p.subject, p.attribute, seed): (p, seed) for p, seed in missing}
        found = {pair: np.full((len(windows), len(sites)), np.nan) for pair in missing}
        for row in result.rows:
            pair = named[row.prompt, row.subject, row.attribute, row.seed]
            window = windows.index((row.window_start, row.window_stop))
            found[pair][window, sites[row.site]] = row.effect
        return {pair: {"effects": effects} for pair, effects in found.items()}

    def name(pair: Named) -> str:
        return f"windows {pair[0]} {pair[1]} {sigma} {tuple(windows)}"

    return {p: own["effects"] for p, own in keep_all(kept, pairs, name, make).items()}


def exact_parts(
    tracer: Tracer,
    kept: Kept,
    pairs: Sequence[Named],
    sigma: float,
    groups: Sequence[Sequence[Part]],
    lanes: int,
) -> dict[Named, np.ndarray]:
    """Latent recovery of parts patched in all calls, a run a group: [groups].

    lanes: patched runs at a time.
    """

    def make(missing: list[Named]) -> dict[Named, Arrays]:
        plan = planned(tracer, missing, sigma)
        parts = Parts(tracer.model, tracer.fast_engine, plan, lanes)
        found = {}
        for probe, seed in missing:
            number = plan.probes.index(probe)
            row = next(r for r in plan.rows if (r.probe, r.seed) == (number, seed))
            with tracer._inside():
                run = tracer._pair(plan, probe, [row])
                [effects] = parts.effects(probe, run, groups).values()
            found[probe, seed] = {"effects": effects}
        return found

    asked = hashlib.sha256(repr([list(group) for group in groups]).encode()).hexdigest()

    def name(pair: Named) -> str:
        return f"parts {pair[0]} {pair[1]} {sigma} {asked} {lanes}"

    return {p: own["effects"] for p, own in keep_all(kept, pairs, name, make).items()}


def planned(tracer: Tracer, pairs: Sequence[Named], sigma: float) -> Plan:
    """A plan of these pairs."""
    seeds = seeds_of(pairs)
    corruption = Corruption(sigma=sigma)
    return tracer.plan(list(seeds), seeds=seeds, metric=METRIC, corruption=corruption)


def exact_text(tracer: Tracer, kept: Kept, pair: Named, sigma: float) -> Arrays:
    """Text-encoder sites by token: sites, kinds, labels, positions ("0,1"), effects of rows that
    run. What a causal mask makes zero is left out."""
    probe, seed = pair

    def make() -> Arrays:
        plan = tracer.plan(
            [probe],
            seeds=[seed],
            component="text_encoder",
            metric=[METRIC],
            corruption=Corruption(sigma=sigma),
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

    return kept.get(f"text {probe} {seed} {sigma}", make)
