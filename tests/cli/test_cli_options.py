"""Reading 0:4 and its relatives."""

from __future__ import annotations

import io
import shlex
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.cli import progress
from fasttrace.cli.options import (
    check_text,
    full_command,
    parse_components,
    parse_seeds,
    parse_shard,
    parse_tokens,
    parse_windows,
    parse_words,
)
from fasttrace.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0:4", [0, 1, 2, 3]),
        ("7", [7]),
        ("0,3,10:12", [0, 3, 10, 11]),
        ("3, 1 ,3", [3, 1]),
        (str(2**63 - 1), [2**63 - 1]),
    ],
)
def test_seeds(text: str, seeds: list[int]):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "a", "4:4", "5:2", "1:", ":3", "-1", "0.5", "1;2", "0:999999999", str(2**63), "²"]
)
def test_bad_seeds(text: str):
    with pytest.raises(UsageError, match="--seeds .* can't be read"):
        parse_seeds(text)


@given(st.text(alphabet="0123456789:,- .", max_size=8))
def test_seeds_never_fail_otherwise(text: str):
    try:
        found = parse_seeds(text)
    except UsageError:
        return
    assert found
    assert len(set(found)) == len(found)


def test_shards():
    assert (parse_shard("1/4").index, parse_shard("1/4").count) == (1, 4)
    assert str(parse_shard(None)) == "0/1"
    for bad in ("", "1", "4/4", "-1/4", "0/0", "a/b", "1/2/3"):
        with pytest.raises(UsageError, match=r"shard"):
            parse_shard(bad)


def test_windows():
    assert parse_windows([]) is None
    assert parse_windows(["0:5", "0.0:0.25"]) == [(0, 5), (0.0, 0.25)]
    for bad in ("5", "a:b", "1:", "0.5:x"):
        with pytest.raises(UsageError, match="--window"):
            parse_windows([bad])


def test_components_and_tokens():
    assert parse_components(["all"]) == ["unet", "text_encoder"]
    assert parse_components(["text_encoder,unet"]) == ["unet", "text_encoder"]
    assert parse_tokens(["last subject,EOS", "7"]) == ["last subject", "EOS", 7]
    for unknown in ("vae", "text_encoder_2"):
        with pytest.raises(UsageError, match=rf"'{unknown}' is unknown.*\(every text encoder\)"):
            parse_components([unknown])
    for parse in (parse_components, parse_tokens, lambda texts: parse_words(texts, "--metric")):
        assert parse([]) == []
        with pytest.raises(UsageError, match=r"--\w+ is empty"):
            parse([" , "])
    with pytest.raises(UsageError, match="UTF-8"):
        check_text("--prompt", "caf\udce9")


def typed(*words: str, **settings: str) -> list[str]:
    """What `full_command` makes of words typed."""
    found: list[list[str]] = []
    app = typer.Typer()

    @app.command()
    def command(
        context: typer.Context,
        name: str = "",
        seeds: str = "0",
        guidance: float | None = None,
    ) -> None:
        found.append(shlex.split(full_command(context, **settings)))

    run: Any = typer.main.get_command(app)
    run.main(list(words), standalone_mode=False, obj=shlex.join(["fasttrace", *words]))
    return found[0]


def test_the_full_command_spells_out_what_was_left_to_defaults():
    settings = {"seeds": "0", "guidance": "7.5"}
    left = ["--seeds", "0", "--guidance", "7.5"]
    assert typed(**settings) == ["fasttrace", *left]
    given = ["--name", "it's <a b>", "--guidance", "2"]
    assert typed(*given, **settings) == ["fasttrace", *given, "--seeds", "0"]
    assert typed("--seeds", "4:6", "--guidance", "3", **settings) == [
        "fasttrace", "--seeds", "4:6", "--guidance", "3",
    ]  # fmt: skip
    assert typed(name="a b; rm") == ["fasttrace", "--name", "a b; rm"]
    assert typed("--", **settings) == ["fasttrace", "--"]  # options don't go after it


def test_lines_where_there_is_no_terminal():
    """A line at most every 15 seconds, and one at the end."""
    stream, now = io.StringIO(), iter([0.0, 4.0, 16.0, 20.0, 24.0])
    advance = progress._lines(4, stream, lambda: next(now))
    for _ in range(4):
        advance()
    assert stream.getvalue().splitlines() == [
        "2/4 rows, 8.0 s/row, 16 s left",
        "4/4 rows, 6.0 s/row",
    ]


@pytest.mark.parametrize(
    ("done", "elapsed", "expected", "left"),
    [
        (1, 100.0, None, None),  # a hundredth of the rows: their rate says nothing
        (1, 100.0, 250.0, 150.0),
        (1, 300.0, 250.0, None),
        (50, 100.0, 999.0, 100.0),
        (100, 100.0, None, 0.0),
    ],
)
def test_time_left(done, elapsed, expected, left):
    assert progress.time_left(done, 100, elapsed, expected) == left


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress.progress(3, quiet=False, stream=stream) as advance:
        for _ in range(3):
            advance()
    assert "3/3" in stream.getvalue()


def test_quiet_says_nothing():
    stream = io.StringIO()
    with progress.progress(3, quiet=True, stream=stream) as advance:
        advance()
    assert stream.getvalue() == ""


def test_durations():
    assert [progress.duration(s) for s in (4.2, 89, 700, 11_100)] == [
        "4 s", "89 s", "12 min", "3 h 05 min",
    ]  # fmt: skip
    assert progress.rate(0.25) == "4.0 s/row"
    assert progress.rate(7.04) == "7.0 rows/s"
