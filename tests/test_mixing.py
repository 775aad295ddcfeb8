"""theta -> alpha, and that theta stays float32."""

import pytest
import torch
from torch import nn

from bitune_kernels import BituneConfig, MixingCoefficients

THETAS = [0.01, 0.0, -0.02, 0.5, -3.0]


def coefficients(thetas=THETAS, **options):
    module = MixingCoefficients(len(thetas), 2, **options)
    with torch.no_grad():
        module.theta_k.copy_(torch.tensor(thetas))
        module.theta_v.copy_(-torch.tensor(thetas))
    return module


@pytest.mark.parametrize("theta_init", [0.01, 0.1])
def test_abs(theta_init):
    module = coefficients(theta_init=theta_init)
    for layer, theta in enumerate(THETAS):
        expected = abs(theta) / (abs(theta) + theta_init)
        for alpha in module.alpha(layer):
            assert alpha.dtype == torch.float32 and alpha.shape == ()
            assert alpha.item() == pytest.approx(expected, rel=1e-6)


def test_relu_is_dead_below_zero():
    module = coefficients(mixing="relu")
    for layer, theta in enumerate(THETAS):
        for alpha, value in zip(module.alpha(layer), (theta, -theta), strict=True):
            assert alpha.item() == pytest.approx(max(value, 0) / (max(value, 0) + 0.01), rel=1e-6)
    sum(sum(module.alpha(layer)) for layer in range(len(THETAS))).backward()
    assert ((module.theta_k.grad > 0) == (module.theta_k > 0)).all()
    assert ((module.theta_v.grad > 0) == (module.theta_v > 0)).all()


@pytest.mark.parametrize(("theta", "slope"), [(0.02, 0.01 / 0.03**2), (-0.02, -0.01 / 0.03**2)])
def test_gradient_of_abs(theta, slope):
    module = coefficients([theta])
    module.alpha(0)[0].backward()
    assert module.theta_k.grad.item() == pytest.approx(slope, rel=1e-5)
    assert module.theta_v.grad is None


@pytest.mark.parametrize("theta_init", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("mixing", ["abs", "relu"])
@pytest.mark.parametrize("granularity", ["layer", "head", "global"])
def test_alpha_starts_at_one_half(granularity, mixing, theta_init):
    module = MixingCoefficients(3, 2, mixing=mixing, granularity=granularity, theta_init=theta_init)
    for layer in range(3):
        for alpha in module.alpha(layer):
            torch.testing.assert_close(alpha, torch.full_like(alpha, 0.5))


@pytest.mark.parametrize(
    ("granularity", "theta_shape", "alpha_shape"),
    [("layer", (3,), ()), ("head", (3, 2), (2,)), ("global", (1,), ())],
)
def test_granularity(granularity, theta_shape, alpha_shape):
    config = BituneConfig(None, mixing_granularity=granularity, dynamic_mixing=True)
    module = MixingCoefficients.from_config(config, 3, 2, gate_features=[8] * 3)
    assert module.theta_k.shape == module.theta_v.shape == theta_shape
    assert {alpha.shape for alpha in module.gated(0, None, torch.ones(5, 8))} == {(5, *(alpha_shape or (1,)))}
    with torch.no_grad():
        for theta in (module.theta_k, module.theta_v):
            theta.copy_(torch.arange(1, theta.numel() + 1).view(theta_shape))
    alphas = [module.alpha(layer)[0] for layer in range(3)]
    assert all(alpha.shape == alpha_shape for alpha in alphas)
    assert len({tuple(alpha.reshape(-1).tolist()) for alpha in alphas}) == (1 if granularity == "global" else 3)


CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_theta_stays_float32_when_the_model_is_cast(cast):
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "mixing": coefficients([0.0123456789, -0.3])})
    module = model["mixing"]
    module.theta_v.requires_grad_(False)
    module.theta_k.grad = torch.tensor([0.1, 0.2])
    before = {name: (theta, theta.detach().clone()) for name, theta in module.named_parameters()}
    cast(model)
    assert model["linear"].weight.dtype != torch.float32
    for name, theta in module.named_parameters():
        parameter, value = before[name]
        assert theta.dtype == torch.float32 and torch.equal(theta, value)
        assert theta is parameter, "an optimizer made before the cast must still train theta"
        assert theta.requires_grad == (name == "theta_k")
    assert torch.equal(module.theta_k.grad, torch.tensor([0.1, 0.2]))


@torch.no_grad()
def test_gates_are_float32_under_autocast():
    module = MixingCoefficients(3, 2, gate_features=[6] * 3)
    for gate in module.gate:
        gate.normal_()
    state = torch.randn(4, 6)
    expected = module.gated(1, None, state)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.gated(1, None, state)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_meta_device_and_back():
    module = MixingCoefficients(3, 2, gate_features=[8] * 3, device="meta").bfloat16()
    assert all(p.is_meta and p.dtype == torch.float32 for p in module.parameters())
    module = module.to_empty(device="cpu")
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in module.parameters())
    assert all(p.is_meta for p in module.to("meta").parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": "tanh"}, "mixing: expected one of abs, relu"),
        ({"granularity": "token"}, "granularity: expected"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MixingCoefficients(3, 2, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_loaded(value, tmp_path):
    module, broken = coefficients(), coefficients()
    before = module.theta_v.detach().clone()
    with torch.no_grad():
        broken.theta_v[1] = value
    broken.save(tmp_path)
    with pytest.raises(ValueError, match="expected finite theta_v"):
        module.load(tmp_path)
    assert torch.equal(module.theta_v, before)
