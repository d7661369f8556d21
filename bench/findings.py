"""The numbers of docs/findings.md: `python bench/findings.py DIR [--metric clip_score]`.

DIR holds a trace of the UNet, the text encoder, or both (docs/findings.md says how). Values are
normalised effects in percent: 100 is the clean run's score, 0 the corrupt run's. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable

from fasttrace.report.result import Result
from fasttrace.report.statistics import SiteEffect

CAUSAL = 0.5  # a site is called a state of its own if it brings half of the concept back


def value(effect: SiteEffect) -> str:
    found = f"{100 * effect.normalised:.0f}"
    if effect.normalised_low is None or effect.normalised_high is None:
        return f"{found} (n = {effect.prompts})"
    return f"{found} [{100 * effect.normalised_low:.0f}, {100 * effect.normalised_high:.0f}]"


def name(effect: SiteEffect) -> str:
    place = effect.site.partition(".")[2].replace("transformer_blocks.0.", "")
    return place if effect.selector == "all" else f"{place} @ {effect.selector}"


def table(title: str, head: list[str], rows: Iterable[list[str]]) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def groups(effects: list[SiteEffect]) -> dict[str, list[SiteEffect]]:
    found = defaultdict(list)
    for effect in effects:
        if effect.status == "run":
            found[effect.group].append(effect)
    return dict(found)


def text_encoder(effects: list[SiteEffect]) -> None:
    rows = []
    for group, own in groups(effects).items():
        narrow = [e for e in own if e.kind != "hidden"]  # hidden restores the whole stream
        first = next(e for e in own if is_first(e))
        rank = 1 + sum(e.normalised > first.normalised for e in narrow)
        states = [e for e in narrow if e.normalised >= CAUSAL]
        rivals = sorted((e for e in narrow if e is not first), key=lambda e: -e.normalised)
        rows.append(
            [
                group,
                str(first.prompts),
                value(first),
                f"{rank} of {len(narrow)}",
                str(len(states)),
                f"{name(rivals[0])}: {value(rivals[0])}",
            ]
        )
    table(
        "Text encoder: layer 0 self-attention at the last subject token",
        ["attribute", "prompts", "effect", "rank (attn and mlp)", "states >= 50 %", "best other"],
        rows,
    )
    for kind, what in (("attn", "self-attention"), ("mlp", "MLP"), ("hidden", "whole layer")):
        tokens = ["earlier of the subject", "last subject", "EOS", "padding"]
        by_layer: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for effect in effects:
            if effect.kind == kind and effect.status == "run":
                layer = int(effect.site.split("layers.")[1].split(".")[0])
                by_layer[layer][column(effect.selector)].append(effect.normalised)
        table(
            f"Text encoder, {what}: mean over the attributes by layer and token",
            ["layer", *tokens, "later words"],
            [
                [str(layer)] + [mean(of.get(t, [])) for t in (*tokens, "later")]
                for layer, of in sorted(by_layer.items())
            ],
        )


def is_first(effect: SiteEffect) -> bool:
    return (effect.kind, effect.selector) == ("attn", "last subject") and ".0." in effect.site


def column(selector: str) -> str:
    if selector.startswith("subject"):
        return "earlier of the subject"
    return "later" if selector.startswith("later") else selector


def mean(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.0f}" if values else ""


def unet(effects: list[SiteEffect]) -> None:
    rows, kinds, firsts = [], [], []
    for group, own in groups(effects).items():
        best = max(own, key=lambda e: e.normalised)
        positive = [max(0.0, e.normalised) for e in own]
        spread = sum(positive) ** 2 / sum(v * v for v in positive)
        above = sum(e.normalised > 0.1 for e in own)
        certain = sum(e.beyond_chance for e in own)
        rows.append(
            [
                group,
                str(best.prompts),
                f"{name(best)}: {value(best)}",
                f"{spread:.1f} of {len(own)}",
                str(above),
                str(certain),
            ]
        )
        line = [group]
        for kind in ("resnet", "attn1", "attn2", "ff"):
            of = [e for e in own if e.kind == kind]
            top = max(of, key=lambda e: e.normalised)
            average = 100 * sum(e.normalised for e in of) / len(of)
            line.append(f"{average:.1f}; {name(top)} {value(top)}")
        kinds.append(line)
        selfs = [e for e in own if e.kind == "attn1"]
        first = min(selfs, key=lambda e: e.site_index)
        among = 1 + sum(e.normalised > first.normalised for e in selfs)
        overall = 1 + sum(e.normalised > first.normalised for e in own)
        firsts.append([group, value(first), f"{among} of {len(selfs)}", f"{overall} of {len(own)}"])
    table(
        "UNet: how spread out",
        [
            "attribute",
            "prompts",
            "best site",
            "effective number of sites",
            "sites > 10 %",
            "beyond chance (Holm)",
        ],
        rows,
    )
    table(
        "UNet by kind: mean; best",
        ["attribute", "ResNet", "self-attention", "cross-attention", "feed-forward"],
        kinds,
    )
    table(
        "UNet: the first self-attention",
        ["attribute", "effect", "rank in self-attention", "rank in all"],
        firsts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--metric", default="clip_score")
    args = parser.parse_args()
    result = Result.open(args.directory).where(metric=args.metric)
    pairs = result.pairs()
    counted = {k for k, rows in pairs.items() if rows[0].total_effect > result.minimum[args.metric]}
    print(
        f"{args.metric}: {len(pairs)} pairs, {len(counted)} of them count; "
        f"noise floor {result.noise_floor:.2g}, minimum {result.minimum[args.metric]:.2g}"
    )
    for component, describe in (("text_encoder", text_encoder), ("unet", unet)):
        describe(result.where(component=component).aie())


if __name__ == "__main__":
    main()
