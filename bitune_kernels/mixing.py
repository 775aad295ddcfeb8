"""theta -> alpha -> mix: the trained weight of the bidirectional stream, always in float32."""

from __future__ import annotations

import torch
from torch import nn

from .config import GRANULARITIES, MIXINGS


def mix(causal: torch.Tensor, bidir: torch.Tensor, alpha, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``(1 - alpha) * causal + alpha * bidir``, rounded to the dtype of ``causal``.

    causal, bidir [rows, heads, head_dim]; alpha scalar or [heads]; computed in ``dtype``, by default float32
    (float64 for float64 input). Differentiable in all three.
    """
    dtype = dtype or torch.promote_types(causal.dtype, torch.float32)
    alpha = torch.as_tensor(alpha, dtype=dtype, device=causal.device)
    alpha = alpha[:, None] if alpha.ndim else alpha
    return torch.lerp(causal.to(dtype), bidir.to(dtype), alpha).to(causal.dtype)


class MixingCoefficients(nn.Module):
    """The trained parameters ``theta_k`` and ``theta_v`` and the alphas they stand for.

    ``alpha = f(theta) / (f(theta) + theta_init)`` with f = abs (the paper's Eq. 8) or relu, so alpha lies in
    [0, 1) and starts at 0.5. Shapes: [layers] for "layer", [layers, num_heads_kv] for "head", [1] for "global".
    The parameters stay float32 whatever dtype the model is moved to.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads_kv: int,
        *,
        mixing: str = "abs",
        granularity: str = "layer",
        theta_init: float = 0.01,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if mixing not in MIXINGS:
            raise ValueError(f"mixing: expected one of {', '.join(MIXINGS)}, got {mixing!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        shape = {"layer": (num_layers,), "head": (num_layers, num_heads_kv), "global": (1,)}[granularity]
        self.num_layers, self.mixing, self.granularity, self.theta_init = num_layers, mixing, granularity, theta_init
        theta = torch.full(shape, float(theta_init), dtype=torch.float32, device=device)
        self.theta_k = nn.Parameter(theta)
        self.theta_v = nn.Parameter(theta.clone())

    def _apply(self, fn, recurse=True):
        # .bfloat16() or .to(dtype) of the whole model must not round theta: follow its moves between devices only.
        def keep_dtype(x):
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def alphas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``alpha_k, alpha_v`` of all layers: float32, of the thetas' shapes. Differentiable in theta."""
        return self._alpha(self.theta_k), self._alpha(self.theta_v)

    def alpha(self, layer: int, alphas: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``alpha_k, alpha_v`` of one layer: float32, scalars or [num_heads_kv]. Differentiable in theta.

        ``alphas``: what ``alphas()`` gave, to read this layer's from; None: computed here.
        """
        index = 0 if self.granularity == "global" else layer
        alpha_k, alpha_v = self.alphas() if alphas is None else alphas
        return alpha_k[index], alpha_v[index]

    def _alpha(self, theta: torch.Tensor) -> torch.Tensor:
        f = theta.abs() if self.mixing == "abs" else theta.relu()
        return f / (f + self.theta_init)

    def check_finite(self) -> None:
        """Raise ValueError if a theta is nan or infinite (reads the values: synchronizes a GPU)."""
        for name, theta in self.named_parameters():
            if not theta.is_meta and not bool(torch.isfinite(theta).all()):
                raise ValueError(f"{name}: expected finite values, got {theta.detach().flatten().tolist()}")

    def extra_repr(self) -> str:
        return f"{tuple(self.theta_k.shape)}, mixing={self.mixing!r}, granularity={self.granularity!r}"
