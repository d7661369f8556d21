"""Small PTX programs for tests: the frame around a few lines, or around one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .launch import Kernel
from .memory import GlobalMemory
from .values import Array

_MODULE = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry handwritten(
{parameters}
)
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<32>;
    mov.u32 %r0, %tid.x;
{loads}
{body}
    ret;
}}
"""


def assemble(
    body: str, parameters: Sequence[str] = ("out",), *, shared_size: int = 0, num_warps: int = 1
) -> Kernel:
    """%r0 is the thread, %rd0, %rd1 ... the parameters, all of them pointers."""
    frame = _MODULE.format(
        parameters=",\n".join(f"    .param .u64 parameter_{n}" for n in range(len(parameters))),
        loads="\n".join(
            f"    ld.param.u64 %rd{n}, [parameter_{n}];" for n in range(len(parameters))
        ),
        body=body,
    )
    return Kernel(frame, shared_size, num_warps, tuple(parameters))


def run(
    body: str,
    *tensors: torch.Tensor,
    shared_size: int = 256,
    num_warps: int = 1,
    grid: tuple[int, ...] = (1,),
) -> GlobalMemory:
    """The parameters are `out` and, after it, `more`."""
    names = ("out", "more")[: len(tensors)]
    kernel = assemble(body, names, shared_size=shared_size, num_warps=num_warps)
    return kernel.launch(grid, dict(zip(names, tensors, strict=True)))


def compute(instruction: str, result: Any, **inputs: Array) -> Array:
    """One instruction in one warp: its registers have the names of the inputs, and `d`.

    Inputs are [n], n <= 32, of any dtype; the result is the n values of d, as the dtype `result`.
    """
    size = max(len(values) for values in inputs.values())
    tensors = {"out": torch.zeros(32, dtype=torch.int64)}
    body = []
    for n, (name, values) in enumerate(inputs.items(), start=1):
        bits = 8 * values.itemsize
        if values.dtype == np.bool_:
            values, bits = values.astype(np.int32), 32
            body += [f".reg .pred {name};", f".reg .b32 word_{name};"]
        else:
            body.append(f".reg .b{bits} {name};")
        padded = np.resize(values, 32)
        tensors[name] = torch.from_numpy(padded.view(f"i{bits // 8}").copy())
        target = f"word_{name}" if f".reg .pred {name};" in body else name
        body += [
            f"mad.wide.u32 %rd{10 + n}, %r0, {bits // 8}, %rd{n};",
            f"ld.global.b{bits} {target}, [%rd{10 + n}];",
        ]
        if target != name:
            body.append(f"setp.ne.s32 {name}, {target}, 0;")
    bits = 32 if result == np.bool_ else 8 * np.dtype(result).itemsize
    body += [".reg .pred d;" if result == np.bool_ else f".reg .b{bits} d;", instruction]
    body.append("mad.wide.u32 %rd10, %r0, 8, %rd0;")
    if result == np.bool_:
        body += ["selp.b32 %r1, 1, 0, d;", "st.global.b32 [%rd10], %r1;"]
    else:
        body.append(f"st.global.b{bits} [%rd10], d;")
    assemble("\n".join(body), tuple(tensors)).launch((1,), tensors)
    raw = tensors["out"].numpy().view(f"u{bits // 8}")[:: 64 // bits][:size]
    return raw.astype(np.bool_) if result == np.bool_ else raw.copy().view(result)
