"""Which kernel computes and which one patches each site of a compiled denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fasttrace.adapters.unet import KINDS, kind_of
from fasttrace.engine.compiled import Denoiser
from fasttrace.engine.graph.fuse import ATTENTION, fusable
from fasttrace.engine.graph.marks import MARK
from fasttrace.engine.options import ATTENTIONS
from fasttrace.errors import UsageError
from fasttrace_kernels import extension_status, triton_available
from fasttrace_kernels.attention_configs import split

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SiteKernels:
    """A site, the kernel of its attention ("" where it has none) and the one that patches it."""

    site: str
    attention: str
    patch: str


def use_fused(choice: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention is `patch_attention`, for an engine option as `Options.attention`.

    "auto" takes it on CUDA in half precision; in float32 torch's attention is as good.
    """
    if choice == "auto":
        return triton_available and device.type == "cuda" and dtype in HALF
    return choice == "fused"


def kernels_of(
    denoiser: Denoiser, device: torch.device, dtype: torch.dtype, choice: str = "auto"
) -> list[SiteKernels]:
    """Of the default sites, in execution order, for a model of this dtype on this device."""
    patch = f"patch_rows ({op_form(device)})"
    fused = use_fused(choice, device, dtype)
    attentions: dict[str, str] = {}
    latest: fx.Node | None = None
    for node in denoiser.body.small.module.graph.nodes:
        if node.target is ATTENTION:
            latest = node
        elif node.target is MARK and node.args[2] == "heads" and latest is not None:
            attentions[node.args[1].removesuffix(".heads")] = _attention(latest, fused)
            latest = None
    return [
        SiteKernels(mark.name, attentions.get(mark.name, ""), patch)
        for mark in denoiser.marks.values()
        if mark.kind == "output" and kind_of(mark.name) in KINDS
    ]


def op_form(device: torch.device) -> str:
    """The form of an op that runs there."""
    if device.type == "cuda":
        return "Triton" if triton_available else "CUDA C++"
    return "C++" if extension_status().loaded else "PyTorch"


def check_choice(choice: str) -> None:
    """Raises `UsageError` for what is no choice of attention."""
    if choice not in ATTENTIONS:
        known = ", ".join(ATTENTIONS)
        raise UsageError(f"attention is one of {known}, not {choice!r}.")


def _attention(node: fx.Node, fused: bool) -> str:
    query, key = (_value(argument) for argument in node.args[:2])
    head, keys = query.shape[-1], key.shape[-2]
    if not (fused and fusable(node)):
        return f"torch attention, head {head}, {keys} keys"
    parts = " + ".join(str(part) for part in split(head) if part)
    return f"patch_attention, head {head} as {parts}, {keys} keys"


def _value(argument: Any) -> Any:
    return argument.meta["val"]
