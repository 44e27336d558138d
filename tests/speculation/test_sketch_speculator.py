"""What the draft's search is told of a round's first step. No model is run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from specattn_vllm.speculation import sketch_speculator
from specattn_vllm.speculation.sketch_speculator import SketchSpeculator


def test_the_newest_token_has_a_say_and_rejected_drafts_have_none(monkeypatch):
    """Three rows of 4, 1 and 3 tokens. Of the first two drafts were rejected, of the last none."""
    starts, last = [0, 4, 5, 8], [1, 4, 7]
    layers = {"layer": SimpleNamespace(query_start_loc=torch.tensor(starts, dtype=torch.int32), choice=None)}
    monkeypatch.setattr(
        sketch_speculator.RoundSpeculator, "_build_attn_metadata", lambda *args, **kwargs: layers, raising=False
    )
    told = []

    def begin(metadata, query_start_loc, valid_lens):
        told.append((query_start_loc.tolist(), valid_lens.tolist()))
        return "chosen"

    speculator = SketchSpeculator.__new__(SketchSpeculator)
    speculator._recording = True
    speculator.selection = SimpleNamespace(begin=begin)
    speculator.last_token_indices = torch.tensor([*last, 99])
    speculator._build_attn_metadata(3, step=0, query_start_loc_np=np.array(starts, dtype=np.int32))
    assert told == [(starts, [2, 1, 3])]
    assert layers["layer"].choice == "chosen"
    assert speculator._query_lens.tolist() == [4, 1, 3]
