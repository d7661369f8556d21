"""Exact scores of every site of the bundled model, kept for simulations: exhaustive.parquet.

Made anew, in about an hour, by

    fasttrace trace embedded --probes fasttrace/embedded/probes.json --seeds 0:12 \
        --metric latent_recovery --metric attribute --metric clip_score --no-pictures --out DIR
    python bench/adaptive.py --from DIR

and, in ten minutes, screened.csv: what `tracer.screen` says of the first three seeds' pairs.

    python bench/adaptive.py --screen
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILE = Path(__file__).with_name("exhaustive.parquet")
SCREENED = FILE.with_name("screened.csv")
FEW = 3  # seeds a prompt that are screened
METRICS = ("latent_recovery", "attribute", "clip_score")
ATTRIBUTES = ("object", "style", "colour", "action")
WORDS = ("attribute", "prompt", "subject", "site", "kind", "metric")
SMALL = {"seed": pa.int16(), "site_index": pa.int16()}
NUMBERS = ("effect", "total_effect", "noise_floor")


def keep(folder: Path, file: Path = FILE) -> None:
    """Write the columns that simulations need of a results directory."""
    table = pq.read_table(folder / "results.parquet")
    columns = {name: table[name].cast(pa.string()) for name in WORDS}
    columns |= {name: table[name].cast(kind) for name, kind in SMALL.items()}
    columns |= {name: table[name].cast(pa.float32()) for name in NUMBERS}
    fixed = (table.schema.metadata or {}).get(b"fasttrace.fixed", b"")
    made = pa.table(columns).replace_schema_metadata({b"fasttrace.fixed": fixed})
    pq.write_table(made, file, compression="zstd", compression_level=19, use_dictionary=[*WORDS])


@dataclass(frozen=True)
class Scores:
    """effects [pairs, sites]; counted [pairs]: whether there is something to restore."""

    metric: str
    group: str
    effects: np.ndarray
    counted: np.ndarray
    floor: float
    sites: tuple[str, ...]
    kinds: tuple[str, ...]
    seeds: np.ndarray

    @property
    def pairs(self) -> int:
        return len(self.effects)

    @property
    def means(self) -> np.ndarray:
        """Of each site, over all pairs that count."""
        found: np.ndarray = self.effects[self.counted].mean(0)
        return found

    def of(self, chosen: np.ndarray) -> Scores:
        """Some of the pairs."""
        return replace(
            self,
            effects=self.effects[chosen],
            counted=self.counted[chosen],
            seeds=self.seeds[chosen],
        )


def read(file: Path = FILE) -> dict[tuple[str, str], Scores]:
    """By metric and attribute; "all" is every attribute's pairs."""
    table = pq.read_table(file).to_pydict()
    cells: dict[str, dict[tuple, dict[int, int]]] = {}
    for i, metric in enumerate(table["metric"]):
        pair = tuple(table[name][i] for name in ("attribute", "prompt", "subject", "seed"))
        cells.setdefault(metric, {}).setdefault(pair, {})[table["site_index"][i]] = i
    found = {}
    for metric in METRICS:
        pairs = cells[metric]
        order = sorted(next(iter(pairs.values())))
        at = np.array([[row[s] for s in order] for row in pairs.values()])
        every = Scores(
            metric=metric,
            group="all",
            effects=np.array(table["effect"], np.float64)[at],
            counted=(np.array(table["total_effect"]) > np.array(table["noise_floor"]))[at].all(1),
            floor=max(table["noise_floor"][i] for i in at.ravel()),
            sites=tuple(table["site"][i] for i in at[0]),
            kinds=tuple(table["kind"][i] for i in at[0]),
            seeds=np.array([pair[3] for pair in pairs]),
        )
        found[metric, "all"] = every
        names = np.array([pair[0] for pair in pairs])
        for attribute in ATTRIBUTES:
            found[metric, attribute] = replace(every.of(names == attribute), group=attribute)
    return found


def screen() -> None:
    """Write first-order effects of each site, by metric and attribute, plain estimator."""
    from fasttrace import Tracer, load
    from fasttrace.adapters.pipeline import embedded_folder
    from fasttrace.store.probes import read_probes

    tracer = Tracer(load("embedded"))
    entries = read_probes(embedded_folder("model").parent / "probes.json")
    with SCREENED.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("metric", "attribute", "site", "effect"))
        for metric in METRICS:
            for attribute in ATTRIBUTES:
                probes = [e.probe() for e in entries if e.attribute == attribute]
                found = tracer.screen(probes, seeds=FEW, metric=metric)
                for one in found.ranking():
                    out.writerow((metric, attribute, one.site, f"{one.effect:.6g}"))
                file.flush()


def read_screens(file: Path = SCREENED) -> dict[tuple[str, str], dict[str, float]]:
    """By metric and attribute: first-order effects by site."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            own = found.setdefault((row["metric"], row["attribute"]), {})
            own[row["site"]] = float(row["effect"])
    return found
