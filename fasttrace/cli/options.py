"""What several commands share: option types, and reading values such as 0:4."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.errors import UsageError
from fasttrace.types import Corruption

if TYPE_CHECKING:
    from fasttrace.store import Shard

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no hints.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output, alone on stdout.")]
Components = Annotated[
    list[str] | None,
    typer.Option("--component", help="unet, text_encoder or all; repeatable.", metavar="NAME"),
]
Sites = Annotated[
    list[str] | None,
    typer.Option("--sites", help="Names, globs, a kind, or 'paper'; repeatable.", metavar="NAME"),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The results directory.", metavar="DIR")]

Clean = Annotated[
    str | None, typer.Option("--clean", help="Where lanes read activations: auto, leader or cache.")
]
Lanes = Annotated[int | None, typer.Option("--lanes", help="The most lanes in a batch.")]
CacheSize = Annotated[
    float | None, typer.Option("--cache", help="GiB that clean activations may take.")
]

Model = Annotated[str, typer.Argument(help="'embedded', a pipeline's folder, or a hub id.")]
NewFolder = Annotated[Path, typer.Option("--out", "-o", help="A new folder.", metavar="DIR")]
Pair = Annotated[
    list[str] | None, typer.Option(help="A phrase and its new meaning; repeatable.", metavar="A=B")
]
Pairs = Annotated[Path | None, typer.Option(help="A file of pairs instead.", metavar="FILE")]
Lam = Annotated[float | None, typer.Option(help="Weight of the change's own size.")]
Template = Annotated[
    list[str] | None,
    typer.Option(help="A sentence with {} for the phrase; repeatable.", metavar="TEXT"),
]
Tokens = Annotated[str | None, typer.Option(help="last, last_to_end or aligned.")]
Preserve = Annotated[
    list[str] | None, typer.Option(help="A phrase that is to stay; repeatable.", metavar="TEXT")
]
Attribute = Annotated[
    list[str] | None,
    typer.Option(help="What a phrase is; repeatable.", metavar="PHRASE=NAME"),
]
Seeds = Annotated[str, typer.Option(help="0:4 is 0, 1, 2, 3.", metavar="SEEDS")]
MetricName = Annotated[str | None, typer.Option(help="The score.", metavar="NAME")]
Steps = Annotated[int | None, typer.Option(help="Inference steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16")]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant", help="Weight files by the word in their names: fp16.", metavar="WORD"
    ),
]
CORRUPTIONS = ("embedding_noise", "output_noise", "replace")
CorruptionKind = Annotated[str, typer.Option("--corruption", help=", ".join(CORRUPTIONS))]
Sigma = Annotated[float | None, typer.Option(help="Absolute noise.")]
NoiseScale = Annotated[float, typer.Option(help="Noise in standard deviations.")]
Replacement = Annotated[str | None, typer.Option(help="Words for 'replace'.")]
NoiseSeed = Annotated[int, typer.Option(help="Fixes the noise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]

COMPONENTS = ("unet", "text_encoder")
MOST_SEEDS = 100_000
_RANGE = re.compile(r"(\d+):(\d+)")
_SHARD = re.compile(r"(\d+)/(\d+)")


def parse_seeds(text: str) -> list[int]:
    """ "0:4" is 0, 1, 2, 3; "7" is seed 7; "0,3,10:12" joins several. Each seed once."""
    found: list[int] = []
    for part in text.split(","):
        span = _RANGE.fullmatch(part.strip())
        if span:
            start, stop = int(span[1]), int(span[2])
            if not start < stop <= start + MOST_SEEDS:
                raise _bad_seeds(text, f"{part!r} holds no seeds" if stop <= start else "too many")
            found += range(start, stop)
        elif part.strip().isdecimal():
            found.append(int(part))
        else:
            raise _bad_seeds(text, f"{part!r} is neither")
    if max(found) >= 2**63:
        raise _bad_seeds(text, "a seed is at most 2^63 - 1")
    return list(dict.fromkeys(found))


def _bad_seeds(text: str, reason: str) -> UsageError:
    return UsageError(
        f"--seeds {text!r} can't be read ({reason}): expected a seed (7), a half-open range "
        "(0:4 is 0, 1, 2, 3), or several with commas (0,3,10:12)."
    )


def parse_shard(text: str | None) -> Shard:
    """ "1/4" is the second of four; None is the whole."""
    from fasttrace.store import Shard

    if text is None:
        return Shard()
    found = _SHARD.fullmatch(text.strip())
    if not found:
        raise UsageError(
            f"--shard {text!r} can't be read: expected i/n, the i-th of n from 0, such as 0/2 in "
            "one process and 1/2 in another."
        )
    return Shard(int(found[1]), int(found[2]))


def parse_windows(texts: Sequence[str]) -> list[tuple[int, int] | tuple[float, float]] | None:
    """ "0:5" is denoiser calls 0 to 4, "0.0:0.25" the first quarter; None where none is given."""
    found: list[tuple[int, int] | tuple[float, float]] = []
    for text in texts:
        start, colon, stop = text.partition(":")
        try:
            if not colon:
                raise ValueError
            if "." in text:
                found.append((float(start), float(stop)))
            else:
                found.append((int(start), int(stop)))
        except ValueError:
            raise UsageError(
                f"--window {text!r} can't be read: expected denoiser calls (0:5 is calls 0 to 4) "
                "or a share of the run (0.0:0.25)."
            ) from None
    return found or None


def parse_words(texts: Sequence[str], option: str) -> list[str]:
    """Words of a repeatable option, commas allowed. Raises `UsageError` where it holds none."""
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if texts and not words:
        raise UsageError(f"{option} is empty: give a name, or leave it out.")
    return words


def parse_tokens(texts: Sequence[str]) -> list[str | int]:
    """Token groups by name, positions as numbers."""
    return [int(word) if word.isdecimal() else word for word in parse_words(texts, "--tokens")]


def parse_corruption(
    kind: str, scale: float, sigma: float | None, replacement: str | None, seed: int
) -> Corruption:
    """Raises `UsageError` for an unknown kind; the rest is checked by the plan."""
    if kind not in CORRUPTIONS:
        raise UsageError(f"--corruption {kind!r} is unknown: expected {', '.join(CORRUPTIONS)}.")
    return Corruption(
        kind=kind,  # type: ignore[arg-type]  # checked above
        scale=scale,
        sigma=sigma,
        replacement=replacement,
        seed=seed,
    )


def parse_components(texts: Sequence[str], listed: Sequence[str] = ()) -> list[str]:
    """ "all" is every component that is traced; each once, in the model's order.

    listed: others that are known, by name alone.
    """
    words = parse_words(texts, "--component")
    unknown = [word for word in words if word not in (*COMPONENTS, *listed, "all")]
    if unknown:
        raise UsageError(
            f"--component {unknown[0]!r} is unknown: expected "
            f"{', '.join(['unet', 'text_encoder (every text encoder)', *listed])} or all."
        )
    every = [c for c in COMPONENTS if c in words or "all" in words]
    return [*every, *(c for c in listed if c in words)]


def parse_engine(clean: str | None, lanes: int | None, cache: float | None) -> dict[str, Any]:
    """The fast engine's options that were given, as the fields of `Options`."""
    if cache is not None and not 0 < cache < 1e6:
        raise UsageError(f"--cache {cache} is not a positive number of GiB.")
    given = {
        "clean": clean,
        "lanes": lanes,
        "cache": None if cache is None else int(cache * 2**30),
    }
    return {name: value for name, value in given.items() if value is not None}


def check_text(name: str, text: str) -> str:
    """Refuse bytes that are no text: they could be written nowhere. Raises `UsageError`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid UTF-8 text: {text!a}.") from None
    return text


def full_command(context: typer.Context, **settings: str) -> str:
    """As typed, with the options that were left to their defaults: those may change.

    settings: by option, what the default came to.
    """
    typed = str(context.obj)
    if "--" in shlex.split(typed):
        return typed
    left = [
        word
        for name, value in settings.items()
        if getattr(context.get_parameter_source(name), "name", "") == "DEFAULT"
        for word in (f"--{name}", value)
    ]
    return " ".join([typed, *map(shlex.quote, left)])
