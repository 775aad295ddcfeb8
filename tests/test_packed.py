"""Samples packed into a row train as they do one per row, padded."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.families import BY_ID
from tests.tiny import VOCAB, bitune_model, lora, ragged_batch

PROMPTS, ANSWERS = (5, 2, 9, 3), (3, 4, 1, 6)
SAMPLES = dict(prompts=PROMPTS, answers=ANSWERS)
CONFIGS = {"token": {}, "sample": {"loss": "sample"}, "chunks": {"loss_chunk_rows": 3}}
CONFIGS["sample in chunks"] = CONFIGS["sample"] | CONFIGS["chunks"]


def padded(side="right", **samples):
    return dict(zip(("input_ids", "attention_mask", "labels"), ragged_batch(side, **SAMPLES | samples), strict=True))


def flattened(without_labels=(), **options):
    """The samples in one row, as transformers' collator packs them."""
    batch, rows = padded(), []
    for b, mask in enumerate(batch["attention_mask"].bool()):
        labels = torch.full_like(batch["labels"][b], -100) if b in without_labels else batch["labels"][b]
        rows.append({"input_ids": batch["input_ids"][b][mask].tolist(), "labels": labels[mask].tolist()})
    return DataCollatorWithFlattening(return_tensors="pt", **options)(rows)


def everything():
    """All that a collator may say about the samples."""
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def two_rows(side="right"):
    """The first two samples in one row, two in another, and padding that repeats positions."""
    batch, cut = flattened(), sum(PROMPTS[:2] + ANSWERS[:2])
    rows = {name: [x[0, :cut], x[0, cut:]] for name, x in batch.items()}
    rows["attention_mask"] = [torch.ones_like(x) for x in rows["input_ids"]]
    fill = {"labels": -100, "position_ids": 1}
    return {
        name: torch.nn.utils.rnn.pad_sequence(x, True, fill.get(name, 0), padding_side=side) for name, x in rows.items()
    }


LAYOUTS = {
    "one_row": flattened,
    "everything": everything,
    "two_rows": two_rows,
    "two_rows_left": lambda: two_rows("left"),
}


def step(model, batch, checkpointing=None):
    model.train().zero_grad(set_to_none=True)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    out = model(**batch)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    (a, found), (b, expected) = found, expected
    torch.testing.assert_close(a.loss, b.loss, atol=0, rtol=1e-5)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
        assert error <= 1e-5 or gradient.norm() < 1e-7, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fused", [True, False])
def test_packed_samples_train_as_padded_ones(fused, config, layout):
    model = bitune_model(use_fused=fused, **CONFIGS[config])
    expected = step(model, padded())
    found = step(model, LAYOUTS[layout]())
    assert_same(found, expected)
    if "chunks" not in config:  # logits in the places of the tokens, zero in front of answers
        places = (LAYOUTS[layout]()["labels"] != -100)[:, 1:], (padded()["labels"] != -100)[:, 1:]
        rows = [out.logits[:, :-1][place] for (out, _), place in zip((found, expected), places, strict=True)]
        torch.testing.assert_close(*rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("fused", "reentrant"), [(True, True), (True, False), (False, False)])
def test_with_gradient_checkpointing(fused, reentrant):
    model = bitune_model(use_fused=fused, loss_chunk_rows=3)
    assert_same(step(model, two_rows(), reentrant), step(bitune_model(use_fused=fused), padded()))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "gpt2", "opt", "gpt_oss"])
def test_windows_positions_and_sinks_of_families(family):
    family = BY_ID[family]
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    model = bitune_model(base=family.build(vocab_size=VOCAB), peft=lora(target_modules=targets)).eval()
    logits = [model(**batch).logits[:, :-1][(batch["labels"] != -100)[:, 1:]] for batch in (flattened(), padded())]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_samples_without_an_answer_train_nothing(config):
    # a truncated prompt among the others, and padding to a multiple of 8 whose positions are 0, as TRL pads
    model = bitune_model(**CONFIGS[config])
    keep = torch.tensor([0, 1, 3])
    expected = step(model, {name: x[keep] for name, x in padded().items()})
    batch = flattened(without_labels=[2])
    fill = {"labels": -100}
    batch = {name: torch.nn.functional.pad(x, (0, 7), value=fill.get(name, 0)) for name, x in batch.items()}
    assert_same(step(model, batch), expected)
    batch = padded()
    batch["labels"][2] = -100
    assert_same(step(model, batch), expected)


def test_a_batch_without_any_answer_adds_nothing_to_a_sum():
    batch, model = flattened(without_labels=range(4)), bitune_model()
    out, gradients = step(model, batch | {"num_items_in_batch": 7})
    assert float(out.loss.detach()) == 0 and not any(g.any() for g in gradients.values())
    with pytest.raises(ValueError, match="labels: expected an answer token"):
        model(**batch)


def test_prompt_lengths_are_one_per_sample():
    prompts = (5, 1, 9, 1)
    model, change = bitune_model(), {"prompt_lengths": prompts}
    expected = step(model, padded(prompts=prompts))
    batch = padded(prompts=prompts)
    rows = [(batch["input_ids"][b][m], batch["labels"][b][m]) for b, m in enumerate(batch["attention_mask"].bool())]
    packed = {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": torch.cat([labels for _, labels in rows])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
    }
    assert_same(step(model, packed | change), expected)
    with pytest.raises(ValueError, match="prompt_lengths: expected one length for each of the 4 samples, got 1"):
        model(**packed, prompt_lengths=[5])
    with pytest.raises(ValueError, match=r"labels: .* packed samples \[1, 3\]"):
        model(**packed)


def changed(**changes):
    return lambda: everything() | {name: change(everything()[name]) for name, change in changes.items()}


def without(*names):
    return lambda: {name: x for name, x in everything().items() if name not in names}


def cut_answer():
    """The second sample is the rest of an answer, as TRL's "bfd_split" leaves it."""
    batch, first = flattened(), PROMPTS[0] + ANSWERS[0]
    batch["labels"][0, first + 1 : first + 3] = batch["input_ids"][0, first + 1 : first + 3]
    return batch


BAD = {
    "labels: expected -100 on the prompt, got a label on one of the first two tokens of the packed samples [1]": (
        cut_answer
    ),
    "position_ids: expected 0, 1, 2, ... from the first token of each sample, got 9 for token 8 of row 0": changed(
        position_ids=lambda x: x.index_fill(1, torch.tensor([8]), 9)
    ),
    "got 1 for token 0 of row 0": changed(position_ids=lambda x: x + 1),
    "position_ids: expected shape (1, 33) as the tokens, got (1, 32)": changed(position_ids=lambda x: x[:, 1:]),
    "position_ids: expected integers": changed(position_ids=lambda x: x.float()),
    "position_ids: expected an integer tensor, got list": changed(position_ids=lambda x: x.tolist()),
    "position_ids: expected positions that say where samples begin with cu_seq_lens_q": without("position_ids"),
    "with seq_idx": without(
        "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "attention_mask"
    ),
    "cu_seq_lens_k: expected samples at tokens [0, 8, 14, 24] as position_ids say, got [0, 8, 24]": changed(
        cu_seq_lens_k=lambda x: x[[0, 1, 3, 4]]
    ),
    "position_ids: expected 0, 1, 2, ... from the first real token of each row (several": without(
        "labels", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    ),
    "cu_seq_lens_q: expected packed samples in training alone": without("labels"),
    "use_cache: expected False with packed samples": lambda: flattened() | {"use_cache": True},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_right_is_refused_by_name(message):
    model = bitune_model().eval()
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=re.escape(message)):
        model(**BAD[message]())


def test_generate_refuses_packed_prompts():
    batch = flattened()
    with pytest.raises(ValueError, match="position_ids: expected 0, 1, 2"):
        bitune_model().eval().generate(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
