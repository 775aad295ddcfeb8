"""Switching a Bitune model's schedule, backend and second stream for the length of a with block."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from tests import tiny
from tests.families import BY_ID


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, logits_to_keep=1).logits


def test_every_schedule_and_backend_computes_the_same():
    model = tiny.bitune_model().eval()
    ids = torch.arange(3, 14)[None]
    expected, before = logits(model, ids), model.bitune_config
    for changes in ({"use_fused": False}, {"backend": "reference"}, {"use_fused": True, "backend": "sdpa"}, {}):
        with model.use_schedule(**changes):
            assert all(getattr(model.bitune_config, name) == value for name, value in changes.items())
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
        assert model.bitune_config is before
    with pytest.raises(ValueError, match="backend: expected one of"), model.use_schedule(backend="abacus"):
        pass
    with pytest.raises(RuntimeError, match="inside"), model.use_schedule(use_fused=False):
        raise RuntimeError("inside")
    assert model.bitune_config is before


def test_three_passes_call_the_backbone_three_times():
    model = tiny.bitune_model().eval()
    calls = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    for fused, count in ((True, 1), (False, 3)):
        calls.clear()
        with model.use_schedule(use_fused=fused):
            logits(model, torch.arange(3, 9)[None])
        assert len(calls) == count


def test_three_passes_run_the_models_own_attention(monkeypatch):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **options: calls.append(1) or sdpa(*x, **options))
    for own, count in (("sdpa", 9), ("eager", 0)):
        base = tiny.base_model()
        base.set_attn_implementation(own)
        model = tiny.bitune_model(base=base, use_fused=False).eval()
        calls.clear()
        logits(model, torch.arange(3, 9)[None])
        assert len(calls) == count


def test_a_window_holds_without_prompt_rows_and_in_the_cache():
    model = tiny.bitune_model(base=BY_ID["mistral"].build(vocab_size=tiny.VOCAB)).eval()
    ids, mask, labels = tiny.ragged_batch(prompts=(1, 1), answers=(9, 6))
    losses = []
    for fused in (True, False):
        with torch.no_grad(), model.use_schedule(use_fused=fused):
            losses.append(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    torch.testing.assert_close(*losses)
    with torch.no_grad():
        cache = model(input_ids=ids[:1, :6]).past_key_values
    assert all(layer.is_sliding for layer in cache.layers)  # so that no more is kept than the window


def test_without_bitune_it_is_the_plain_peft_model():
    model = tiny.bitune_model().eval()
    plain = get_peft_model(tiny.base_model(), tiny.lora()).eval()
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(weights[name.replace(".default.", ".causal.")])
    ids = torch.arange(3, 14)[None]
    labels = ids.clone()
    labels[:, :4] = -100
    with model.disable_bitune():
        torch.testing.assert_close(logits(model, ids), logits(plain, ids))
        found, expected = (m(input_ids=ids, labels=labels).loss for m in (model, plain))
        torch.testing.assert_close(found, expected)
    assert (logits(model, ids) - logits(plain, ids)).abs().max() > 1e-2
