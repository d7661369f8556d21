"""patch_attention: attention whose lanes may take other lanes' results, a head at a time.

`reference.patch_attention` is the maths. A head with source -1 or a token with strength 0 keeps its
own result bit for bit and the source is never looked at; strength 1 gives the source's result bit
for bit; between them (and outside) it is a float32 lerp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from . import _registry
from ._triton import ptxas_version, triton
from .attention_configs import (
    LARGEST_HEAD,
    MAPS_KEYS,
    AttentionConfig,
    all_keys_at_once,
    attention_config,
    padded,
    split,
    split_fails,
)
from .patch_attention_kernel import patch_attention_kernel

OFFSETS_END = 2**31
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * query @ key.T) @ value, where a head's result may be another lane's.

    query [L, H, N, D], key and value [S, H, n, D], n >= 1 and D <= 256, of one dtype: float16,
    bfloat16 or float32. Any strides; those with unit stride on D are read in place. The result
    [L, H, N, D] lies in memory as [L, N, H, D], so `.transpose(1, 2).flatten(2)` is free.
    kv_index [L] int32 or int64: the slot of key and value that a lane reads; None: its own, S = L.
    index [L, H] int32 or int64: the lane whose result (its query, its slot) this head takes, -1
    for none. Results are taken as they are without any patch: no chains.
    strength [L, N] or [L, 1] float32, a token's share of the source; None is 1 everywhere.
    scale, positive, is D ** -0.5 where it is None.

    Inference only. Raises RuntimeError if a gradient is required, if shapes, dtypes or devices
    don't fit, and on the CPU if an index is out of range. CUDA can't look without a sync: there
    such a head becomes NaN, so whoever fills the tables checks them.
    """
    result: Tensor = torch.ops.fasttrace.patch_attention.default(
        query, key, value, kv_index, index, strength, scale
    )
    return result


def patch_attention_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`patch_attention`, and the probabilities behind it, spliced alike: [L, H, N, n] float32.

    For n <= 128. `maps.mean(2)` is the attention mass [L, H, n] of each text token.
    """
    result: tuple[Tensor, Tensor] = torch.ops.fasttrace.patch_attention_maps.default(
        query, key, value, kv_index, index, strength, scale
    )
    return result


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"patch_attention: {message}")


def check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None,
    index: Tensor | None,
    strength: Tensor | None,
    scale: float | None,
) -> None:
    have = list(query.shape)
    require(query.dtype in FLOATS, "query must be float16, bfloat16 or float32")
    require(query.dim() == 4, f"query must be [L, H, N, D], got {have}")
    lanes, heads, tokens, size = have
    require(1 <= size <= LARGEST_HEAD, f"heads must be of 1 to {LARGEST_HEAD}, got {size}")
    for name, tensor in {"key": key, "value": value}.items():
        require(
            tensor.dim() == 4 and tensor.shape[1] == heads and tensor.shape[3] == size,
            f"{name} must be [S, {heads}, n, {size}], as query {have} asks, "
            f"got {list(tensor.shape)}",
        )
        require(tensor.dtype == query.dtype, f"{name} and query must have one dtype")
    require(
        key.shape == value.shape and key.shape[2] >= 1,
        f"key and value must be alike, with at least one key, "
        f"got {list(key.shape)} and {list(value.shape)}",
    )
    others = [table for table in (kv_index, index, strength) if table is not None]
    require(
        all(other.device == query.device for other in (key, value, *others)),
        "query and every other tensor must be on one device",
    )
    slots = key.shape[0]
    if kv_index is None:
        require(slots == lanes, f"without kv_index there must be {lanes} slots, got {slots}")
    else:
        require(slots >= 1 or lanes == 0, "kv_index needs at least one slot to read")
        _check_table("kv_index", kv_index, [lanes])
    require(strength is None or index is not None, "strength needs an index")
    if index is not None:
        _check_table("index", index, [lanes, heads])
    if strength is not None:
        require(strength.dtype == torch.float32, "strength must be float32")
        require(
            list(strength.shape) in ([lanes, tokens], [lanes, 1]),
            f"strength must be [{lanes}, {tokens}] or [{lanes}, 1], got {list(strength.shape)}",
        )
    require(
        scale is None or (scale > 0 and math.isfinite(scale)),
        f"scale must be positive and finite, got {scale}",
    )


def _check_table(name: str, table: Tensor, shape: list[int]) -> None:
    require(table.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64")
    require(list(table.shape) == shape, f"{name} must be {shape}, got {list(table.shape)}")


def check_maps(query: Tensor, key: Tensor) -> None:
    require(
        key.shape[2] <= MAPS_KEYS,
        f"maps are given for at most {MAPS_KEYS} keys, got {key.shape[2]}",
    )
    largest = OFFSETS_END // MAPS_KEYS
    require(query.shape[2] <= largest, f"maps are given for at most {largest} tokens")


def check_tables(key: Tensor, kv_index: Tensor | None, index: Tensor | None) -> None:
    """What CUDA can't look at without a sync."""
    tables = {"kv_index": (kv_index, 0, key.shape[0])}
    if index is not None:
        tables["index"] = (index, -1, index.shape[0])
    for name, (table, lowest, stop) in tables.items():
        if table is None or table.numel() == 0:
            continue
        low, high = int(table.min()), int(table.max())
        require(
            lowest <= low and high < stop,
            f"{name} has {low if low < lowest else high}; expected {lowest} to {stop - 1}",
        )


def fallback(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The CPU op: torch's attention on gathered slots, then results are taken from it."""
    check_shapes(query, key, value, kv_index, index, strength, scale)
    check_tables(key, kv_index, index)
    if kv_index is not None:
        key, value = key.index_select(0, kv_index), value.index_select(0, kv_index)
    own = functional.scaled_dot_product_attention(query, key, value, scale=scale)
    return _by_token(_spliced(own, index, strength))


def fallback_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    out = fallback(query, key, value, kv_index, index, strength, scale)
    check_maps(query, key)
    keys = key if kv_index is None else key.index_select(0, kv_index)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    own = torch.softmax(query.float() @ keys.float().mT * factor, -1)
    return out, _spliced(own, index, strength)


def _spliced(own: Tensor, index: Tensor | None, strength: Tensor | None) -> Tensor:
    """own [L, H, N, ...], each (lane, head) alone; written over."""
    if index is None:
        return own
    lanes, heads = torch.nonzero(index >= 0, as_tuple=True)
    old, new = own[lanes, heads], own[index[lanes, heads].long(), heads]
    if strength is not None:
        share = strength[lanes][..., None]
        between = old.float() + share * (new.float() - old.float())
        new = torch.where(share == 0, old, torch.where(share == 1, new, between.to(own.dtype)))
    own[lanes, heads] = new
    return own


def _by_token(out: Tensor) -> Tensor:
    # [L, H, N, D] that lies in memory as [L, N, H, D].
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(query: Tensor) -> Tensor:
    lanes, heads, tokens, size = query.shape
    return query.new_empty(lanes, tokens, heads, size).transpose(1, 2)


def _empty_maps(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """The Triton form of `patch_attention`; a config of None is chosen for the device."""
    check_shapes(query, key, value, kv_index, index, strength, scale)
    out = _empty_like(query)
    _launch(out, None, query, key, value, kv_index, index, strength, scale, config)
    return out


def launch_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton form of `patch_attention_maps`."""
    check_shapes(query, key, value, kv_index, index, strength, scale)
    check_maps(query, key)
    out, maps = _empty_like(query), _empty_maps(query, key)
    _launch(out, maps, query, key, value, kv_index, index, strength, scale, config)
    return out, maps


def _launch(
    out: Tensor,
    maps: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None,
    index: Tensor | None,
    strength: Tensor | None,
    scale: float | None,
    config: AttentionConfig | None,
) -> None:
    if out.numel() == 0:
        return
    lanes, heads, tokens, size = query.shape
    keys = key.shape[2]
    sm = architecture(query.device)
    short = all_keys_at_once(sm, query.dtype, size, keys, maps=maps is not None)
    query = query if query.stride(3) == 1 else query.contiguous()
    # The short path's offsets within a head have 32 bits.
    limit = OFFSETS_END if short else math.inf
    key, value = (
        tensor
        if tensor.stride(3) == 1 and keys * tensor.stride(2) + size <= limit
        else tensor.contiguous()
        for tensor in (key, value)
    )
    align, strides = _strides(query, key, value)
    d1, d2 = split(size)
    if d2 and sm is not None and split_fails(sm, query.dtype, ptxas_version()):
        short = maps is not None
        d1, d2 = padded(size) if short or align == 1 else (d1, d2)
    if config is None:
        config = attention_config(sm, query.dtype, size, short=short, splice=index is not None)
    block_n, tail_n = split(keys) if short else (config.block_n, 0)
    share, share_strides = out, (0, 0)  # not read
    if index is not None:
        share = query.new_ones((), dtype=torch.float32) if strength is None else strength
        share = share.contiguous()
        one = share.dim() == 0
        share_strides = (0 if one else share.shape[1], int(not one and share.shape[1] > 1))
    with torch.cuda.device_of(query):
        patch_attention_kernel[triton.cdiv(tokens, config.block_m), heads, lanes](
            out_ptr=out,
            maps_ptr=out if maps is None else maps,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            kv_index_ptr=out if kv_index is None else kv_index.contiguous(),
            index_ptr=out if index is None else index.contiguous(),
            strength_ptr=share,
            scale_log2=(size**-0.5 if scale is None else scale) / math.log(2),
            lanes_size=lanes,
            slots_size=key.shape[0],
            queries_size=tokens,
            keys_size=keys,
            query_lane_stride=strides[0],
            query_head_stride=strides[1],
            query_token_stride=strides[2],
            key_slot_stride=strides[3],
            key_head_stride=strides[4],
            key_token_stride=strides[5],
            value_slot_stride=strides[6],
            value_head_stride=strides[7],
            value_token_stride=strides[8],
            strength_lane_stride=share_strides[0],
            strength_token_stride=share_strides[1],
            D=size,
            D1=d1,
            D2=d2,
            BLOCK_M=config.block_m,
            BLOCK_N=block_n,
            TAIL_N=tail_n,
            SHORT=short,
            EVEN=keys == block_n + tail_n if short else keys % block_n == 0,
            ALIGN=align,
            SLOTS=kv_index is not None,
            SPLICE=index is not None,
            MAPS=maps is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def architecture(device: torch.device) -> int | None:
    """80 for sm_80, and for AMD, which has no number of its own; None where Triton interprets."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """In units of 16 bytes where all are: a head's 40 alone doesn't tell Triton of its 8s."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    align = 16 // tensors[0].element_size()
    if any(stride % align for stride in strides):
        return 1, strides
    return align, [stride // align for stride in strides]


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    check_shapes(query, key, value, kv_index, index, strength, scale)
    return _empty_like(query)


def _fake_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    check_shapes(query, key, value, kv_index, index, strength, scale)
    check_maps(query, key)
    return _empty_like(query), _empty_maps(query, key)


_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor value, Tensor? kv_index, Tensor? index, Tensor? strength, "
    "float? scale)"
)
_REMEDY = "use torch's scaled_dot_product_attention, or call it under torch.no_grad()"
_registry.define(f"patch_attention{_ARGUMENTS} -> Tensor", cpu=fallback, cuda=launch, fake=_fake)
_registry.define(
    f"patch_attention_maps{_ARGUMENTS} -> (Tensor, Tensor)",
    cpu=fallback_maps,
    cuda=launch_maps,
    fake=_fake_maps,
)
for _name in ("patch_attention", "patch_attention_maps"):
    _registry.refuse_gradient(_name, _REMEDY, mutates=())
