"""The machine code of every kernel as it ships, beside the padded form that others compile.

python -m bench.machine_code [--write] [--json FILE] [--only PATTERN] [--jobs N]
    compiles ahead of time, needs no GPU, and prints Markdown. --write also puts it into
    docs/kernels.md and renews machine_code.golden.json, under the versions of Triton and nvcc.

A few minutes. Nothing is kept between runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # python bench/machine_code.py
    sys.path.insert(0, str(ROOT))

from bench import cubin, machine_code_table  # noqa: E402
from bench.cubin import CHIPS, LDS_SIZE  # noqa: E402

GOLDEN = Path(__file__).with_suffix(".golden.json")
MEASURED = (80, 90)
# What has no configurations of its own, and whose it takes over. ROCm calls gfx942 version 9.4.
INHERITS = {86: 80, 89: 80, 100: 90, "gfx942": 90}
CU_COMPILES = (80, 90, 100)
NVCC_FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings")

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One case for one target, in words that travel to another process."""

    case: str
    target: int | str  # 80, "gfx942"

    @property
    def target_name(self) -> str:
        return f"sm_{self.target}" if isinstance(self.target, int) else self.target


def jobs(only: str = "") -> Iterator[Job]:
    """Slow ones are not known beforehand; each case goes through all its targets."""
    from fasttrace_kernels.machine_code import machine_code_cases

    for case in machine_code_cases():
        if not re.search(only, case.name):
            continue
        yield from (Job(case.name, sm) for sm in case.sm)
        if not case.padded:
            takers = (target for target, whose in INHERITS.items() if whose in case.sm)
            yield from (Job(case.name, target) for target in takers)


def compile_job(job: Job) -> Result:
    """Figures where the target's machine code is read, else how much shared memory it takes."""
    try:
        return _compile(job)
    except Exception:
        return {"error": traceback.format_exc(limit=-3)}


def _compile(job: Job) -> Result:
    from fasttrace_kernels.machine_code import machine_code_cases

    whose = INHERITS.get(job.target, job.target)
    (case,) = (case for case in machine_code_cases() if case.name == job.case and whose in case.sm)
    compiled = compile_case(case, job.target)
    shared = compiled.metadata.shared
    if job.target == "gfx942":
        return {"shared": shared, "fits": shared <= LDS_SIZE}
    chip = CHIPS[int(job.target)]
    if chip.capability not in MEASURED:
        return {"shared": shared, "fits": shared <= chip.block_shared}
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        ((usage, code),) = cubin.dump(binary).values()
    # Not the option: a specialised kernel has more warps than it was asked for.
    threads = re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])
    if threads is None:
        raise ValueError(f"the PTX of {case.name} does not say how many threads it wants")
    warps = int(threads[1]) // cubin.WARP
    return cubin.figures(chip, usage, code, shared=shared, warps=warps).to_json()


def compile_case(case: Any, target: int | str) -> Any:
    """What `triton.compile` returns."""
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = {
        name: tl.dtype(value["dtype"]) if isinstance(value, Mapping) else value
        for name, value in case.constants.items()
    }
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    if unknown := {*case.types, *case.constants} ^ {*kernel.arg_names}:
        raise ValueError(f"{case.name} and {name} do not agree on the arguments {sorted(unknown)}")
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name in case.divisible
    }
    gpu = GPUTarget("hip", target, 64) if target == "gfx942" else GPUTarget("cuda", target, 32)
    return triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=gpu,
        options={"enable_fp_fusion": True} | dict(case.options),
    )


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvcc_version() -> str | None:
    """Such as 13.0.88."""
    if nvcc() is None:
        return None
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\bV([\d.]+)", said)[0]


def compile_cu(source: Path, capability: int, folder: Path) -> Path:
    """Raises CalledProcessError, with nvcc's words in `stderr`, on a warning too."""
    binary = folder / f"{source.stem}.sm_{capability}.cubin"
    command = ["nvcc", "-cubin", f"-arch=sm_{capability}", *NVCC_FLAGS, "-o", binary, source]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return binary


def measure_cu(capability: int) -> dict[str, Result]:
    """By kernel, demangled; {} for each where only that it compiles is of interest."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            try:
                binary = compile_cu(source, capability, Path(folder))
            except subprocess.CalledProcessError as error:
                found[source.name] = {"error": error.stderr}
                continue
            if capability not in MEASURED:
                found[source.name] = {}
                continue
            for name, (usage, code) in cubin.dump(binary).items():
                found[f"{source.name}: {demangled(name)}"] = {
                    "registers": usage.registers,
                    "spilled": usage.local,
                    "local_accesses": code.count("LDL", "STL"),
                    "loads": code.count("LDG", "LDGSTS"),
                    "wide_loads": code.count("LDG", "LDGSTS", having="128"),
                }
    return dict(sorted(found.items()))


def demangled(name: str) -> str:
    """patch_rows_kernel<__half, 8>; without the namespaces, one of which holds a hash."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    plain = plain.strip().replace("(anonymous namespace)::", "").replace("fasttrace::", "")
    return plain.removeprefix("void ").partition("(")[0]


def measure(only: str = "", workers: int = 2) -> Result:
    """{"triton": {version: {case: {target: figures}}}, "nvcc": {version: {target: {kernel: ...}}}}.

    An {"error": ...} stands where something did not compile.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        foreign = [name for name in os.environ if name.startswith("TRITON_")]
        for name in foreign:  # another ptxas, a cache, a dump
            del os.environ[name]
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1"}
        import triton

        todo = list(jobs(only))
        spawn = multiprocessing.get_context("spawn")
        cases: dict[str, Result] = {}
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            for job, result in zip(todo, pool.map(compile_job, todo), strict=True):
                cases.setdefault(job.case, {})[job.target_name] = result
                print(f"{job.case}, {job.target_name}", file=sys.stderr, flush=True)
    found: Result = {"triton": {triton.__version__: cases}}
    if version := nvcc_version():
        kernels = {f"sm_{capability}": measure_cu(capability) for capability in CU_COMPILES}
        found["nvcc"] = {version: kernels}
    return found


def errors(found: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Sentences, one for each thing that did not compile."""
    if "error" in found:
        yield f"{path.strip(', ')} does not compile: {found['error']}"
    for name, inner in found.items():
        if isinstance(inner, Mapping):
            yield from errors(inner, f"{path}, {name}")


def renewed(golden: Mapping[str, Any], found: Mapping[str, Any]) -> Result:
    """The figures of these versions replaced, those of other versions kept."""
    tools = sorted({*golden, *found})
    return {tool: {**golden.get(tool, {}), **found.get(tool, {})} for tool in tools}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew the page and the golden file")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", default="", help="cases whose name has this regular expression")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write wants every case; leave --only out")
    found = measure(arguments.only, arguments.jobs)
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    failed = list(errors(found))
    for sentence in failed:
        print(sentence, file=sys.stderr)
    if failed:
        return 1
    text = machine_code_table.markdown(found)
    print(text)
    if arguments.write:
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(machine_code_table.as_text(renewed(golden, found)) + "\n")
        machine_code_table.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
