"""The trainers people use, unmodified: Hugging Face Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from bitune_kernels import BituneConfig, BituneModel, get_bitune_model
from tests.tiny import base_model, bitune_model, lora, ragged_batch

WORDS = "the a cat dog sat ran on mat what who did where is it ? . yes no at home".split()
TEXTS = [
    ("what did the cat do ?", "the cat sat on the mat ."),
    ("where is the dog ?", "at home ."),
    ("who ran ?", "the dog ran ."),
    ("is it a cat that sat on a mat at home ?", "yes it is a cat ."),
] * 3
STEPS = 3
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}. {% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}? {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}. {% endif %}"
)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def arguments(cls, folder, **changes):
    settings = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="steps",
        save_steps=STEPS - 1,
        use_cpu=True,
        bf16=False,
        seed=3,
        disable_tqdm=True,
    )
    return cls(**settings | changes)


def tokenized() -> Dataset:
    tok, rows = tokenizer(), []
    for prompt, answer in TEXTS:
        p, a = tok(prompt)["input_ids"], [*tok(answer)["input_ids"], tok.eos_token_id]
        rows.append({"input_ids": p + a, "attention_mask": [1] * len(p + a), "labels": [-100] * len(p) + a})
    return Dataset.from_list(rows)


def collate(rows):
    width = max(len(r["input_ids"]) for r in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([r[k] + [f] * (width - len(r[k])) for r in rows]) for k, f in fill.items()}


def hf_trainer(model, folder, eval_dataset=None, **changes):
    return Trainer(
        model=model,
        args=arguments(TrainingArguments, folder, **changes),
        train_dataset=tokenized(),
        eval_dataset=eval_dataset,
        data_collator=collate,
    )


def sft_trainer(model, folder, rows=None, **changes):
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": p + " ", "completion": a} for p, a in TEXTS] if rows is None else rows
    return SFTTrainer(
        model=model,
        args=arguments(SFTConfig, folder, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def snapshot(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "nonreentrant"])
@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
def test_training_equals_the_three_pass_schedule(make, checkpointing, tmp_path):
    changes = {} if checkpointing is None else {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    curves, trained = [], []
    for fused in (True, False):
        model = bitune_model(use_fused=fused, theta_init=0.01)
        before = snapshot(model)
        options = changes | {"gradient_checkpointing": fused and checkpointing is not None}
        trainer = make(model, tmp_path / str(fused), **options)
        trainer.train()
        curves.append(losses(trainer))
        trained.append(snapshot(model))
        for name, parameter in model.named_parameters():
            changed = not torch.equal(parameter, before[name])
            # the last layer's bidirectional q has no influence, so its gradient is zero or absent
            if ".bidir." in name and ".layers.2." in name and "q_proj" in name:
                continue
            assert changed == parameter.requires_grad, name
        assert {n.split(".")[-2] for n in before if "lora_B" in n and ".layers.0." in n} == {"causal", "bidir"}
    assert len(curves[0]) == STEPS and curves[0] == pytest.approx(curves[1], rel=2e-4)
    assert curves[0][-1] < curves[0][0]
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
def test_a_checkpoint_of_the_trainer_reloads_exactly_and_resumes(make, tmp_path):
    whole = make(bitune_model(), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS - 1}"
    loaded = BituneModel.from_pretrained(base_model(), checkpoint)
    resumed = make(bitune_model(seed=5, base=base_model()), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = snapshot(whole.model)
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], abs=1e-6)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    again = BituneModel.from_pretrained(base_model(), checkpoint, is_trainable=True)
    for (name, a), b in zip(loaded.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(loaded.mixing.theta_k, whole.model.mixing.theta_k)


def test_the_best_checkpoint_is_loaded_at_the_end_and_resumed(tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)  # the first one
    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, lr_scheduler_type="constant")
    trainer = hf_trainer(bitune_model(), tmp_path, eval_dataset=tokenized(), **options, **best)
    trainer.train()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert max(evaluated) == evaluated[0] > evaluated[-1]
    assert trainer.evaluate()["eval_loss"] == evaluated[0]
    frozen = {n for n, p in bitune_model().named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    resumed = hf_trainer(bitune_model(seed=5, base=base_model()), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert resumed.evaluate(tokenized())["eval_loss"] == evaluated[-1]


def test_evaluation_reports_the_loss_of_the_answers(tmp_path):
    model = bitune_model()
    trainer = hf_trainer(model, tmp_path)
    model.eval()
    with torch.no_grad():
        expected = model(**collate(list(tokenized())[:4])).loss
    found = trainer.evaluate(tokenized().select(range(4)))["eval_loss"]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_needs_prompt_lengths_and_is_that_of_three_passes(tmp_path):
    def collate_lengths(rows):
        lengths = {} if "prompt_lengths" not in rows[0] else {"prompt_lengths": [r["prompt_lengths"] for r in rows]}
        return collate(rows) | {name: torch.tensor(x) for name, x in lengths.items()}

    rows = tokenized().map(lambda r: {"prompt_lengths": r["labels"].count(-100)})
    options = dict(label_smoothing_factor=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2)

    def make(**more):
        trainer = hf_trainer(bitune_model(), tmp_path, **options | more)
        trainer.train_dataset, trainer.data_collator = rows, collate_lengths
        return trainer

    with pytest.raises(ValueError, match=r"^labels: .* label_smoothing_factor .*: .* remove_unused_columns=False"):
        make().train()
    trainer = make(remove_unused_columns=False)
    found = trainer.evaluate(rows)["eval_loss"]
    batch = collate_lengths(list(rows))
    with torch.no_grad():
        logits = bitune_model(use_fused=False).eval()(**batch).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    assert found == pytest.approx(float(expected), rel=1e-5)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_noise_on_embeddings_is_refused(tmp_path):
    trainer = hf_trainer(bitune_model(), tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha: expected None"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
def test_mixed_precision_trains_every_adapter(make, autocast, dtype, tmp_path):
    model = get_bitune_model(base_model(dtype=dtype), BituneConfig(peft=lora()))
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in adapters} == {torch.float32}
    trainer = make(model, tmp_path, bf16=autocast)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in adapters)
    assert all(
        p.abs().max() > 0
        for n, p in model.named_parameters()
        if "lora_B" in n and p.requires_grad and "q_proj" not in n
    )


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = {
    "prompt_completion": [{"prompt": [turn("user", p)], "completion": [turn("assistant", a)]} for p, a in TEXTS],
    "assistant_only": [  # two turns each
        {"messages": [turn("user", p), turn("assistant", a), turn("user", q), turn("assistant", b)]}
        for (p, a), (q, b) in pairwise([*TEXTS, TEXTS[0]])
    ],
}
# Whether samples are packed, padding is dropped, and prompts or answers are cut: all rows are in every batch.
PACKED = {
    "packing": (dict(packing=True, max_length=40), dict(max_length=40)),
    "packing_truncated": (dict(packing=True, max_length=8, pad_to_multiple_of=16), dict(max_length=8)),
    "padding_free": (dict(padding_free=True, max_length=None), dict(max_length=None)),
}


@pytest.mark.parametrize(
    ("rows", "packed"),
    [
        ("text", "packing"),
        ("text", "packing_truncated"),
        ("text", "padding_free"),
        ("prompt_completion", "padding_free"),
        ("assistant_only", "packing"),
    ],
)
def test_sft_on_packed_samples_and_conversations_equals_padded_three_passes(rows, packed, tmp_path):
    common = dict(
        per_device_train_batch_size=len(TEXTS), save_steps=STEPS, assistant_only_loss=rows == "assistant_only"
    )
    trainers = []
    for name, fused, options in zip(("packed", "padded"), (True, False), PACKED[packed], strict=True):
        model = bitune_model(use_fused=fused, theta_init=0.01)
        trainers.append(sft_trainer(model, tmp_path / name, CONVERSATIONS.get(rows), **common, **options))
        trainers[-1].train()
    found, expected = map(losses, trainers)
    assert len(found) == STEPS and found == pytest.approx(expected, rel=2e-4) and found[-1] < found[0]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    loaded = BituneModel.from_pretrained(base_model(), tmp_path / "packed" / f"checkpoint-{STEPS}")
    trained = snapshot(trainers[0].model)
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (dict(packing=True, packing_strategy="bfd_split", max_length=8), "one of the first two tokens"),
        (dict(packing=True, packing_strategy="wrapped", max_length=8), "the first token"),
        (dict(padding_free=True, max_length=None, completion_only_loss=False), "one of the first two tokens"),
    ],
    ids=["bfd_split", "wrapped", "no_completion_only_loss"],
)
def test_sft_samples_without_a_prompt_are_refused(options, place, tmp_path):
    with pytest.raises(ValueError, match=f"^labels: expected -100 on the prompt, got a label on {place}"):
        sft_trainer(bitune_model(), tmp_path, **options).train()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_fused", [True, False])
def test_trls_head_gives_each_token_its_own_log_probability(use_fused, side):
    from trl.trainer.utils import add_fused_lm_head

    ids, mask, labels = ragged_batch(side)
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        logits = bitune_model(use_fused=False).eval()(**batch).logits[:, :-1].log_softmax(-1)
    scored = labels[:, 1:] != -100
    expected = {
        "log_probs": logits.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * scored,
        "entropy": -(logits.exp() * logits).sum(-1) * scored,
        "label_mask": scored,
    }
    base = base_model()
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    model = bitune_model(base=base, use_fused=use_fused, loss_chunk_rows=2).train()  # which is not for this head
    out = model(**batch, fused_lm_head=True)
    for name, values in expected.items():
        torch.testing.assert_close(out[name], values, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def trl_trainer(kind, args, model, rows, **options):
    return kind(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **options)


def dpo_trainer(model, folder):
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": p + " ", "chosen": a, "rejected": TEXTS[i - 1][1]} for i, (p, a) in enumerate(TEXTS)]
    return trl_trainer(DPOTrainer, arguments(DPOConfig, folder), model, rows, ref_model=base_model())


def kto_trainer(model, folder):
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": p + " ", "completion": a, "label": i % 2 == 0} for i, (p, a) in enumerate(TEXTS)]
    return trl_trainer(KTOTrainer, arguments(KTOConfig, folder), model, rows, ref_model=base_model())


def grpo_trainer(model, folder):
    from trl import GRPOConfig, GRPOTrainer

    args = arguments(GRPOConfig, folder, num_generations=2, num_iterations=2, max_completion_length=4)

    def lengths(completions, **kwargs):
        return [float(len(c)) for c in completions]

    return trl_trainer(GRPOTrainer, args, model, [{"prompt": p} for p, _ in TEXTS], reward_funcs=lengths)


@pytest.mark.parametrize("make", [dpo_trainer, kto_trainer, grpo_trainer])
def test_trls_trainers_by_log_probabilities_equal_the_three_pass_schedule(make, tmp_path):
    curves = []
    for fused in (True, False):
        trainer = make(bitune_model(use_fused=fused), tmp_path / str(fused))
        trainer.train()
        curves.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    assert len(curves[0]) == STEPS and all(grad_norm > 0.01 for _, grad_norm in curves[0])
    for found, expected in zip(*curves, strict=True):
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_a_loop_under_accelerate_equals_the_same_loop_without():
    rows, trained = list(tokenized()), []
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer leaves its own precision behind
    for accelerator in (Accelerator(cpu=True, gradient_accumulation_steps=2), None):
        model = bitune_model(theta_init=0.01).train()
        before = snapshot(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(rows, batch_size=3, collate_fn=collate)
        if accelerator is not None:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for i, batch in enumerate(loader):
            if accelerator is not None:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                (model(**batch).loss / 2).backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        trained.append(snapshot(model))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(trained[0]["mixing.theta_k"], before["mixing.theta_k"])
