"""The authors' published code, reproduced number by number (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from bitune_kernels import BituneConfig, get_bitune_model, load_official_checkpoint
from bitune_kernels.backends import BACKENDS, resolve

GOLDEN = Path(__file__).parent / "golden" / "llama_607"
SETTINGS = json.loads(GOLDEN.with_suffix(".json").read_text())
TENSORS = load_file(GOLDEN.with_suffix(".safetensors"))
SAMPLES = range(len(SETTINGS["samples"]))


def runnable() -> list[str]:
    names = []
    for name in BACKENDS:
        try:
            resolve(name, device=torch.device("cpu"), dtype=torch.float32, head_dim=16, requires_grad=True)
            names.append(name)
        except ValueError:
            pass
    return names


SCHEDULES = [f"one_pass-{name}" for name in runnable()] + ["three_pass-eager", "three_pass-sdpa"]


def golden_model(schedule: str):
    kind, name = schedule.split("-")
    base = LlamaForCausalLM._from_config(
        LlamaConfig(**SETTINGS["model_config"], attn_implementation=name if kind == "three_pass" else "sdpa")
    )
    adapter = SETTINGS["adapter"]
    peft = LoraConfig(r=adapter["r"], lora_alpha=adapter["alpha"], target_modules=adapter["targets"])
    config = BituneConfig(peft=peft, use_fused=kind == "one_pass", backend=name if kind == "one_pass" else "auto")
    model = get_bitune_model(base, config)
    load_official_checkpoint(model, {k[8:]: t for k, t in TENSORS.items() if k.startswith("weights/")})
    return model


@pytest.fixture(scope="module", params=SCHEDULES)
def model(request):
    return golden_model(request.param)


def sample(i: int) -> dict[str, torch.Tensor]:
    return {k.split("/", 1)[1]: t for k, t in TENSORS.items() if k.startswith(f"sample{i}/")}


@pytest.mark.parametrize("i", SAMPLES)
def test_loss_logits_and_gradients(model, i):
    expected = sample(i)
    model.train()
    model.zero_grad()
    out = model(input_ids=expected["input_ids"], labels=expected["labels"])
    out.loss.backward()
    first = int(expected["prompt_length"]) - 1
    torch.testing.assert_close(out.loss.reshape(1), expected["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logits[:, first:], expected["logits"], atol=5e-5, rtol=0)

    parameters = dict(model.named_parameters())
    compared = 0
    for name, gradient in expected.items():
        if not name.startswith("grad/"):
            continue
        ours = name[5:].replace(".default.", ".causal.").replace(".prefill.", ".bidir.")
        if "pass_scale" in ours:
            found = getattr(model.mixing, "theta_k" if "pass_scale_k" in ours else "theta_v").grad
        else:
            found = parameters[ours].grad
        found = torch.zeros_like(gradient) if found is None else found
        # the floor is for gradients that are zero in exact arithmetic (a softmax over one key)
        assert (found - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
        compared += 1
    assert compared == sum(k.startswith("grad/") for k in expected) > 80


@pytest.mark.parametrize("i", SAMPLES)
def test_mixed_cache(model, i):
    expected = sample(i)
    n = int(expected["prompt_length"]) - 1
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=expected["input_ids"][:, : n + 1], use_cache=True).past_key_values
    for layer in range(SETTINGS["model_config"]["num_hidden_layers"]):
        for ours, theirs in ((cache.layers[layer].keys, "mixed_k"), (cache.layers[layer].values, "mixed_v")):
            torch.testing.assert_close(ours[:, :, :n], expected[f"{theirs}/{layer}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("i", SAMPLES)
def test_greedy_tokens_and_their_logits(model, i):
    expected = sample(i)
    prompt = expected["input_ids"][:, : int(expected["prompt_length"])]
    model.eval()
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[0, prompt.shape[1] :].tolist() == expected["generate/tokens"].tolist()
    torch.testing.assert_close(torch.cat(out.logits), expected["generate/logits"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("base_model.model.pass_scale_k.modules_to_save.default.weight"), "missing.*theta_k"),
        (lambda w: w.update({"base_model.model.model.layers.7.mlp.down_proj.weight": torch.ones(1)}), "unexpected"),
        (lambda w: w.update({THETA_V: torch.full((3,), float("nan"))}), "pass_scale_v.*finite"),
        (lambda w: w.update({THETA_V: torch.ones(4)}), "pass_scale_v.*expected 3 values"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(change, match):
    model = golden_model("one_pass-sdpa")
    before = {n: p.clone() for n, p in model.named_parameters()}
    weights = {k[8:]: t * 2 for k, t in TENSORS.items() if k.startswith("weights/")}
    change(weights)
    with pytest.raises(ValueError, match=match):
        load_official_checkpoint(model, weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


THETA_V = "base_model.model.pass_scale_v.modules_to_save.default.weight"


def test_a_folder_of_the_authors_code_is_read(tmp_path):
    from safetensors.torch import save_file

    # PEFT saves adapters without their names, the second one in a folder of its own.
    for adapter, folder in (("default", tmp_path), ("prefill", tmp_path / "prefill")):
        folder.mkdir(exist_ok=True)
        state = {
            k[8:].replace(f".{adapter}.weight", ".weight"): t
            for k, t in TENSORS.items()
            if k.startswith("weights/") and "lora_" in k and f".{adapter}." in k
        }
        for kv in "kv":
            state[f"base_model.model.pass_scale_{kv}.weight"] = TENSORS[
                f"weights/base_model.model.pass_scale_{kv}.modules_to_save.{adapter}.weight"
            ]
        save_file(state, folder / "adapter_model.safetensors")
    complete, from_folder = golden_model("one_pass-sdpa"), golden_model("one_pass-sdpa")
    with torch.no_grad():
        for name, parameter in from_folder.named_parameters():
            if "lora_" in name or "theta" in name:
                parameter.zero_()
    load_official_checkpoint(from_folder, tmp_path)
    for (name, a), b in zip(complete.named_parameters(), from_folder.parameters(), strict=True):
        assert torch.equal(a, b), name
