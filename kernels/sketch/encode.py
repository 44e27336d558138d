"""Writes codes of new keys beside the keys; if values are given, it writes keys and values to the cache too.

A key is rotated, the centre is subtracted, and each element is rounded to 2^bits levels with a step size that suits the
key's norm. The rotation (random signs, then a Hadamard matrix) spreads a few large elements over all elements. The
centre is the mean key of the layer and head: it would change all scores of a query by the same amount and only cost
precision. A code depends on one key only, so it is the same in any batch, chunk or order of writing. In an fp8 cache it
is the code of the rounded key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import padding
from ..contracts import FP8, checked
from ..fp8 import round_to
from . import contracts
from .layout import STEPS, bits_of
from .tiles import elements

BLOCK = 16  # keys per program, the fewest for a matrix product


@triton.jit(do_not_specialize=["tokens"])  # any number may come, and nobody should wait for another compilation
def _encode_kernel(
    key, slot_mapping, rotation, centre, codes, scales, value, kv_cache, tokens, block_size, norm, step_size,
    key_scale, value_scale, stride_kt, stride_kh, stride_cb, stride_ch, stride_cn, stride_sb, stride_sh,
    stride_vt, stride_vh, stride_eb, stride_eh, stride_en,
    D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1)
    slot = tl.load(slot_mapping + t, mask=t < tokens, other=-1)
    live = slot >= 0
    d = tl.arange(0, padding.padded(D))
    mask = padding.both(live[:, None], (d < D)[None, :], D)
    k = tl.load(key + t.to(tl.int64)[:, None] * stride_kt + h * stride_kh + d[None, :], mask=mask, other=0.0)
    block, offset = slot // block_size, slot % block_size
    if value is not None:
        at = t.to(tl.int64)[:, None] * stride_vt + h * stride_vh + d[None, :]
        v = tl.load(value + at, mask=mask, other=0.0)
        if FP8:
            k, v = round_to(k, key_scale, kv_cache), round_to(v, value_scale, kv_cache)
        entry = kv_cache + block[:, None] * stride_eb + h * stride_eh + offset[:, None] * stride_en + d[None, :]
        tl.store(entry, k, mask=mask)
        tl.store(entry + D, v, mask=mask)
    e = elements(D, C)
    turn = padding.load(rotation + d[:, None] * D + e[None, :], (d < D)[:, None] & (e < D)[None, :], D)
    middle = padding.load(centre + h * D + e, e < D, D)
    x = tl.dot(k.to(turn.dtype), turn, input_precision="ieee") * norm - middle[None, :]
    step = tl.sqrt(tl.sum(x * x, 1) / D) * step_size
    HALF: tl.constexpr = 1 << (BITS - 1)
    level = tl.floor(x / tl.maximum(step, 1e-30)[:, None]) + HALF
    # NaN keys get level 0: any code will do, because their scale is NaN.
    level = tl.where(level == level, tl.minimum(tl.maximum(level, 0.0), 2.0 * HALF - 1.0), 0.0).to(tl.int32)
    FIELDS: tl.constexpr = 8 // BITS
    field = tl.arange(0, FIELDS)
    packed = tl.sum(tl.reshape(level, (BLOCK, FIELDS, padding.padded(C))) << (field * BITS)[None, :, None], 1)
    j = tl.arange(0, padding.padded(C))
    where = codes + block[:, None] * stride_cb + h * stride_ch + offset[:, None] * stride_cn + j[None, :]
    tl.store(where, packed.to(tl.uint8), mask=padding.both(live[:, None], (j < C)[None, :], C))
    # With this scale, the estimate of the key's product with itself is exact. A smaller scale would rank keys with a
    # large norm too low.
    rounded = 2.0 * level.to(tl.float32) - (2.0 * HALF - 1.0)
    scale = tl.sum(x * x, 1) / tl.maximum(tl.sum(x * rounded, 1), 1e-30)
    tl.store(scales + block * stride_sb + h * stride_sh + offset, scale.to(tl.float16), mask=live)


@checked(contracts.encode_keys)
def encode_keys(
    key, slot_mapping, rotation, centre, codes, scales, value=None, kv_cache=None, key_scale=1.0, value_scale=1.0
) -> None:
    bits = bits_of(codes, key.shape[2])
    tokens, (_, heads, size) = slot_mapping.shape[0], key.shape
    if tokens == 0:
        return
    _encode_kernel[(triton.cdiv(tokens, BLOCK), heads)](
        key, slot_mapping, rotation, centre, codes, scales, value, kv_cache, tokens, codes.shape[2], size**-0.5,
        STEPS[bits], key_scale, value_scale, *key.stride()[:2], *codes.stride()[:3], *scales.stride()[:2],
        *((0,) * 5 if value is None else (*value.stride()[:2], *kv_cache.stride()[:3])),
        D=size, BITS=bits, C=codes.shape[3], BLOCK=BLOCK,
        FP8=kv_cache is not None and kv_cache.dtype == FP8, num_warps=4,
    )  # fmt: skip
