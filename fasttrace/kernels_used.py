"""Which kernels a model would run, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasttrace.adapters.catalogue import configurations
from fasttrace.engine.kernels import SiteKernels, check_choice, kernels_of, op_form
from fasttrace.errors import UsageError
from fasttrace.forecast import compile_configuration

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class KernelsUsed:
    """Of every site, and in words what ends a denoiser call."""

    device: str
    dtype: str
    sites: tuple[SiteKernels, ...]
    step: str


def kernels_of_model(
    name: str, device: str | None = None, dtype: str | None = None, attention: str = "auto"
) -> KernelsUsed:
    """name: as for `list_sites`. device, dtype: those of this machine by default.

    The device need not be here: nothing is run. Raises `UsageError` for unknown words and
    `ModelError` for an unknown model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("fp16" if device == "cuda" else "fp32")
    for given, known, what in ((device, DEVICES, "device"), (dtype, tuple(DTYPES), "dtype")):
        if given not in known:
            raise UsageError(f"Unknown {what} {given!r}; expected one of {', '.join(known)}.")
    check_choice(attention)
    _, denoiser = compile_configuration(configurations(name)["unet"], DTYPES[dtype])
    where = torch.device(device)
    sites = kernels_of(denoiser, where, DTYPES[dtype], attention)
    ending = f"guided_step ({op_form(where)}) ends each call"
    return KernelsUsed(device, dtype, tuple(sites), ending)
