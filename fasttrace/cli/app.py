"""The application: its commands, and how every outcome becomes an exit code and a sentence.

0 done; 1 failed; 2 wrong call; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from fasttrace import __version__
from fasttrace.cli import (
    demo,
    edit,
    evaluate,
    find,
    info,
    locate,
    plan,
    profile,
    report,
    run,
    screen,
    sites,
    trace,
)
from fasttrace.errors import FasttraceError, UsageError
from fasttrace.plugins import PluginWarning

DONE, FAILED, WRONG_CALL, STOPPED = 0, 1, 2, 130

_format = warnings.formatwarning

app = typer.Typer(
    name="fasttrace",
    help="Find the parts of a text-to-image model that hold an object, a style, an action.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    trace,
    screen,
    find,
    run,
    plan,
    profile,
    report,
    sites,
    edit,
    evaluate,
    locate,
    info,
    demo,
)
for module in COMMANDS:
    app.command(name=module.NAME)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fasttrace {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. `arguments` are the process's own where not given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("FASTTRACE_DEBUG", "") not in ("", "0")
    warnings.filterwarnings("once", category=PluginWarning)
    warnings.formatwarning = _warning
    command = typer.main.get_command(app)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A prompt may hold characters that this terminal or pipe has no encoding for.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command.main(
            given,
            prog_name="fasttrace",
            standalone_mode=False,
            obj=shlex.join(["fasttrace", *given]),
        )
    except KeyboardInterrupt:
        code = STOPPED
    except FasttraceError as error:
        if debug:
            raise
        return _say(str(error), WRONG_CALL if isinstance(error, UsageError) else FAILED)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(str(error), file=sys.stderr)
            return WRONG_CALL
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the parser's own
            return _say(f"{error.format_message()} (fasttrace --help says more)", error.exit_code)
        if debug:
            raise
        return _say(_bug(error, given), FAILED)
    if code == STOPPED:  # the parser turns Ctrl-C into this code itself
        return _say("stopped; run the same command again", STOPPED)
    return code if isinstance(code, int) else DONE


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Ours is a sentence; a line of code says nothing to who called a command."""
    if issubclass(category, PluginWarning):
        return f"fasttrace: {message}\n"
    return _format(message, category, filename, lineno, line)


def _say(sentence: str, code: int) -> int:
    print(f"fasttrace: {sentence}", file=sys.stderr)
    return code


def _bug(error: Exception, given: list[str]) -> str:
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)  # how torch says it of a CPU
    ):
        return (
            "out of memory. What was finished is safe. Use a smaller --height and --width, "
            "another --dtype, or a machine with more memory."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full, so the output could not be written. What was finished is safe."
    reason = (str(error).splitlines() or [""])[0][:300]
    return (
        f"a bug in fasttrace, {type(error).__name__}: {reason}. What was finished is safe. To see "
        f"where it happened: FASTTRACE_DEBUG=1 {shlex.join(['fasttrace', *given])}"
    )
