"""Finds the threshold of a top-p selection, which separates the selected free tokens of a row from the others.

A row's free tokens are taken by q descending. ``threshold`` is the largest t for which the tokens with q >= t are
*enough*. ``skip`` is how many of the tokens with q == t must be left out again. Tokens are enough if

    count >= upper   or   count >= lower and weight >= need

where weight is the sum of their q. The result is the shortest prefix of weight ``need``, clamped to [lower, upper]. One
search finds it, because the weight of a prefix grows with its length. WEIGHED and COUNTED say which of the two sums are
computed: without WEIGHED only ``upper`` matters, without COUNTED only ``need``.

The search first finds the number of bits of the threshold, then its bits: 5 + 13 steps for a threshold near 2^14, while
trying all bits of an int32 takes 31. It stops after 24 bits: the threshold is the q of some token, which comes from a
float32 and has at most 24 significant bits. All sums are int32, so the order of summation does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE_TAKEN = tl.constexpr(0x7FFFFFFF)  # a threshold above every q


@triton.jit
def quanta(mass, p, length, head, tail, VECTOR: tl.constexpr):
    """Fixed-point mass at positions p: of all tokens (0 past the row), and of free tokens (-1 elsewhere), which are
    head <= p < tail. The mask is rounded up to VECTOR tokens, because a finer mask would split the 16-byte loads."""
    rounded = (length + VECTOR - 1) // VECTOR * VECTOR
    m = tl.load(mass + p, mask=p < rounded, other=0.0)
    # A NaN is not greater than 0 either. What it would be as an integer is undefined.
    q = (tl.where(m > 0.0, tl.minimum(m, 1.0), 0.0) * 1073741824.0).to(tl.int32)
    # One unsigned comparison for both ends.
    free = (p - head).to(tl.uint32, bitcast=True) < (tail - head).to(tl.uint32, bitcast=True)
    return tl.where(p < length, q, 0), tl.where(free, q, -1)


@triton.jit
def _enough(weight, count, need, lower, upper, WEIGHED: tl.constexpr, COUNTED: tl.constexpr):
    if WEIGHED and COUNTED:
        result = (count >= upper) | ((count >= lower) & (weight >= need))
    elif WEIGHED:
        result = weight >= need
    else:
        result = count >= upper
    return result.to(tl.int32)


@triton.jit
def _skip(t, weight, above, equal, need, lower, upper, WEIGHED: tl.constexpr, COUNTED: tl.constexpr):
    """How many tokens at threshold t are too many; (weight, above): sum of q and number of the tokens with q > t."""
    taken = upper
    if WEIGHED:
        # At t = 0 the weight is already reached, and tokens of weight 0 only add to the count.
        missing = tl.maximum(need - weight, 0)
        taken = above + tl.where(missing > 0, (missing - 1) // tl.maximum(t, 1) + 1, 0)
        if COUNTED:
            taken = tl.minimum(tl.maximum(taken, lower), upper)
    return above + equal - taken


@triton.jit
def _power(bits):
    """The smallest number with this many bits; for more than 31 bits, a number that no q reaches."""
    return tl.where(bits > 31, NONE_TAKEN, 1 << tl.minimum(tl.maximum(bits - 1, 0), 30))


@triton.jit
def _first(bits):
    """The smallest threshold with this many bits; 0 for 0 bits."""
    return tl.where(bits > 0, _power(bits), 0)


@triton.constexpr_function
def _add_four(weigh):
    """PTX: the sum of four q, or their number, of those that are at least the candidate, by predicated adds."""
    value = [f"${4 + i}" if weigh else "1" for i in range(4)]
    adds = "".join(f"@p{i} add.s32 $0, $0, {value[i]};\n" for i in range(1, 4))
    compares = "".join(f"setp.ge.s32 p{i}, ${4 + i}, ${8 + i};\n" for i in range(4))
    zeros = "".join(f"mov.s32 ${i}, 0;\n" for i in range(1, 4))
    return f"{{\n.reg .pred p0, p1, p2, p3;\n{compares}selp.s32 $0, {value[0]}, 0, p0;\n{adds}{zeros}}}"


@triton.jit
def _sum_from(q, candidate, WEIGH: tl.constexpr, FUSED: tl.constexpr):
    """Sum (or without WEIGH, number) of all q [SIZE] that are at least the candidate. FUSED uses predicated adds, four
    tokens at a time, while the compiler would select and then add: 44 instead of 74 operations of the integer pipe for
    32 tokens, and this pipe limits a step. Every thread must hold a multiple of four tokens."""
    if FUSED:
        parts = tl.inline_asm_elementwise(
            _add_four(WEIGH), "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [q, candidate], dtype=tl.int32, is_pure=True, pack=4
        )
    else:
        parts = tl.where(q >= candidate, q if WEIGH else 1, 0)
    return tl.sum(parts, 0)


@triton.jit
def _reaches(
    q, candidate, need, lower, upper, WEIGHED: tl.constexpr, COUNTED: tl.constexpr, FUSED: tl.constexpr
):  # fmt: skip
    weight = tl.full([], 0, tl.int32)
    count = tl.full([], 0, tl.int32)
    if WEIGHED:
        weight = _sum_from(q, candidate, True, FUSED)
    if COUNTED:
        count = _sum_from(q, candidate, False, FUSED)
    return _enough(weight, count, need, lower, upper, WEIGHED, COUNTED)


@triton.jit
def find_in_registers(
    q, need, lower, upper, WEIGHED: tl.constexpr, COUNTED: tl.constexpr, FUSED: tl.constexpr
):  # fmt: skip
    """(threshold, skip) of a row that is held in registers, q [SIZE] int32, -1 for tokens that are not free. Each step
    finds one bit, because its cost is its compares and adds."""
    bits = tl.full([], 0, tl.int32)
    for i in range(5):
        trial = bits + (16 >> i)
        bits += (16 >> i) * _reaches(q, _power(trial), need, lower, upper, WEIGHED, COUNTED, FUSED)
    t = _first(bits)
    for i in range(1, tl.minimum(bits, 24)):
        step = 1 << (bits - 1 - i)
        t += step * _reaches(q, t + step, need, lower, upper, WEIGHED, COUNTED, FUSED)
    weight = tl.full([], 0, tl.int32)
    if WEIGHED:
        weight = _sum_from(q, t + 1, True, FUSED)
    above = _sum_from(q, t + 1, False, FUSED)
    equal = _sum_from(q, t, False, FUSED) - above
    return t, _skip(t, weight, above, equal, need, lower, upper, WEIGHED, COUNTED)


@triton.jit
def _add_from(total, value, q, candidate, FUSED: tl.constexpr):
    """total + value where q is at least the candidate, element by element; FUSED uses a predicated add."""
    if FUSED:
        total = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.s32 p, $3, $4; mov.s32 $0, $1; @p add.s32 $0, $1, $2; }",
            "=&r,r,r,r,r", [total, value, q, candidate], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total += tl.where(q >= candidate, value, 0)
    return total


@triton.jit
def _reached_of_three(
    mass, length, head, tail, c1, c2, c3, need, lower, upper,
    WEIGHED: tl.constexpr, COUNTED: tl.constexpr, FUSED: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """How many of the ascending candidates c1, c2, c3 give enough tokens, in one pass over the row."""
    zero = tl.zeros([TILE], tl.int32)
    w1, w2, w3 = zero, zero, zero
    n1, n2, n3 = zero, zero, zero
    for start in tl.range(0, length, TILE, num_stages=STAGES):
        _, q = quanta(mass, start + tl.arange(0, TILE), length, head, tail, VECTOR)
        if WEIGHED:
            w1 = _add_from(w1, q, q, c1, FUSED)
            w2 = _add_from(w2, q, q, c2, FUSED)
            w3 = _add_from(w3, q, q, c3, FUSED)
        if COUNTED:
            n1 = _add_from(n1, 1, q, c1, FUSED)
            n2 = _add_from(n2, 1, q, c2, FUSED)
            n3 = _add_from(n3, 1, q, c3, FUSED)
    reached = _enough(tl.sum(w1, 0), tl.sum(n1, 0), need, lower, upper, WEIGHED, COUNTED)
    reached += _enough(tl.sum(w2, 0), tl.sum(n2, 0), need, lower, upper, WEIGHED, COUNTED)
    return reached + _enough(tl.sum(w3, 0), tl.sum(n3, 0), need, lower, upper, WEIGHED, COUNTED)


@triton.jit
def find_in_memory(
    mass, length, head, tail, need, lower, upper,
    WEIGHED: tl.constexpr, COUNTED: tl.constexpr, FUSED: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(threshold, skip) of a row that is too long for registers. Each pass finds two bits, because its main cost is
    reading the row from L2. The last pass of each loop may try candidates that must fail, which is harmless."""
    bits = tl.full([], 0, tl.int32)
    for i in range(3):
        step = tl.maximum(8 >> (2 * i), 1)
        bits += step * _reached_of_three(
            mass, length, head, tail, _power(bits + step), _power(bits + 2 * step), _power(bits + 3 * step),
            need, lower, upper, WEIGHED, COUNTED, FUSED, VECTOR, TILE, STAGES,
        )  # fmt: skip
    t = _first(bits)
    for i in range(0, tl.minimum(bits // 2, 12)):
        step = 1 << tl.maximum(bits - 3 - 2 * i, 0)
        t += step * _reached_of_three(
            mass, length, head, tail, t + step, t + 2 * step, t + 3 * step,
            need, lower, upper, WEIGHED, COUNTED, FUSED, VECTOR, TILE, STAGES,
        )  # fmt: skip
    weight = tl.zeros([TILE], tl.int32)
    above = tl.zeros([TILE], tl.int32)
    least = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, length, TILE, num_stages=STAGES):
        _, q = quanta(mass, start + tl.arange(0, TILE), length, head, tail, VECTOR)
        if WEIGHED:
            weight = _add_from(weight, q, q, t + 1, FUSED)
        above = _add_from(above, 1, q, t + 1, FUSED)
        least = _add_from(least, 1, q, t, FUSED)
    weight, above, least = tl.sum(weight, 0), tl.sum(above, 0), tl.sum(least, 0)
    return t, _skip(t, weight, above, least - above, need, lower, upper, WEIGHED, COUNTED)
