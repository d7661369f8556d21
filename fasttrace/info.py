"""What this machine offers, fact by fact, for `fasttrace info` and for bug reports.

Nothing here raises: a library that is missing, broken or half installed is itself a fact.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Fact:
    """One line of `fasttrace info`: a name, whether it is there, and a sentence that says more."""

    name: str
    present: bool
    sentence: str


def environment() -> list[Fact]:
    """Every fact, in the order to read them."""
    probes: dict[str, Callable[[], Fact]] = {
        "python": _python,
        "cores": _cores,
        "memory": _memory,
        "torch": _torch,
        "cuda": _cuda,
        "triton": _triton,
        "compiled ops": _compiled_ops,
        "diffusers": lambda: _distribution("diffusers", "loads the pipelines that are traced"),
        "transformers": lambda: _distribution("transformers", "loads their text encoders"),
        "peft": lambda: _distribution("peft", "loads LoRA files"),
        "xformers": _xformers,
        "nvtx": _nvtx,
    }
    return [_guarded(name, probe) for name, probe in probes.items()]


def _guarded(name: str, probe: Callable[[], Fact]) -> Fact:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe()
    except Exception as error:
        return Fact(name, False, f"{name} can't be used: {_reason(error)}")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _distribution(name: str, purpose: str) -> Fact:
    version = _version(name)
    if version is None:
        return Fact(name, False, f"{name} is not installed; it {purpose}")
    return Fact(name, True, f"{name} {version} {purpose}")


def _python() -> Fact:
    where = f"{platform.system()} on {platform.machine()}"
    return Fact("python", True, f"Python {platform.python_version()}, {where}")


def _cores() -> Fact:
    with contextlib.suppress(AttributeError):  # sched_getaffinity is Linux only
        usable = len(os.sched_getaffinity(0))
        return Fact("cores", True, f"{usable} of {os.cpu_count()} processor cores can be used")
    return Fact("cores", True, f"{os.cpu_count()} processor cores")


def _memory() -> Fact:
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    sentence = f"{_gib(pages * page_size)} GiB of memory"
    with contextlib.suppress(ValueError):  # SC_AVPHYS_PAGES is not everywhere
        sentence += f", {_gib(os.sysconf('SC_AVPHYS_PAGES') * page_size)} GiB of it free"
    return Fact("memory", True, sentence)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _torch() -> Fact:
    import torch

    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = next((f"{name} {number}" for name, number in builds.items() if number), "CPU")
    threads = torch.get_num_threads()
    return Fact("torch", True, f"torch {torch.__version__}, a {build} build, {threads} threads")


def _cuda() -> Fact:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return Fact("cuda", False, "this torch is built for the CPU, so everything runs there")
    if not torch.cuda.is_available():
        return Fact("cuda", False, "torch sees no GPU, so everything runs on the CPU")
    return Fact("cuda", True, "; ".join(_devices()))


def _devices() -> Iterator[str]:
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        yield f"cuda:{index} is {device.name}, {_gib(device.total_memory)} GiB, {capability}"


def _triton() -> Fact:
    import torch

    version = _version("triton")
    if version is None:
        return Fact("triton", False, "triton is not installed; on a GPU it runs the fused kernels")
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        return Fact("triton", True, f"triton {version} runs in its interpreter (TRITON_INTERPRET)")
    if torch.cuda.is_available():
        return Fact("triton", True, f"triton {version} compiles the fused kernels for the GPU")
    return Fact(
        "triton",
        True,
        f"triton {version} has no GPU to run on; it can compile ahead of time and interpret",
    )


def _compiled_ops() -> Fact:
    from fasttrace_kernels import cuda_extension_status, extension_status

    status = extension_status()
    sentence = f"compiled CPU ops: {status.sentence}"
    import torch

    if torch.version.cuda is not None:
        sentence += f"; compiled CUDA ops: {cuda_extension_status().sentence}"
    return Fact("compiled ops", status.loaded, sentence)


def _xformers() -> Fact:
    version = _version("xformers")
    if version is None or importlib.util.find_spec("xformers") is None:
        return Fact("xformers", False, "xformers is not installed; torch's attention is used")
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:
        sentence = (
            f"xformers {version} does not load beside this torch, so torch's attention is used"
        )
        return Fact("xformers", False, f"{sentence} ({_reason(error)})")
    return Fact("xformers", True, f"xformers {version} loads")


def _nvtx() -> Fact:
    import torch

    if torch.version.cuda is not None:
        return Fact("nvtx", True, "torch has nvtx, so a profiler can show named ranges")
    return Fact("nvtx", False, "this torch has no nvtx, so a profiler shows no named ranges")
