"""Single-stream variants and dynamic mixing, against a Llama's forward that is written out here."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bitune_kernels import BituneConfig, BituneModel
from bitune_kernels.modeling import stream_attention, stream_distance
from bitune_kernels.modeling.probe import find_structure
from tests.families import BY_ID
from tests.tiny import base_model, bitune_model, lora, ragged_batch

CONFIGS = {
    "single": dict(variant="single_stream", beta_init=0.3),
    "single per head": dict(variant="single_stream", mixing_granularity="head"),
    "dual": dict(variant="single_stream_dual"),
    "dual per head": dict(variant="single_stream_dual", mixing_granularity="head", skip_bidir=1),
    "dual dynamic": dict(variant="single_stream_dual", dynamic_mixing=True, beta_init=0.9),
    "dynamic": dict(dynamic_mixing=True),
    "dynamic per head": dict(dynamic_mixing=True, mixing_granularity="head", theta_init=0.1),
}
each_config = pytest.mark.parametrize("config", CONFIGS)


def model_of(config: str, **options) -> BituneModel:
    model = bitune_model(base=base_model(dtype=torch.float64), **CONFIGS[config] | options)
    return model.double().eval()


def alphas_by_hand(model, layer: int, bidir, causal) -> list[torch.Tensor]:
    """alpha_k and alpha_v, from the thetas and the values of both streams [heads, n, dim]."""
    mixing, found = model.mixing, []
    index = 0 if mixing.granularity == "global" else layer
    for column, theta in enumerate((mixing.theta_k, mixing.theta_v)):
        odds = theta[index].abs() / mixing.theta_init
        if model.bitune_config.dynamic_mixing:
            state = torch.cat([x[1].transpose(0, 1).flatten(1).mean(0) for x in (bidir, causal)]).float()
            gate = (state / state.square().mean().sqrt()) @ mixing.gate[layer]
            odds = odds * gate.chunk(2)[column].squeeze().exp()
        found.append((odds / (1 + odds)).double())
    return [a[:, None, None] if a.ndim else a for a in found]


@torch.no_grad()
def by_hand(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the answer rows of one sample, ids [1, T]: rows P - 1 and later."""
    config, llama = model.bitune_config, model.get_base_model().model
    n, single = prompt - 1, "beta" in config.mixed
    position = llama.rotary_emb(llama.embed_tokens(ids), torch.arange(ids.shape[1])[None])

    def project(x, module, name):
        if name not in module.lora_A:
            name = "causal"
        update = module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()
        return x @ (module.base_layer.weight + module.scaling[name] * update).T

    def qkv(layer, x, first, name):
        """Of rows that begin at position ``first``: [heads, rows, dim] each."""
        a, rows = layer.self_attn, slice(first, first + x.shape[1])
        q, k, v = (project(x, m, name).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rotary_pos_emb(q, k, position[0][:, rows], position[1][:, rows])
        return q[0], k[0], v[0]

    def attend(q, k, v, see):
        return scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=True)

    def after(layer, x, out, name):
        """The rest of a layer behind the outputs of attention [heads, rows, dim]."""
        x = x + project(out.transpose(0, 1).flatten(1)[None], layer.self_attn.o_proj, name)
        y, mlp = layer.post_attention_layernorm(x), layer.mlp
        gate = mlp.act_fn(project(y, mlp.gate_proj, name))
        return x + project(gate * project(y, mlp.up_proj, name), mlp.down_proj, name)

    embedded = llama.embed_tokens(ids)
    first, second, answer = embedded[:, :n], embedded[:, :n], embedded[:, n:]  # the causal stream, the other one
    full, causal = torch.ones(n, n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool).tril()
    last = torch.ones(ids.shape[1] - n, ids.shape[1], dtype=torch.bool).tril(n)
    for index, layer in enumerate(llama.layers):
        see = causal if index < config.skip_bidir else full
        norm = layer.input_layernorm
        q_c, *kv_c = qkv(layer, norm(first), 0, "causal")
        q_b, *kv_b = qkv(layer, norm(first if single else second), 0, "bidir")
        outs = attend(q_c, *kv_c, causal), attend(q_b, *kv_b, see)
        mixed = kv_c
        if "k" in config.mixed:
            alphas = alphas_by_hand(model, index, kv_b, kv_c)
            mixed = [(1 - a) * c + a * b for c, b, a in zip(kv_c, kv_b, alphas, strict=True)]
        q, *kv = qkv(layer, norm(answer), n, "causal")
        out = attend(q, *(torch.cat(pair, dim=1) for pair in zip(mixed, kv, strict=True)), last)
        if single:
            odds = model.mixing.theta_beta[index].abs() / config.theta_init
            beta = (odds / (1 + odds)).double()
            beta = beta[:, None, None] if beta.ndim else beta
            first = after(layer, first, (1 - beta) * outs[0] + beta * outs[1], "causal")
        else:
            first, second = after(layer, first, outs[0], "causal"), after(layer, second, outs[1], "bidir")
        answer = after(layer, answer, out, "causal")
    return model.get_base_model().lm_head(llama.norm(answer))[0]


@each_config
@pytest.mark.parametrize("fused", [True, False])
def test_logits_by_hand(fused, config):
    model = model_of(config, use_fused=fused)
    ids, mask, labels = ragged_batch("left", prompts=(5, 9, 2), answers=(3, 2, 4))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    for b, (p, a) in enumerate(((5, 3), (9, 2), (2, 4))):
        expected = by_hand(model, ids[b : b + 1, -p - a :], p)
        torch.testing.assert_close(found[b, -a - 1 :], expected, rtol=1e-5, atol=1e-6)  # norms are float32 inside


@each_config
@pytest.mark.parametrize("fused", [True, False])
def test_generated_tokens_by_hand(fused, config):
    model = model_of(config, use_fused=fused)
    ids, mask, _ = ragged_batch("left", prompts=(7, 3), answers=(1, 1))
    ids, mask = ids[:, :-1], mask[:, :-1]
    found = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for b, p in enumerate((7, 3)):
        tokens = ids[b : b + 1, -p:]
        for _ in range(4):
            tokens = torch.cat([tokens, by_hand(model, tokens, p)[-1:].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found[b, -4:], tokens[0, -4:])


@each_config
def test_gradients_are_those_of_the_padded_schedule(config):
    grads = []
    ids, mask, labels = ragged_batch()
    for fused in (True, False):
        model = bitune_model(use_fused=fused, **CONFIGS[config])
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())})
    assert grads[0].keys() == grads[1].keys()
    names = {n.split(".")[1] if n.startswith("mixing") else n.split(".")[-2] for n in grads[0]}
    assert names >= {f"theta_{name}" for name in model.bitune_config.mixed} | {"causal"}
    assert ("bidir" in names) == model.bitune_config.separate_adapters
    assert ("gate" in names) == model.bitune_config.dynamic_mixing
    for name, g in grads[0].items():
        assert float((g - grads[1][name]).norm()) <= 2e-5 * float(g.norm()), name


@each_config
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, config):
    ids, mask, labels = ragged_batch()
    model, grads = bitune_model(**CONFIGS[config]).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, rtol=1e-5, atol=1e-7, msg=name)


@each_config
def test_saved_and_loaded(config, tmp_path):
    model = bitune_model(**CONFIGS[config]).eval()
    model.save_pretrained(tmp_path)
    loaded = BituneModel.from_pretrained(base_model(), tmp_path)
    assert loaded.bitune_config.to_dict() == model.bitune_config.to_dict()
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@each_config
def test_alternating_turns_and_packed_samples(config):
    """Turns over a cache, and conversations in one row: each against what the tests above hold to the formula."""
    model = bitune_model(turns="alternating", **CONFIGS[config]).eval()
    turns, total = ((4, 2), (3, 3)), 12
    ids = torch.randint(3, 90, (1, total), generator=torch.Generator().manual_seed(5))
    labels, at = torch.full_like(ids, -100), 0
    for p, a in turns:
        labels[:, at + p : at + p + a] = ids[:, at + p : at + p + a]
        at += p + a
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).logits
        cache, at = DynamicCache(config=model.config), 0
        for p, a in turns:
            with model._hooks.turn_over(cache):
                first = model(input_ids=ids[:, at : at + p], past_key_values=cache).logits
            rest = model(input_ids=ids[:, at + p : at + p + a], past_key_values=cache).logits
            found = torch.cat([first[:, -1:], rest], dim=1)
            torch.testing.assert_close(found, whole[:, at + p - 1 : at + p + a], rtol=1e-4, atol=1e-5)
            at += p + a
        one, two = bitune_model(**CONFIGS[config]).eval(), torch.cat([ids, ids.flip(1)], dim=1)
        labels = two.clone()
        labels[:, :5] = labels[:, total : total + 7] = -100
        packed = one(input_ids=two, labels=labels, position_ids=torch.arange(total).repeat(2)[None]).logits
        for row, p in ((slice(0, total), 5), (slice(total, None), 7)):
            alone = one(input_ids=two[:, row], prompt_lengths=[p]).logits
            torch.testing.assert_close(packed[:, row], alone, rtol=1e-4, atol=1e-5)


def test_the_second_adapter_serves_queries_keys_and_values_alone():
    model = bitune_model(variant="single_stream_dual")
    names = {n.split(".")[-4] for n, _ in model.named_parameters() if ".bidir." in n}
    assert names == {"q_proj", "k_proj", "v_proj"}
    ia3 = bitune_model(variant="single_stream_dual", peft=IA3Config(task_type="CAUSAL_LM"))
    names = {n.split(".")[-2] for n, _ in ia3.named_parameters() if ".bidir" in n}
    assert names == {"ia3_l"} and any("down_proj" in n for n, _ in ia3.named_parameters() if "ia3_l.causal" in n)
    full = bitune_model(variant="single_stream_dual", peft=None)
    names = {n.split(".modules_to_save")[0].split(".")[-1] for n, _ in full.named_parameters() if ".bidir." in n}
    assert names == {"q_proj", "k_proj", "v_proj"}


def test_the_base_products_are_computed_once():
    """Rows of each linear layer's base product: the prompt's only once."""

    class Rows(TorchDispatchMode):
        found: ClassVar = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.bitune.segment_lora.default:
                self.found.append(args[0].shape[0])
            return func(*args, **kwargs or {})

    model = bitune_model(variant="single_stream_dual").eval()
    with Rows() as rows:  # with gradients, for which the product is one operator
        model(input_ids=torch.arange(3, 14)[None], use_cache=False)
    # 10 rows of the prompt and one of the answer; behind the last layer's attention the answer's alone
    assert sorted(rows.found) == [1] * 4 + [11] * (3 * 7 - 4)


def test_a_compiled_layer_takes_the_weights_of_a_base_layer_that_was_replaced():
    torch._dynamo.reset()
    model, ids = bitune_model(variant="single_stream_dual").eval(), torch.arange(3, 14)[None]
    layer = model.get_base_model().model.layers[0]
    layer.compile(backend="eager")
    with torch.no_grad():
        before = model(ids).logits
        for module in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            module.base_layer = copy.deepcopy(module.base_layer)
            module.base_layer.weight.mul_(3)
        found = model(ids).logits
        with model.use_schedule(use_fused=False):
            expected = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_tuners_run_twice_and_give_the_same(dtype):
    ids, mask, labels = ragged_batch()
    every = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    named = IA3Config(target_modules=every, feedforward_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    for peft in (
        lora(use_dora=True),
        IA3Config(task_type="CAUSAL_LM"),
        named,
        None,
        lora(lora_dropout=0.0, lora_bias=True),
    ):
        logits = []
        for fused in (True, False):
            base = base_model(dtype=dtype)
            model = bitune_model(base=base, peft=peft, variant="single_stream_dual", use_fused=fused).eval()
            with torch.no_grad():
                for n, p in model.named_parameters():
                    if ".bidir" in n:
                        p.mul_(1.5)
                logits.append(model(input_ids=ids, attention_mask=mask, labels=labels).logits.float())
        error = float((logits[0] - logits[1]).norm() / logits[1].norm())
        assert error < (1e-5 if dtype == torch.float32 else 0.02), (peft, error)


def test_beta_starts_where_it_was_asked_to():
    for options, beta in (
        (dict(beta_init=0.9), 0.9),
        (dict(beta_init=0.1, theta_init=0.1, mixing="relu"), 0.1),
        ({}, 0.5),
    ):
        model = bitune_model(randomize=False, variant="single_stream_dual", **options)
        assert float(model.mixing.beta(1)) == pytest.approx(beta, rel=1e-6)
        assert [float(x) for x in model.mixing.alpha(1)] == pytest.approx([0.5, 0.5])


def test_modules_in_front_of_attention_are_found():
    for name in ("llama", "qwen3"):
        structure = find_structure(BY_ID[name].build())
        for projections in structure.projections:
            attention = projections.attention
            direct = {attention.q_proj, attention.k_proj, attention.v_proj}
            norms = {attention.q_norm, attention.k_norm} if name == "qwen3" else set()  # of what q_proj and k_proj made
            assert (projections.direct, projections.before) == (direct, direct | norms)
            assert projections.exit is attention.o_proj and set(map(id, direct)) <= structure.direct


def test_what_the_streams_see():
    ids = torch.arange(3, 14)[None]
    for config in ("single", "dual"):
        model = bitune_model(**CONFIGS[config])
        found = stream_attention(model, ids)
        assert torch.equal(found["causal"] > 0, torch.ones(3, 10, 10).tril() > 0)
        assert bool((found["bidir"] > 0).all())
    assert bool((stream_distance(bitune_model(**CONFIGS["dual"]), ids)["k"] > 0.05).all())
    with pytest.raises(ValueError, match="expected a variant that mixes keys and values, got 'single_stream'"):
        stream_distance(bitune_model(**CONFIGS["single"]), ids)


def test_what_is_refused_leaves_the_model_as_it_was():
    base = base_model()
    names = [n for n, _ in base.named_parameters()]
    for options, message in (
        (dict(peft=LoraConfig(target_modules=["up_proj"])), "peft: expected adapters on modules that make queries"),
        (dict(dynamic_mixing=True, variant="naive_bidir"), "dynamic_mixing: expected a variant that mixes keys"),
        (dict(beta_init=0.9, variant="bitune"), "beta_init: expected 0.5 for 'bitune', which has no beta, got 0.9"),
        (dict(beta_init=1.0), "beta_init: expected a number between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            bitune_model(base=base, randomize=False, **{"variant": "single_stream_dual"} | options)
        assert [n for n, _ in base.named_parameters()] == names


def test_one_weight_per_head_needs_as_many_of_those_heads_in_every_layer():
    needed = {
        "bitune": ["num_heads_kv"],
        "single_stream": ["num_heads_q"],
        "single_stream_dual": ["num_heads_kv", "num_heads_q"],
    }
    kinds = {"num_heads_kv": "key/value", "num_heads_q": "query"}
    for variant, heads in itertools.product(needed, kinds):
        base = base_model()
        structure = find_structure(base)
        getattr(structure, heads)[1] = 1
        refused = pytest.raises(ValueError, match=rf"different numbers of {kinds[heads]} heads \(\[1, ")
        with refused if heads in needed[variant] else nullcontext():
            BituneModel(base, BituneConfig(lora(), variant, mixing_granularity="head"), structure)


def test_at_the_start_dynamic_mixing_is_the_static_mix():
    ids = torch.arange(3, 14)[None]
    static, dynamic = (bitune_model(dynamic_mixing=x).eval() for x in (False, True))
    with torch.no_grad():
        for gate in dynamic.mixing.gate:
            gate.zero_()
        state = {n: p for n, p in static.state_dict().items()}
        dynamic.load_state_dict(state, strict=False)
        torch.testing.assert_close(dynamic(input_ids=ids).logits, static(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
