"""BituneModel as its users meet it: attach, train, generate, save, load, and be refused with a reason."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LilyConfig, LoraConfig, PromptTuningConfig, VBLoRAConfig
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForSequenceClassification

from bitune_kernels import BituneConfig, BituneModel, get_bitune_model
from bitune_kernels.modeling import adapters, encode, one_pass, passes, score_choices, self_test, stream_distance
from bitune_kernels.modeling import model as model_module
from bitune_kernels.modeling.adapters import SegmentLora
from bitune_kernels.modeling.one_pass import OnePass
from tests.families import BY_ID
from tests.tiny import VOCAB, base_model, bitune_model, lora, ragged_batch


def answer_logits(out, labels):
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    return out.logits[keep]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_samples_one_by_one(fused, side):
    model = bitune_model(use_fused=fused).eval()
    ids, mask, labels = ragged_batch(side)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, labels=labels)
        rows, losses = [], []
        for b in range(len(ids)):
            real = mask[b].bool()
            one = model(input_ids=ids[b : b + 1, real], labels=labels[b : b + 1, real])
            rows.append(answer_logits(one, labels[b : b + 1, real]))
            losses.append(one.loss * (labels[b] != -100).sum())
    torch.testing.assert_close(answer_logits(batch, labels), torch.cat(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.loss, sum(losses) / (labels != -100).sum(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_padding_never_leaks_even_when_poisoned(fused):
    model = bitune_model(use_fused=fused).eval()
    ids, mask, labels = ragged_batch("left")
    embeds = model.get_input_embeddings()(ids)
    poisoned = torch.where(mask[..., None].bool(), embeds, torch.full_like(embeds, float("nan")))
    with torch.no_grad():
        clean = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
        dirty = model(inputs_embeds=poisoned, attention_mask=mask, labels=labels)
        cache = model(inputs_embeds=poisoned, attention_mask=mask).past_key_values
    assert torch.equal(clean.loss, dirty.loss) and clean.past_key_values is None
    assert torch.equal(answer_logits(clean, labels), answer_logits(dirty, labels))
    for x in (x for layer in cache.layers for x in (layer.keys, layer.values)):
        assert torch.equal(x.ne(0).any(-1).any(1), mask.bool())


@pytest.mark.parametrize("fused", [True, False])
def test_later_answer_tokens_change_nothing_before_them(fused):
    model = bitune_model(use_fused=fused).eval()
    ids = torch.randint(3, VOCAB, (1, 12))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] - 2) % (VOCAB - 3) + 3
    with torch.no_grad():
        a, b = (model(input_ids=x, prompt_lengths=[5]).logits for x in (ids, changed))
    torch.testing.assert_close(a[:, 4:9], b[:, 4:9], atol=1e-6, rtol=0)
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 1e-4


def test_a_prompt_token_is_seen_in_both_directions():
    # In a causal model the first prompt token's key can't depend on later ones; the mixed cache must, and not alone.
    model = bitune_model().eval()
    ids = torch.randint(3, VOCAB, (1, 8))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] - 2) % (VOCAB - 3) + 3
    with torch.no_grad():
        a, b = (model(input_ids=x).past_key_values.layers[1].keys[0, :, 0] for x in (ids, changed))
        assert (a - b).abs().max() > 1e-5
        model.mixing.theta_k.zero_()
        model.mixing.theta_v.zero_()
        a, b = (model(input_ids=x).past_key_values.layers[1].keys[0, :, 0] for x in (ids, changed))
    torch.testing.assert_close(a, b)  # alpha 0: the causal stream alone


def test_alpha_zero_is_the_causal_lora_model():
    model = bitune_model().eval()
    with torch.no_grad():
        model.mixing.theta_k.zero_()
        model.mixing.theta_v.zero_()
        ids = torch.randint(3, VOCAB, (1, 11))
        ours = model(input_ids=ids, prompt_lengths=[6]).logits[:, 5:]
        with model._hooks.disabled():
            plain = model(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_prefill_then_decoding_equals_one_full_pass(fused):
    model = bitune_model(use_fused=fused).eval()
    ids = torch.randint(3, VOCAB, (1, 10))
    with torch.no_grad():
        full = model(input_ids=ids, prompt_lengths=[6]).logits[:, 5:]
        out = model(input_ids=ids[:, :6])
        steps = [out.logits[:, -1]]
        for t in range(6, 10):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-5, rtol=1e-5)


def test_the_last_layer_attends_for_answers_alone(monkeypatch):
    model, rows, attention = bitune_model().eval(), [], one_pass.bitune_attention
    monkeypatch.setattr(
        one_pass, "bitune_attention", lambda q, *x, **options: rows.append(len(q)) or attention(q, *x, **options)
    )
    with torch.no_grad():
        model(input_ids=torch.arange(3, 13)[None], prompt_lengths=[6])
    assert rows == [15, 15, 5]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_prompts_of_one_and_two_tokens(fused, length):
    model, other = bitune_model(use_fused=fused).eval(), bitune_model(use_fused=not fused).eval()
    ids = torch.randint(3, VOCAB, (1, length))
    a, b = (
        m.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        for m in (model, other)
    )
    assert a.tolist() == b.tolist() and a.shape[1] == length + 5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_trains_the_same_parameters_by_the_same_gradients(use_reentrant):
    ids, mask, labels = ragged_batch()
    gradients = []
    for checkpointing in (False, True):
        model = bitune_model()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(g is not None for g in plain.values()), "every trainable parameter takes part"
    assert {n for n in plain if n.startswith("mixing.")} == {"mixing.theta_k", "mixing.theta_v"}
    for name, gradient in plain.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, atol=1e-7, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_compiled_layers_train_on_all_lengths_and_compile_at_most_twice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    models = [bitune_model(base=base_model(num_hidden_layers=2)).train() for _ in range(2)]
    for layer in models[1].get_base_model().model.layers:
        layer.compile(backend=counter, fullgraph=True)
    frames = []
    for prompts, answers in (
        ((5, 1, 9, 2), (3, 4, 1, 6)),
        ((6, 3, 4, 8), (2, 2, 5, 3)),
        ((12, 2, 7, 5), (1, 6, 3, 2)),
        ((3, 9, 2, 4), (8, 1, 2, 7)),
    ):
        ids, mask, labels = ragged_batch(prompts=prompts, answers=answers)
        for model in models:
            model.zero_grad()
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, atol=1e-7, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        frames.append(counter.frame_count)
    # the first call compiles for its lengths, the second for all lengths
    assert frames[1] <= 2 * frames[0] and frames[1:] == frames[1:2] * 3, frames


def test_compiled_layers_are_recomputed_in_their_pass():
    torch._dynamo.reset()
    model, (ids, mask, labels), found = bitune_model(base=base_model(num_hidden_layers=2)).train(), ragged_batch(), []
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model.get_base_model().model.layers[0].compile(backend="eager")
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_is_compiled_as_a_whole_is_the_same(fused):
    torch._dynamo.reset()
    model = bitune_model(base=base_model(num_hidden_layers=1), use_fused=fused).train()
    compiled, expected = torch.compile(model, backend="eager"), []
    for run in (model, compiled):
        ids, mask, labels = ragged_batch()
        losses = [run(input_ids=ids, attention_mask=mask, labels=labels).loss]
        losses[0].backward()
        assert passes.current() is None and model.config._attn_implementation == "sdpa"
        with torch.no_grad():
            losses.append(run(input_ids=ids[:1, :4]).logits[:, -1])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        expected = expected or [*losses, *gradients]
    for found, x in zip([*losses, *gradients], expected, strict=True):
        torch.testing.assert_close(found, x, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_three_passes_of_a_model_that_is_compiled_as_a_whole_are_compiled():
    torch._dynamo.reset()
    model, (ids, mask, labels), called = bitune_model(base=base_model(num_hidden_layers=1)).eval(), ragged_batch(), []

    def backend(graph, inputs):
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    with model.use_schedule(use_fused=False):
        torch.compile(model, backend=backend)(input_ids=ids, attention_mask=mask, labels=labels)
    assert called.count(scaled_dot_product_attention) == 3


@torch.no_grad()
def test_compiled_layers_evaluate_as_they_are():
    torch._dynamo.reset()
    model, (ids, mask, labels) = bitune_model().eval(), ragged_batch()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager", fullgraph=True)
    found = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def wrapped(model, use_reentrant: bool):
    impl = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    layers = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, impl)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize(("use_fused", "use_reentrant"), [(True, False), (True, True), (False, False)])
def test_layers_in_checkpoint_wrappers_find_their_pass_and_are_saved(use_fused, use_reentrant, tmp_path):
    ids, mask, labels = ragged_batch()
    found = []
    for model in (bitune_model(), wrapped(bitune_model(use_fused=use_fused), use_reentrant)):
        model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        found.append({n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, pair in zip(found[0], zip(*(x.values() for x in found), strict=True), strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in pair)  # three passes never reach some
        torch.testing.assert_close(
            *torch.broadcast_tensors(a, b), atol=1e-7, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    model = copy.deepcopy(model)  # the wrapped one
    model.save_pretrained(tmp_path)
    loaded = wrapped(bitune_model(1), use_reentrant)
    loaded.load_adapter(tmp_path, "causal")
    for name, p in loaded.named_parameters():
        if "lora_" in name or "theta" in name:
            assert torch.equal(p, model.get_parameter(name)), name


def test_a_state_dict_of_other_names_is_not_saved(tmp_path):
    model = bitune_model()
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"^state_dict: expected the model's own names, got none that is base_model\.model\."
    ):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)  # what processes that write nothing have


def test_reentrant_checkpointing_is_refused_for_three_passes():
    model = bitune_model(use_fused=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids, mask, labels = ragged_batch()
    with pytest.raises(ValueError, match="use_reentrant"):
        model.train()(input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variant": "naive_bidir"},
        {"peft": LoraConfig(use_dora=True, r=4, target_modules=["q_proj", "v_proj"])},
        {"peft": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])},
        {"peft": VBLoRAConfig(target_modules=["q_proj", "v_proj"], vector_length=8, num_vectors=16)},
        {"peft": None},
        {"mixing_granularity": "head", "skip_bidir": 1},
    ],
    ids=["bitune", "naive_bidir", "dora", "ia3", "vblora", "full", "head"],
)
def test_saved_and_loaded_is_the_same_model(config, tmp_path):
    model = bitune_model(**config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.eval().save_pretrained(tmp_path)
    ids, mask, labels = ragged_batch()
    loaded = BituneModel.from_pretrained(base_model(0), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.bitune_config.to_dict() == model.bitune_config.to_dict()
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask, labels=labels) for m in (model, loaded))
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits)

    again = BituneModel.from_pretrained(base_model(0), tmp_path, is_trainable=True, use_fused=False)
    assert again.training and again.bitune_config.use_fused is False
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_loaded_adapters_have_the_dtype_that_they_are_made_with(autocast_adapter_dtype, tmp_path):
    options, config = dict(autocast_adapter_dtype=autocast_adapter_dtype), BituneConfig(peft=lora())
    made = get_bitune_model(base_model(dtype=torch.bfloat16), config, **options)
    made.save_pretrained(tmp_path)
    loaded = BituneModel.from_pretrained(base_model(dtype=torch.bfloat16), tmp_path, **options)
    made.load_adapter(tmp_path / "causal", "causal")
    for model in (made, loaded):
        found = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        assert found == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    bitune_model().save_pretrained(tmp_path)
    (tmp_path / "bitune_mixing.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="bitune_mixing"):
        BituneModel.from_pretrained(base_model(), tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "bitune_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"bitune_config.json: expected fields and values as JSON, got"):
            BituneModel.from_pretrained(base_model(), tmp_path)
    (tmp_path / "bitune_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="bitune_config"):
        BituneModel.from_pretrained(base_model(), tmp_path)
    with pytest.raises(FileNotFoundError, match="folder: expected one of save_pretrained or the id"):
        BituneModel.from_pretrained(base_model(), tmp_path / "none")


def test_weights_that_no_adapter_has_are_refused(tmp_path):
    model = bitune_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "causal" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name.replace("layers.0", "layers.9"): weights[name].clone()}, path)
    with pytest.raises(ValueError, match=r"unexpected weights .*layers.9"):
        BituneModel.from_pretrained(base_model(), tmp_path)
    del weights[name]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"no weights for .*layers.0"):
        BituneModel.from_pretrained(base_model(), tmp_path)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("variant", dict(variant="shared_weights")),
        ("mixing", dict(mixing="relu")),
        ("skip_bidir", dict(skip_bidir=1)),
        ("lora_alpha", dict(peft=lora(lora_alpha=16))),
        ("use_rslora", dict(peft=lora(use_rslora=True))),
        ("alpha_pattern", dict(peft=lora(alpha_pattern={"q_proj": 1}))),
    ],
)
def test_weights_of_a_model_made_in_another_way_are_refused(field, changes, tmp_path):
    bitune_model(seed=1).save_pretrained(tmp_path)
    model = bitune_model(**changes)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"expected weights of a model with {field}=.*, got "):
        model.load_adapter(tmp_path, "causal")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    same = bitune_model(loss="sample", turns="recompute")
    same.load_adapter(tmp_path, "causal")


def test_a_tensor_that_all_layers_share_is_missed(tmp_path):
    model = bitune_model(peft=VBLoRAConfig(target_modules=["q_proj", "v_proj"], vector_length=8, num_vectors=16))
    model.save_pretrained(tmp_path)
    path = tmp_path / "causal" / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(path).items() if "vector_bank" not in n}, path)
    with pytest.raises(ValueError, match=r"no weights for .*vector_bank"):
        BituneModel.from_pretrained(base_model(), tmp_path)


def test_an_adapter_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    bitune_model().save_pretrained(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "bidir")
    monkeypatch.chdir(tmp_path)  # where "mine/bidir" could be a repository of the Hub
    model = bitune_model()
    for load in (
        lambda: BituneModel.from_pretrained(base_model(), "mine"),
        lambda: model.load_adapter("mine/bidir", "bidir"),
    ):
        with pytest.raises(FileNotFoundError, match=r"^mine/bidir: not found"):
            load()
    model.save_pretrained("mine")
    (tmp_path / "mine/bidir/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^mine/bidir/adapter_model.safetensors: not found"):
        model.load_adapter("mine/bidir", "bidir")
    with pytest.raises(ValueError, match=r"^adapter_name: expected one of causal, bidir, got 'mine'"):
        model.load_adapter("mine/causal", "mine")


def test_the_model_card_says_how_to_load_it(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = bitune_model(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("bitune_kernels", str(tmp_path / "base"))
    code, scope = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], {}
    exec(code.replace("this folder", str(tmp_path / "mine")), scope)
    assert torch.equal(scope["model"].mixing.theta_k, model.mixing.theta_k)
    (tmp_path / "mine" / "README.md").write_text("changed")
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "changed"


def test_how_a_model_runs_is_not_saved_with_it(tmp_path):
    bitune_model(backend="reference", use_fused=False, loss_chunk_rows=3).save_pretrained(tmp_path)
    found = BituneModel.from_pretrained(base_model(), tmp_path).bitune_config
    assert (found.backend, found.use_fused, found.loss_chunk_rows) == ("auto", True, None)
    changes = {"backend": "reference", "autocast_adapter_dtype": False, "self_test": False}
    assert BituneModel.from_pretrained(base_model(), tmp_path, **changes).bitune_config.backend == "reference"
    with pytest.raises(TypeError, match=r"^backends: expected a field of BituneConfig"):
        BituneModel.from_pretrained(base_model(), tmp_path, backends="reference")


@torch.no_grad()
@pytest.mark.parametrize("fault", ["adapters", "layers", "keys and values"])
def test_the_self_test_sees_what_fresh_adapters_hide(fault, monkeypatch):
    rows, alphas = SegmentLora._rows, OnePass._alphas

    def swapped(self, x, n):
        with monkeypatch.context() as m:
            m.setattr(adapters, "BIDIR", "causal")
            m.setattr(adapters, "CAUSAL", "bidir")
            return rows(self, x, n)

    if fault == "adapters":
        monkeypatch.setattr(SegmentLora, "_rows", swapped)
    elif fault == "layers":
        monkeypatch.setattr(OnePass, "_alphas", lambda self, layer, v: alphas(self, 0, v))
    else:
        monkeypatch.setattr(OnePass, "_alphas", lambda self, layer, v: tuple(reversed(alphas(self, layer, v))))
    with pytest.raises(ValueError, match=r"base_model: .* can't be used in one pass: its hidden states differ"):
        bitune_model()


def test_the_self_test_compares_in_the_models_own_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        for family in ("granite", "nemotron"):
            model = bitune_model(base=BY_ID[family].build(), loss_chunk_rows=2)
            assert model._hooks.trims, "rounding made no difference"


def test_the_self_test_leaves_a_model_as_it_is():
    ours, others = (
        dict(get_bitune_model(base_model(), BituneConfig(peft=lora()), self_test=x).named_parameters())
        for x in (True, False)
    )
    assert all(torch.equal(p, others[n]) and p.requires_grad == others[n].requires_grad for n, p in ours.items())


@torch.no_grad()
def test_prompt_lengths_keep_labels_on_the_prompt_out_of_the_loss():
    model, (ids, mask, labels) = bitune_model().train(), ragged_batch()
    lengths = (labels != -100).int().argmax(1)  # right padding
    everywhere = ids.masked_fill(mask == 0, -100)
    found = model(input_ids=ids, attention_mask=mask, labels=everywhere, prompt_lengths=lengths).loss
    assert found == model(input_ids=ids, attention_mask=mask, labels=labels).loss
    with pytest.raises(
        ValueError, match=r"^labels: expected -100 on the prompt with num_items_in_batch, got 17 others"
    ):
        model(input_ids=ids, attention_mask=mask, labels=everywhere, prompt_lengths=lengths, num_items_in_batch=9)
    model(input_ids=ids, attention_mask=mask, labels=labels, prompt_lengths=lengths, num_items_in_batch=9)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_labels_of_any_integers_give_the_same_loss(chunk_rows):
    model, (ids, mask, labels) = bitune_model(loss_chunk_rows=chunk_rows).train(), ragged_batch()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert model(input_ids=ids.int(), attention_mask=mask, labels=labels.int()).loss == expected


@torch.no_grad()
def test_equal_tokens_under_other_masks_are_other_prompts():
    model, ids = bitune_model().eval(), torch.tensor([[5, 6, 7, 8]] * 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    found = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits
    for row, own in enumerate((ids[:1, 1:], ids[:1], ids[:1])):
        torch.testing.assert_close(found[row : row + 1], model(input_ids=own, logits_to_keep=1).logits)


@pytest.mark.parametrize(
    "peft", [lora(), lora(modules_to_save=["norm", "down_proj"]), None], ids=["lora", "saved", "full"]
)
def test_without_its_adapters_it_is_the_base_model(peft):
    base = base_model()
    ids = torch.randint(3, VOCAB, (2, 7))
    with torch.no_grad():
        expected = base(ids).logits
        model = bitune_model(base=base, peft=peft).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
        trainable = [p.requires_grad for p in model.parameters()]
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert [p.requires_grad for p in model.parameters()] == trainable
        assert not torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model.unload()(ids).logits, expected)


@pytest.mark.parametrize(("family", "copied"), [("llama", "mlp"), ("modernbert-decoder", "lm_head")])
def test_all_that_is_trained_of_copied_modules_gets_a_gradient(family, copied):
    model = bitune_model(base=BY_ID[family].build(), peft=lora(modules_to_save=[copied]))
    ids, mask, labels = ragged_batch()
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_copy_of_the_head_is_no_copy_of_the_model():
    head = bitune_model(peft=lora(target_modules=["q_proj"])).get_output_embeddings()
    assert len(pickle.dumps(head)) < 2 * head.weight.nbytes


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(make):
    model = bitune_model().eval()
    other = make(model)
    ids, mask, labels = ragged_batch()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert torch.equal(other(input_ids=ids, attention_mask=mask, labels=labels).loss, before)
        for p in other.parameters():
            p.mul_(1.1)
        assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).loss, before)
        assert not torch.equal(other(input_ids=ids, attention_mask=mask, labels=labels).loss, before)
        other.unload()
        assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).loss, before)


BAD_CALLS = {
    "prompt_lengths: expected 1 to": lambda i, m, y: dict(input_ids=i, attention_mask=m, prompt_lengths=[5, 0, 9, 2]),
    "prompt_lengths: expected one length": lambda i, m, y: dict(input_ids=i, attention_mask=m, prompt_lengths=[5]),
    "prompt_lengths: expected integers": lambda i, m, y: dict(input_ids=i, prompt_lengths=torch.ones(4)),
    "labels: expected an answer token": lambda i, m, y: dict(
        input_ids=i, attention_mask=m, labels=torch.full_like(y, -100)
    ),
    "labels: expected an answer token (a label behind the prompt": lambda i, m, y: dict(
        input_ids=i, attention_mask=m, labels=i.masked_fill(m == 0, -100), prompt_lengths=m.sum(1)
    ),
    "labels: expected -100 on the prompt": lambda i, m, y: dict(input_ids=i, labels=i),
    "labels: expected -100 wherever": lambda i, m, y: dict(input_ids=i, attention_mask=m, labels=y.roll(9, 1)),
    "labels: expected shape": lambda i, m, y: dict(input_ids=i, attention_mask=m, labels=y[:, 1:]),
    "attention_mask: expected shape": lambda i, m, y: dict(input_ids=i, attention_mask=m[:, 1:], labels=y),
    "attention_mask: expected the real tokens": lambda i, m, y: dict(
        input_ids=i, attention_mask=m.index_fill(1, torch.tensor([1]), 0), prompt_lengths=[3, 1, 3, 1]
    ),
    "input_ids: expected token ids": lambda i, m, y: dict(labels=y),
    "input_ids: expected an integer tensor": lambda i, m, y: dict(input_ids=i.tolist(), labels=y),
    "input_ids: expected [batch, seq]": lambda i, m, y: dict(input_ids=i[0]),
    "inputs_embeds: expected [batch, seq, hidden]": lambda i, m, y: dict(inputs_embeds=torch.zeros(7, 32), labels=y),
    "labels: expected integers": lambda i, m, y: dict(input_ids=i, attention_mask=m, labels=y.float()),
    "logits_to_keep": lambda i, m, y: dict(input_ids=i, attention_mask=m, labels=y, logits_to_keep=1),
    "output_attentions": lambda i, m, y: dict(input_ids=i, attention_mask=m, labels=y, output_attentions=True),
    "position_ids": lambda i, m, y: dict(
        input_ids=i, attention_mask=m, labels=y, position_ids=torch.arange(i.shape[1])[None] // 2
    ),
    "past_key_values": lambda i, m, y: dict(input_ids=i, attention_mask=m, labels=y, past_key_values=DynamicCache()),
    "past_key_values: expected a Cache": lambda i, m, y: dict(input_ids=i, past_key_values=[i]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
@pytest.mark.filterwarnings("ignore:.*output_attentions.*", "error:module forward hook")
def test_bad_calls_name_the_argument_and_leave_the_model_usable(message):
    model = bitune_model().train()
    ids, mask, labels = ragged_batch()
    implementation = model.config._attn_implementation
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        model(**BAD_CALLS[message](ids, mask, labels))
    assert model.config._attn_implementation == implementation
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()


@pytest.mark.parametrize("fused", [True, False])
def test_an_interrupt_in_the_middle_of_a_pass_leaves_nothing_behind(fused):
    # torch runs the hooks behind a module for an Exception, and a KeyboardInterrupt isn't one
    model, (ids, mask, labels) = bitune_model(use_fused=fused).eval(), ragged_batch()

    def interrupt(*_):
        raise KeyboardInterrupt

    def disabled():
        with model.disable_bitune():
            return model(input_ids=ids, attention_mask=mask).logits

    runs = [
        lambda: model(input_ids=ids, attention_mask=mask, labels=labels).logits,
        lambda: model.generate(input_ids=ids[:1, :5], max_new_tokens=3),
        disabled,
        lambda: bitune_model(use_fused=fused)(input_ids=ids, attention_mask=mask, labels=labels).loss,
    ]
    for run in runs:
        expected = run()
        handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids, attention_mask=mask, labels=labels)
        handle.remove()
        assert torch.equal(run(), expected)


def test_checkpointing_stays_off_behind_an_interrupt():
    model, (ids, mask, labels) = bitune_model().train(), ragged_batch()

    def interrupt(*_):
        raise KeyboardInterrupt

    model.gradient_checkpointing_enable()
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    handle.remove()
    model.gradient_checkpointing_disable()
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert not model.get_base_model().is_gradient_checkpointing


@pytest.mark.parametrize("fused", [True, False])
def test_an_interrupt_at_any_line_of_a_switch_leaves_nothing_behind(fused):
    model, (ids, mask, labels) = bitune_model(use_fused=fused).eval(), ragged_batch()
    switches = ("active", "checkpointing", "_switching", "_switch_back")

    def run():
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def interrupted_at(line: int) -> bool:
        lines, before = count(), sys.gettrace()

        def trace(frame, event, _):
            if frame.f_code.co_filename != passes.__file__ or frame.f_code.co_name not in switches:
                return None
            if event == "line" and next(lines) == line:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            run()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    expected, line = run(), 0
    while interrupted_at(line):
        line += 1
        assert model.config._attn_implementation == "sdpa", line
        assert torch.equal(run(), expected), line
    assert line > 10


def test_another_thread_goes_on_behind_an_interrupt():
    model, ids = bitune_model().eval(), ragged_batch()[0][:1, :5]

    def interrupt(*_):
        raise KeyboardInterrupt

    def generate():
        return model.generate(input_ids=ids, max_new_tokens=3)

    expected = generate()
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate()
    handle.remove()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(generate).result(), expected)


def test_an_error_that_a_hook_has_handled_ends_no_pass():
    model, (ids, mask, labels) = bitune_model().eval(), ragged_batch()

    def failing(*_):
        with contextlib.suppress(ZeroDivisionError), model.disable_bitune():
            raise ZeroDivisionError

    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    model.get_base_model().model.layers[1].register_forward_hook(failing)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).loss, expected)


def test_logits_that_are_not_computed_are_told():
    model, (ids, mask, labels) = bitune_model().eval(), ragged_batch()
    told = pytest.warns(UserWarning, match="logits: without labels and prompt_lengths all tokens are prompt")
    with torch.no_grad():
        with told:
            out = model(input_ids=ids[:, :5], use_cache=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(input_ids=ids[:, :5], logits_to_keep=1)
            model.get_decoder()(input_ids=ids[:, :5])
            model(input_ids=ids, attention_mask=mask, labels=labels)
            model(input_ids=ids[:, :1])
            model(input_ids=ids[:, :3], past_key_values=out.past_key_values, use_cache=True)
            model(input_ids=ids, attention_mask=mask, labels=labels)
            model.generate(input_ids=ids[:, :5], max_new_tokens=2)
            model.get_decoder()(input_ids=ids[:, :5])
            with model.disable_bitune():
                model(input_ids=ids)


def test_threads_take_turns():
    model, (ids, mask, labels) = bitune_model().eval(), ragged_batch()
    calls = [
        lambda: model(input_ids=ids, attention_mask=mask, labels=labels).logits,
        lambda: model(input_ids=ids[:1, :6]).logits,
        lambda: model.generate(input_ids=ids[:1, :5], max_new_tokens=3),
    ]
    with torch.no_grad(), ThreadPoolExecutor(len(calls)) as pool:
        expected = [call() for call in calls]
        found = [torch.no_grad()(call) for call in calls]
        for result in [pool.map(lambda call: call(), found) for _ in range(8)]:
            for x, y in zip(result, expected, strict=True):
                assert torch.equal(x, y)


def test_layers_that_are_recomputed_take_their_turn():
    model, (ids, mask, labels) = bitune_model().train(), ragged_batch()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    others = []

    def call_elsewhere(*_):
        handle.remove()
        others.append(pool.submit(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss))
        others.append(wait(others, timeout=0.3).done)

    with ThreadPoolExecutor(1) as pool:
        handle = model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(call_elsewhere)
        loss.backward()
        other, done = others
        assert not done
        assert torch.equal(other.result(), loss)


def test_choices_are_scored_between_a_loss_and_its_gradient():
    model, (ids, mask, labels) = bitune_model(use_fused=False), ragged_batch()
    gradients = []
    for score in (lambda: None, lambda: score_choices(model, [[3, 4, 5]], [[[6, 7], [8]]])):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        score()
        gradients.append(torch.autograd.grad(loss, list(model.mixing.parameters())))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_threads_that_score_choices_take_turns():
    model = bitune_model(use_fused=False).train()
    others = []

    def score():
        return score_choices(model, [[3, 4, 5]], [[[6, 7], [8]]])

    def score_elsewhere(*_):
        handle.remove()
        others.append(pool.submit(score))
        wait(others, timeout=0.3)

    with ThreadPoolExecutor(1) as pool:
        handle = model.get_base_model().model.layers[0].register_forward_pre_hook(score_elsewhere)
        assert score() == others[0].result()
    assert not model.bitune_config.use_fused
    assert all(m.training for m in model.modules())


def test_the_loss_is_computed_in_chunks_while_another_thread_evaluates():
    model, (ids, mask, labels) = bitune_model(loss_chunk_rows=2).train(), ragged_batch()
    others = []

    def train_elsewhere(*_):
        handle.remove()
        others.append(pool.submit(lambda: model(input_ids=ids, attention_mask=mask, labels=labels)))
        wait(others, timeout=0.3)

    with ThreadPoolExecutor(1) as pool:
        handle = model.get_base_model().model.layers[0].register_forward_pre_hook(train_elsewhere)
        score_choices(model, [[3, 4, 5]], [[[6, 7], [8]]])
        assert others[0].result().logits is None


def test_replicas_of_data_parallel_are_refused():
    model, (ids, mask, labels) = bitune_model(), ragged_batch()

    def replica(module):  # as torch.nn.parallel.replicate makes them, which needs GPUs
        twin = module._replicate_for_data_parallel()
        twin._modules = {name: replica(child) for name, child in module.named_children()}
        twin.__dict__ |= {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        return twin

    with pytest.raises(ValueError, match="one process per GPU"):
        replica(model)(input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_fused": False}, {"turns": "alternating"}, {"turns": "recompute"}, {"dynamic_mixing": True}],
    ids=lambda config: " ".join(map(str, config.values())) or "bitune",
)
def test_the_default_device_makes_no_difference(config):
    # users set it to "cuda"; of tensors on "meta" nothing could be read
    model, (ids, mask, labels) = bitune_model(**config).eval(), ragged_batch()
    packed = dict(input_ids=ids[:1, :10], labels=torch.tensor([[-100] * 3 + [4] * 2] * 2).view(1, -1))
    packed["position_ids"] = torch.arange(5).repeat(2)[None]

    def run():
        with torch.no_grad():
            return [
                model(input_ids=ids, attention_mask=mask, labels=labels).logits,
                model(**packed).logits,
                model(input_ids=ids[:2, :3]).logits,
                model.generate(input_ids=ids[:1, :5], attention_mask=mask[:1, :5], max_new_tokens=3),
                encode(model, ids, mask, repeat=True),
            ]

    expected = run()
    with torch.device("meta"):
        found = run()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_the_default_device_makes_no_difference_to_the_self_test():
    model = bitune_model(loss_chunk_rows=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.device("meta"):
        self_test.check_one_pass(model)
        self_test.check_chunked_loss(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_a_cache_is_not_forgotten_in_silence_where_gradients_are_on(fused):
    model, ids = bitune_model(use_fused=fused).eval(), torch.randint(3, VOCAB, (2, 6))
    with pytest.raises(ValueError, match=r"^use_cache: expected .* torch.no_grad"):
        model(input_ids=ids, use_cache=True)
    assert model(input_ids=ids).past_key_values is None


def test_training_without_labels_is_refused():
    model = bitune_model().train()
    with pytest.raises(ValueError, match="labels: expected labels"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_the_adapters_of_the_streams_are_all_there_are():
    model, (ids, mask, labels) = bitune_model().eval(), ragged_batch()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    for name in ("causal", "bidir"):
        with pytest.raises(ValueError, match=f"adapter_name: expected the streams to keep theirs .*got '{name}'"):
            model.delete_adapter(name)
    with pytest.raises(ValueError, match="adapter_name: expected those of the streams and no other, got 'other'"):
        model.add_adapter("other", lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter_name: expected those of the streams and no other, got 'other'"):
        model.add_weighted_adapter(["causal", "bidir"], [0.5, 0.5], "other")
    model.base_model.set_adapter("bidir")
    with pytest.raises(ValueError, match=r"adapters: expected 'causal' to be active .* got \['bidir'\]"):
        model.generate(ids)
    model.set_adapter("causal")
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"adapters: expected 'causal' to be active .* got disabled ones"):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    model.enable_adapter_layers()
    assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).loss, expected)


@pytest.mark.parametrize("trained", ["inputs", "mixing."])
def test_gradients_without_labels_where_the_model_is_frozen(trained):
    model, ids = bitune_model().eval(), torch.randint(3, VOCAB, (2, 6))
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trained))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(trained == "inputs")
    leaves = [x for x in (embeds, *model.mixing.parameters()) if x.requires_grad]
    found = []
    for fused in (True, False):
        with model.use_schedule(use_fused=fused):
            out = model(inputs_embeds=embeds)
        assert out.past_key_values is None
        found.append(torch.autograd.grad(out.logits[:, -1].square().sum(), leaves))
    for x, y in zip(*found, strict=True):
        assert x.abs().max() > 1e-4
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_modules_keep_their_own_modes(tmp_path):
    model = bitune_model().train()
    model.get_base_model().model.layers[0].eval()
    model.save_pretrained(tmp_path)
    before = [m.training for m in model.modules()]
    score_choices(model, [[3, 4, 5]], [[[6], [7, 8]]])
    stream_distance(model, torch.tensor([[3, 4, 5]]))
    model.load_adapter(tmp_path / "causal", "causal")
    assert [m.training for m in model.modules()] == before


def untouched(base, before):
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())
    assert [p.requires_grad for p in base.parameters()] == before["requires_grad"]
    assert base.config._attn_implementation == before["implementation"]
    assert base.training == before["training"]
    with torch.no_grad():
        assert torch.equal(base.eval()(before["ids"]).logits, before["logits"])


def dispatched(base):
    base.hf_device_map = {"model": 0, "lm_head": "disk"}  # as accelerate writes it down
    return base


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda base: get_bitune_model(base, BituneConfig(peft=lora(), skip_bidir=9)), "skip_bidir"),
        (lambda base: get_bitune_model(base, "bitune"), "config: expected a BituneConfig"),
        (
            lambda base: get_bitune_model(
                base, BituneConfig(peft=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
            ),
            "virtual tokens",
        ),
        (
            lambda base: get_bitune_model(base, BituneConfig(peft=lora(trainable_token_indices=[3]))),
            "expected no trainable_token_indices with the two adapters of 'bitune'",
        ),
        (
            lambda base: get_bitune_model(base, BituneConfig(peft=lora(init_lora_weights="pissa_niter_4"))),
            "leave the base weights alone, which the two adapters of 'bitune' share, got 'pissa_niter_4'",
        ),
        (
            lambda base: get_bitune_model(base, BituneConfig(peft=lora(alora_invocation_tokens=[3]))),
            "expected no alora_invocation_tokens",
        ),
        (
            lambda base: get_bitune_model(base, BituneConfig(peft=lora(layer_replication=[[0, 2], [1, 3]]))),
            "expected no layer_replication",
        ),
        (
            lambda base: get_bitune_model(base, BituneConfig(peft=LilyConfig(target_modules=["q_proj"]))),
            "work on each token by itself, got LilyConfig",
        ),
        (
            lambda base: get_bitune_model(base, BituneConfig(peft=lora(modules_to_save=["self_attn"]))),
            "got one around model.layers.0.self_attn",
        ),
        (lambda base: get_bitune_model(base, BituneConfig(peft=lora(target_modules=["nonexistent"]))), "nonexistent"),
        (lambda base: get_bitune_model(base, BituneConfig(peft=lora(), backend="flash")), "flash"),
        (lambda base: get_bitune_model(base.model, BituneConfig(peft=lora())), "causal LM"),
        (
            lambda base: get_bitune_model(LlamaForSequenceClassification(base.config), BituneConfig(peft=lora())),
            "expected a transformers causal LM .*, got LlamaForSequenceClassification",
        ),
        (lambda base: get_bitune_model(dispatched(base), BituneConfig(peft=lora())), "device_map over 0, disk"),
    ],
)
def test_a_refused_attach_leaves_the_model_as_it_was(make, match):
    base = base_model()
    ids = torch.randint(3, VOCAB, (1, 5))
    with torch.no_grad():
        before = dict(
            ids=ids,
            logits=base.eval()(ids).logits,
            requires_grad=[p.requires_grad for p in base.parameters()],
            implementation=base.config._attn_implementation,
        )
    base.train()
    before["training"] = True
    with pytest.raises((ValueError, TypeError), match=match):
        make(base)
    untouched(base, before)


@pytest.mark.parametrize(
    "owner, where",
    [(model_module, "route_rows"), (BituneModel, "_train_adapters"), (model_module, "check_one_pass")],
)
def test_an_interrupted_attach_can_be_made_again(owner, where, monkeypatch):
    base, ids = base_model().eval(), ragged_batch()[0]
    expected = base(ids).logits

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, where, interrupt)
        bitune_model(base=base)
    assert torch.equal(base(ids).logits, expected)
    assert all(p.requires_grad for p in base.parameters())
    bitune_model(base=base)


def test_a_second_attach_is_refused():
    model = bitune_model()
    ids, mask, labels = ragged_batch()
    before = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    for base in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="adapters already"):
            get_bitune_model(base, BituneConfig(peft=lora()))
    assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).loss, before)


def test_an_adapter_on_the_embedding_is_exact():
    config = dict(peft=lora(target_modules=["q_proj", "embed_tokens"]))
    ids, mask, labels = ragged_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [bitune_model(use_fused=fused, **config) for fused in (True, False)]
    losses = [m(input_ids=ids, attention_mask=mask, labels=labels).loss for m in models]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    for model in (*models, bitune_model(peft=None)):
        embeds = model.get_input_embeddings()(ids[:1])
        with pytest.raises(ValueError, match="inputs_embeds: expected input_ids where the token embeddings have"):
            model(inputs_embeds=embeds, labels=labels[:1])
        with pytest.raises(ValueError, match="inputs_embeds: expected input_ids"):
            model.generate(inputs_embeds=embeds, max_new_tokens=1)
    # its second adapter is one of attention: the embedding has the other alone
    for peft in (config["peft"], lora(modules_to_save=["embed_tokens"])):
        model = bitune_model(variant="single_stream_dual", peft=peft)
        own = dict(attention_mask=mask, labels=labels)
        found = model(inputs_embeds=model.get_input_embeddings()(ids), **own).loss
        torch.testing.assert_close(found, model(input_ids=ids, **own).loss)


@pytest.mark.parametrize("fused", [True, False])
def test_merged_adapters_are_refused_where_two_are_needed(fused):
    model = bitune_model(use_fused=fused).eval()
    ids, mask, labels = ragged_batch()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(input_ids=ids, attention_mask=mask, labels=labels)
        model.unmerge_adapter()
        after = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_one_adapter_of_a_variant_may_be_merged():
    model, (ids, mask, labels) = bitune_model(variant="naive_bidir").eval(), ragged_batch()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, labels=labels).logits, expected)


class Products(TorchDispatchMode):
    """Keeps the shape of the second factor of each product, by the operator."""

    def __init__(self):
        super().__init__()
        self.factors = {torch.ops.aten.mm.default: set(), torch.ops.aten.bmm.default: set()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.factors:
            self.factors[func].add(tuple(args[1].shape[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "peft",
    [lora(target_modules=["q_proj"]), lora(target_modules=["down_proj"], use_dora=True, lora_dropout=0.1), IA3Config()],
    ids=["lora", "dora", "ia3"],
)
def test_no_frozen_weight_is_copied(peft, batch, monkeypatch):
    """As ``linear`` does, for a batched product, with rows that were cut from a longer tensor."""
    monkeypatch.setattr("bitune_kernels.modeling.row_chunks.ROWS", 4)
    model = bitune_model(peft=peft)
    weights = {tuple(m.weight.T.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    ids = torch.arange(12 * batch).view(batch, 12)
    with torch.no_grad(), Products() as products:
        model.eval()(ids, logits_to_keep=1)
        model.train()(ids, prompt_lengths=[9] * batch)
    single, batched = products.factors.values()
    assert weights & single and not weights & batched
