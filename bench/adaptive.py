"""How many runs an adaptive sweep takes, how often its set is right, and how often audits hold.

python bench/adaptive.py writes bench/adaptive.csv and prints Markdown, from stored exact scores of
every site (`adaptive_scores.py`): nothing is generated, no model is loaded. Every race is the one
that `--until top10%@95` runs, over the pairs in 200 random orders with fixed seeds. Runs are
counted as the tool counts them, clean and corrupt ones included.

python bench/adaptive.py --from DIR makes bench/exhaustive.parquet anew from a results directory,
python bench/adaptive.py --screen what real screens say (bench/screened.csv).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from adaptive_scores import ATTRIBUTES, FEW, METRICS, Scores, keep, read, read_screens, screen
from audits import AuditRow, audit_rows, audit_table

from fasttrace.attribution.adaptive import BESIDE, Race, pull_order, run_race
from fasttrace.attribution.goal import parse_goal

OUT = Path(__file__).with_name("adaptive.csv")
REPEATS = 200
GOAL = parse_goal("top10%@95")


@dataclass(frozen=True)
class RaceRow:
    """Races over one set of pairs.

    gap: how far the last of the top is ahead of the first below it, in standard deviations of their
    paired difference. right: repetitions with the exhaustive set. share_*: of the exhaustive runs;
    uniform_mean: where every site is run until the last decision. finished: repetitions that needed
    every pair.
    """

    metric: str
    pairs_of: str
    pairs: int
    counted: int
    sites: int
    places: int
    gap: float
    repeats: int
    right: int
    share_mean: float
    share_median: float
    share_90: float
    uniform_mean: float
    finished: int


def race_row(scores: Scores, repeats: int = REPEATS) -> RaceRow:
    """`repeats` races over these pairs."""
    sites = range(len(scores.sites))
    places = GOAL.count(len(sites))
    best = np.argsort(-scores.means, kind="stable")
    top = set(best[:places].tolist())
    apart = (scores.effects[:, best[places - 1]] - scores.effects[:, best[places]])[scores.counted]
    right, shares, uniform, finished = 0, [], [], 0
    for seed in range(repeats):
        order = pull_order(scores.pairs, seed)

        def pull(arms: Sequence[int], pair: int, order: list[int] = order) -> dict | None:
            at = order[pair]
            return {a: scores.effects[at, a] for a in arms} if scores.counted[at] else None

        race = Race(
            sites, places, scores.pairs, confidence=GOAL.confidence, noise=float(scores.floor)
        )
        found = run_race(race, pull)
        right += set(found.top) == top
        shares.append(found.share)
        uniform.append(found.visited * (BESIDE + len(sites)) / found.exhaustive)
        finished += found.why == "every pair"
    return RaceRow(
        metric=scores.metric,
        pairs_of=scores.group,
        pairs=scores.pairs,
        counted=int(scores.counted.sum()),
        sites=len(sites),
        places=places,
        gap=float(apart.mean() / apart.std(ddof=1)),
        repeats=repeats,
        right=right,
        share_mean=float(np.mean(shares)),
        share_median=float(np.median(shares)),
        share_90=float(np.quantile(shares, 0.9)),
        uniform_mean=float(np.mean(uniform)),
        finished=finished,
    )


def race_rows() -> Iterator[RaceRow]:
    scores = read()
    for metric in METRICS:
        for attribute in ATTRIBUTES:
            own = scores[metric, attribute]
            yield race_row(own.of(own.seeds < FEW))
        for group in (*ATTRIBUTES, "all"):
            yield race_row(scores[metric, group])


def race_table(rows: Sequence[RaceRow]) -> str:
    heads = (
        "metric",
        "pairs of",
        "pairs, counted",
        "3rd ahead of 4th, sd",
        "right, of 200",
        "share of the exhaustive runs, mean",
        "median",
        "90 %",
        "uniform",
        "took every pair",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [
        f"| {r.metric} | {r.pairs_of} | {r.pairs}, {r.counted} | {r.gap:.2f} | {r.right} | "
        f"{r.share_mean:.0%} | {r.share_median:.0%} | {r.share_90:.0%} | {r.uniform_mean:.0%} | "
        f"{r.finished} |"
        for r in rows
    ]
    return "\n".join(lines)


def write(rows: Sequence[RaceRow | AuditRow]) -> None:
    """Both kinds in one file; what a kind has no value for is empty."""
    names = list(dict.fromkeys(f.name for kind in (RaceRow, AuditRow) for f in fields(kind)))
    with OUT.open("w", newline="") as file:
        out = csv.DictWriter(file, ["part", *names], lineterminator="\n")
        out.writeheader()
        for row in rows:
            part = "race" if isinstance(row, RaceRow) else "audit"
            values = asdict(row).items()
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values}
            out.writerow({"part": part, **shown})


def main() -> int:
    if sys.argv[1:2] == ["--from"] and len(sys.argv) == 3:
        keep(Path(sys.argv[2]))
        return 0
    if sys.argv[1:] == ["--screen"]:
        screen()
        return 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    races = list(race_rows())
    audits = list(audit_rows(read(), read_screens()))
    write([*races, *audits])
    print(f"{race_table(races)}\n\n{audit_table(audits)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
