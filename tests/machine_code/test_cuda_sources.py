"""csrc/*.cu where nvcc is but no GPU: warnings are errors, and a launch says what is missing."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine_code import compile_cu, demangled, nvcc

CSRC = Path(__file__).parents[2] / "csrc"

pytestmark = [
    pytest.mark.kernels_slow,
    pytest.mark.skipif(nvcc() is None, reason="there is no nvcc on the path"),
]

# A launch of one element a lane; nothing behind the pointers, which nobody gets to look at.
SHIM = r"""
#include "ops.h"

extern "C" const char* patch_rows(long lanes) {
  fasttrace::PatchRowsArgs args{};
  args.lanes = lanes;
  args.tokens = args.channels = args.source_rows = 1;
  args.dtype = fasttrace::Dtype::kFloat16;
  return fasttrace::patch_rows_launch(args, nullptr);
}

extern "C" const char* guided_step(long lanes) {
  fasttrace::GuidedStepArgs args{};
  args.lanes = lanes;
  args.row_size = args.calls = 1;
  args.latents = args.predictions = 1;
  args.dtype = args.state_dtype = fasttrace::Dtype::kFloat32;
  return fasttrace::guided_step_launch(args, nullptr);
}
"""
OPS = ("patch_rows", "guided_step")
CALL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
call = getattr(library, sys.argv[2])
call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_long]
said = call(int(sys.argv[3]))
print("" if said is None else said.decode())
"""


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "shim.cu").write_text(SHIM)
    command = ["nvcc", "-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-arch=sm_80"]
    command += ["-I", str(CSRC), "-o", str(folder / "launchers.so"), str(folder / "shim.cu")]
    subprocess.run([*command, *map(str, CSRC.glob("*.cu"))], check=True)
    return folder / "launchers.so"


def call(library: Path, op: str, lanes: int) -> str:
    """In a process of its own, so that a crash is a failure of this test alone."""
    result = subprocess.run(
        [sys.executable, "-c", CALL, str(library), op, str(lanes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(has_driver(), reason="there is a CUDA driver, so a launch would be a launch")
@pytest.mark.parametrize("op", OPS)
def test_without_a_driver_a_launch_says_so(library, op):
    assert call(library, op, 3) == "CUDA driver version is insufficient for CUDA runtime version"


def test_nothing_to_do_needs_no_driver(library):
    assert call(library, "patch_rows", 0) == ""


@pytest.mark.parametrize("op", OPS)
def test_too_many_lanes_are_refused_in_words(library, op):
    assert call(library, op, 65536) == "at most 65535 lanes fit one launch"


def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void kernel() { int never_read; }\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        compile_cu(source, 80, tmp_path)
    assert "never_read" in caught.value.stderr


def test_names_are_read_without_namespaces():
    name = "_ZN9fasttrace12_GLOBAL__N_117patch_rows_kernelI6__halfLi8EEEvNS_13PatchRowsArgsE"
    assert demangled(name) == "patch_rows_kernel<__half, 8>"
