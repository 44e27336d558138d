"""What is searched before anything is chosen, in bytes: against sizes written out, and against what is laid out."""

from __future__ import annotations

import pytest

from specattn_vllm.evaluation.scan import byte_fraction
from specattn_vllm.evaluation.schema import Setting
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.stats import Counts


def baseline(**options) -> Setting:
    return Setting(name="x", options={"method": "dense"}, baseline=options)


@pytest.mark.parametrize(
    ("setting", "size", "searched", "entries"),
    [
        # Bytes of a head's entries, K and V, and of what is read to choose among them: of 16 tokens, two keys.
        (baseline(name="quest", ratio=0.1), 128, 2 * 128 * 2, 16 * 2 * 128 * 2),
        (baseline(name="quest", ratio=0.1, page_size=8), 64, 2 * 64 * 2, 8 * 2 * 64 * 2),
        (baseline(name="mean_std", ratio=0.1), 64, 2 * 64 * 2, 16 * 2 * 64 * 2),
        (baseline(name="channels", ratio=0.1), 64, 16 * 2, 2 * 64 * 2),
        (baseline(name="channels", ratio=0.1, channels=8), 128, 8 * 2, 2 * 128 * 2),
        (baseline(name="oracle", ratio=0.1), 64, 0, 1),
        (Setting(name="x", options={"method": "sketch"}), 128, 128 * 2 / 8 + 2, 2 * 128 * 2),
        (Setting(name="x", options={"method": "sketch", "sketch_bits": 1}), 64, 64 / 8 + 2, 2 * 64 * 2),
        (Setting(name="x", options={"method": "specattn"}), 64, 0, 1),
        # Of an fp8 cache: channels in 16 bits beside keys in 8, pages' vectors as exact as keys.
        (baseline(name="channels", ratio=0.1).model_copy(update={"fp8_cache": True}), 64, 16 * 2, 2 * 64),
        (baseline(name="quest", ratio=0.1).model_copy(update={"fp8_cache": True}), 64, 2 * 64, 16 * 2 * 64),
        (Setting(name="x", options={"method": "sketch"}, fp8_cache=True), 128, 128 * 2 / 8 + 2, 2 * 128),
    ],
)
def test_what_is_searched_for_each_byte_of_the_cache(setting, size, searched, entries):
    assert setting.scan_share(size) == pytest.approx(searched / entries)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("size", [64, 128])
def test_a_sketch_is_as_large_as_it_lies_in_the_cache(bits, size):
    layout = SketchLayout(heads=3, block_size=16, head_size=size, bits=bits, element_size=2)
    setting = Setting(name="x", options={"method": "sketch", "sketch_bits": bits})
    assert setting.scan_share(size) == layout.token_bytes / layout.kv_bytes


def test_bytes_are_those_of_what_is_kept_and_of_what_is_searched():
    counts = Counts(kv_read=100, kv_full=1000, kv_scanned=800)
    assert byte_fraction(counts, 1 / 16) == pytest.approx(0.15)
    # What is read of the same copy before the search, for a sample of the tokens.
    sampled = Counts(kv_read=100, kv_full=1000, kv_scanned=800, kv_sampled=160)
    assert byte_fraction(sampled, 1 / 16) == pytest.approx(0.16)
    assert byte_fraction(Counts(kv_read=100, kv_full=1000), 0.0) == 0.1
    assert byte_fraction(Counts(), 0.0) == 1.0, "where nothing was pruned, all was read"
