"""Small Triton kernels that between them emit what the emulator knows.

Only the worker imports this. Arguments are named as in the project's kernels.
"""

import triton
import triton.language as tl


@triton.jit
def copy(out_ptr, in_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    tl.store(out_ptr + offs, tl.load(in_ptr + offs, mask=inside), mask=inside)


@triton.jit
def gather_rows(out_ptr, in_ptr, index_ptr, row_size, row_stride, BLOCK: tl.constexpr):
    """out[i] = in[index[i]], streamed past the caches."""
    lane_idx = tl.program_id(0)
    row_idx = tl.load(index_ptr + lane_idx)
    offs = tl.arange(0, BLOCK)
    inside = offs < row_size
    row = tl.load(
        in_ptr + row_idx * row_stride + offs, mask=inside, other=0, eviction_policy="evict_first"
    )
    tl.store(out_ptr + lane_idx * row_size + offs, row, mask=inside, cache_modifier=".cs")


@triton.jit
def softmax(out_ptr, in_ptr, row_size, BLOCK: tl.constexpr):
    """One row a block: reductions across warps go through shared memory."""
    offs = tl.arange(0, BLOCK)
    inside = offs < row_size
    start = tl.program_id(0) * row_size
    row = tl.load(in_ptr + start + offs, mask=inside, other=-float("inf")).to(tl.float32)
    row = tl.exp(row - tl.max(row, 0))
    tl.store(out_ptr + start + offs, row / tl.sum(row, 0), mask=inside)


@triton.jit
def transpose(out_ptr, in_ptr, rows_size, columns_size, R: tl.constexpr, C: tl.constexpr):
    """Read by rows, written by columns: a change of layout through shared memory."""
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    inside = (r[:, None] < rows_size) & (c[None, :] < columns_size)
    tile = tl.load(in_ptr + r[:, None] * columns_size + c[None, :], mask=inside)
    outside = (c[:, None] < columns_size) & (r[None, :] < rows_size)
    tl.store(out_ptr + c[:, None] * rows_size + r[None, :], tl.trans(tile), mask=outside)


@triton.jit
def matmul(
    out_ptr,
    a_ptr,
    b_ptr,
    m_size,
    n_size,
    k_size,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [m, n] = a [m, k] b [k, n], in float32; odd sizes are masked."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in tl.range(0, k_size, K):
        k = start + tl.arange(0, K)
        a_mask = (m[:, None] < m_size) & (k[None, :] < k_size)
        b_mask = (k[:, None] < k_size) & (n[None, :] < n_size)
        a = tl.load(a_ptr + m[:, None] * k_size + k[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + k[:, None] * n_size + n[None, :], mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out_mask = (m[:, None] < m_size) & (n[None, :] < n_size)
    tl.store(
        out_ptr + m[:, None] * n_size + n[None, :], total.to(out_ptr.dtype.element_ty), out_mask
    )


@triton.jit
def attention(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
    scale,
    queries_size,
    keys_size,
    q_stride,
    kv_stride,
    slot_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Flash attention: q and out [lanes, queries, D], k and v [slots, keys, D], slot [lanes].

    Keys come in blocks of N with an online softmax (Dao et al. 2022, algorithm 1, in base 2).
    """
    lane_idx = tl.program_id(1)
    slot_idx = tl.load(slot_ptr + lane_idx)
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.arange(0, N)
    d = tl.arange(0, WIDTH)
    q_offs = lane_idx * queries_size * q_stride + m[:, None] * q_stride + d[None, :]
    q_mask = (m[:, None] < queries_size) & (d[None, :] < D)
    q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
    highest = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, WIDTH], tl.float32)
    for start in tl.range(0, keys_size, N):
        inside = start + n < keys_size
        kv_offs = slot_idx * slot_stride + (start + n) * kv_stride
        k_mask = inside[None, :] & (d[:, None] < D)
        k = tl.load(k_ptr + kv_offs[None, :] + d[:, None], mask=k_mask, other=0.0)
        score = tl.where(
            inside[None, :], tl.dot(q, k) * (scale * 1.4426950408889634), -float("inf")
        )
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weight, 1)
        v_mask = inside[:, None] & (d[None, :] < D)
        v = tl.load(v_ptr + kv_offs[:, None] + d[None, :], mask=v_mask, other=0.0)
        result = tl.dot(weight.to(v.dtype), v, result * shrink[:, None])
        highest = new_highest
    result = result / total[:, None]
    tl.store(out_ptr + q_offs, result.to(out_ptr.dtype.element_ty), mask=q_mask)
