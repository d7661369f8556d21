"""Pipelines that the tests of edits may write to, and the slow ways to read and to solve."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrace.testing import tiny_pipeline

# What several files of tests share; a folder of tests is no package.
for _file in ("by_formula", "exports"):
    _spec = importlib.util.spec_from_file_location(
        f"fasttrace_{_file}", Path(__file__).parent / f"{_file}.py"
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])


@pytest.fixture(scope="module")
def own() -> Callable[..., Any]:
    """Pipelines by family and dtype, shared in a module: whoever edits one reverts it."""

    @cache
    def make(family: str = "sd", dtype: torch.dtype = torch.float32) -> Any:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        return tiny_pipeline(family).to(dtype=dtype)  # type: ignore[arg-type]

    return make


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def module_of(pipe: Any, name: str) -> Any:
    """The layer behind a matrix's name, by the tree alone."""
    component, path = name.split(".", 1)
    part = getattr(pipe, component)
    if component == "unet":
        return part.get_submodule(path)
    core = part.text_model if hasattr(part, "text_model") else part
    return core.encoder.get_submodule(path)


def encode_fully(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """The text embedding [prompts, window, D], by the pipeline's own means."""
    with torch.no_grad():
        return pipe.encode_prompt(
            list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]


def read_fully(
    pipe: Any, names: Iterable[str], prompts: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs [prompts, window, .] of linear layers, prompts whole and padded."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    names = list(names)
    for name in names:
        if name.startswith("unet."):
            continue

        def keep(_module: Any, args: Any, out: Tensor, name: str = name) -> None:
            found[name] = args[0].detach().clone(), out.detach().clone()

        handles.append(module_of(pipe, name).register_forward_hook(keep))
    text = encode_fully(pipe, prompts)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for name in names:
            if name.startswith("unet."):
                found[name] = text, module_of(pipe, name)(text)
    return found


def state_of(pipe: Any) -> dict[str, bytes]:
    """Every weight's bytes."""
    return {
        f"{part}.{name}": tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
    }


@pytest.fixture(scope="session")
def slow() -> Any:
    """The functions above."""

    class Slow:
        module = staticmethod(module_of)
        read = staticmethod(read_fully)
        encode = staticmethod(encode_fully)
        state = staticmethod(state_of)

    return Slow
