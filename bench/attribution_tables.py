"""Figures of attribution_rows.py: screened against exact, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from attribution_exact import ALL, METRIC, ONE_CALL
from attribution_pieces import AGAIN, OF_ALL, OTHER_METRICS, Asked
from attribution_sites import GROUPS

from fasttrace import Tracer
from fasttrace.report.uncertainty import rank_correlation
from fasttrace.testing.memory import PeakBytes

EVERY = "all"  # attributes
TOP_SHARE = 0.1
SWEEP_LANES = 16
Compared = tuple[np.ndarray, np.ndarray]  # screened, exact


@dataclass(frozen=True)
class Line:
    """One figure. group: which places; pairs: how many it is over."""

    row: str
    metric: str
    estimator: str
    generations: str
    attribute: str
    group: str
    pairs: int
    name: str
    value: float


def agreement(both: Sequence[Compared], mask: np.ndarray) -> Iterator[tuple[int, str, float]]:
    """(pairs, name, value): rank correlations over the places in `mask`."""
    rhos = [rank_correlation(s[mask].tolist(), e[mask].tolist()) for s, e in both]
    known = [rho for rho in rhos if not np.isnan(rho)]
    if known:
        yield len(known), "mean_of_pairs", float(np.mean(known))
        yield len(known), "least_of_pairs", min(known)
    screened, exact = (np.mean([one[i] for one in both], axis=0) for i in (0, 1))
    rho = rank_correlation(screened[mask].tolist(), exact[mask].tolist())
    if not np.isnan(rho):
        yield len(both), "of_means", rho


def share_of_top(screened: np.ndarray, exact: np.ndarray, count: int) -> float:
    """Of the `count` highest exact ones, those among the `count` screened highest."""
    tops = [set(np.argsort(-one, kind="stable")[:count].tolist()) for one in (screened, exact)]
    return len(tops[0] & tops[1]) / count


def with_all(by_attribute: Mapping[str, Sequence[Compared]]) -> dict[str, list[Compared]]:
    found = {attribute: list(own) for attribute, own in by_attribute.items()}
    return found | {EVERY: [both for own in found.values() for both in own]}


def cost(generations: Sequence[float]) -> str:
    return f"{np.mean(generations):.2f}"


def sites(asked: Asked) -> Iterator[Line]:
    kinds = np.array([site.kind for site in asked.tracer.sites()])
    for metric in OTHER_METRICS:
        pairs = asked.pairs(metric)
        for estimator in OF_ALL:
            both: dict[str, list[Compared]] = {}
            costs = []
            for attribute, own in pairs.items():
                found = asked.screens(metric, estimator, [(p.probe, p.seed) for p in own])
                both[attribute] = [(found[p.probe, p.seed].of(ALL), p.effects) for p in own]
                costs += [one.generations for one in found.values()]
            for attribute, compared in with_all(both).items():
                for group, own_kinds in GROUPS.items():
                    for number, name, value in agreement(compared, np.isin(kinds, own_kinds)):
                        yield Line(
                            "sites", metric, estimator, cost(costs), attribute, group, number,
                            name, value,
                        )  # fmt: skip


def windows(asked: Asked) -> Iterator[Line]:
    kinds = np.array([site.kind for site in asked.tracer.sites()])
    exact = {a: asked.windows(pairs) for a, pairs in asked.named.items()}
    for estimator in OF_ALL:
        found = {a: asked.screens(METRIC, estimator, own) for a, own in asked.named.items()}
        costs = cost([s.generations for own in found.values() for s in own.values()])
        for w, window in enumerate(ONE_CALL):
            both = {
                a: [(found[a][pair].of(window), exact[a][pair][w]) for pair in pairs]
                for a, pairs in asked.named.items()
            }
            for attribute, compared in with_all(both).items():
                for group, own_kinds in GROUPS.items():
                    mask = np.isin(kinds, own_kinds)
                    for number, name, value in agreement(compared, mask):
                        yield Line(
                            "windows", METRIC, estimator, costs, attribute,
                            f"call {window[0]}: {group}", number, name, value,
                        )  # fmt: skip


def heads(asked: Asked) -> Iterator[Line]:
    exact = {a: asked.heads(pairs) for a, pairs in asked.named.items()}
    kinds = np.array([kind for kind, _ in asked.parts("head")])
    total = len(kinds)
    count = max(1, round(TOP_SHARE * total))
    for estimator in OF_ALL:
        found = {a: asked.screens(METRIC, estimator, own, True) for a, own in asked.named.items()}
        costs = cost([s.generations for own in found.values() for s in own.values()])
        both = {
            a: [(found[a][pair].heads.ravel(), exact[a][pair]) for pair in pairs]
            for a, pairs in asked.named.items()
        }
        for attribute, compared in with_all(both).items():
            shares = [share_of_top(s, e, count) for s, e in compared]
            means = [np.mean([one[i] for one in compared], axis=0) for i in (0, 1)]
            values = {
                "top_share_mean_of_pairs": float(np.mean(shares)),
                "top_share_of_means": share_of_top(means[0], means[1], count),
                "top_share_by_chance": count / total,
            }
            for name, value in values.items():
                yield Line(
                    "heads", METRIC, estimator, costs, attribute, f"top {count} of {total}",
                    len(compared), name, value,
                )  # fmt: skip
            for group, own_kinds in _HEADS.items():
                for number, name, value in agreement(compared, np.isin(kinds, own_kinds)):
                    yield Line(
                        "heads", METRIC, estimator, costs, attribute, group, number, name, value
                    )


def channels(asked: Asked) -> Iterator[Line]:
    few = asked.few
    numbers = np.array([*asked.random, *asked.top])
    is_random = np.arange(len(numbers)) < len(asked.random)
    kinds = np.array([kind for kind, _ in asked.parts("channel")])[numbers]
    halves = [asked.channels(own, few) for own in (asked.random, asked.top)]
    exact = {pair: np.concatenate([half[pair] for half in halves]) for pair in few}
    again = asked.once_more(few)
    floor = max(float(np.abs(again[p] - exact[p][:AGAIN]).max()) for p in few)
    every = np.array([exact[pair] for pair in few])
    drawn = {
        "random": is_random,
        "top": ~is_random,
        "random and top": np.ones_like(is_random),
    }
    for estimator in OF_ALL:
        found = asked.screens(METRIC, estimator, few, True)
        costs = cost([s.generations for s in found.values()])
        both = [(found[pair].channels[numbers], exact[pair]) for pair in few]
        for which, chosen in drawn.items():
            for group, own_kinds in _CHANNELS.items():
                mask = np.isin(kinds, own_kinds) & chosen
                for number, name, value in agreement(both, mask):
                    yield Line(
                        "channels", METRIC, estimator, costs, EVERY, f"{group}, {which}", number,
                        name, value,
                    )  # fmt: skip
    for which, chosen in drawn.items():
        for group, own_kinds in _CHANNELS.items():
            own = every[:, np.isin(kinds, own_kinds) & chosen]
            if own.size:
                values = {
                    "channels": own.shape[1],
                    "noise_floor": floor,
                    "share_above_noise": float((np.abs(own) > floor).mean()),
                    "median_size": float(np.median(np.abs(own))),
                }
                for name, value in values.items():
                    where = f"{group}, {which}"
                    yield Line("channels", METRIC, "", "", EVERY, where, len(few), name, value)


def text(asked: Asked) -> Iterator[Line]:
    for estimator in OF_ALL:
        rhos: dict[tuple[str, str], list[float]] = {}
        costs = []
        for attribute, pairs in asked.prompts.items():
            for pair in pairs:
                exact = asked.text(pair)
                scores, generations = asked.text_screen(estimator, pair)
                costs.append(generations)
                screened = np.array(
                    [
                        scores[site][[int(token) for token in tokens.split(",")]].sum()
                        for site, tokens in zip(exact["site"], exact["tokens"], strict=True)
                    ]
                )
                for group, kinds in _TEXT.items():
                    mask = np.isin(exact["kind"], kinds)
                    rho = rank_correlation(screened[mask].tolist(), exact["effect"][mask].tolist())
                    if not np.isnan(rho):
                        for name in (attribute, EVERY):
                            rhos.setdefault((name, group), []).append(rho)
        for (attribute, group), own in rhos.items():
            for name, value in (("mean_of_pairs", np.mean(own)), ("least_of_pairs", min(own))):
                yield Line(
                    "text", METRIC, estimator, cost(costs), attribute, group, len(own), name,
                    float(value),
                )  # fmt: skip


def memory(asked: Asked) -> Iterator[Line]:
    """Most bytes that tensors took at one time, weights apart: one pair, from the first call on."""
    [(probe, seed), *_] = asked.few
    pipe = asked.tracer.model.pipe
    given = {"seeds": [seed], "metric": METRIC}
    with PeakBytes() as exact:
        Tracer(pipe, lanes=SWEEP_LANES).trace(probe, pictures=False, **given)
    yield Line(
        "memory", METRIC, "", "", EVERY, f"exact sweep, {SWEEP_LANES} lanes", 1, "MiB",
        exact.peak / 2**20,
    )  # fmt: skip
    for estimator in OF_ALL:
        with PeakBytes() as screen:
            found = Tracer(pipe).screen(probe, estimator=estimator, **given)
        for name, value in (
            ("MiB", screen.peak / 2**20),
            ("over_exact_sweep", screen.peak / exact.peak),
        ):
            yield Line(
                "memory", METRIC, estimator, cost([found.generations]), EVERY, "screen", 1, name,
                value,
            )  # fmt: skip


_HEADS = {
    "all heads": ("attn1", "attn2"),
    "self-attention": ("attn1",),
    "cross-attention": ("attn2",),
}
_CHANNELS = {
    "all sites": ("resnet", "attn1", "attn2", "ff"),
    "ResNets": ("resnet",),
    "self-attention": ("attn1",),
    "cross-attention": ("attn2",),
    "feed-forward": ("ff",),
}
_TEXT = {
    "all places": ("attn", "mlp", "hidden"),
    "attention": ("attn",),
    "MLP": ("mlp",),
    "hidden states": ("hidden",),
}
ROWS: dict[str, Callable[[Asked], Iterator[Line]]] = {
    "sites": sites,
    "windows": windows,
    "heads": heads,
    "channels": channels,
    "text": text,
    "memory": memory,
}
