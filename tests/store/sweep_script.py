"""A sweep through the real store with a fast fake engine, run as a process that gets killed.

    python sweep_script.py OUT LOG [SHARD_INDEX SHARD_COUNT]

The fake engine works in batches, as the real one does: it notes in LOG what it computes, then hands
the batch's rows over one by one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fake_rows import fake_sweep

from fasttrace.store import Call, Shard, Store
from fasttrace.types import Row

BATCH = 8
FIXED = {"fingerprint": "f" * 64, "steps": 20, "guidance": 7.5}
CALL = Call(command="sweep_script", started="2026-01-01T00:00:00Z")


def rows_of_the_sweep() -> list[Row]:
    return list(fake_sweep(attributes=("object", "style"), prompts=2, components=("unet",)))


def engine(rows: list[Row], log: Path, pause: float) -> Iterator[Row]:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        os.write(handle, "".join(f"{row.key}\n" for row in batch).encode())
        for row in batch:
            time.sleep(pause)
            yield row
    os.close(handle)


def sweep(out: Path, log: Path, shard: Shard, rows: list[Row], pause: float = 0.002) -> None:
    import numpy as np

    picture = np.full((3, 8, 8), 0.5, np.float32)
    mine = [row for number, row in enumerate(rows) if shard.owns(number // 70)]
    with Store.open(out, fixed=FIXED, call=CALL, shard=shard) as store:
        missing = [row for row in mine if not store.done(row.key)]
        for row in engine(missing, log, pause):
            assert row.picture is not None
            store.add(row, {row.picture: picture})
        store.finish()


if __name__ == "__main__":
    index, count = (int(a) for a in sys.argv[3:5]) if len(sys.argv) > 3 else (0, 1)
    sweep(Path(sys.argv[1]), Path(sys.argv[2]), Shard(index, count), rows_of_the_sweep())
