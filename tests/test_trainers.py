"""The trainers people use, unmodified: Hugging Face Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from bitune_kernels import BituneConfig, BituneModel, get_bitune_model
from tests.tiny import base_model, bitune_model, lora

WORDS = "the a cat dog sat ran on mat what who did where is it ? . yes no at home".split()
TEXTS = [
    ("what did the cat do ?", "the cat sat on the mat ."),
    ("where is the dog ?", "at home ."),
    ("who ran ?", "the dog ran ."),
    ("is it a cat that sat on a mat at home ?", "yes it is a cat ."),
] * 3
STEPS = 3


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
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


def hf_trainer(model, folder, **changes):
    return Trainer(
        model=model,
        args=arguments(TrainingArguments, folder, **changes),
        train_dataset=tokenized(),
        data_collator=collate,
    )


def sft_trainer(model, folder, **changes):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": p + " ", "completion": a} for p, a in TEXTS])
    return SFTTrainer(
        model=model, args=arguments(SFTConfig, folder, **changes), train_dataset=data, processing_class=tokenizer()
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


def test_evaluation_reports_the_loss_of_the_answers(tmp_path):
    model = bitune_model()
    trainer = hf_trainer(model, tmp_path)
    model.eval()
    with torch.no_grad():
        expected = model(**collate(list(tokenized())[:4])).loss
    found = trainer.evaluate(tokenized().select(range(4)))["eval_loss"]
    assert found == pytest.approx(float(expected), rel=1e-5)


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
