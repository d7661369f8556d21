"""An edit's manifest in words: what was rewritten, how it was made, how to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_FEW = 4  # pairs that are still typed on a command line
_SHOWN = 12  # hashes
_LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Origin:
    """Where a page comes from: the whole command that gives it, how was judged, by the options'
    names, and the folder of each edit, by its name."""

    command: str
    settings: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """settings: name and value; command makes the edit, from `pairs` (a file) where not empty.
    check judges it; empty where the page says so itself."""

    settings: list[tuple[str, str]]
    hashes: list[tuple[str, str]]  # matrix, sha256 before the edit
    more_hashes: int
    command: str
    pairs: str
    python: str
    check: str


def quoted(phrase: str) -> str:
    return f"“{phrase}”"


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c" """
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def reads_as(manifest: Mapping[str, Any] | None, phrases: Sequence[str]) -> str:
    """The headline of one edit."""
    pairs = _pairs(manifest or {})
    if not pairs:
        return f"{listed([quoted(p) for p in phrases[:3]]) or 'An edit'} rewritten"
    shown = [f"{quoted(old)} rewritten as {_new(news)}" for old, news in pairs[:2]]
    if len(pairs) > 2:
        return f"{len(pairs)} phrases rewritten: {quoted(pairs[0][0])} as {_new(pairs[0][1])}, ..."
    return listed(shown)


def versions(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each set of versions once."""
    found = [
        ", ".join(f"{name} {number}" for name, number in m.get("versions", {}).items())
        for m in manifests
    ]
    return list(dict.fromkeys(text for text in found if text))


def made(
    name: str, manifest: Mapping[str, Any], seeds: Sequence[int], origin: Origin | None
) -> Made:
    folder = name if origin is None else origin.folders.get(name, name)
    base = list(manifest.get("base", {}).items())
    by_hand = _by_hand(manifest)
    model = str(manifest.get("model", "MODEL"))
    old = next((pair[0] for pair in _pairs(manifest)), "a prompt")
    return Made(
        settings=_settings(manifest),
        hashes=[(str(matrix), str(digest)) for matrix, digest in base[:_SHOWN]],
        more_hashes=max(0, len(base) - _SHOWN),
        command=_command(folder, manifest, by_hand),
        pairs="" if by_hand else _pair_file(manifest),
        python=(
            "import fasttrace\n\n"
            f"pipe = fasttrace.load({_literal(model)})\n"
            f"with fasttrace.load_edit({_literal(folder)}).applied(pipe):\n"
            f'    pipe({_literal(old)}).images[0].save("edited.png")\n\n'
            "# where it was saved as a LoRA, without fasttrace:\n"
            f"pipe.load_lora_weights({_literal(folder)}, weight_name={_literal(_LORA)})"
        ),
        check=_check(folder, seeds) if origin is None else "",
    )


def _pairs(manifest: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return [(str(p["old"]), [str(n) for n in p["new"]]) for p in manifest.get("pairs", ())]


def _new(news: Sequence[str]) -> str:
    if len(news) > 1:
        return "the mean of " + listed([quoted(new) for new in news])
    return quoted(news[0]) if news and news[0] else "nothing (the empty prompt)"


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for p in manifest.get("pairs", ()):
        text = f"{quoted(str(p['old']))} as {_new([str(n) for n in p['new']])}"
        if p.get("strength", 1.0) != 1.0:
            text += f", strength {p['strength']:g}"
        if len(set(p.get("shares", ()))) > 1:
            text += ", shares " + ", ".join(f"{s:.3g}" for s in p["shares"])
        found.append(("pair", text))
    for name, value in manifest.items():
        if name in ("pairs", "base", "versions", "after"):
            continue
        if isinstance(value, list | tuple):
            value = " | ".join(map(str, value)) or "none"
        found.append(
            (name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value))
        )
    if manifest.get("after"):
        first = [f"{m.get('method')}: {reads_as(m, ())}" for m in manifest["after"]]
        found.append(("on top of", "; ".join(first)))
    return found


def _by_hand(manifest: Mapping[str, Any]) -> bool:
    """Whether its pairs can be said with `--pair old=new`."""
    pairs = list(manifest.get("pairs", ()))
    return len(pairs) <= _FEW and all(
        len(p["new"]) == 1 and "=" not in p["old"] and p.get("strength", 1.0) == 1.0 for p in pairs
    )


def _check(folder: str, seeds: Sequence[int]) -> str:
    numbers = ",".join(map(str, seeds))
    return shlex.join(["fasttrace", "evaluate", folder, "--seeds", numbers])


def _command(folder: str, manifest: Mapping[str, Any], by_hand: bool) -> str:
    words = ["fasttrace", "edit", str(manifest.get("model", "MODEL"))]
    for old, news in _pairs(manifest) if by_hand else ():
        words += ["--pair", f"{old}={news[0]}"]
    words += [] if by_hand else ["--pairs", "pairs.json"]
    for option, key in (("--method", "method"), ("--tokens", "tokens"), ("--bias", "bias")):
        if key in manifest:
            words += [option, str(manifest[key])]
    if "lam" in manifest:
        words += ["--lam", repr(manifest["lam"])]
    for option, key in (
        ("--site", "sites"),
        ("--template", "templates"),
        ("--preserve", "preserve"),
    ):
        for value in manifest.get(key, ()):
            words += [option, str(value)]
    if manifest.get("preserve"):
        words += ["--preserve-weight", repr(manifest.get("preserve_weight", 1.0))]
    if manifest.get("after"):
        words += ["--after", "EARLIER"]
    if manifest.get("dtype", "float32") != "float32":
        words += ["--dtype", str(manifest["dtype"])]
    return shlex.join([*words, "--out", folder])


def _pair_file(manifest: Mapping[str, Any]) -> str:
    pairs = []
    for p in manifest.get("pairs", ()):
        entry: dict[str, Any] = {"old": p["old"], "new": _one(list(p["new"]))}
        if p.get("strength", 1.0) != 1.0:
            entry["strength"] = p["strength"]
        if len(set(p.get("shares", ()))) > 1:
            entry["weights"] = list(p["shares"])
        pairs.append(json.dumps(entry, ensure_ascii=False))
    return '{"schema": 1, "pairs": [\n  ' + ",\n  ".join(pairs) + "\n]}"


def _one(news: list[str]) -> str | list[str]:
    return news[0] if len(news) == 1 else news


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
