"""Tensors that a plan names: safetensors beside the plan, and nowhere else."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from torch import Tensor

from fasttrace.errors import UsageError

MOST_BYTES = 1 << 30
MOST_PARTS = 8
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `folder`/`name`, a path as a plan writes it: "directions/dog.safetensors".

    Relative, with "/" between parts, no "..", no link on the way, an ordinary file of at most
    `MOST_BYTES`. Raises `UsageError` for anything else.
    """
    parts = name.split("/")
    sound = all(_PART.fullmatch(part) and ".." not in part for part in parts)
    if not sound or len(parts) > MOST_PARTS or not name.endswith(".safetensors"):
        raise UsageError(
            f"The plan's tensor file {name[:120]!a} is refused: expected a name such as "
            "'directions/dog.safetensors', relative to the plan's folder, of letters, digits, "
            "'.', '_' and '-'."
        )
    data = _read(folder, parts, name)
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UsageError(f"The plan's tensor file {name!r} is no safetensors: {reason}.") from error


def _read(folder: Path, parts: list[str], name: str) -> bytes:
    """Each part is opened from the folder before it, so that none can be exchanged for a link."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for i, part in enumerate(parts):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            last = i == len(parts) - 1
            inner = os.open(part, flags | (0 if last else os.O_DIRECTORY), dir_fd=handle)
            os.close(handle)
            handle = inner
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"The plan's tensor file {name!r} is no ordinary file.")
        if found.st_size > MOST_BYTES:
            raise UsageError(f"The plan's tensor file {name!r} has more than 1 GiB.")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"The plan's tensor file {name!r} can't be read beside the plan ({error.strerror}); "
            "links are not followed."
        ) from error
    finally:
        os.close(handle)
