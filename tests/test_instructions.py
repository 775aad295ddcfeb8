"""Learned instructions: the hypergradient against unrolled training, and what the optimizer leaves as it was."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call

from bitune_kernels.training import (
    EncodedInstruction,
    InstructionOptimizer,
    InstructionSelector,
    SoftInstruction,
    hypergradient,
    largest_curvature,
    prepend_instruction,
)
from tests.tiny import base_model, bitune_model, lora, ragged_batch


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


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-13), ("finite", 1e-9)])
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


def test_curvature_is_the_largest_eigenvalue():
    q = Quadratic()
    q.a = torch.diag(torch.tensor([9.0, 2, 1, 1, 0.5, 0.1], dtype=torch.float64))
    for method in ("exact", "finite"):
        assert largest_curvature(q.closures()[0], [q.theta], method=method) == pytest.approx(9, rel=1e-4)


def test_a_lora_transformer_at_its_optimum_is_unrolled_training():
    base = base_model(dtype=torch.float64, num_hidden_layers=1, hidden_size=16, intermediate_size=16, head_dim=4)
    model = get_peft_model(
        base, lora(r=2, target_modules=["q_proj", "v_proj", "down_proj"]), autocast_adapter_dtype=False
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

    def train(theta, phi):
        vectors = phi[0].expand(4, -1, -1)
        inputs = prepend_instruction(model, train_batch, vectors, torch.ones(4, 2, dtype=torch.bool))
        loss = functional_call(model, dict(zip(names, theta, strict=True)), (), inputs).loss
        # the optimum shall neither be at infinity nor at adapters of zeros
        return loss + 0.02 * sum((p - p0).square().sum() for p, p0 in zip(theta, start, strict=True))

    def val(theta, phi):
        return functional_call(model, dict(zip(names, theta, strict=True)), (), val_batch).loss

    phi = [instruction.vectors]
    solver = torch.optim.LBFGS(
        theta, max_iter=400, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = train(theta, phi)
        loss.backward(inputs=theta)
        return loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        solver.step(closure)
        assert max(float(p.grad.abs().max()) for p in theta) < 1e-7
        losses = (lambda: train(theta, phi), lambda: val(theta, phi))
        alpha = 1 / largest_curvature(losses[0], theta, method="exact")
        for k in (0, 1, 5):
            expected, _ = unrolled(train, val, theta, phi, alpha, k + 1)
            for method, rtol in (("exact", 1e-5), ("finite", 1e-3)):
                close(hypergradient(*losses, theta, phi, alpha=alpha, k=k, method=method), expected, rtol)


class Counted:
    """A model that also notes its random state, its parameters and its dropout at each call."""

    def __init__(self, model):
        self.model, self.states = model, []
        model.register_forward_pre_hook(lambda *_: self.states.append(torch.get_rng_state()))


def optimizers(model, instruction, lr=0.05, outer_lr=0.1):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr), torch.optim.Adam(instruction.parameters(), outer_lr)


@pytest.mark.parametrize("kind", ["soft", "encoded", "selector"])
def test_finite_on_one_pass_is_exact_on_three(kind):
    model = bitune_model(variant="bitune").eval()
    embedding = model.get_input_embeddings()
    torch.manual_seed(0)
    instruction = {
        "soft": lambda: SoftInstruction(embedding, length=3, num_tasks=2),
        "encoded": lambda: EncodedInstruction(embedding, length=2, width=8),
        "selector": lambda: InstructionSelector(embedding, [[5, 6], [], [7, 8, 9]], num_tasks=2),
    }[kind]()
    if kind == "selector":
        instruction.logits.data.normal_()
    train_batch, val_batch = batch("left", task_ids=torch.tensor([0, 1, 1, 0])), batch(seed=1)
    theta = [p for p in model.parameters() if p.requires_grad]
    phi = list(instruction.parameters())
    losses = (
        lambda: model(**prepend_instruction(model, train_batch, *instruction(train_batch))).loss,
        lambda: model(**val_batch).loss,
    )
    finite = hypergradient(*losses, theta, phi, alpha=0.05, k=2)
    with pytest.raises(ValueError, match=r"^train_loss: expected operators .* got _SegmentLora"):
        hypergradient(*losses, theta, phi, alpha=0.05, k=2, method="exact")
    with model.use_schedule(use_fused=False):
        exact = hypergradient(*losses, theta, phi, alpha=0.05, k=2, method="exact")
    assert all(float(x.norm()) > 0 for x in exact)
    close(finite, exact, 2e-2)
