"""Learning rates of their own for the thetas and for the adapters."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, theta_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trained parameters of a Bitune model as two groups, adapters and thetas, for any torch optimizer.

    Pass it on as ``Trainer(optimizers=(torch.optim.AdamW(parameter_groups(model, 3e-4, 1e-2)), None))``.

    Args:
        lr, theta_lr: learning rates > 0 of adapters and thetas; ``theta_lr`` None: ``lr``.
        weight_decay: >= 0, of the adapters alone: decay would pull theta, and alpha with it, to 0.

    Returns:
        One dict per group that has parameters: name, params, lr, weight_decay.

    Raises:
        ValueError: a rate out of range, or nothing to train.
    """
    theta_lr = lr if theta_lr is None else theta_lr
    for name, value in (("lr", lr), ("theta_lr", theta_lr)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay}")
    mixing = getattr(model, "mixing", None)
    thetas = [p for p in (mixing.parameters() if mixing is not None else ()) if p.requires_grad]
    known = {id(p) for p in thetas}
    adapters = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"name": "adapters", "params": adapters, "lr": lr, "weight_decay": weight_decay},
        {"name": "thetas", "params": thetas, "lr": theta_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"model: expected parameters that require gradients, got none in {type(model).__name__}")
    return groups
