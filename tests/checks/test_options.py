"""Options at start-up: without the backend, without effect, or wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from specattn_vllm.checks import UnsupportedError
from specattn_vllm.options import OptionsError


@pytest.mark.parametrize(("backend", "shown"), [(None, "left to vLLM"), ("TRITON_ATTN", "TRITON_ATTN")])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}])
def test_options_without_the_backend_are_refused(configure, backend, shown, options):
    with pytest.raises(OptionsError) as caught:
        configure(backend=backend, options=options)
    message = str(caught.value)
    assert f"additional_config['specattn'] is set, but the attention backend is {shown}" in message
    assert "add --attention-backend specattn, or remove them" in message


@pytest.mark.parametrize("options", [None, {"top_p": 0.5}])
def test_the_backend_for_some_kinds_of_layers_is_refused(configure, options):
    refused = r"backend_per_kind .*use --attention-backend specattn, and name another backend for sliding_window alone"
    with pytest.raises(UnsupportedError, match=refused):
        configure(backend=None, options=options, attention_config={"backend_per_kind": {"full_attention": "specattn"}})
    with pytest.raises(UnsupportedError, match=refused):
        configure(
            backend=None,
            options=options,
            attention_config={"backend": "specattn", "backend_per_kind": {"full_attention": "TRITON_ATTN"}},
        )


def test_layers_with_a_window_are_vllm_s_own_or_those_of_the_backend_that_is_named_for_them(configure):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert configure().attention_config.backend_per_kind == {}
    given = {"backend": "specattn", "backend_per_kind": {"sliding_window": "TRITON_ATTN"}}
    made = configure(backend=None, options={}, attention_config=given).attention_config.backend_per_kind
    assert made == {"sliding_window": AttentionBackendEnum.TRITON_ATTN}
    # What a drafter's configuration is made anew of has no name in it that vLLM does not know.
    assert replace(configure().attention_config, use_non_causal=True).backend_per_kind == {}


@pytest.mark.parametrize(("windowed", "path"), [(False, "SpecAttnBackend"), (True, "CPUAttentionBackend")])
def test_who_attends_in_a_window(configure, windowed, path):
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    if torch.cuda.is_available():
        pytest.skip("vLLM's own choice is another on a GPU")
    with set_current_vllm_config(configure()):
        found = get_attn_backend(64, torch.float32, "auto", num_heads=2, has_sliding_window=windowed)
    assert found.__name__ == path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dense", "layer_map": "uniform"}, "layer_map = 'uniform': method 'dense' has no such option"),
        ({"method": "dense", "top_p": 0.5}, "top_p without sparse_draft, where everything is read"),
    ],
)
def test_options_without_effect_are_refused(configure, options, message):
    """Nobody should believe that they did something."""
    with pytest.raises(OptionsError, match=message):
        configure(options=options)


def test_bad_options_are_refused_before_anything_else(configure):
    with pytest.raises(OptionsError, match="top_q: unknown option"):
        configure(options={"top_q": 1}, draft=None)
