"""The words of a call made into records, or a sentence about what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, get_args

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.selection import suggestion
from fasttrace.errors import UsageError
from fasttrace.types import Branch, Corruption, CorruptionKind, Probe, Sampling

COMPONENTS = ("unet", "text_encoder")
_LARGEST_SEED = 2**63 - 1
MOST_SEEDS = 1_000_000
MOST_PIXELS = 2**26


def parse_choice(word: str, choices: Sequence[str], what: str) -> str:
    if word not in choices:
        raise UsageError(
            f"Unknown {what} {word!r}; expected {', '.join(choices)}."
            f"{suggestion(str(word), choices, n=1)}"
        )
    return word


def parse_branch(branch: str, guided: bool) -> Branch:
    """Without unconditional rows there is one branch only."""
    found = cast(Branch, parse_choice(branch, get_args(Branch), "branch"))
    if found == "uncond" and not guided:
        raise UsageError("Without guidance (guidance <= 1) there is no unconditional branch.")
    return found if guided else "cond"


def parse_corruption(corruption: Corruption | str | None) -> Corruption:
    if corruption is None:
        return Corruption()
    if isinstance(corruption, Corruption):
        parse_choice(corruption.kind, get_args(CorruptionKind), "corruption")
        return corruption
    kind = parse_choice(corruption, get_args(CorruptionKind), "corruption")
    return Corruption(kind=cast(CorruptionKind, kind))


def parse_seeds(seeds: Any) -> tuple[int, ...]:
    """A count becomes 0 .. n-1; a list stays, each seed once."""
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 1:
            raise UsageError(f"{seeds} seeds were asked for; at least one is needed.")
        if seeds > MOST_SEEDS:
            raise UsageError(f"{seeds} seeds were asked for; at most {MOST_SEEDS} go together.")
        return tuple(range(seeds))
    if isinstance(seeds, str | bool) or not isinstance(seeds, Sequence) or not seeds:
        raise UsageError(f"Seeds are a count or a list of whole numbers; {seeds!r} was given.")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _LARGEST_SEED:
            raise UsageError(f"Seed {seed!r} is not a whole number from 0 to 2^63 - 1.")
    return tuple(dict.fromkeys(seeds))


def parse_sampling(
    model: Model,
    *,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    eta: float,
) -> Sampling:
    """None becomes the model's default. `UsageError` for numbers out of range."""
    values: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "height": height,
        "width": width,
    }
    values = {k: model.default(k) if v is None else v for k, v in values.items()}
    most = int(getattr(model.pipe.scheduler.config, "num_train_timesteps", 1000))
    if not _whole(values["steps"]) or not 1 <= values["steps"] <= most:
        raise UsageError(
            f"{values['steps']!r} steps were asked for; this scheduler takes 1 to {most}, a whole "
            "number."
        )
    for name in ("height", "width"):
        # The pipelines themselves refuse sizes that 8 doesn't divide.
        unit = math.lcm(8, model.family.unit)
        if not _whole(values[name]) or values[name] < unit or values[name] % unit:
            raise UsageError(f"The {name} {values[name]!r} is not a positive multiple of {unit}.")
    if values["height"] * values["width"] > MOST_PIXELS:
        raise UsageError(
            f"A picture of {values['height']}x{values['width']} is larger than any model of this "
            f"kind draws (at most {MOST_PIXELS // 2**20} million pixels)."
        )
    if not _number(values["guidance"]) or values["guidance"] < 0:
        raise UsageError(
            f"The guidance {values['guidance']!r} is not a finite number of 0 or more."
        )
    if not _number(eta) or not 0 <= eta <= 1:
        raise UsageError(f"eta {eta!r} is not between 0 and 1.")
    return Sampling(**(values | {"guidance": float(values["guidance"])}), eta=float(eta))


def parse_probes(probes: Probe | Sequence[Probe]) -> tuple[Probe, ...]:
    """At least one probe, each once."""
    many = [probes] if isinstance(probes, Probe) else list(probes)
    if not many:
        raise UsageError("There is no prompt to trace: the list of probes is empty.")
    for given in many:
        probe: Any = given
        if not isinstance(probe, Probe):
            raise UsageError(f"A probe is a Probe(prompt, subject); {probe!r} was given.")
        if not probe.prompt.strip():
            raise UsageError("A prompt is empty; there is nothing to trace in it.")
    return tuple(dict.fromkeys(many))


def check_text(model: Model, probe: Probe, *, with_subject: bool = True) -> None:
    """The prompt and its negative fit the text window; the subject is in the prompt."""
    for encoder in model.encoders:
        encoder.tokens(probe.prompt)
        encoder.tokens(probe.negative_prompt)
        if with_subject:
            encoder.span(probe.prompt, probe.subject, probe.occurrence)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
