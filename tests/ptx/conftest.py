"""The PTX that Triton emits for sm_80, executed on a CPU; one process compiles all of it.

The way through: values, parse, memory and shared_memory, machine, the tables in opcodes*, launch.
What it can't see: branches that threads of a block take differently (refused), races between
blocks (but `backwards` changes their order), how long anything takes, and what a GPU leaves open,
such as the order of a sum within `mma`.
"""

from collections.abc import Iterator

import pytest

from .launch import Compiler


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()
