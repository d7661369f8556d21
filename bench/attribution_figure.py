"""docs/attribution.png: screened against exact, from what attribution_rows.py has kept.

.venv/bin/python bench/attribution_figure.py [--keep bench-out/attribution]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from attribution_exact import ALL, METRIC, ONE_CALL, Kept
from attribution_pieces import Asked
from attribution_tables import Compared

from fasttrace import Tracer, load

ESTIMATOR = "nudged"
OUT = Path(__file__).parents[1] / "docs" / "attribution.png"
COLOURS = {
    "resnet": ("#3f7fb8", "ResNet"),
    "attn1": ("#f58c55", "self-attention"),
    "attn2": ("#ad2560", "cross-attention"),
    "ff": ("#7d52a8", "feed-forward"),
    "attn": ("#f58c55", ""),
    "mlp": ("#7d52a8", ""),
    "hidden": ("#3f7fb8", ""),
}
Panel = tuple[str, list[str], np.ndarray, np.ndarray]  # title, kinds, screened, exact


def panels(asked: Asked) -> Iterable[Panel]:
    """Means over an attribute's pairs; of the text encoder single pairs, whose tokens differ."""
    kinds = [site.kind for site in asked.tracer.sites()]
    found = {a: asked.screens(METRIC, ESTIMATOR, own) for a, own in asked.named.items()}
    exact = {a: {(p.probe, p.seed): p.effects for p in own} for a, own in asked.pairs().items()}
    calls = {a: asked.windows(own) for a, own in asked.named.items()}
    yield means(
        "whole sites, all 12 calls", kinds,
        [[(found[a][p].of(ALL), exact[a][p]) for p in own] for a, own in asked.named.items()],
    )  # fmt: skip
    window = ONE_CALL[1]
    yield means(
        f"whole sites, call {window[0]} alone", kinds,
        [[(found[a][p].of(window), calls[a][p][1]) for p in own] for a, own in asked.named.items()],
    )  # fmt: skip
    heads = {a: asked.heads(own) for a, own in asked.named.items()}
    parts = {a: asked.screens(METRIC, ESTIMATOR, own, True) for a, own in asked.named.items()}
    yield means(
        "heads, all calls", [kind for kind, _ in asked.parts("head")],
        [[(parts[a][p].heads.ravel(), heads[a][p]) for p in own] for a, own in asked.named.items()],
    )  # fmt: skip
    of, screened, patched = [], [], []
    for pair in [pair for own in asked.prompts.values() for pair in own]:
        places = asked.text(pair)
        scores, _ = asked.text_screen(ESTIMATOR, pair)
        of += places["kind"].tolist()
        patched.append(places["effect"])
        for site, tokens in zip(places["site"], places["tokens"], strict=True):
            screened.append(scores[site][[int(token) for token in tokens.split(",")]].sum())
    yield "text encoder, a layer's tokens", of, np.array(screened), np.concatenate(patched)


def means(title: str, kinds: list[str], compared: list[list[Compared]]) -> Panel:
    mean = [
        np.concatenate([np.mean([one[i] for one in own], 0) for own in compared]) for i in (0, 1)
    ]
    return title, kinds * len(compared), mean[0], mean[1]


def draw(found: Iterable[Panel]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), constrained_layout=True)
    for axis, (title, kinds, screened, exact) in zip(axes, found, strict=True):
        of = np.array(kinds)
        for kind in dict.fromkeys(kinds):
            colour, name = COLOURS[kind]
            mine = of == kind
            axis.scatter(screened[mine], exact[mine], 14, colour, alpha=0.65, lw=0, label=name)
        axis.axline((0, 0), slope=1, color="#8b8896", lw=0.8, ls="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"screened ({ESTIMATOR})", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("exact: patched alone", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(OUT, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, default=Path("bench-out/attribution"))
    given = parser.parse_args()
    tracer = Tracer(load("embedded"))
    draw(panels(Asked(tracer, Kept(given.keep, tracer.fingerprint))))


if __name__ == "__main__":
    main()
