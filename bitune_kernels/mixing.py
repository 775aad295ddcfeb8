"""theta -> alpha -> mix: the trained weight of the bidirectional stream, always in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from .autocast import without_autocast
from .config import GRANULARITIES, MIXINGS, BituneConfig
from .folders import existing

MIXING_NAME = "bitune_mixing.safetensors"


def read_mixing(folder: str | Path) -> dict[str, torch.Tensor]:
    """What ``MixingCoefficients.save`` wrote into ``folder``, by the names of the parameters."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = existing(folder, MIXING_NAME)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole file of safetensors; {error}") from None


def mix(causal: torch.Tensor, bidir: torch.Tensor, alpha, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``(1 - alpha) * causal + alpha * bidir``, rounded to the dtype of ``causal``.

    causal, bidir [rows, heads, head_dim]; alpha scalar, [heads] or [rows, 1 or heads]; computed in ``dtype``, by
    default float32 (float64 for float64 input). Differentiable in all three.
    """
    dtype = dtype or torch.promote_types(causal.dtype, torch.float32)
    alpha = torch.as_tensor(alpha, dtype=dtype, device=causal.device)[..., None]
    return torch.lerp(causal.to(dtype), bidir.to(dtype), alpha).to(causal.dtype)


def mix_prompts(streams: Sequence[torch.Tensor], alpha) -> torch.Tensor:
    """Keys or values of the prompts, [N, heads, dim] of each stream -> as answers see them: mixed, or one stream's."""
    return streams[0] if len(streams) == 1 else mix(streams[1], streams[0], alpha)


class MixingCoefficients(nn.Module):
    """The trained parameters ``theta_*`` and the weights of the bidirectional stream that they stand for.

    ``alpha = f(theta) / (f(theta) + theta_init)`` with f = abs (the paper's Eq. 8) or relu, so alpha lies in
    [0, 1) and starts at 0.5. Shapes: [layers] for "layer", [layers, heads] for "head", [1] for "global".
    The parameters stay float32 whatever dtype the model is moved to.

    Args:
        num_layers: of the model.
        num_heads_kv: of each layer: the heads of alpha_k and alpha_v.
        weights: which there are: "k" and "v" for the mixed keys and values, "beta" for the prompt's mixed outputs.
        mixing, granularity, theta_init: as in ``BituneConfig``.
        num_heads_q: the heads of beta.
        beta_init: in (0, 1), where beta starts.
        gate_features: per layer the size of a prompt's state from which ``gated`` moves alpha; None: alpha is fixed.
        device: of the parameters.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads_kv: int,
        *,
        weights: tuple[str, ...] = ("k", "v"),
        mixing: str = BituneConfig.mixing,
        granularity: str = BituneConfig.mixing_granularity,
        theta_init: float = BituneConfig.theta_init,
        num_heads_q: int | None = None,
        beta_init: float = BituneConfig.beta_init,
        gate_features: list[int] | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if mixing not in MIXINGS:
            raise ValueError(f"mixing: expected one of {', '.join(MIXINGS)}, got {mixing!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        self.num_layers, self.mixing, self.granularity, self.theta_init = num_layers, mixing, granularity, theta_init
        self.weights = tuple(weights)
        for name in self.weights:
            heads, start = (num_heads_q, beta_init) if name == "beta" else (num_heads_kv, 0.5)
            shape = {"layer": (num_layers,), "head": (num_layers, heads), "global": (1,)}[granularity]
            theta = torch.full(shape, theta_init * start / (1 - start), dtype=torch.float32, device=device)
            self.register_parameter(f"theta_{name}", nn.Parameter(theta))
        self.gate = None
        if gate_features is not None:
            columns = 2 * (num_heads_kv if granularity == "head" else 1)
            gates = [torch.zeros(n, columns, dtype=torch.float32, device=device) for n in gate_features]
            self.gate = nn.ParameterList(gates)

    @classmethod
    def from_config(cls, config: BituneConfig, num_layers: int, num_heads_kv: int, **sizes) -> MixingCoefficients:
        """Those of a config that mixes something; ``sizes``: num_heads_q, gate_features and device."""
        return cls(
            num_layers,
            num_heads_kv,
            weights=config.mixed,
            mixing=config.mixing,
            granularity=config.mixing_granularity,
            theta_init=config.theta_init,
            beta_init=config.beta_init,
            **sizes,
        )

    def _apply(self, fn, recurse=True):
        # .bfloat16() or .to(dtype) of the whole model must not round theta: follow its moves between devices only.
        def keep_dtype(x):
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of ``alphas()``: "alpha_k", "alpha_v", "beta", those that there are."""
        return tuple(name if name == "beta" else f"alpha_{name}" for name in self.weights)

    def alphas(self) -> tuple[torch.Tensor, ...]:
        """The weights of all layers, in the order of ``weights``: float32, of the thetas' shapes. Differentiable."""
        return tuple(self._alpha(getattr(self, f"theta_{name}")) for name in self.weights)

    def alpha(
        self, layer: int, alphas: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``alpha_k, alpha_v`` of one layer: float32, scalars or [num_heads_kv]; None where nothing is mixed.

        ``alphas``: what ``alphas()`` gave, to read this layer's from; None: computed here.
        """
        return self._of_layer("k", layer, alphas), self._of_layer("v", layer, alphas)

    def beta(self, layer: int, alphas: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor | None:
        """Likewise the weight of the prompt's bidirectional attention: a scalar or [num_heads_q]."""
        return self._of_layer("beta", layer, alphas)

    def gated(
        self, layer: int, alphas: tuple[torch.Tensor, ...] | None, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``alpha_k, alpha_v`` of each sample, float32 [samples, 1 or num_heads_kv].

        The odds alpha / (1 - alpha) of the layer are multiplied by exp(gate), where gate is linear in ``state``
        [samples, gate_features[layer]] over its root mean square, and zero before training.
        """
        state = state * state.square().mean(-1, keepdim=True).add(1e-12).rsqrt()
        with without_autocast(state):
            gates = (state @ self.gate[layer].float()).clamp(-20, 20).chunk(2, dim=1)
        pairs = zip(self.alpha(layer, alphas), gates, strict=True)
        return tuple(alpha / (alpha + (1 - alpha) * torch.exp(-gate)) for alpha, gate in pairs)

    def _of_layer(self, name: str, layer: int, alphas: tuple[torch.Tensor, ...] | None) -> torch.Tensor | None:
        if name not in self.weights:
            return None
        index = 0 if self.granularity == "global" else layer
        return (self.alphas() if alphas is None else alphas)[self.weights.index(name)][index]

    def _alpha(self, theta: torch.Tensor) -> torch.Tensor:
        theta = theta.float()  # FSDP2's mixed precision gathers it in a lower dtype
        f = theta.abs() if self.mixing == "abs" else theta.relu()
        return f / (f + self.theta_init)

    def save(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write ``bitune_mixing.safetensors`` into ``folder``. ``state_dict``: tensors to take in place of its own."""
        from safetensors.torch import save_file

        state = dict(self.named_parameters()) | dict(state_dict or {})
        state = {name: x.detach().float().cpu().contiguous() for name, x in state.items()}
        save_file(state, Path(folder, MIXING_NAME), metadata={"format": "pt"})

    def load(self, folder: str | Path) -> None:
        """Read what ``save`` wrote; refuse other shapes and values that aren't finite (ValueError)."""
        state, path = read_mixing(folder), Path(folder, MIXING_NAME)
        for name, theta in self.named_parameters():
            found = None if name not in state else tuple(state[name].shape)
            if found != tuple(theta.shape):
                raise ValueError(f"{path}: expected {name} of shape {tuple(theta.shape)}, got {found}")
            if not bool(torch.isfinite(state[name]).all()):
                raise ValueError(f"{path}: expected finite {name}, got {state[name].flatten().tolist()}")
        self.load_state_dict(state)

    def extra_repr(self) -> str:
        weights = ", ".join(self.weights)
        return f"{weights}, {self.num_layers} layers, mixing={self.mixing!r}, granularity={self.granularity!r}"
