"""Learning rates, the paper's loss, the logs of alpha, and equal training by both schedules."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from bitune_kernels.training import (
    AlphaCallback,
    alpha_history,
    parameter_groups,
    plot_alpha,
    read_alpha_csv,
    selective_checkpointing,
    write_alpha_csv,
)
from tests.test_trainers import arguments, collate, hf_trainer, losses, sft_trainer, tokenized
from tests.tiny import base_model, bitune_model, ragged_batch


def test_parameter_groups_cover_what_is_trained_once():
    model = bitune_model()
    adapters, thetas = parameter_groups(model, 1e-3, theta_lr=1e-2, weight_decay=0.1)
    assert (adapters["lr"], adapters["weight_decay"]) == (1e-3, 0.1)
    assert (thetas["lr"], thetas["weight_decay"]) == (1e-2, 0.0)
    assert [id(p) for p in thetas["params"]] == [id(p) for p in model.mixing.parameters()]
    found = sorted(id(p) for p in [*adapters["params"], *thetas["params"]])
    assert found == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [g["name"] for g in parameter_groups(bitune_model(variant="no_mixing"), 1e-3)] == ["adapters"]
    for options in ({"lr": 0}, {"lr": 1.0, "theta_lr": -1}, {"lr": 1.0, "weight_decay": -1}):
        with pytest.raises(ValueError, match="expected a number"):
            parameter_groups(model, **options)


def test_the_trainer_keeps_both_learning_rates(tmp_path):
    model = bitune_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, theta_lr=1e-2))
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path, lr_scheduler_type="constant"),
        train_dataset=tokenized(),
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    before = model.mixing.theta_k.detach().clone()
    trainer.train()
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [1e-3, 1e-2]
    assert float((model.mixing.theta_k - before).detach().abs().max()) > 5e-3  # Adam moves by about lr a step


class Listener(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [(state.global_step, dict(logs))]


@pytest.mark.parametrize(
    ("granularity", "variant"),
    [("layer", "bitune"), ("head", "bitune"), ("global", "bitune"), ("head", "single_stream_dual")],
)
def test_alpha_is_logged_to_every_listener_and_kept(granularity, variant, tmp_path):
    listener = Listener()
    trainer = Trainer(
        model_init=lambda: bitune_model(mixing_granularity=granularity, variant=variant),  # a new one in train()
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=tokenized(),
        data_collator=collate,
    )
    trainer.add_callback(listener)  # before AlphaCallback, as what the Trainer reports to stands before both
    trainer.add_callback(AlphaCallback(trainer))
    trainer.train()
    logged = [(step, logs) for step, logs in listener.seen if "alpha_k/mean" in logs]
    assert [step for step, _ in logged] == [1, 2, 3] and len(losses(trainer)) == 3
    rows = alpha_history(trainer.state.log_history)
    assert [(row["step"], row["layer"]) for row in rows] == [(s, n) for s in (1, 2, 3) for n in range(3)]
    alpha_k, alpha_v = trainer.model.mixing.alpha(2)
    assert rows[-1]["alpha_k"] == pytest.approx(float(alpha_k.mean()))
    assert rows[-1]["alpha_v"] == pytest.approx(float(alpha_v.mean()))
    assert logged[-1][1]["alpha_v/mean"] == pytest.approx(sum(row["alpha_v"] for row in rows[-3:]) / 3)
    beta = trainer.model.mixing.beta(2)
    assert ("beta" in rows[-1]) == (variant == "single_stream_dual") == (beta is not None)
    assert beta is None or rows[-1]["beta"] == pytest.approx(float(beta.mean()))
    write_alpha_csv(rows, tmp_path / "alpha.csv")
    assert read_alpha_csv(tmp_path / "alpha.csv") == rows
    plot_alpha(rows, tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")


def test_alpha_needs_a_model_that_mixes(tmp_path):
    with pytest.raises(ValueError, match="without alpha"):
        AlphaCallback(hf_trainer(bitune_model(variant="no_mixing"), tmp_path))


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_per_sample_is_the_formula(side, use_fused):
    model = bitune_model(loss="sample", use_fused=use_fused).eval()
    plain = model.get_base_model().loss_function
    ids, mask, labels = ragged_batch(side)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    means = []
    for b in range(len(ids)):
        rows = (labels[b] != -100).nonzero().flatten()
        means.append(torch.nn.functional.cross_entropy(out.logits[b, rows - 1], labels[b, rows]))
    torch.testing.assert_close(out.loss, torch.stack(means).mean(), atol=1e-6, rtol=1e-6)
    assert model.get_base_model().loss_function is plain
    with pytest.raises(ValueError, match=r"^loss: expected 'token'"):
        model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=3)
    assert not hasattr(model.unload(), "accepts_loss_kwargs")


@pytest.mark.parametrize("loss", ["sample", "token"])
def test_ten_accumulated_samples_are_one_batch_of_ten(loss, tmp_path):
    trained = []
    for size in (10, 1):
        model = bitune_model(loss=loss)
        changes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=10 // size, max_steps=1)
        trainer = hf_trainer(model, tmp_path / str(size), optim="sgd", max_grad_norm=0, **changes)
        trainer.train()
        state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trained.append((losses(trainer)[0], state))
    (loss_10, state_10), (loss_1, state_1) = trained
    assert loss_1 == pytest.approx(loss_10, abs=1e-5)
    for name, parameter in state_10.items():
        torch.testing.assert_close(state_1[name], parameter, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_trainer_with_its_own_loss_is_refused_with_loss_per_sample(tmp_path):
    with pytest.raises(ValueError, match=r"^loss: expected 'token'"):
        sft_trainer(bitune_model(loss="sample"), tmp_path).train()


def test_a_model_that_computes_its_own_loss_is_refused_with_loss_per_sample(monkeypatch):
    model = bitune_model(loss="sample")
    causal_lm = model.get_base_model()
    forward = causal_lm.forward

    def fused(*args, labels, **kwargs):  # as Liger-Kernel's
        out = forward(*args, **kwargs)
        return type(out)(loss=out.logits.sum())

    monkeypatch.setattr(causal_lm, "forward", fused)
    ids, mask, labels = ragged_batch("left")
    with pytest.raises(ValueError, match=r"^loss: expected 'token' with a causal LM that doesn't ask"):
        model(input_ids=ids, attention_mask=mask, labels=labels)


def test_two_hundred_steps_by_both_schedules_coincide(tmp_path):
    curves = []
    for fused in (True, False):
        model = bitune_model(use_fused=fused, randomize=False, seed=3)
        # faster, thetas cross 0, where the sign of their gradient is decided by rounding
        changes = dict(max_steps=200, learning_rate=1e-3, save_strategy="no", seed=3)
        trainer = hf_trainer(model, tmp_path / str(fused), **changes)
        trainer.train()
        curves.append(losses(trainer))
    assert len(curves[0]) == 200 and curves[0][-1] < curves[0][0] - 0.2
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_bfloat16_curves_differ_less_than_seeds_do(tmp_path):
    curves = []
    for fused, seed in ((True, 3), (False, 3), (False, 4)):
        base = base_model(dtype=torch.bfloat16)
        model = bitune_model(seed, base=base, use_fused=fused, theta_init=0.01)
        changes = dict(max_steps=200, learning_rate=2e-3, save_strategy="no", seed=seed)
        trainer = hf_trainer(model, tmp_path / f"{fused}{seed}", **changes)
        trainer.train()
        curves.append(torch.tensor(losses(trainer)))
    one_pass, three_passes, another_seed = curves
    noise = (three_passes - another_seed).abs().mean()
    assert (one_pass - three_passes).abs().mean() < noise / 2 and one_pass[-1] < one_pass[0] - 0.2


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[func] += 1
        return func(*args, **kwargs or {})


def test_selective_checkpointing_repeats_neither_products_nor_attention():
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    products = [torch.ops.bitune.segment_lora.default, attention]
    repeated, gradients = {}, {}
    for mode in ("none", "selective", "full"):
        model, (ids, mask, labels) = bitune_model(backend="sdpa").train(), ragged_batch()
        if mode != "none":
            kwargs = selective_checkpointing() if mode == "selective" else {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        with Called() as called:
            loss.backward()
        repeated[mode] = [called.operators[op] for op in (*products, torch.ops.aten.silu.default)]
        gradients[mode] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # of 3 layers the last is trimmed and keeps its activations; 3 prompts with rows attend twice, 4 answers once
    assert repeated == {"none": [0, 0, 0], "selective": [0, 0, 2], "full": [14, 20, 2]}
    for name, gradient in gradients["none"].items():
        assert torch.equal(gradients["selective"][name], gradient) and torch.equal(gradients["full"][name], gradient)
