"""The device code of patch_attention: one program computes BLOCK_M queries of a (lane, head)."""

from __future__ import annotations

from ._triton import jit, tl


@jit
def _load_rows(row_ptrs, row_mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH - 1 of rows [R, 1]; zeros past D and where masked off.

    Without a mask (None) every row is there.
    """
    columns_offs = (FIRST + tl.arange(0, WIDTH))[None, :]
    if FIRST + WIDTH > D:
        mask = columns_offs < D
        if row_mask is not None:
            mask = row_mask[:, None] & mask
        rows = tl.load(row_ptrs + columns_offs, mask=mask, other=0.0)
    elif row_mask is not None:
        rows = tl.load(row_ptrs + columns_offs, mask=row_mask[:, None], other=0.0)
    else:
        rows = tl.load(row_ptrs + columns_offs)
    return rows


@jit
def _scores(q1, q2, key_ptrs, key_mask, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """q [M, D] @ k [n, D].T; -inf where a key is masked off."""
    k1 = _load_rows(key_ptrs, key_mask, 0, D1, D)
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        k2 = _load_rows(key_ptrs, key_mask, D1, D2, D)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
    if key_mask is not None:
        scores = tl.where(key_mask[None, :], scores, -float("inf"))
    return scores


@jit
def _add_values(
    sums, weights, value_ptrs, key_mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """sums [M, WIDTH] + weights [M, n] @ the columns of v [n, D] from FIRST on."""
    v = _load_rows(value_ptrs, key_mask, FIRST, WIDTH, D)
    return tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")


@jit
def _amounts(share_ptr, m, queries_size, strength_token_stride, pass_idx):
    """Which tokens a pass is about, those that take from a source in pass 1, and their strength."""
    inside = m < queries_size
    strength = tl.load(share_ptr + m * strength_token_stride, mask=inside, other=0.0)
    own = pass_idx == 0
    return inside & ((strength != 0) | own), tl.where(own, 1.0, strength)


@jit
def _write(ptrs, new, mask, strength, SPLICE: tl.constexpr):
    """Where the strength is not 1, the lerp from what pass 0 wrote."""
    if SPLICE:
        both = (strength != 1)[:, None]
        own = tl.load(ptrs, mask=mask & both, other=0.0).to(tl.float32)
        between = own + strength[:, None] * (new.to(tl.float32) - own)
        new = tl.where(both, between.to(new.dtype), new)
    tl.store(ptrs, new, mask=mask)


@jit
def patch_attention_kernel(
    out_ptr,
    maps_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    kv_index_ptr,
    index_ptr,
    strength_ptr,
    scale_log2,
    lanes_size,
    slots_size,
    queries_size,
    keys_size,
    query_lane_stride,
    query_head_stride,
    query_token_stride,
    key_slot_stride,
    key_head_stride,
    key_token_stride,
    value_slot_stride,
    value_head_stride,
    value_token_stride,
    strength_lane_stride,
    strength_token_stride,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    SHORT: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLICE: tl.constexpr,
    MAPS: tl.constexpr,
):
    """BLOCK_M queries of a (lane, head). Pass 0 is its own, pass 1 the source's; most need one.

    Strides of query, key and value are in units of ALIGN. The head dimension is D1 + D2, the last
    of it empty. If SHORT, keys are BLOCK_N + TAIL_N, all at once; EVEN says that none is missing.
    """
    head_idx, lane_idx = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads_size = tl.num_programs(1)
    tile_m = tl.program_id(0) * BLOCK_M
    n = tl.arange(0, BLOCK_N)
    start_idx = 3
    source_idx = lane_idx
    share_ptr = strength_ptr + lane_idx * strength_lane_stride
    if SPLICE:
        source_idx = tl.load(index_ptr + lane_idx * heads_size + head_idx).to(tl.int64)
        m = tile_m + tl.arange(0, BLOCK_M)
        patched = (m < queries_size) & (tl.broadcast_to(source_idx, [BLOCK_M]) != -1)
        strength = tl.load(share_ptr + m * strength_token_stride, mask=patched, other=0.0)
        keeps = tl.max(((m < queries_size) & (strength != 1)).to(tl.int32), 0)
        takes = tl.max((strength != 0).to(tl.int32), 0)
        start_idx = 3 - takes * (1 + 2 * keeps)
    # 0 and 2, or 2 alone, or 3 alone: 2 is pass 1. So no bound of the loop lives in a register.
    for step_idx in tl.range(start_idx, 4, 2, num_stages=1, disable_licm=True):
        pass_idx = tl.where(step_idx == 2, 1, 0)
        # Plus 0, which the compiler doesn't know: offsets that are the same in both passes would
        # be kept in registers all through the main loop.
        m = tile_m + step_idx // 4 + tl.arange(0, BLOCK_M)
        m_offs = m.to(tl.int64)
        read_mask = m < queries_size
        read_idx = lane_idx
        if SPLICE:
            # Of the source only tokens that take from it are read.
            read_mask, _ = _amounts(share_ptr, m, queries_size, strength_token_stride, pass_idx)
            read_idx = lane_idx + (source_idx - lane_idx) * pass_idx
        # The host can't see the tables without a sync, so an index out of range shows as NaN.
        known = (read_idx >= 0) & (read_idx < lanes_size)
        read_idx = tl.where(known, read_idx, 0)
        slot_idx = read_idx
        if SLOTS:
            slot_idx = tl.load(kv_index_ptr + read_idx).to(tl.int64)
            known = known & (slot_idx >= 0) & (slot_idx < slots_size)
            slot_idx = tl.where(known, slot_idx, 0)
        factor = tl.where(known, scale_log2, float("nan"))

        query_base = read_idx * query_lane_stride + head_idx * query_head_stride
        query_offs = (query_base + m_offs * query_token_stride) * ALIGN
        query_ptrs = query_ptr + query_offs[:, None]
        key_base = (slot_idx * key_slot_stride + head_idx * key_head_stride) * ALIGN
        value_base = (slot_idx * value_slot_stride + head_idx * value_head_stride) * ALIGN
        q1 = _load_rows(query_ptrs, read_mask, 0, D1, D)
        q2 = q1
        if D2 > 0:
            q2 = _load_rows(query_ptrs, read_mask, D1, D2, D)
        sum1 = tl.zeros([BLOCK_M, D1], tl.float32)
        sum2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else D1], tl.float32)
        if SHORT:
            # All scores of a query at once: no running maximum, nothing is scaled twice. Offsets of
            # 32 bits, which the launcher sees to: addresses of 64 would fill the registers.
            mask1, mask2 = None, None
            if TAIL_N == 0 and not EVEN:
                mask1 = n < keys_size
            key_ptrs = key_ptr + key_base + n[:, None] * (key_token_stride * ALIGN)
            value_ptrs = value_ptr + value_base + n[:, None] * (value_token_stride * ALIGN)
            p1 = _scores(q1, q2, key_ptrs, mask1, D, D1, D2)
            highest = tl.max(p1, 1)
            if TAIL_N > 0:
                tail_n = BLOCK_N + tl.arange(0, TAIL_N)
                if not EVEN:
                    mask2 = tail_n < keys_size
                tail_ptrs = key_ptr + key_base + tail_n[:, None] * (key_token_stride * ALIGN)
                p2 = _scores(q1, q2, tail_ptrs, mask2, D, D1, D2)
                highest = tl.maximum(highest, tl.max(p2, 1))
            highest *= factor
            p1 = tl.exp2(p1 * factor - highest[:, None])
            total = tl.sum(p1, 1)
            if TAIL_N > 0:
                p2 = tl.exp2(p2 * factor - highest[:, None])
                total += tl.sum(p2, 1)
            if MAPS:
                write_mask, strength = m < queries_size, total
                if SPLICE:
                    tl.debug_barrier()  # as below
                    write_mask, strength = _amounts(
                        share_ptr, m, queries_size, strength_token_stride, pass_idx
                    )
                # The launcher sees to it that offsets within a head need no more than 32 bits.
                maps_base = (lane_idx * heads_size + head_idx) * queries_size * keys_size
                maps_ptrs = maps_ptr + maps_base + (m * keys_size)[:, None] + n[None, :]
                mask = write_mask[:, None] & (n < keys_size)[None, :]
                _write(maps_ptrs, p1 * (1 / total)[:, None], mask, strength, SPLICE)
                if TAIL_N > 0:
                    tail_ptrs = maps_ptr + maps_base + (m * keys_size)[:, None] + tail_n[None, :]
                    mask = write_mask[:, None] & (tail_n < keys_size)[None, :]
                    _write(tail_ptrs, p2 * (1 / total)[:, None], mask, strength, SPLICE)
            sum1 = _add_values(sum1, p1, value_ptrs, mask1, 0, D1, D)
            if TAIL_N > 0:
                tail_ptrs = value_ptr + value_base + tail_n[:, None] * (value_token_stride * ALIGN)
                sum1 = _add_values(sum1, p2, tail_ptrs, mask2, 0, D1, D)
        else:
            # Online softmax in base 2 (Dao et al. 2022, algorithm 1).
            highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for start in tl.range(0, keys_size, BLOCK_N):
                mask = None
                if not EVEN:
                    mask = start + n < keys_size
                n_offs = (start + n).to(tl.int64)[:, None]
                key_ptrs = key_ptr + key_base + n_offs * (key_token_stride * ALIGN)
                value_ptrs = value_ptr + value_base + n_offs * (value_token_stride * ALIGN)
                p = _scores(q1, q2, key_ptrs, mask, D, D1, D2)
                new_highest = tl.maximum(highest, tl.max(p, 1) * factor)
                p = tl.exp2(p * factor - new_highest[:, None])
                shrink = tl.exp2(highest - new_highest)
                total = total * shrink + tl.sum(p, 1)
                sum1 = sum1 * shrink[:, None]
                if D2 > 0:
                    sum2 = sum2 * shrink[:, None]
                p = p.to(value_ptr.dtype.element_ty)
                sum1 = _add_values(sum1, p, value_ptrs, mask, 0, D1, D)
                if D2 > 0:
                    sum2 = _add_values(sum2, p, value_ptrs, mask, D1, D2, D)
                highest = new_highest

        share = 1 / total
        write_mask, strength = m < queries_size, share
        if SPLICE:
            tl.debug_barrier()  # what pass 0 wrote is there for every thread of pass 1
            write_mask, strength = _amounts(
                share_ptr, m, queries_size, strength_token_stride, pass_idx
            )
        out_offs = ((lane_idx * queries_size + m_offs) * heads_size + head_idx) * D
        d = tl.arange(0, D1)[None, :]
        out_ptrs = out_ptr + out_offs[:, None] + d
        new = (sum1 * share[:, None]).to(out_ptr.dtype.element_ty)
        _write(out_ptrs, new, write_mask[:, None] & (d < D), strength, SPLICE)
        if D2 > 0:
            if SHORT:
                sum2 = _add_values(sum2, p1, value_ptrs, mask1, D1, D2, D)
                if TAIL_N > 0:
                    sum2 = _add_values(sum2, p2, tail_ptrs, mask2, D1, D2, D)
            d = D1 + tl.arange(0, D2)[None, :]
            out_ptrs = out_ptr + out_offs[:, None] + d
            new = (sum2 * share[:, None]).to(out_ptr.dtype.element_ty)
            _write(out_ptrs, new, write_mask[:, None] & (d < D), strength, SPLICE)
