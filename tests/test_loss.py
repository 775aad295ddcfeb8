"""The loss of a few answer rows at a time: the same numbers, without the logits of all rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitune_kernels import BituneConfig, BituneModel, SegmentPlan, get_bitune_model
from bitune_kernels.modeling.loss import loss_per_sample
from tests.families import BY_ID
from tests.test_trainers import hf_trainer, losses, sft_trainer
from tests.tiny import VOCAB, base_model, bitune_model, lora, ragged_batch

# What families do between hidden states and loss: nothing, a cap, a scale, a bias, a projection inside the backbone.
HEADS = ("llama", "gemma2", "gemma4_text", "granite", "granitemoe", "cohere", "phi", "opt", "gpt2", "qwen3_moe")


class LargestLogits(TorchDispatchMode):
    """Records how many rows of a vocabulary any one tensor had."""

    def __init__(self, model, vocab: int):
        super().__init__()
        self.vocab, self.rows = vocab, 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            created = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.weights
            if created and x.ndim and x.shape[-1] == self.vocab:
                self.rows = max(self.rows, x.numel() // self.vocab)
        return out


def loss_and_gradients(model, **options):
    ids, mask, labels = ragged_batch()
    out = model.train()(input_ids=ids, attention_mask=mask, labels=labels, **options)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(whole, chunked):
    (a, expected), (b, found) = whole, chunked
    assert a.logits is not None and b.logits is None and "logits" not in b
    torch.testing.assert_close(b.loss, a.loss, atol=0, rtol=1e-6)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error <= 5e-6 or gradient.norm() < 1e-7, f"{name}: {error:.1e}"


@pytest.mark.parametrize("loss", ["token", "sample"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_in_chunks_equals_the_whole_one(fused, chunk, loss):
    options = dict(use_fused=fused, loss=loss)
    runs = [loss_and_gradients(bitune_model(**options, loss_chunk_rows=rows)) for rows in (None, chunk)]
    compare(*runs)


@pytest.mark.parametrize("family", HEADS)
def test_every_kind_of_head_keeps_its_loss(family):
    family, runs = BY_ID[family], []
    for rows in (None, 3):
        targets = family.targets if isinstance(family.targets, str) else list(family.targets)
        runs.append(
            loss_and_gradients(
                bitune_model(base=family.build(), peft=lora(target_modules=targets), loss_chunk_rows=rows)
            )
        )
    compare(*runs)


@pytest.mark.parametrize(
    "config",
    [
        {"peft": lora(target_modules=["q_proj", "lm_head"])},
        {"peft": lora(target_modules=["q_proj"], modules_to_save=["lm_head"])},
        {"peft": None},
        {"variant": "naive_bidir"},
    ],
    ids=["lora_head", "trained_head", "full", "naive_bidir"],
)
def test_a_trained_head_keeps_its_gradients(config):
    base = dict(tie_word_embeddings=False)
    runs = [
        loss_and_gradients(bitune_model(base=base_model(**base), **config, loss_chunk_rows=rows)) for rows in (None, 2)
    ]
    compare(*runs)
    if config.get("peft") is not None:
        assert any("lm_head" in name for name in runs[1][1])


@pytest.mark.parametrize("count", [7, torch.tensor(23)])
def test_the_trainers_count_of_tokens_divides_the_sum(count):
    runs = [loss_and_gradients(bitune_model(loss_chunk_rows=rows), num_items_in_batch=count) for rows in (None, 3)]
    compare(*runs)
    mean = loss_and_gradients(bitune_model())[0].loss
    assert abs(float((runs[0][0].loss / mean).detach()) - 1) > 0.1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_goes_with_it(reentrant):
    model = bitune_model(loss_chunk_rows=3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare(loss_and_gradients(bitune_model()), loss_and_gradients(model))


def test_no_tensor_holds_the_logits_of_all_rows():
    vocab, found = 997, {}
    ids, mask, labels = ragged_batch()
    targets = int((labels != -100).sum())
    for rows in (None, 3):
        model = bitune_model(base=base_model(vocab_size=vocab), loss_chunk_rows=rows).train()
        with LargestLogits(model, vocab) as largest:
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        found[rows] = largest.rows
    assert found[None] >= targets  # what the recorder must see without chunks
    assert found[3] == 4


def test_evaluation_still_gives_logits():
    model = bitune_model(loss_chunk_rows=2).eval()
    ids, mask, labels = ragged_batch()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        expected = bitune_model().eval()(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)


def test_a_tuple_begins_with_the_loss():
    model = bitune_model(loss_chunk_rows=2).train()
    ids, mask, labels = ragged_batch()
    out = model(input_ids=ids, attention_mask=mask, labels=labels, return_dict=False)
    assert out[0].ndim == 0 and not any(isinstance(x, torch.Tensor) and x.shape[-1:] == (VOCAB,) for x in out)


def test_the_models_own_forward_and_modules_are_left_alone():
    model = bitune_model(loss_chunk_rows=2).train()
    base = model.get_base_model()
    before = dict(base.__dict__), dict(base._modules)
    loss_and_gradients(model)
    assert base.__dict__ == before[0] and base._modules == before[1]


def test_a_family_whose_loss_is_no_sum_is_refused():
    base = base_model()
    # what a family does that ignores the count of tokens: the mean of each chunk
    base.loss_function = lambda logits, labels, vocab_size, **kwargs: torch.nn.functional.cross_entropy(
        logits[0, :-1], labels[0, 1:]
    )
    with pytest.raises(ValueError, match="loss_chunk_rows: LlamaForCausalLM needs None"):
        get_bitune_model(base, BituneConfig(peft=lora(), loss_chunk_rows=2))
    get_bitune_model(base, BituneConfig(peft=lora()))


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_experts_auxiliary_loss_is_refused(chunk):
    family = BY_ID["qwen3_moe"]
    model = bitune_model(base=family.build(), peft=lora(target_modules=list(family.targets)), loss_chunk_rows=chunk)
    with pytest.raises(ValueError, match="output_router_logits"):
        loss_and_gradients(model, output_router_logits=True)
    model.get_base_model().config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        loss_and_gradients(model)
    with pytest.raises(ValueError, match="output_router_logits"):
        model.eval().generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)


@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
def test_trainers_give_the_same_losses(make, tmp_path):
    curves = []
    for rows in (None, 5):
        trainer = make(bitune_model(loss_chunk_rows=rows), tmp_path / str(rows), gradient_accumulation_steps=2)
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_chunks_are_asked_for_where_a_model_is_loaded(tmp_path):
    bitune_model(loss_chunk_rows=5).save_pretrained(tmp_path)
    for rows in (None, 5):
        loaded = BituneModel.from_pretrained(base_model(), tmp_path, loss_chunk_rows=rows)
        assert loaded.bitune_config.loss_chunk_rows == rows


def test_the_mean_over_samples_reads_no_value():
    # it would make the host wait for a GPU's whole forward; fake tensors have none
    causal_lm = SimpleNamespace(loss_function=None)
    with FakeTensorMode(), loss_per_sample(causal_lm, SegmentPlan.from_lengths([3, 2], [4, 5]), True):
        labels = torch.zeros(1, 9, dtype=torch.int64)
        assert causal_lm.loss_function(torch.zeros(1, 9, VOCAB), labels, VOCAB).shape == ()
