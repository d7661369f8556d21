"""Die at every single call by which the store changes the disk, then go on and check.

    python crash_script.py FOLDER

Each trial forks: the child ends itself with SIGKILL just before its n-th system call; the parent
then finishes the same sweep and looks at the rows. Prints the number of trials.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweep_script import Shard, rows_of_the_sweep, sweep

from fasttrace.store import read_rows

ROWS = rows_of_the_sweep()[:5]
WATCHED = ("open", "write", "fsync", "replace", "ftruncate", "mkdir", "unlink", "close")


def die_at(countdown: int) -> None:
    left = [countdown]

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if real is original_write and len(args[1]) > 1:
                    real(args[0], bytes(args[1][: len(args[1]) // 2]))  # torn in the middle
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    original_write = os.write
    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name)))


def trial(folder: Path, countdown: int) -> bool:
    """True where the child was killed; False where it finished before its n-th call."""
    out, log = folder / f"out-{countdown}", folder / f"log-{countdown}"
    child = os.fork()
    if child == 0:
        die_at(countdown)
        sweep(out, log, Shard(), ROWS, pause=0.0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    sweep(out, log, Shard(), ROWS, pause=0.0)
    assert sorted(r.key for r in read_rows(out)) == sorted(r.key for r in ROWS), countdown
    assert not list((out / "rows").glob("*.tmp")), countdown
    for row in ROWS:
        assert (out / "pictures" / f"{row.picture}.png").stat().st_size > 0, countdown
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    trials = 1
    while trial(Path(sys.argv[1]), trials):
        trials += 1
    sys.stdout.write(f"{trials}\n")
