"""The argument structs as Python has them against csrc/ops.h, as a C++ compiler lays them out."""

import ctypes
import shutil
import subprocess

import pytest

from .csrc_structs import STRUCTS
from .nvcc import CSRC

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no g++ to compile csrc/ops.h"
)

# The binding compiles only if it names as many fields as there are.
PROGRAM = """
#include <cstddef>
#include <cstdio>

#include "ops.h"

using fasttrace::{struct};

int main() {{
  const auto [{bindings}] = {struct}{{}};
{prints}
  std::printf("%zu\\n", sizeof({struct}));
}}
"""


def laid_out(struct, fields, folder):
    prints = [
        f'  std::printf("%zu %zu\\n", offsetof({struct}, {name}), sizeof({struct}::{name}));'
        for name in fields
    ]
    bindings = ", ".join(f"f{n}" for n in range(len(fields)))
    source, program = folder / "layout.cpp", folder / "layout"
    source.write_text(PROGRAM.format(struct=struct, bindings=bindings, prints="\n".join(prints)))
    compiled = subprocess.run(
        ["g++", "-std=c++20", f"-I{CSRC}", str(source), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stderr
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    *places, size = said.splitlines()
    return [tuple(map(int, place.split())) for place in places], int(size)


@pytest.mark.parametrize("op", STRUCTS)
def test_layout(op, tmp_path):
    struct = STRUCTS[op]
    names = [name for name, _ in struct._fields_]
    want, size = laid_out(struct.__name__, names, tmp_path)
    fields = [getattr(struct, name) for name in names]
    assert [(field.offset, field.size) for field in fields] == want
    assert ctypes.sizeof(struct) == size


def test_a_field_that_is_missing_shows(tmp_path):
    """Also the last one, whose place would be padding without it."""
    struct = STRUCTS["patch_rows"]
    names = [name for name, _ in struct._fields_][:-1]
    with pytest.raises(AssertionError, match="decompose"):
        laid_out(struct.__name__, names, tmp_path)
