"""Every kernel as it ships: what has to be compiled to look at the machine code of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .attention_configs import all_keys_at_once, attention_config, padded, split
from .guided_step import DEFAULT_LAUNCH as GUIDED_STEP_LAUNCH
from .patch_rows import DEFAULT_LAUNCH

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of constants, as Triton's launcher would specialise it.

    Arguments of the kernel are in `types`, in `constants`, and nowhere else.
    """

    name: str
    kernel: str  # module:name
    types: Mapping[str, str]  # of runtime arguments, as Triton writes them
    constants: Mapping[str, Any]  # a dtype as {"dtype": "fp32"}
    divisible: tuple[str, ...]  # pointers and integers that are multiples of 16
    options: Mapping[str, int]  # num_warps, num_stages
    group: str  # the op
    padded: bool = False  # not shipped: the form with a padded head dimension, to compare with
    sm: tuple[int, ...] = (80, 90)  # which architectures get it; others must compile it


def machine_code_cases() -> Iterator[Case]:
    """All that is shipped, and beside some of it what it is compared with."""
    yield from _patch_rows_cases()
    yield from _patch_attention_cases()
    yield from _guided_step_cases()


def _patch_rows_cases() -> Iterator[Case]:
    """Aligned rows of tokens, as every model has them; a mask picks tokens."""
    for dtype in _DTYPES:
        for masked in (False, True):
            types = dict.fromkeys(("out_ptr", "source_ptr"), f"*{dtype}")
            types |= {"index_ptr": "*i64", "strength_ptr": "*fp32", "mask_ptr": "*fp32"}
            pointers = tuple(types)
            sizes = ("row_size", "channels_size", "source_size")
            strides = ("out_lane_stride", "source_row_stride", "mask_lane_stride")
            types |= dict.fromkeys((*sizes, *strides, "mask_channel_stride"), "i32")
            constants: dict[str, Any] = {"HAS_MASK": masked, "WIDE": {"dtype": "fp32"}}
            constants["BLOCK"] = DEFAULT_LAUNCH.block
            # Triton makes a constant of a stride of 1, which a mask of tokens has; none has 0.
            if masked:
                constants["mask_token_stride"] = 1
            else:
                types["mask_token_stride"] = "i32"
            aligned = ("row_size", "channels_size", *strides, "mask_channel_stride")
            yield Case(
                name=f"patch_rows {dtype}{' masked' if masked else ''}",
                kernel="fasttrace_kernels.patch_rows:patch_rows_kernel",
                types=types,
                constants=constants,
                divisible=(*pointers, *aligned, *(() if masked else ("mask_token_stride",))),
                options={"num_warps": DEFAULT_LAUNCH.num_warps, "num_stages": 3},
                group="patch_rows",
            )


HEAD_SIZES = (40, 64, 80, 128, 160)


def _patch_attention_cases() -> Iterator[Case]:
    """Text (77 keys, a table of slots) and pictures (many keys), in diffusers' layout.

    With a table of sources, which takes most registers; for fp16 also without one, with maps, and
    with a head dimension that is padded to a power of two where it is split.
    """
    for sm in (80, 90):
        for dtype in _DTYPES:
            for size in HEAD_SIZES:
                for keys in (77, 4096):
                    yield _attention(sm, dtype, size, keys)
        for size in HEAD_SIZES:
            yield _attention(sm, "fp16", size, 77, maps=True)
            for keys in (77, 4096):
                yield _attention(sm, "fp16", size, keys, splice=False)
                if split(size)[1]:
                    yield _attention(sm, "fp16", size, keys, pad=True)


def _attention(
    sm: int,
    dtype: str,
    size: int,
    keys: int,
    *,
    splice: bool = True,
    maps: bool = False,
    pad: bool = False,
) -> Case:
    short = all_keys_at_once(sm, _DTYPES[dtype], size, keys, maps=maps)
    text = keys == 77
    config = attention_config(sm, _DTYPES[dtype], size, short=short, splice=splice)
    d1, d2 = padded(size) if pad else split(size)
    block_n, tail_n = split(keys) if short else (config.block_n, 0)
    data = ("out_ptr", "query_ptr", "key_ptr", "value_ptr")
    types = dict.fromkeys(data, f"*{dtype}")
    types |= {"maps_ptr": "*fp32", "strength_ptr": "*fp32"}
    types |= {"kv_index_ptr": "*i64", "index_ptr": "*i64"}
    pointers = tuple(types)
    types["scale_log2"] = "fp32"
    sizes = ("lanes_size", "slots_size", "queries_size", "keys_size")
    # [L, N, H, D] seen as [L, H, N, D]: in units of 16 bytes a head lies at 5, 8, 10 ... of them.
    strides = [
        f"{name}_{axis}_stride"
        for name in ("query", "key", "value")
        for axis in ("lane" if name == "query" else "slot", "head", "token")
    ]
    types |= dict.fromkeys((*sizes, *strides, "strength_lane_stride"), "i32")
    aligned = [name for name in strides if not name.endswith("_head_stride")]
    constants = {
        "strength_token_stride": 1,
        "D": size,
        "D1": d1,
        "D2": d2,
        "BLOCK_M": config.block_m,
        "BLOCK_N": block_n,
        "TAIL_N": tail_n,
        "SHORT": short,
        "EVEN": keys % config.block_n == 0 and not short,
        "ALIGN": 4 if dtype == "fp32" else 8,
        "SLOTS": text,
        "SPLICE": splice,
        "MAPS": maps,
    }
    details = {" unpatched": not splice, " maps": maps, " padded": pad}
    return Case(
        name=f"patch_attention {dtype} {size} {'text' if text else 'picture'}"
        + "".join(word for word, given in details.items() if given),
        kernel="fasttrace_kernels.patch_attention_kernel:patch_attention_kernel",
        types=types,
        constants=constants,
        divisible=(*pointers, "queries_size", "strength_lane_stride", *aligned)
        + (() if text else ("keys_size",)),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        group="patch_attention",
        padded=pad,
        sm=(sm,),
    )


def _guided_step_cases() -> Iterator[Case]:
    """Aligned rows, float32 state, guidance of each lane; slots as schedulers want them."""
    slots = {"Euler": (1, 1, False), "PNDM": (2, 4, False), "most": (4, 4, True)}
    for dtype in _DTYPES:
        for scheduler, (latents, predictions, noisy) in slots.items():
            types = {"prediction_ptr": f"*{dtype}", "sample_ptr": f"*{dtype}"}
            tables = ("state", "noise", "weights", "input_scales", "guidance")
            types |= {f"{name}_ptr": "*fp32" for name in tables} | {"counter_ptr": "*i64"}
            pointers = tuple(types)
            strides = ["prediction_lane_stride", "state_slot_stride", "state_lane_stride"]
            strides += ["sample_lane_stride", "noise_call_stride", "noise_lane_stride"]
            types |= dict.fromkeys(("lanes_size", "row_size", "calls_size", *strides), "i32")
            yield Case(
                name=f"guided_step {dtype} {scheduler}",
                kernel="fasttrace_kernels.guided_step:guided_step_kernel",
                types=types,
                constants={
                    "guidance_lane_stride": 1,
                    "LATENTS": latents,
                    "PREDICTIONS": predictions,
                    "HAS_GUIDANCE": True,
                    "HAS_NOISE": noisy,
                    "WIDE": {"dtype": "fp32"},
                    "SCALE": {"dtype": "fp32"},
                    "BLOCK": GUIDED_STEP_LAUNCH.block,
                },
                divisible=(*pointers, "row_size", *strides),
                options={
                    "num_warps": GUIDED_STEP_LAUNCH.num_warps,
                    "num_stages": 3,
                    "enable_fp_fusion": False,
                },
                group="guided_step",
            )
