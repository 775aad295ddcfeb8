"""Learned instructions: the hypergradient against unrolled training, and what the optimizer leaves as it was."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

from bitune_kernels.training import (
    EncodedInstruction,
    InstructionOptimizer,
    InstructionSelector,
    SoftInstruction,
    hypergradient,
    largest_curvature,
    prepend_instruction,
)
from tests.tiny import VOCAB, base_model, bitune_model, lora, ragged_batch


def batch(side="right", seed=0, **extra):
    ids, mask, labels = ragged_batch(side, seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **extra}


def unrolled(train_loss, val_loss, theta, phi, alpha, steps):
    """d val_loss / d phi by autograd through this many steps of SGD from theta; both losses take (theta, phi)."""
    phi = [p.detach().requires_grad_() for p in phi]
    theta = [p.detach().requires_grad_() for p in theta]
    for _ in range(steps):
        gradients = torch.autograd.grad(train_loss(theta, phi), theta, create_graph=True)
        theta = [p - alpha * g for p, g in zip(theta, gradients, strict=True)]
    return torch.autograd.grad(val_loss(theta, phi), phi), theta


def close(result, expected, rtol):
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(result, expected, strict=True))
    assert difference < rtol, difference


class Quadratic:
    """train: theta A theta / 2 - theta B phi; val: |theta - t|^2 / 2 + theta_0 phi_0."""

    def __init__(self):
        torch.manual_seed(0)
        options = dict(dtype=torch.float64)
        root, self.b = torch.randn(6, 6, **options), torch.randn(6, 3, **options)
        self.a, self.t = root @ root.T / 6 + 0.2 * torch.eye(6, **options), torch.randn(6, **options)
        self.theta = torch.randn(6, **options, requires_grad=True)
        self.phi = torch.randn(3, **options, requires_grad=True)

    def train(self, theta, phi):
        return theta[0] @ self.a @ theta[0] / 2 - theta[0] @ self.b @ phi[0]

    def val(self, theta, phi):
        return (theta[0] - self.t).square().sum() / 2 + theta[0][0] * phi[0][0]

    def closures(self):
        return tuple(lambda f=f: f([self.theta], [self.phi]) for f in (self.train, self.val))


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-12), ("finite", 1e-8)])
def test_a_quadratic_is_unrolled_training_and_its_closed_form(method, rtol):
    q = Quadratic()
    alpha, options = 0.3, dict(alpha=0.3, method=method)
    for k in (0, 1, 5):
        expected, reached = unrolled(q.train, q.val, [q.theta], [q.phi], alpha, k + 1)
        start = q.theta.detach().clone()
        q.theta.data.copy_(reached[0])
        close(hypergradient(*q.closures(), [q.theta], [q.phi], k=k, **options), expected, rtol)
        q.theta.data.copy_(start)
    # all of the series: theta*(phi) = A^-1 B phi
    theta = torch.linalg.solve(q.a, q.b @ q.phi).detach()
    q.theta.data.copy_(theta)
    gradient = theta - q.t
    gradient[0] += q.phi[0].detach()
    expected = q.b.T @ torch.linalg.solve(q.a, gradient)
    expected[0] += theta[0]
    close(hypergradient(*q.closures(), [q.theta], [q.phi], k=400, **options), [expected], 10 * rtol)


@pytest.mark.parametrize("method", ["finite", "exact"])
def test_a_validation_loss_apart_from_the_model_leaves_its_direct_term(method):
    q = Quadratic()
    train_loss, _ = q.closures()
    (found,) = hypergradient(
        train_loss, lambda: q.phi.square().sum(), [q.theta], [q.phi], alpha=0.1, k=1, method=method
    )
    assert torch.equal(found, 2 * q.phi.detach())


def test_curvature_is_the_largest_eigenvalue():
    q = Quadratic()
    q.a = torch.diag(torch.tensor([9.0, 2, 1, 1, 0.5, 0.1], dtype=torch.float64))
    for method in ("exact", "finite"):
        assert largest_curvature(q.closures()[0], [q.theta], method=method) == pytest.approx(9, rel=1e-4)


def test_a_lora_transformer_at_its_optimum_is_unrolled_training():
    # GPT-2, which computes nothing in float32; the loss is computed here, since transformers' does
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)).double()
    model = get_peft_model(
        base, lora(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), autocast_adapter_dtype=False
    )
    model.eval()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    theta = [model.get_parameter(n) for n in names]
    torch.manual_seed(1)
    for p in theta:
        p.data.normal_(std=0.3)
    start = [p.detach().clone() for p in theta]
    embedding = model.get_input_embeddings()
    instruction = SoftInstruction(embedding, length=2).double()
    instruction.vectors.data.normal_()
    train_batch, val_batch = batch(seed=0), batch(seed=1)

    def mean_loss(theta, inputs):
        tokens = {name: x for name, x in inputs.items() if name != "labels"}
        logits = functional_call(model, dict(zip(names, theta, strict=True)), (), tokens).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())

    def train(theta, phi):
        vectors = phi[0].expand(4, -1, -1)
        inputs = prepend_instruction(model, train_batch, vectors, torch.ones(4, 2, dtype=torch.bool))
        loss = mean_loss(theta, inputs)
        # the optimum shall neither be at infinity nor at adapters of zeros
        return loss + 0.02 * sum((p - p0).square().sum() for p, p0 in zip(theta, start, strict=True))

    def val(theta, phi):
        return mean_loss(theta, val_batch)

    phi = [instruction.vectors]
    solver = torch.optim.LBFGS(
        theta, max_iter=300, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = train(theta, phi)
        loss.backward(inputs=theta)
        return loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(4):
            solver.step(closure)
        assert max(float(g.abs().max()) for g in torch.autograd.grad(train(theta, phi), theta)) < 1e-7
        losses = (lambda: train(theta, phi), lambda: val(theta, phi))
        alpha = 1 / largest_curvature(losses[0], theta, method="exact")
        for k in (0, 1, 5):
            expected, _ = unrolled(train, val, theta, phi, alpha, k + 1)
            for method, rtol in (("exact", 1e-5), ("finite", 1e-3)):
                close(hypergradient(*losses, theta, phi, alpha=alpha, k=k, method=method), expected, rtol)


KINDS = {
    "soft": lambda embedding: SoftInstruction(embedding, length=3, num_tasks=2),
    "encoded": lambda embedding: EncodedInstruction(embedding, length=2, width=8),
    "selector": lambda embedding: InstructionSelector(embedding, [[5, 6], [], [7, 8, 9]], num_tasks=2),
    "mean": lambda embedding: InstructionSelector(embedding, [[5, 6], [], [7, 8, 9]], num_tasks=2, soft=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_finite_on_one_pass_is_exact_on_three(kind):
    model = bitune_model().eval()
    torch.manual_seed(0)
    instruction = KINDS[kind](model.get_input_embeddings())
    if kind in ("selector", "mean"):
        instruction.logits.data.copy_(torch.tensor([[0, 0, 1.0], [0.5, 0, 0]]))
    train_batch, val_batch = batch("left", task_ids=torch.tensor([0, 1, 1, 0])), batch(seed=1)
    theta, phi = [p for p in model.parameters() if p.requires_grad], list(instruction.parameters())
    losses = (
        lambda: model(**prepend_instruction(model, train_batch, *instruction(train_batch))).loss,
        lambda: model(**val_batch).loss,
    )
    options = dict(alpha=1e-3, k=2)
    finite = hypergradient(*losses, theta, phi, **options)
    with pytest.raises(ValueError, match=r"^train_loss: expected operators .* got _SegmentLora"):
        hypergradient(*losses, theta, phi, **options, method="exact")
    with model.use_schedule(use_fused=False):
        exact = hypergradient(*losses, theta, phi, **options, method="exact")
    assert all(float(x.norm()) > 0 for x in exact)
    close(finite, exact, 2e-2)


def optimizers(model, instruction, lr=1e-4):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr), torch.optim.Adam(instruction.parameters(), 0.1)


def test_an_outer_step_leaves_the_model_as_an_inner_step_alone_does_and_shares_dropout():
    states, noise = [], []
    for every in (1, 2):  # the second step is an outer one with 1, and not with 2
        model = bitune_model(peft=lora(lora_dropout=0.3)).train()
        instruction = SoftInstruction(model.get_input_embeddings(), token_ids=[5, 6, 7])
        optimizer = InstructionOptimizer(model, instruction, *optimizers(model, instruction), every=every)
        for p in optimizer.parameters:
            p.grad = torch.ones_like(p) if every == 1 else None  # left by somebody else
        model.register_forward_pre_hook(lambda *_, seen=noise: seen.append(torch.get_rng_state()))
        optimizer.step(batch(), batch(seed=1))
        noise.clear()
        before = instruction.vectors.detach().clone()
        torch.manual_seed(3)
        result = optimizer.step(batch(), batch(seed=1))
        assert torch.equal(before, instruction.vectors) == ("grad_norm" not in result) == (every == 2)
        assert all(p.grad is None for p in (*model.parameters(), *instruction.parameters()))
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        if every == 1:  # the inner step, the validation batch, and two pairs
            assert len(noise) == 6
            assert all(torch.equal(state, noise[2]) for state in noise[3:])
            assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])
    assert all(torch.equal(p, states[1][n]) for n, p in states[0].items())


def test_the_hypergradient_is_clipped_and_its_norm_told_unclipped():
    def outer_step(max_grad_norm: float) -> tuple[float, float]:
        model = bitune_model()
        instruction = SoftInstruction(model.get_input_embeddings(), token_ids=[5, 6, 7])
        before = instruction.vectors.detach().clone()
        inner, outer = optimizers(model, instruction)[0], torch.optim.SGD(instruction.parameters(), 1.0)
        optimizer = InstructionOptimizer(model, instruction, inner, outer, k=0, max_grad_norm=max_grad_norm)
        told = optimizer.step(batch(), batch(seed=1))["grad_norm"]
        return told, float((instruction.vectors.detach() - before).norm())

    norm, moved = outer_step(1e9)
    assert moved == pytest.approx(norm, rel=1e-3)
    assert outer_step(norm / 3) == pytest.approx((norm, norm / 3), rel=1e-3)


def test_parameters_and_their_gradients_come_back_when_a_loss_fails():
    q, calls = Quadratic(), []

    def train():
        calls.append(q.theta.detach().clone())
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return q.closures()[0]()

    before, q.theta.grad = q.theta.detach().clone(), torch.ones(6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out of memory"):
        hypergradient(train, q.closures()[1], [q.theta], [q.phi], alpha=0.1)
    assert not torch.equal(calls[0], before) and torch.equal(q.theta, before)
    assert torch.equal(q.theta.grad, torch.ones(6)) and q.phi.grad is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bitune", [True, False])
def test_a_chosen_text_is_that_text_in_the_prompt(bitune, side):
    model = (bitune_model() if bitune else get_peft_model(base_model(), lora())).eval()
    selector = InstructionSelector(model.get_input_embeddings(), [[5, 6, 7, 8], [9, 10], []], num_tasks=3)
    selector.logits.data.copy_(torch.eye(3)[[1, 2, 0]])
    assert selector.choice() == [1, 2, 0]
    given, texts = batch(side, task_ids=torch.tensor([1, 0, 2, 0])), [[], [9, 10], [5, 6, 7, 8], [9, 10]]
    inputs = prepend_instruction(model, given, *selector(given))
    assert bool(inputs["attention_mask"][:, 0 if side == "right" else -1].all())  # padded where the batch is
    out = model(**inputs)
    losses = []
    for row, text in enumerate(texts):
        real = given["attention_mask"][row].bool()
        ids = torch.cat([torch.tensor(text, dtype=torch.long), given["input_ids"][row][real]])[None]
        labels = torch.cat([torch.full((len(text),), -100), given["labels"][row][real]])[None]
        losses += [model(input_ids=ids, labels=labels).loss] * int((labels != -100).sum())
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_a_chosen_text_has_the_gradient_of_the_mean():
    embedding, gradients = bitune_model().get_input_embeddings(), []
    for soft in (False, True):
        selector = InstructionSelector(embedding, [[5, 6, 7], [], [8, 9]], soft=soft)
        selector.logits.data.copy_(torch.tensor([[0, 0.5, 1.0]]))
        vectors, _ = selector(batch())
        torch.manual_seed(0)
        gradients += torch.autograd.grad(vectors, selector.logits, torch.randn(vectors.shape))
    torch.testing.assert_close(*gradients)


def test_an_encoded_instruction_reads_the_prompt_and_not_the_answer():
    instruction, given = EncodedInstruction(base_model().get_input_embeddings(), length=2), batch()
    vectors, _ = instruction(given)
    answers = given["labels"] != -100
    for changed, same in (
        (answers, True),
        (~answers & given["attention_mask"].bool(), False),
        (given["attention_mask"] == 0, True),
    ):
        other, _ = instruction(given | {"input_ids": torch.where(changed, 50, given["input_ids"])})
        assert torch.equal(other, vectors) == same


def test_soft_instructions_start_as_tokens():
    embedding = base_model().get_input_embeddings()
    assert torch.equal(SoftInstruction(embedding, token_ids=[4, 9], num_tasks=2).vectors[1], embedding.weight[[4, 9]])
    vectors = SoftInstruction(embedding, length=5).vectors
    assert bool((vectors[0][:, None] == embedding.weight).all(-1).any(-1).all())


def test_bad_input_is_refused_by_name():
    model = bitune_model()
    embedding = model.get_input_embeddings()
    instruction = SoftInstruction(embedding, length=2)
    inner, outer = optimizers(model, instruction)

    def make(**options):
        return InstructionOptimizer(model, instruction, inner, outer, **options)

    q = Quadratic()
    low = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    slow_and_fast = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in ((q.theta, 0.1), (q.phi, 0.2))])
    long = SoftInstruction(embedding, length=250)
    cases = {
        "candidates: expected one or more": lambda: InstructionSelector(embedding, []),
        "candidates: expected one or more texts": lambda: InstructionSelector(embedding, [[], []]),
        "candidates: expected token ids from 0 to 95 in a list, got 'is": lambda: InstructionSelector(
            embedding, ["is it a dog ?"]
        ),
        "token_ids: expected token ids from 0 to 95 in a list, got 'is": lambda: SoftInstruction(
            embedding, token_ids="is it a dog ?"
        ),
        "token_ids: expected token ids from 0 to 95 in a list, got [96]": lambda: SoftInstruction(
            embedding, token_ids=[96]
        ),
        "candidates: expected token ids from 0 to 95 in a list, got [-1]": lambda: InstructionSelector(
            embedding, [[3], [-1]]
        ),
        "length: expected either": lambda: SoftInstruction(embedding),
        "length: expected an integer >= 1": lambda: SoftInstruction(embedding, length=0),
        "length: expected an integer >= 1, got 1.5": lambda: SoftInstruction(embedding, length=1.5),
        "width: expected an integer >= 1": lambda: EncodedInstruction(embedding, length=1, width=0),
        "token_ids: expected one or more": lambda: SoftInstruction(embedding, token_ids=[]),
        "num_tasks: expected": lambda: SoftInstruction(embedding, length=1, num_tasks=0),
        "task_ids: expected 4 numbers": lambda: instruction(batch(task_ids=torch.tensor([0, 1, 0, 0]))),
        "task_ids: expected 4 numbers from 0": lambda: instruction(batch(task_ids=torch.zeros(4, 1, dtype=torch.long))),
        "epsilon: expected a number > 0": lambda: make(epsilon=-1.0),
        "k: expected an integer >= 0, got -1": lambda: make(k=-1),
        "alpha: expected a number > 0": lambda: make(alpha=0.0),
        "alpha: expected a number where": lambda: InstructionOptimizer(model, instruction, slow_and_fast, outer),
        "method: expected one of": lambda: make(method="unrolled"),
        "method: expected one of finite": lambda: largest_curvature(q.closures()[0], [q.theta], method="unrolled"),
        "every: expected": lambda: make(every=0),
        "every: expected an integer": lambda: make(every=1.5),
        "max_grad_norm: expected": lambda: make(max_grad_norm=0),
        "outer_optimizer: expected parameters": lambda: InstructionOptimizer(model, instruction, inner, inner),
        "outer_optimizer: expected parameters of the instruction": lambda: InstructionOptimizer(
            model, instruction, outer, inner
        ),
        "parameters: expected float32": lambda: hypergradient(*q.closures(), [low], [q.phi], alpha=0.1),
        "phi: expected one or more leaves": lambda: hypergradient(*q.closures(), [q.theta], [], alpha=0.1),
        "batch: expected input_ids": lambda: make().step(batch(position_ids=torch.zeros(4, 9)), batch()),
        "attention_mask: expected shape": lambda: make().step(batch(attention_mask=torch.ones(4, 3)), batch()),
        "attention_mask: expected the real tokens of each row in one run": lambda: make().step(
            batch(attention_mask=torch.tensor([1, 0] + [1] * 9).expand(4, -1)), batch()
        ),
        "labels: expected shape": lambda: make().step(batch(labels=torch.zeros(4, 3, dtype=torch.long)), batch()),
        "labels: expected shape [4, 11] as": lambda: EncodedInstruction(embedding, length=1)(
            batch(labels=torch.zeros(4, 3, dtype=torch.long))
        ),
        "labels: expected -100 wherever": lambda: make().step(batch(labels=batch()["input_ids"]), batch()),
        "max_grad_norm: expected a number > 0, got None": lambda: make(max_grad_norm=None),
        "instruction: expected at most 256 tokens": lambda: prepend_instruction(model, batch(), *long(batch())),
        "alpha: expected at most 2 / |lambda|": lambda: make(alpha=1e3).step(batch(), batch()),
        "model: expected token embeddings without": lambda: InstructionOptimizer(
            bitune_model(peft=lora(target_modules=["embed_tokens"])), instruction, inner, outer
        ),
    }
    before = [p.detach().clone() for p in (*model.parameters(), *instruction.parameters())]
    for message, call in cases.items():
        with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
            call()
    assert all(torch.equal(p, x) for p, x in zip((*model.parameters(), *instruction.parameters()), before, strict=True))


def test_alpha_may_be_as_large_as_the_series_bears():
    model = bitune_model()
    instruction = SoftInstruction(model.get_input_embeddings(), length=2)

    def step(alpha):
        optimizer = InstructionOptimizer(model, instruction, *optimizers(model, instruction), alpha=alpha)
        optimizer.step(batch(), batch(seed=1))

    with pytest.raises(ValueError, match=r"alpha: expected at most 2 / \|lambda\|") as error:
        step(1e3)
    limit = float(re.search(r"= (\S+) of", str(error.value))[1])
    with pytest.raises(ValueError, match="alpha: expected at most"):
        step(1.1 * limit)
    step(0.9 * limit)


def test_training_tasks_in_the_validation_are_warned_of():
    model = bitune_model()
    instruction = SoftInstruction(model.get_input_embeddings(), length=2, num_tasks=2)
    optimizer = InstructionOptimizer(model, instruction, *optimizers(model, instruction), k=0)
    train = batch(task_ids=torch.tensor([0, 0, 1, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step(train, batch(task_ids=torch.tensor([2, 3, 2, 3])))
    with pytest.warns(
        UserWarning, match=r"^val_batch: expected tasks that aren't trained on, got training tasks \[1\]"
    ):
        optimizer.step(train, batch(task_ids=torch.tensor([2, 1, 2, 3])))


def test_the_example_chooses_the_right_instruction_through_training_and_the_leak_without(capsys):
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "choose_instruction.py"))
    del example["METHODS"]["bilevel, k = 0"]  # which it shows and promises nothing of
    assert example["main"](["--seeds", "1"]) == 0
    assert len(re.findall(r"^ +0  .*\d\.\d\d$", capsys.readouterr().out, re.M)) == 1 + len(example["METHODS"])
