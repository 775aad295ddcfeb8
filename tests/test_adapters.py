"""PEFT's layers in a pass: the same outputs and gradients as each one run by itself on each block of rows."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitune_kernels.modeling import adapters
from bitune_kernels.modeling.adapters import BIDIR, CAUSAL, adapter_configs, route_rows
from bitune_kernels.testing import assert_within_budget
from tests.tiny import base_model, bitune_model, lora, ragged_batch

ROWS, N, IN, OUT = 53, 20, 64, 96


def config(**changes) -> LoraConfig:
    return LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["layer"]) | changes)


CONFIGS = {
    "lora": config(),
    "rslora": config(use_rslora=True),
    "bias": config(lora_bias=True),
    "dropout": config(lora_dropout=0.3),
    "dora": config(use_dora=True),
    "dora with dropout": config(use_dora=True, lora_dropout=0.3),
    "ia3": IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "ia3 of the input": IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def linear(dtype) -> nn.Module:
    return nn.Linear(IN, OUT).to(dtype)


def conv1d(dtype) -> nn.Module:
    return Conv1D(OUT, IN).to(dtype)


def adapted(base, peft_config, dtype, adapter_dtype) -> nn.Module:
    """A layer with two adapters whose numbers aren't their initial ones."""
    torch.manual_seed(0)
    layer = base(dtype)
    model = Model(layer).requires_grad_(False)
    causal, bidir = adapter_configs(peft_config, model)
    peft_model = get_peft_model(model, causal, adapter_name=CAUSAL, autocast_adapter_dtype=False)
    peft_model.add_adapter(BIDIR, bidir, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, p in sorted(peft_model.named_parameters()):
        if BIDIR in name or CAUSAL in name:
            around = p.detach() if "magnitude" in name else 1.0 if "ia3" in name else 0.0
            p.data = (around + 0.2 * torch.randn(p.shape, generator=generator)).to(adapter_dtype)
            p.requires_grad_(True)
    return peft_model.train()


def one_by_one(model, x):
    """PEFT's own forward per block, before anything was changed."""
    blocks = []
    for name, rows in ((BIDIR, x[:N]), (CAUSAL, x[N:])):
        with adapters._using(model.base_model.model.layer, name):
            blocks.append(model(rows))
    return torch.cat(blocks)


def in_a_pass(model, x, monkeypatch):
    current = SimpleNamespace(packed=True, repeats=lambda module: False, split=lambda x: (0, N))
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "current", lambda: current)
        return model(x)


def outputs(forward, model, x, dy):
    torch.manual_seed(2)  # of dropout
    leaf = x.detach().clone().requires_grad_()
    y = forward(model, leaf)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, [leaf, *parameters.values()], dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(["x", *parameters], gradients, strict=True))


def data(dtype):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(ROWS, width, generator=generator, dtype=torch.float64).to(dtype) for width in (IN, OUT)]


def count_products(layers, monkeypatch) -> list:
    """Grows with every call of a base layer. Not by hooks, for which one would be called that isn't without them."""
    calls, layers = [], set(layers)
    for kind in {type(layer) for layer in layers}:

        def forward(self, x, plain=kind.forward):
            calls.extend([1] if self in layers else [])
            return plain(self, x)

        monkeypatch.setattr(kind, "forward", forward)
    return calls


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2], ids=" ".join)
@pytest.mark.parametrize("base", [linear, conv1d], ids=lambda b: b.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tuner_equals_its_layer_on_each_block(name, base, dtypes, monkeypatch):
    dtype, adapter_dtype = (getattr(torch, d) for d in dtypes)  # PEFT's default is float32 beside bfloat16
    x, dy = data(dtype)
    peft_config = CONFIGS[name]
    model = adapted(base, peft_config, dtype, adapter_dtype)
    wide = adapted(base, peft_config, dtype, adapter_dtype).double()
    expected, low = outputs(one_by_one, wide, x.double(), dy), outputs(one_by_one, model, x, dy)
    route_rows(model, ())
    calls = count_products([model.base_model.model.layer.base_layer], monkeypatch)
    found = outputs(lambda m, x: in_a_pass(m, x, monkeypatch), model, x, dy)
    # DoRA's dropout stands in front of its base product too, and PEFT's formula for Conv1D runs per block
    assert len(calls) <= (2 if "dora" in name and (base is conv1d or "dropout" in name) else 1)
    assert found.keys() == expected.keys() and any(BIDIR in n for n in found)
    for output, value in found.items():
        assert value.dtype == low[output].dtype
        assert_within_budget(output, value, expected[output], low[output], dtype, f"{name} {base.__name__}")


def test_dropout_that_is_switched_off_alone_is_off():
    model, (ids, mask, labels) = bitune_model(peft=lora(lora_dropout=0.3)), ragged_batch()
    expected = model.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, labels=labels).loss, expected)


class Doubling(nn.Module):
    """Around a module that it passes for, as FSDP1 is."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x):
        return 2 * self.inner(x)


PARTS = [
    *itertools.product(["lora", "dora"], ["", "base_layer", "lora_A.bidir", "lora_B.causal", "lora_dropout.causal"]),
    *[("vera", ""), ("vera", "base_layer"), ("whole modules", "")],
]


@pytest.mark.parametrize(
    ("way", "tuner", "part"),
    [
        (way, *place)
        for way, place in itertools.product(["hook", "pre-hook", "forward", "wrapper"], PARTS)
        if way != "wrapper" or place[1]  # a layer in a wrapper is called by it, as any other
    ],
)
def test_what_hangs_on_a_layer_or_its_parts_is_run(way, tuner, part):
    vera = VeraConfig(r=8, target_modules=["up_proj", "down_proj"])
    peft = {"lora": lora(), "dora": lora(use_dora=True), "vera": vera, "whole modules": None}[tuner]
    model = bitune_model(peft=peft)
    module = model.get_base_model().model.layers[1].mlp.up_proj.get_submodule(part)
    if way == "hook":
        module.register_forward_hook(lambda module, args, output: 2 * output)
    elif way == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: 2 * args[0])
    elif way == "wrapper":
        model.get_base_model().model.layers[1].mlp.up_proj.set_submodule(part, Doubling(module))
    else:
        module.forward = lambda x, plain=module.forward: 2 * plain(x)
    found, expected = step(model), step(model, use_fused=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def quantized(kind: str, folder) -> nn.Module:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

    if kind == "torchao int8":
        pytest.importorskip("torchao")  # not installed for the tests: it makes transformers talk at every import
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "bitsandbytes nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    base_model(hidden_size=64, dtype=torch.bfloat16).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)


def dequantized(model: nn.Module) -> nn.Module:
    plain = base_model(hidden_size=64, dtype=torch.float64)
    state = {n: p.double() for n, p in model.state_dict().items() if n in plain.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state[f"{name}.weight"] = dequantize_module_weight(module).detach().double()
    plain.load_state_dict(state)
    return plain


def step(model, seed=0, **schedule):
    model.train()
    torch.manual_seed(0)
    ids, mask, labels = ragged_batch(seed=seed)
    with model.use_schedule(**schedule):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
    result = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


SEEDS = 8


def steps(model, **schedule):
    """Loss and gradients of as many batches, stacked."""
    results = [step(model, seed, **schedule) for seed in range(SEEDS)]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize(
    "kind, tuner",
    [
        ("bitsandbytes nf4", "lora"),
        ("bitsandbytes nf4", "dora"),
        ("bitsandbytes int8", "lora"),  # PEFT 0.21 itself can't train a second DoRA adapter over this layer
        ("torchao int8", "lora"),
        ("torchao int8", "dora"),
    ],
)
def test_a_quantized_base_equals_itself_dequantized(kind, tuner, tmp_path, monkeypatch):
    """Within twice the noise of the quantized products in three passes through PEFT's own layers.

    The largest of eight batches: of one alone it may be small by chance.
    """
    peft_config = lora(target_modules=["k_proj", "v_proj", "o_proj", "down_proj"], use_dora=tuner == "dora")
    truth = bitune_model(base=dequantized(quantized(kind, tmp_path)), peft=peft_config)
    model = bitune_model(base=quantized(kind, tmp_path), peft=peft_config)
    expected = steps(truth, backend="reference")
    low = steps(model, use_fused=False)
    calls = count_products([m.base_layer for m in model.modules() if hasattr(m, "base_layer")], monkeypatch)
    found = steps(model)
    assert len(calls) == 12 * SEEDS if tuner == "lora" else 12 * SEEDS <= len(calls) <= 24 * SEEDS
    assert found.keys() == expected.keys()
    noise = max(float((low[name] - e).norm() / e.norm()) for name, e in expected.items())
    assert noise < 0.2  # a yardstick without its gradients would allow anything
    for name, value in found.items():
        # a theta's gradient is one sum, whose error three passes may have small by chance
        slack = noise * float(expected[name].abs().max()) if name.startswith("mixing.") else 0.0
        assert_within_budget(name, value, expected[name], low[name], torch.bfloat16, f"{kind} {tuner}", slack)


def test_gradients_pass_through_4_bits_after_an_evaluation(tmp_path):
    results = []
    for packs in (False, True):  # True: a CPU where bitsandbytes packs weights for inference
        base = quantized("bitsandbytes nf4", tmp_path)
        layers = [m for m in base.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
        for layer in layers:
            layer.support_avx512bf16_for_cpu = packs
        model = bitune_model(base=base)
        with torch.no_grad():
            model.eval()(torch.arange(8)[None])
        results.append(step(model))
    expected, found = results
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    layers[-1].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"base_model: expected 4-bit weights as they were loaded, got .*down_proj"):
        bitune_model(base=model.unload())


def test_packed_weights_without_their_library_are_refused():
    base = base_model()
    packed = nn.Parameter(base.model.layers[1].mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    base.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(ValueError, match=r"base_model: .* got a plain nn.Linear of torch.int8 at .*1\.mlp\.up"):
        bitune_model(base=base)
