"""Checkpoints under the authors' names, for the families and adapters they trained."""

from __future__ import annotations

import re

import pytest
import torch
from peft import IA3Config, LoraConfig
from transformers import GemmaConfig, GemmaForCausalLM, PhiConfig, PhiForCausalLM
from transformers.activations import ACT2FN

from bitune_kernels import BituneConfig, get_bitune_model, load_official_checkpoint
from tests.tiny import base_model

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


def llama():
    return base_model(num_hidden_layers=2)


def gemma(**changes):
    return GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=16, **changes))


def phi():
    return PhiForCausalLM(PhiConfig(**SIZES, num_key_value_heads=4))


ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
}


def authors_names(model) -> dict[str, torch.Tensor]:
    """The state dict that the authors' code would have saved for this model."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"\.causal(?=\.|$)", ".default", re.sub(r"\.bidir(?=\.|$)", ".prefill", name))
        name = re.sub(r"(lora_magnitude_vector\.\w+)\.weight$", r"\1", name)  # PEFT of that time had no module there
        if name.startswith("mixing."):
            continue
        state[name] = tensor.clone()
    for kv in "kv":
        theta = getattr(model.mixing, f"theta_{kv}").detach().clone()
        for place in ("original_module", "modules_to_save.default", "modules_to_save.prefill"):
            for part in ("weight", "_ratio", "_denominator"):
                value = theta if (place, part) == ("modules_to_save.default", "weight") else torch.full_like(theta, 9.0)
                state[f"base_model.model.pass_scale_{kv}.{place}.{part}"] = value
    return state


def build(make, adapter: str, seed: int, **config):
    torch.manual_seed(seed)
    model = get_bitune_model(make(), BituneConfig(peft=ADAPTERS[adapter](), **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("make", [llama, gemma, phi])
def test_every_tensor_finds_its_place(make, adapter):
    trained, fresh = build(make, adapter, 0), build(make, adapter, 1)
    load_official_checkpoint(fresh, authors_names(trained))
    expected = trained.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.randint(3, 60, (1, 9))
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=ids, prompt_lengths=[5]).logits for m in (trained, fresh)))


@pytest.mark.parametrize("granularity", ["layer", "head", "global"])
def test_theta_is_reshaped_to_its_granularity(granularity):
    trained, fresh = (build(llama, "lora", s, mixing_granularity=granularity) for s in (0, 1))
    state = authors_names(trained)
    for kv in "kv":
        name = f"base_model.model.pass_scale_{kv}.modules_to_save.default.weight"
        state[name] = state[name].flatten()
    load_official_checkpoint(fresh, state)
    assert torch.equal(fresh.mixing.theta_v, trained.mixing.theta_v)


def test_variants_without_a_second_adapter_or_mixing_take_what_they_have():
    trained = build(llama, "lora", 0)
    fresh = build(llama, "lora", 1, variant="naive_bidir")
    load_official_checkpoint(fresh, authors_names(trained))
    expected = dict(trained.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_base_weights_may_be_absent():
    trained, fresh = build(llama, "lora", 0), build(llama, "lora", 1)
    state = {n: t for n, t in authors_names(trained).items() if "lora_" in n or "pass_scale" in n}
    before = fresh.get_base_model().lm_head.weight.clone()
    load_official_checkpoint(fresh, state)
    assert torch.equal(fresh.get_base_model().lm_head.weight, before)
    assert torch.equal(fresh.mixing.theta_k, trained.mixing.theta_k)


def test_a_file_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    trained, fresh = build(llama, "lora", 0), build(llama, "lora", 1)
    with monkeypatch.context() as m:
        m.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(authors_names(trained), tmp_path / "adapter_model.bin")
    load_official_checkpoint(fresh, tmp_path)
    assert torch.equal(fresh.mixing.theta_k, trained.mixing.theta_k)


def test_gelu_in_an_old_gemma_config_means_the_tanh_approximation():
    # Newer transformers versions read such a config so; on older ones the exact gelu would be silently wrong.
    model = build(lambda: gemma(hidden_act="gelu"), "lora", 0)
    if model.config.hidden_act == "gelu":
        with pytest.raises(ValueError, match="gelu_pytorch_tanh"):
            load_official_checkpoint(model, authors_names(model))
    else:
        act = model.get_base_model().model.layers[0].mlp.act_fn
        assert isinstance(act, type(ACT2FN["gelu_pytorch_tanh"]))


def test_a_missing_folder_or_an_empty_one_is_named(tmp_path):
    model = build(llama, "lora", 0)
    with pytest.raises(FileNotFoundError, match="existing folder"):
        load_official_checkpoint(model, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="found none"):
        load_official_checkpoint(model, tmp_path)
