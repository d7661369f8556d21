"""How well do screens agree with exact patches of whole sites? On the bundled model.

    .venv/bin/python bench/attribution.py [--keep bench-out/attribution] [--pairs 24]

Exact effects of all-call patches come from exhaustive.parquet. Each (prompt, seed) is screened by
each estimator; Spearman's rank correlation is taken in every pair and averaged over pairs, and once
more of the mean effects over pairs, which is what a user ranks by. What was screened is kept in the
folder, so that a run goes on where it stopped: about an hour for all. Writes attribution.csv.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from attribution_exact import ALL, ATTRIBUTES, Kept, say
from attribution_screens import screened
from attribution_sites import GROUPS, by_group, chosen, stored

from fasttrace import Tracer, load
from fasttrace.report.uncertainty import rank_correlation

ESTIMATORS = (
    "plain",
    "nudged",
    "averaged:2",
    "averaged:2:gauss",
    "averaged:3",
    "averaged:3:middle",
)
METRIC = "latent_recovery"
SIGMA = 0.08642877812073607  # of the exhaustive trace's corruption
OUT = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "metric", "estimator", "generations", "attribute", "group", "pairs", "mean_of_pairs",
    "least_of_pairs", "of_means",
)  # fmt: skip


def measure(tracer: Tracer, kept: Kept, estimators: list[str], count: int) -> list[dict[str, str]]:
    """A line an estimator, attribute and group of sites."""
    kinds = [site.kind for site in tracer.sites()]
    lines = []
    for estimator in estimators:
        for attribute in ATTRIBUTES:
            pairs = chosen(stored(METRIC)[attribute], count)
            screens = [
                screened(tracer, kept, p.probe, p.seed, SIGMA, estimator=estimator) for p in pairs
            ]
            say(f"{estimator} {attribute}")
            both = [(s.of(ALL), p.effects) for s, p in zip(screens, pairs, strict=True)]
            own = by_group(kinds, both)
            means = [np.mean([one[i] for one in both], axis=0) for i in (0, 1)]
            for group, (mean, least, number) in own.items():
                mask = np.isin(kinds, GROUPS[group])
                of_means = rank_correlation(means[0][mask].tolist(), means[1][mask].tolist())
                cost = np.mean([s.generations for s in screens])
                values = (METRIC, estimator, f"{cost:.2f}", attribute, group, str(number))
                numbers = (f"{mean:.3f}", f"{least:.3f}", f"{of_means:.3f}")
                lines.append(dict(zip(COLUMNS, values + numbers, strict=True)))
    return lines


def table(lines: list[dict[str, str]]) -> str:
    """As Markdown: mean over pairs / of the mean effects, an attribute a column."""
    text = [
        "| estimator (generations a pair) | sites | " + " | ".join(ATTRIBUTES) + " |",
        "| --- | --- |" + " --- |" * len(ATTRIBUTES),
    ]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        name = f"{line['estimator']} ({float(line['generations']):.1f})", line["group"]
        cell = f"{float(line['mean_of_pairs']):.2f} / {float(line['of_means']):.2f}"
        cells.setdefault(name, {})[line["attribute"]] = cell
    for (name, group), own in cells.items():
        values = " | ".join(own.get(attribute, "") for attribute in ATTRIBUTES)
        text.append(f"| {name} | {group} | {values} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, default=Path("bench-out/attribution"))
    parser.add_argument("--pairs", type=int, default=24, help="of each attribute")
    parser.add_argument("--estimator", action="append", help="; repeatable", metavar="NAME")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tracer = Tracer(load("embedded"))
    kept = Kept(asked.keep, tracer.fingerprint)
    lines = measure(tracer, kept, asked.estimator or list(ESTIMATORS), asked.pairs)
    print(table(lines))
    if asked.estimator is None and asked.pairs == 24:
        with OUT.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
