"""Denoising samples: spans, what a sample is made of, and that a model trains on it as a prefix LM."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from bitune_kernels.training import UL2_DENOISERS, Denoiser, UL2Collator
from bitune_kernels.training.denoising import corrupt
from tests.test_masks import additive
from tests.test_trainers import arguments, losses, snapshot, tokenizer
from tests.tiny import base_model, bitune_model, lora

MODES = {"R": [1, 80], "S": [1, 81], "X": [1, 82]}  # each after the token that begins a sequence
SENTINELS = list(range(95, 82, -1))
END = 2
SEQUENTIAL = Denoiser("S", 0.25, None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(lengths, seed: int = 0):
    return [{"input_ids": torch.randint(3, 80, (n,), generator=seeded(seed + n)).tolist()} for n in lengths]


def restored(corrupted, answer):
    """The text: each sentinel gives way to what follows it in the answer."""
    spans, text = {}, []
    for token in answer:
        if token in SENTINELS:
            spans[token] = last = []
        else:
            last.append(token)
    for token in corrupted:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


def test_one_text_by_hand():
    tokens = torch.arange(10, 20)
    corrupted, answer = corrupt(tokens, [(0, 1), (3, 6), (9, 10)], [90, 91, 92, 93])
    assert corrupted == [90, 11, 12, 91, 16, 17, 18, 92]
    assert answer == [90, 10, 91, 13, 14, 15, 92, 19]
    assert corrupt([5, 6], [], []) == ([5, 6], [])


def test_the_default_device_makes_no_difference():
    # a GPU has no use for a generator of the CPU, and no DataLoader's worker may use a GPU
    def run():
        collate = UL2Collator(tokenizer(), MODES, SENTINELS, generator=seeded())
        drawn = [denoiser.draw_spans(64, seeded()) for denoiser in UL2_DENOISERS]
        return drawn, [collate._sample(text["input_ids"]) for text in given]

    given = texts([64] * 8)
    expected = run()
    with torch.device("meta"):
        assert run() == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_batch_by_hand(side):
    # at these lengths the sequential denoiser has one choice: the last token
    tok = tokenizer()
    tok.padding_side = side
    batch = UL2Collator(tok, MODES, [95], [SEQUENTIAL])([{"input_ids": [10, 11, 12, 13]}, {"input_ids": [20, 21, 22]}])
    first, second = [1, 81, 10, 11, 12, 95, END, 95, 13, END], [1, 81, 20, 21, 95, END, 95, 22, END]
    answers = [-100] * 7 + [95, 13, END], [-100] * 6 + [95, 22, END]

    def padded(row, fill):
        return [*row, fill] if side == "right" else [fill, *row]

    assert batch["input_ids"].tolist() == [first, padded(second, 0)]
    assert batch["attention_mask"].tolist() == [[1] * 10, padded([1] * 9, 0)]
    assert batch["labels"].tolist() == [answers[0], padded(answers[1], -100)]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("denoiser", UL2_DENOISERS, ids=lambda d: f"{d.mode}-{d.corruption_rate}-{d.mean_span_length}")
def test_rate_and_span_length_over_many_draws(denoiser):
    length, draws = 4096, 200
    spans = [denoiser.draw_spans(length, seeded(i)) for i in range(draws)]
    corrupted = torch.tensor([sum(end - first for first, end in s) for s in spans]).double()
    if denoiser.mean_span_length is None:
        assert all(len(s) == 1 and s[0][1] == length for s in spans)
        # uniform over 1 .. 2 rate length, so the mean of the draws has a known error
        error = 2 * denoiser.corruption_rate * length / 12**0.5 / draws**0.5
        assert abs(corrupted.mean() - denoiser.corruption_rate * length) < 4 * error
        assert corrupted.max() < 2 * denoiser.corruption_rate * length < corrupted.max() + 40 * error
        assert corrupted.min() < 100
    else:
        assert bool((corrupted == round(denoiser.corruption_rate * length)).all())
        assert len({len(s) for s in spans}) == 1
        assert abs(corrupted[0] / len(spans[0]) / denoiser.mean_span_length - 1) < 0.05
        for s in spans:
            assert all(end < first for (_, end), (first, _) in pairwise(s)), "a kept token between"


def test_spans_as_dense_as_they_can_be():
    assert Denoiser("X", 0.6, 1).draw_spans(5) == [(0, 1), (2, 3), (4, 5)]


def test_every_choice_of_spans_is_equally_likely():
    length, draws = 7, 6000  # 3 corrupted tokens in 2 spans
    denoiser, possible = Denoiser("R", 0.45, 1.5), set()
    for chosen in combinations(range(length), 3):
        if sum(i - 1 not in chosen for i in chosen) == 2:
            possible.add(chosen)
    generator, found = seeded(), Counter()
    for _ in range(draws):
        found[tuple(i for span in denoiser.draw_spans(length, generator) for i in range(*span))] += 1
    assert set(found) == possible
    expected = draws / len(possible)
    chi_squared = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi_squared < len(possible) + 4 * (2 * len(possible)) ** 0.5


def test_text_comes_back_and_denoisers_are_equally_likely():
    collate, modes = UL2Collator(tokenizer(), MODES, SENTINELS, generator=seeded()), Counter()
    names = {tuple(ids): mode for mode, ids in MODES.items()}
    features = texts([4, 9, 25, 9]) * 175
    batch = collate(features)
    for feature, ids, mask, labels in zip(features, *(batch[name].tolist() for name in batch), strict=True):
        ids, labels = ids[: sum(mask)], labels[: sum(mask)]
        prompt = labels.count(-100)
        assert labels == [-100] * prompt + ids[prompt:]
        assert ids[prompt - 1] == ids[-1] == END
        corrupted, answer = ids[2 : prompt - 1], ids[prompt:-1]
        assert restored(corrupted, answer) == feature["input_ids"]
        used = [token for token in corrupted if token in SENTINELS]
        assert used == [t for t in answer if t in SENTINELS] == SENTINELS[: len(used)]
        modes[names[tuple(ids[:2])]] += 1
    for mode, share in {"R": 2 / 7, "S": 1 / 7, "X": 4 / 7}.items():
        assert abs(modes[mode] / 700 - share) < 4 * (share * (1 - share) / 700) ** 0.5
    again = UL2Collator(tokenizer(), MODES, SENTINELS, generator=seeded())(features)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_the_loss_is_a_prefix_lms():
    batch = UL2Collator(tokenizer(), MODES, SENTINELS, generator=seeded(1))(texts([12, 7, 20]))
    model = bitune_model(base=base_model(dtype=torch.float64), variant="naive_bidir").eval()
    terms = []
    with torch.no_grad():
        found = model(**batch).loss
        for ids, mask, labels in zip(*batch.values(), strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            i, j = torch.arange(len(ids))[:, None], torch.arange(len(ids))
            text = int((labels == -100).sum()) - 1  # all of the prompt but its end token sees all of that
            with model.disable_bitune():
                logits = model(ids[None], attention_mask=additive((j <= i) | ((i < text) & (j < text)))).logits[0]
            terms.append(cross_entropy(logits[text:-1], ids[text + 1 :], reduction="none"))
    torch.testing.assert_close(found, torch.cat(terms).mean().float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["naive_bidir", "bitune"])
def test_a_trainer_trains_on_it(variant, tmp_path):
    model = bitune_model(variant=variant, peft=lora(modules_to_save=["embed_tokens", "lm_head"]))
    before = snapshot(model)
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path, max_steps=12, save_strategy="no"),
        train_dataset=Dataset.from_list(texts([9, 14, 20, 11])),
        data_collator=UL2Collator(tokenizer(), MODES, SENTINELS, generator=seeded()),
    )
    trainer.train()
    loss = losses(trainer)
    assert sum(loss[-4:]) < sum(loss[:4])
    still = {name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert all("layers.2.self_attn.q_proj" in name and "bidir" in name for name in still), "queries without a result"


REFUSED = [
    (lambda: Denoiser("R", 0.0, 3), "corruption_rate: expected a number between 0 and 1, got 0.0"),
    (lambda: Denoiser("R", 1, 3), "corruption_rate: expected a number between 0 and 1, got 1"),
    (lambda: Denoiser("R", float("nan"), 3), "corruption_rate: expected a number between 0 and 1, got nan"),
    (lambda: Denoiser("S", 0.6, None), "corruption_rate: expected at most 0.5 for the end of a text, got 0.6"),
    (lambda: Denoiser("R", 0.15, 0.5), "mean_span_length: expected a finite number of at least 1, got 0.5"),
    (lambda: Denoiser("R", 0.15, float("inf")), "mean_span_length: expected a finite number of at least 1, got inf"),
    (lambda: Denoiser("X", 0.9, 1).draw_spans(20), "mean_span_length: expected spans long enough for a kept token"),
    (lambda: Denoiser("X", 0.75, 1).draw_spans(4), "mean_span_length: expected spans long enough for a kept token"),
    (lambda: Denoiser("R", 0.15, 3).draw_spans(3), "length: expected a text long enough for Denoiser(mode='R'"),
    (lambda: Denoiser("X", 0.9, 9).draw_spans(4), "length: expected a text long enough"),
    (lambda: SEQUENTIAL.draw_spans(1), "length: expected a text long enough"),
    (lambda: corrupt([5, 6, 7], [(0, 1), (2, 3)], [90]), "sentinels: expected one for each of 2 spans, got 1"),
    (lambda: corrupt([5, 90, 7], [(0, 1)], [90]), "tokens: expected a text without sentinels, got [90]"),
    (lambda: corrupt([5, 6, 7], [(2, 3), (0, 1)], [90, 91]), "spans: expected (first, end) in order within 3 tokens"),
    (lambda: corrupt([5, 6, 7], [(1, 1)], [90]), "spans: expected (first, end) in order within 3 tokens, got [(1, 1)]"),
    (lambda: corrupt([5, 6, 7], [(1, 4)], [90]), "spans: expected (first, end) in order within 3 tokens, got [(1, 4)]"),
    (lambda: UL2Collator(tokenizer(), {"R": [80]}, [95]), "mode_tokens: expected ids for every mode, S, X too, got R"),
    (lambda: UL2Collator(tokenizer(), MODES, [95, 95]), "sentinels: expected distinct ids, got [95, 95]"),
    (
        lambda: UL2Collator(tokenizer(), MODES | {"S": [95]}, [95]),
        "sentinels: expected ids without those of end, padding and modes, got [95]",
    ),
    (lambda: UL2Collator(tokenizer(), MODES, [95], []), "denoisers: expected at least one, got none"),
    (lambda: UL2Collator(tokenizer(), MODES, SENTINELS)(texts([9, 3])), "length: expected a text long enough for Den"),
    (
        lambda: UL2Collator(tokenizer(), MODES, SENTINELS)(texts([9, 100])),
        "sentinels: expected at least 17 for a text of 100 tokens, got 13",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_bad_input_is_refused_by_name(make, message):
    for _ in range(3):  # whatever is drawn
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            make()


def test_what_is_no_number_and_a_tokenizer_without_an_end():
    for wrong in ("0.15", True):
        with pytest.raises(TypeError, match="corruption_rate: expected a number, got"):
            Denoiser("R", wrong, 3)
        with pytest.raises(TypeError, match="mean_span_length: expected a number, got"):
            Denoiser("R", 0.15, wrong)
    for wrong in (80, [80, "x"]):
        with pytest.raises(TypeError, match=re.escape(f"expected a list of ids for 'R', got {wrong}")):
            UL2Collator(tokenizer(), MODES | {"R": wrong}, SENTINELS)
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an end and a padding token"):
        UL2Collator(tok, MODES, SENTINELS)
