"""Long prompts: MLPs run on chunks of rows, with the same results, and nothing grows with the square of the length."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.testing import CompileCounterWithBackend

from bitune_kernels.modeling import row_chunks
from tests.families import BY_ID
from tests.test_families import LLAMA, TUNERS, attach, randomize
from tests.test_ops import LargestTensor
from tests.tiny import VOCAB, base_model, bitune_model, ragged_batch

# Both streams of prompts of 22, 9 and 14 tokens and three answer rows: chunks of 7 rows or less within a stream, across
# its end and across the end of a sample.
PROMPTS, ROWS = (22, 9, 14), 7
# MLPs in sequence and beside attention, with a branch of their own beside them, of Conv1D, and of experts.
FAMILIES = ("llama", "gemma4_text", "phi", "gpt_neox", "cohere", "gpt2", "mixtral", "granitemoe")
CASES = [pytest.param(BY_ID[name], {}, 0.1, id=name) for name in FAMILIES]
CASES += [pytest.param(LLAMA, dict(variant=name), 0.1, id=name) for name in ("single_stream_dual", "naive_bidir")]
CASES += [
    pytest.param(c.family, dict(adapters=c.adapters), c.scale, id=f"{c.id}-llama")
    for c in TUNERS
    if c.family is LLAMA and c.id != "embedding"
]


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr(row_chunks, "ROWS", ROWS)


def rows_seen(model) -> list[int]:
    """Filled by calls with the rows that the modules inside of MLPs got, those with adapters as wholes."""
    rows = []
    for mlp in model._hooks.structure.mlps:
        tuners = [m for m in mlp.modules() if isinstance(m, BaseTunerLayer)]
        parts = {part for tuner in tuners for part in tuner.modules()}
        for m in [*tuners, *(m for m in mlp.modules() if m not in parts)]:
            if m is not mlp and (m in tuners or not any(True for _ in m.children())):
                m.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[:-1].numel()))
    return rows


@pytest.mark.parametrize(("family", "options", "scale"), CASES)
def test_mlps_in_chunks_equal_three_passes(family, options, scale):
    model = attach(family, True, **options).eval()
    randomize(model, scale)
    ids, mask, _ = ragged_batch("left", prompts=PROMPTS, answers=(0, 0, 0))
    outputs, rows = [], rows_seen(model)
    with torch.no_grad():
        for fused in (True, False):
            del rows[:]
            with model.use_schedule(use_fused=fused):
                out = model(ids, attention_mask=mask)
            outputs.append([out.logits[:, -1], *(x for kv in out.past_key_values for x in kv[:2] if x is not None)])
            assert (max(rows) <= 4 * ROWS) if fused else (max(rows) > 4 * ROWS), "experts may get a row four times"
    for one, three in zip(*outputs, strict=True):
        assert float((one - three).norm() / three.norm()) < 1e-5


@pytest.mark.parametrize("variant", ["bitune", "no_mixing", "single_stream_dual"])
def test_long_answers_keep_their_adapter(variant):
    # In the last layer the answer rows are alone, and more than two chunks too.
    model = attach(LLAMA, True, variant=variant).eval()
    randomize(model)
    ids, mask, labels = ragged_batch("right", prompts=PROMPTS, answers=(9, 12, 5))
    logits, rows = [], rows_seen(model)
    with torch.no_grad():
        for fused in (True, False):
            with model.use_schedule(use_fused=fused):
                logits.append(model(ids, attention_mask=mask, labels=labels).logits)
            assert max(rows) <= ROWS if fused else True
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 1e-5


@pytest.mark.parametrize("merged", [False, True])
def test_generate_makes_the_tokens_of_three_passes(merged):
    model = attach(LLAMA, True).eval()
    randomize(model)
    ids, mask, _ = ragged_batch("left", prompts=PROMPTS, answers=(0, 0, 0))
    options = dict(attention_mask=mask, max_new_tokens=6, pad_token_id=0)
    with model.use_schedule(use_fused=False):
        expected = model.generate(ids, **options)
    rows = rows_seen(model)
    if merged:
        with model.merged_decoding():
            found = model.generate(ids, **options)
    else:
        found = model.generate(ids, **options)
    assert max(rows) <= ROWS and torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_hooks_of_others_see_all_rows(kind):
    base = base_model()
    mlp, halve = base.model.layers[0].mlp, lambda module, args, *output: (output or args)[0] / 2
    if kind == "hook":  # runs before ours
        mlp.register_forward_hook(halve)
    model = bitune_model(base=base).eval()
    if kind == "pre-hook":
        mlp.register_forward_pre_hook(halve)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        found = model(ids).logits
        with model.use_schedule(use_fused=False):
            torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_training_is_left_alone():
    # Reentrant checkpointing runs without gradients first. Dropout in chunks would draw other masks than when repeated.
    model = bitune_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    ids, mask, labels = ragged_batch(prompts=PROMPTS, answers=(2, 3, 1))
    rows = rows_seen(model)
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert set(rows) == {2 * sum(PROMPTS) - 2 * 3 + 6 + 3, 6 + 3}, "all rows, and in the last layer the answers'"
    del rows[:]
    model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
    assert min(rows) > ROWS


def test_a_compiled_layer_is_left_alone_and_compiles_at_most_twice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = bitune_model(base=base_model(num_hidden_layers=2)).eval()
    prompts = [torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (30, 21, 47)]
    frames = []
    with torch.no_grad():
        expected = [model(ids).logits for ids in prompts]
        model.get_base_model().model.layers[0].compile(backend=counter, fullgraph=True)
        for ids, logits in zip(prompts, expected, strict=True):
            torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
            frames.append(counter.frame_count)
    assert frames == [1, 2, 2]


@pytest.mark.parametrize("window", [None, 100])
def test_no_tensor_of_a_prefill_is_larger_than_its_rows(window, monkeypatch):
    monkeypatch.setattr(row_chunks, "ROWS", 1024)
    tokens, hidden, wide = 3000, 32, 320
    options = dict(hidden_size=hidden, intermediate_size=wide, vocab_size=1000, max_position_embeddings=4096)
    if window is None:
        model = bitune_model(base=base_model(**options, num_hidden_layers=2))
    else:
        options |= dict(num_hidden_layers=2, sliding_window=window)
        model = bitune_model(base=BY_ID["mistral"].build(**options))
    with LargestTensor() as made:
        model.eval().generate(torch.randint(3, VOCAB, (1, tokens)), max_new_tokens=1)
    # rows of both streams, or a mask of 1024 queries; [tokens, vocab], [rows, wide] and [tokens, tokens] are larger
    assert made.numel <= max(2 * tokens * hidden, 1024 * wide, 0 if window is None else 1024 * (1024 + 2 * window))
