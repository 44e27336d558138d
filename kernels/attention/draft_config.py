"""Launch parameters of draft attention, and how they were tuned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Parameters to tune. They change results only by rounding."""

    block_n: int  # keys per step, a power of two
    num_warps: int
    num_stages: int  # steps whose keys and values are in flight, plus one
    waves: int  # programs wanted per multiprocessor, which sets the number of splits


# By (head size, tile rows), on an H200 with 16 requests of 32k. Marked *: the best of 24 to 72 configurations, bf16
# scores, 2026-11-22: (64, 16) 4 query heads per KV head, 1 query row: 0.280 ms (0.282 before); (64, 32) 7 query rows:
# 0.298 ms (0.348 before; most of the gain by `SMALL_DOT`); (128, 16) 2 query heads: 1 row 0.514 ms (0.522), 7 rows
# 0.519 ms (0.526). Marked +: the best of 8 to 11, fp32 scores, 8 query heads, 7 rows, 2026-11-26: 0.364 ms (no other
# was 1% faster) and 0.746 ms (0.757). With one query head per KV head, tiles have 16 rows, and no configuration was
# faster (docs/results/h200-draft-sweep.json). The others are not measured but reasoned: 48 to 64 KiB of keys and values
# in flight, two to four programs at once. (128, 32) also serves a verification of 6 rows with two scored ones (4 query
# heads per KV head): its second product costs 8 registers per thread and none spills (176 registers, compiled for
# sm_90), so two programs still fit.
CONFIGS = {
    (64, 16): LaunchConfig(128, 8, 3, 4),  # *
    (64, 32): LaunchConfig(64, 4, 3, 4),  # *
    (64, 64): LaunchConfig(64, 4, 3, 4),  # +
    (64, 128): LaunchConfig(64, 8, 4, 4),
    (128, 16): LaunchConfig(128, 8, 3, 2),  # *
    (128, 32): LaunchConfig(64, 4, 3, 4),
    (128, 64): LaunchConfig(32, 4, 4, 2),  # +
    (128, 128): LaunchConfig(32, 8, 4, 4),
}
# If a launch has at most this many programs before splitting, half as many parts are better: the best of 28 to 33 on an
# H200, 4 requests of 32k (1 of 128k), fp32 scores, 2026-11-26: (64, 16) 0.077 ms (0.081 before), (128, 16) 0.138
# (0.142). For 16 requests of 32k they are as good as those above (docs/results/h200-draft-sweep.json).
FEW_PROGRAMS = 128
FEW_CONFIGS = {
    (64, 16): LaunchConfig(128, 8, 3, 2),
    (128, 16): LaunchConfig(64, 4, 3, 2),
}
# fp32 is for tests: exact products do not run on tensor cores, and take their operands from registers.
FP32_CONFIG = LaunchConfig(32, 8, 2, 2)


def launch_config(head_size: int, block_m: int, programs: int = FEW_PROGRAMS + 1) -> LaunchConfig:
    """The tuned configuration for 16-bit inputs. programs: requests x KV heads x tiles of query rows."""
    few = FEW_CONFIGS.get((head_size, block_m)) if programs <= FEW_PROGRAMS else None
    return few or CONFIGS[head_size, block_m]
