"""Attention matrices and distances of the two streams, against PEFT's model of each adapter with a mask as tensor."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel

from bitune_kernels.modeling import stream_attention, stream_distance
from tests.families import BY_ID
from tests.test_families import attach
from tests.tiny import VOCAB, base_model, bitune_model, lora

P = 11


def prompt(vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(3, vocab, (1, P), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def plain(folder, ids, causal: bool, seed: int = 0):
    """Matrices [layers, P - 1, P - 1], and keys and values per layer, of transformers' eager model with one adapter."""
    base = base_model(seed)
    base.set_attn_implementation("eager")
    model = PeftModel.from_pretrained(base, folder)
    n = ids.shape[1] - 1  # the last token opens the answer
    mask = torch.zeros(1, 1, n, n)
    if causal:
        mask = mask.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    out = model(input_ids=ids[:, :n], attention_mask=mask, output_attentions=True, use_cache=True)
    matrices = torch.stack([a[0].mean(0) for a in out.attentions])
    return matrices, [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]


def test_each_stream_against_a_plain_model_of_its_adapter(tmp_path):
    model = bitune_model(peft=lora(lora_dropout=0.5), use_fused=False).train()
    model.save_pretrained(tmp_path)
    ids = prompt()
    found, distance = stream_attention(model, ids), stream_distance(model, ids)
    assert model.training and not model.bitune_config.use_fused, "left as it was"
    bidir, bidir_kv = plain(tmp_path / "bidir", ids, causal=False)
    causal, causal_kv = plain(tmp_path / "causal", ids, causal=True)
    torch.testing.assert_close(found["bidir"], bidir, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["causal"], causal, atol=1e-5, rtol=1e-4)
    for i, name in enumerate("kv"):
        pairs = [(b[i], c[i]) for b, c in zip(bidir_kv, causal_kv, strict=True)]
        expected = torch.tensor([float((b - c).norm() / c.norm()) for b, c in pairs])
        assert bool((expected > 0.05).all()), "the streams differ"
        torch.testing.assert_close(distance[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_rows_sum_to_one_and_masks_hold(family):
    # a softcap, sinks and layers with a window, each shorter than the prompt
    model = attach(BY_ID[family], True)
    windows = model._hooks.structure.windows
    assert any(w is not None and w < P - 1 for w in windows) and None in windows
    found = stream_attention(model, prompt(60))
    sums = torch.stack([found[name].sum(-1) for name in ("bidir", "causal")])
    assert bool((sums < 0.999).all()) if family == "gpt_oss" else torch.allclose(sums, torch.ones_like(sums))
    column = torch.arange(P - 1)
    for layer, window in enumerate(windows):
        near = (column[:, None] - column).abs() < (window or P)
        assert torch.equal(found["bidir"][layer] > 0, near)
        assert torch.equal(found["causal"][layer] > 0, near.tril())


def test_rows_sum_to_one_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = stream_attention(bitune_model(), prompt())
    torch.testing.assert_close(found["bidir"].sum(-1), torch.ones(3, P - 1))


def test_variants_and_what_is_refused():
    model, ids = bitune_model(variant="naive_bidir"), prompt()
    assert list(stream_attention(model, ids)) == ["bidir"]
    with pytest.raises(ValueError, match="expected a variant that mixes keys and values, got 'naive_bidir'"):
        stream_distance(model, ids)
    shared = stream_attention(bitune_model(variant="anti_causal"), ids)
    assert torch.equal(shared["bidir"] > 0, torch.ones(3, P - 1, P - 1).triu() > 0)
    for wrong in (ids[:, :1], ids.repeat(2, 1)):
        with pytest.raises(ValueError, match=re.escape(f"at least two tokens, got {list(wrong.shape)}")):
            stream_attention(model, wrong)
    with pytest.raises(TypeError, match="input_ids: expected an integer tensor"):
        stream_attention(model, ids.tolist())
    with pytest.raises(TypeError, match="model: expected a BituneModel, got LlamaForCausalLM"):
        stream_attention(base_model(), ids)
    both = bitune_model()
    for look in (stream_attention, stream_distance):
        with both.disable_bitune(), pytest.raises(ValueError, match="model: expected its streams to be on"):
            look(both, ids)
