"""The scan for GPUs of compute capability 9.0, in Gluon (``hopper_tile``). It does the same as
``scores._scores_kernel``; arguments are the same, but for two strides.
"""

# ruff: noqa: RUF005 (the compiler does not take (*a, b))

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .hopper_tile import as_bytes, find_blocks, layout, load_query, load_tile, tile_bins, weight

NUM_WARPS = 4
MAX_REGISTERS = 128  # per thread, so that four programs of 4 warps fit; with more than 32 rows there is no limit
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6 has the second name


def takes(packed: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether this kernel supports these tensors: the sizes for which it was made and measured, and aligned memory."""
    tokens, code_bytes = codes.shape[2:]
    return (
        torch.cuda.get_device_capability(packed.device) == (9, 0)
        and packed.shape[2] in (16, 32, 64)
        and packed.shape[3] in (64, 128)
        and code_bytes >= 16
        and 32 * NUM_WARPS % tokens == 0
        and codes.stride()[2:] == (code_bytes, 1)
        and codes.stride(0) == 2 * scales.stride(0)
        and scales.stride(2) == 1
        # Codes are read 16 bytes at a time, scales 8 bytes, and scores 4.
        and (codes.data_ptr() | codes.stride(0) | codes.stride(1)) % 16 == 0
        and (scales.data_ptr() | 2 * scales.stride(1)) % 8 == 0
        and (scores.data_ptr() | scores.stride(0) | scores.stride(1)) % 4 == 0
    )


@gluon.jit
def _scan(
    packed, factors, table, codes, scales, scores, first, end, lowest, per_nat, stride_cb,
    D: gl.constexpr, BITS: gl.constexpr, C: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Writes the bins of tokens first to end - 1, using N groups of 8 query rows."""
    T: gl.constexpr = 32 * W
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1], instr_shape=[16, 8])
    PARTS: gl.constexpr = D // C if C > 16 else D // 32
    q, a, b, n = (), (), (), ()
    for i in gl.static_range(N):
        row = factors + i * 8 + gl.arange(0, 8, gl.SliceLayout(0, MMA))
        a, b, n = a + (gl.load(row) / weight(BITS),), b + (gl.load(row + M),), n + (gl.load(row + 2 * M),)
        for part in gl.static_range(PARTS):
            q = q + (load_query(packed + i * 8 * D + part * (D // PARTS), D, C, W, gl.DotOperandLayout(1, MMA, 4)),)
    CODES: gl.constexpr = layout(
        (8 * W, 4, C // 4), ((2, 1, C // 16), (1, 1, 4)), ((2, C // 16, 4), (0, 1, 8)), ((0, 8, W),)
    )
    group = gl.arange(0, 8 * W, gl.SliceLayout(1, gl.SliceLayout(2, CODES))) * 4
    quarter = gl.arange(0, C // 4, gl.SliceLayout(0, gl.SliceLayout(1, CODES)))[None, None, :] * 4
    within = (first + group).to(gl.uint32) % BLOCK_SIZE
    code_at = codes + (within * C)[:, None, None] + quarter
    scale_at = scales.to(gl.pointer_type(gl.uint8), bitcast=True) + (within * 2)[:, None]
    last = ((end - 1) // BLOCK_SIZE).to(gl.uint32)
    stride = stride_cb.to(gl.uint32).to(gl.uint64)
    # Codes and scales are loaded one tile ahead, block ids two tiles, in loop-carried registers.
    word, scale = load_tile(code_at, scale_at, find_blocks(table, first + group, last, BLOCK_SIZE), stride, C, CODES)
    block = find_blocks(table, first + T + group, last, BLOCK_SIZE)
    lane = gl.arange(0, T, gl.BlockedLayout([1], [32], [W], [0]))
    to = scores + first + lane
    full = end - (end - first) % T
    for start in range(first, full, T):
        next_word, next_scale = load_tile(code_at, scale_at, block, stride, C, CODES)
        block = find_blocks(table, start + 2 * T + group, last, BLOCK_SIZE)
        gl.store(to, tile_bins(word, scale, q, a, b, n, lowest, per_nat, BITS, C, N, W, MMA))
        to += T
        word, scale = next_word, next_scale
    if full < end:
        bin = tile_bins(word, scale, q, a, b, n, lowest, per_nat, BITS, C, N, W, MMA)
        gl.store(to, bin, mask=full + lane < end)


@gluon.jit
def _one_hot(word, value, X: gl.constexpr, W: gl.constexpr):
    """[W, 16, 16 X] int8: 32 where a byte (0 to 31) of words [W, 1, 4, X] int32 equals value [1, 16, 1, 1], else 0."""
    hot = gl.inline_asm_elementwise(
        "{ .reg .b32 t; xor.b32 t, $1, $2; sub.u32 t, 0x20202020, t; and.b32 $0, t, 0x20202020; }", "=r,r,r",
        [word, value], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.reshape(gl.permute(gl.reshape(as_bytes(hot), (W, 16, 4, X, 4)), (0, 1, 3, 2, 4)), (W, 16, 16 * X))


@gluon.jit
def _count(scores, end, low, high, CHUNK: gl.constexpr, W: gl.constexpr, EDGE: gl.constexpr):
    """Histogram [256] int32 of scores [CHUNK]. With EDGE, only scores low to high - 1 count, and none from ``end`` on
    are read. A matrix product, summed over tokens, counts how often the upper half of a bin is i and the lower half j.
    """
    X: gl.constexpr = 4  # words that a lane reads at a time
    L: gl.constexpr = layout((W, 16, 4, X), ((3, 1, X), (1, 8, 2)), ((2, 1, 4), (1, 1, 8)), ((0, 1, W),))
    WORDS: gl.constexpr = gl.SliceLayout(1, L)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    x = gl.arange(0, X, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    at = (w * 4 + t) * X + x
    value = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    value = value * 0x01010101
    words = ()
    for i in gl.static_range(CHUNK // (16 * X * W)):
        where = scores.to(gl.pointer_type(gl.int32), bitcast=True) + at + i * (4 * X * W)
        if EDGE:
            words = words + (gl.load(where, mask=(at + i * (4 * X * W)) * 4 < end, other=0),)
        else:
            words = words + (gl.load(where),)
    counts = gl.full((W, 16, 16), 0, gl.int32, MMA)
    for i in gl.static_range(CHUNK // (16 * X * W)):
        upper = (words[i] >> 4) & 0x0F0F0F0F
        if EDGE:
            for j in gl.static_range(4):
                p = (at + i * (4 * X * W)) * 4 + j
                upper = upper | gl.where((p >= low) & (p < high), 0, 16 << (8 * j))  # 16 matches no value
        a = _one_hot(upper[:, None, :, :], value, X, W)
        b = gl.permute(_one_hot((words[i] & 0x0F0F0F0F)[:, None, :, :], value, X, W), (0, 2, 1))
        a = gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 4), assert_trivial=True)
        counts = mma_v2(a, gl.convert_layout(b, gl.DotOperandLayout(1, MMA, 4), assert_trivial=True), counts)
    return gl.reshape(gl.sum(counts, 0), (256,)) >> 10


@gluon.jit
def scores_kernel(
    packed, factors, query_start_loc, seq_lens, dense, block_table, codes, scales, scores, histogram, chunks,
    sink, recent, dense_up_to, lowest, per_nat, stride_pr, stride_fr, stride_tr, stride_cb, stride_ch, stride_sh,
    stride_or, stride_oh, stride_hr, stride_kr, stride_kh,
    D: gl.constexpr, BITS: gl.constexpr, C: gl.constexpr, M: gl.constexpr, CHUNK: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    h = gl.program_id(0)
    chunk = gl.program_id(1)
    r = gl.program_id(2).to(gl.int64)
    q_len = gl.load(query_start_loc + r + 1) - gl.load(query_start_loc + r)
    context = gl.load(seq_lens + r) - q_len
    first = chunk * CHUNK
    if (gl.load(dense + r) != 0) | (first >= context) | (context <= dense_up_to) | (q_len <= 0):
        return
    packed += r * stride_pr + h * (M * D)
    factors += r * stride_fr + h * (3 * M)
    block_table += r * stride_tr
    codes += h * stride_ch
    scales += h * stride_sh
    scores += r * stride_or + h * stride_oh
    end = gl.minimum(first + CHUNK, context)
    # The number of rows is padded to a power of 2. Often the last quarter of them, or half of 16, is only padding.
    FEWER: gl.constexpr = M // 4 * 3 if M > 16 else M // 2
    rest = factors + 2 * M + FEWER + gl.arange(0, M - FEWER, gl.BlockedLayout([1], [32], [W], [0]))
    if gl.min(gl.load(rest), 0) == float("inf"):
        _scan(packed, factors, block_table, codes, scales, scores, first, end, lowest, per_nat, stride_cb,
              D, BITS, C, M, FEWER // 8, BLOCK_SIZE, W)  # fmt: skip
    else:
        _scan(packed, factors, block_table, codes, scales, scores, first, end, lowest, per_nat, stride_cb,
              D, BITS, C, M, M // 8, BLOCK_SIZE, W)  # fmt: skip
    # The stored scores are loaded again, in the order that the histogram needs.
    barrier()
    if (first >= sink) & (first + CHUNK <= context - recent):
        counts = _count(scores + first, CHUNK, 0, CHUNK, CHUNK, W, False)
    else:
        counts = _count(scores + first, end - first, sink - first, context - recent - first, CHUNK, W, True)
    counts = gl.convert_layout(counts, gl.BlockedLayout([1], [32], [W], [0]))
    bins = gl.arange(0, 256, gl.BlockedLayout([1], [32], [W], [0]))
    gl.store(chunks + r * stride_kr + h * stride_kh + chunk * 256 + bins, counts.to(gl.int16))
    gl.atomic_add(histogram + r * stride_hr + h * 256 + bins, counts, mask=counts > 0, sem="relaxed")
