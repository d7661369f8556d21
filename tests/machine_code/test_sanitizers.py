"""csrc's CPU ops under AddressSanitizer and UBSan, and faults that these must report.

The library is built by the project's own CMakeLists.txt in a temporary folder, with
-DFASTTRACE_SANITIZE=ON, and `sanitized_ops.py` runs it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("sanitized_ops.py")
LIBRARY = "libfasttrace_ops.so"

pytestmark = [pytest.mark.kernels_slow, pytest.mark.timeout(900)]


def program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def sanitizer_runtime() -> str | None:
    """The libraries that must be loaded before everything else, where gcc has its sanitizers'.

    The C++ library too: AddressSanitizer looks for `throw` when it starts, and Python has none.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    paths = []
    for library in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={library}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        paths.append(Path(said.strip()))
    return " ".join(map(str, paths)) if all(path.is_absolute() for path in paths) else None


@dataclass(frozen=True)
class Sanitized:
    """A copy of the sources and what is built of them."""

    folder: Path

    def build(self) -> None:
        command = [program("cmake"), "--build", str(self.folder / "build")]
        command += ["--target", "fasttrace_ops"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        shutil.copy(self.folder / "build" / LIBRARY, self.package)

    @property
    def package(self) -> Path:
        return self.folder / "path" / "fasttrace_kernels"

    def run(self) -> subprocess.CompletedProcess[str]:
        # -S: an editable install would put its own folders before these.
        path = [self.package.parent, Path(torch.__file__).parents[1]]
        environment = {name: os.environ[name] for name in os.environ if name != "FASTTRACE_NO_EXT"}
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "LD_PRELOAD": sanitizer_runtime(),
            "ASAN_OPTIONS": "detect_leaks=0",  # of Python and torch, which never give all back
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run(
            [sys.executable, "-S", str(DRIVER), str(self.package / LIBRARY)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Sanitized:
    if sanitizer_runtime() is None:
        pytest.skip("gcc with its AddressSanitizer library (libasan) is not installed")
    if program("cmake") is None:
        pytest.skip("there is no cmake")
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    found = Sanitized(folder)
    shutil.copytree(
        ROOT / "kernels" / "fasttrace_kernels",
        found.package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    command = [program("cmake"), "-S", str(folder), "-B", str(folder / "build")]
    command += ["-DFASTTRACE_SANITIZE=ON", "-DFASTTRACE_REQUIRE_EXT=ON"]
    command += ["-DCMAKE_CXX_COMPILER=g++", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found.build()
    return found


def test_no_op_is_reported(sanitized):
    result = sanitized.run()
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "every op ran\n"
    assert "runtime error" not in result.stderr


# By name: the file, what is put in place of what, and what must be reported.
PLANTED = {
    "patch_rows copies past the end of a row": (
        "patch_rows.cpp",
        ("std::memmove(out, source, size * sizeof(T))",
         "std::memmove(out, source, (size + 1) * sizeof(T))"),
        "heap-buffer-overflow",
    ),
    "patch_rows writes one element too many": (
        "patch_rows.cpp",
        ("for (int64_t i = 0; i < size; ++i) out[i] =",
         "for (int64_t i = 0; i <= size; ++i) out[i] ="),
        "heap-buffer-overflow",
    ),
    "guided_step reads one element too many": (
        "guided_step.cpp",
        ("for (int64_t i = 0; i < size; ++i) newest[i] =",
         "for (int64_t i = 0; i <= size; ++i) newest[i] ="),
        "buffer-overflow",
    ),
    "patch_rows counts in a type that overflows": (
        "patch_rows.cpp",
        ("if (total == 0) return;",
         "if (total == 0) return;\n  if (2147483647 + static_cast<int>(total) == 0) return;"),
        "signed integer overflow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_reported(sanitized, name):
    file, (text, fault), report = PLANTED[name]
    source = sanitized.folder / "csrc" / file
    sound = source.read_text()
    assert sound.count(text) == 1, f"{text!r} is not in {file} once"
    source.write_text(sound.replace(text, fault))
    try:
        sanitized.build()
        result = sanitized.run()
    finally:
        source.write_text(sound)
    assert result.returncode != 0
    assert report in result.stderr
    assert file in result.stderr
