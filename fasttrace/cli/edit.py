"""`fasttrace edit`: rewrite phrases in closed form and save the edit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.options import (
    Device,
    Dtype,
    Json,
    Lam,
    Model,
    NewFolder,
    Pair,
    Pairs,
    Preserve,
    Quiet,
    Template,
    Tokens,
    check_text,
    parse_words,
)
from fasttrace.errors import UsageError

if TYPE_CHECKING:
    from fasttrace.edit.phrases import Replacement

NAME = "edit"


def command(
    model: Model,
    out: NewFolder,
    pair: Pair = None,
    pairs: Pairs = None,
    method: Annotated[
        str | None, typer.Option(help="diffquickfix, mlp, uce, time or locoedit; by the site.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", help="What to edit: names or globs; repeatable.", metavar="NAME"),
    ] = None,
    lam: Lam = None,
    template: Template = None,
    tokens: Tokens = None,
    bias: Annotated[str, typer.Option(help="exact, or as_released: counted twice.")] = "exact",
    preserve: Preserve = None,
    preserve_weight: Annotated[float, typer.Option(help="Of each of them.")] = 1.0,
    after: Annotated[
        Path | None, typer.Option(help="An edit that this one goes on top of.", metavar="DIR")
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help="peft, kohya, pipeline; repeatable. By the edit's rank.", metavar="NAME"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Truncate the LoRA to this rank.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make phrases read as others, in closed form, and save the edit.

    DIR gets a LoRA for diffusers, one for ComfyUI and A1111, and what `fasttrace evaluate` reads.
    """
    from fasttrace.cli.sweep import quiet_libraries

    asked = read_replacements(pair, pairs)
    quiet_libraries()
    from fasttrace import Editor, load, load_edit

    earlier = None if after is None else load_edit(after)
    pipe = load(check_text("MODEL", model), dtype=dtype, device=device)
    start = time.perf_counter()
    edit = Editor(pipe).edit(
        asked,
        lam=lam,
        after=earlier,
        preserve_weight=preserve_weight,
        bias=bias,
        **given(method=method, site=site, templates=template, tokens=tokens, preserve=preserve),
    )
    seconds = time.perf_counter() - start
    folder = edit.save(out, forms=parse_words(form or [], "--form") or None, rank=rank, pipe=pipe)
    if as_json:
        print(json.dumps({**about(folder), "seconds": round(seconds, 4)}))
    elif not quiet:
        print(f"{edit} ({seconds:.2f} s)")
        for line in saved(folder):
            print(line)
        print(f"Saved in {folder}. Did it work? fasttrace evaluate {folder}")


def read_replacements(pair: Sequence[str] | None, pairs: Path | None) -> list[Replacement]:
    """From `--pair` or `--pairs`. Raises `UsageError`."""
    from fasttrace.edit.phrases import Replacement

    if bool(pair) == (pairs is not None):
        raise UsageError('give either --pair "van gogh=painting", or --pairs FILE.')
    if pairs is not None:
        from fasttrace.store.pairs import read_pairs

        return [
            Replacement(
                e.old,
                e.new if isinstance(e.new, str) else tuple(e.new),
                e.strength,
                None if e.weights is None else tuple(e.weights),
            )
            for e in read_pairs(pairs)
        ]
    found = []
    for text in pair or []:
        old, equals, new = check_text("--pair", text).partition("=")
        if not equals:
            raise UsageError(
                f"--pair {text!r} can't be read: expected a phrase and its new meaning, "
                'such as "van gogh=painting".'
            )
        found.append(Replacement(old.strip(), new.strip()))
    return found


def given(**options: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value}


def saved(folder: Path) -> list[str]:
    """What a reader of the folder may not expect."""
    written = about(folder)
    lost = max(written["discarded"].values())
    lines = []
    if lost > 1e-6:
        lines.append(f"Truncated: up to {100 * lost:.0f} % of a change's norm was left out.")
    if written["forms"] == ["pipeline"]:
        lines.append("A whole pipeline, since its rank is above half (a LoRA: --form peft).")
    return lines


def about(folder: Path) -> dict[str, Any]:
    """What a saved edit says of itself, as JSON."""
    from fasttrace.edit.export import read_written

    written = read_written(folder)
    edit = written.edit
    return {
        "out": str(folder),
        "method": edit["method"],
        "sites": edit["sites"],
        "pairs": len(edit["pairs"]),
        "lam": edit["lam"],
        "forms": written.forms,
        "ranks": written.ranks,
        "discarded": written.discarded,
    }
