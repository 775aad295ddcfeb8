"""Which adapter serves which rows of a pass.

Plain LoRA on nn.Linear is our own PEFT layer, made through PEFT's door for custom LoRA modules. Every other tuner
layer (DoRA, IA3, VeRA, LoRA on embeddings, trained copies of whole modules, ...) keeps its own forward, which hooks
let run once per block of rows with that block's adapter: exact for any tuner.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..lora.segment import segment_lora_linear
from .passes import current

CAUSAL, BIDIR = "causal", "bidir"


@contextmanager
def _using(module, adapter: str):
    active = module._active_adapter
    module._active_adapter = [adapter]
    try:
        yield
    finally:
        module._active_adapter = active


class SegmentLoraLinear(lora.Linear):
    """PEFT's LoRA linear, which in a pass serves the rows of both streams with their own adapters."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        p = current()
        block = None if p is None or self.disable_adapters else p.split(x)
        if block is None:
            return super().forward(x, *args, **kwargs)
        _, n = block
        rows = x.reshape(-1, x.shape[-1])
        if self._is_plain(rows):
            base = self.base_layer
            weights = [
                (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in (BIDIR, CAUSAL)
            ]
            y = segment_lora_linear(rows, base.weight, base.bias, n, *weights)
        elif any(name in self.lora_variant for name in (BIDIR, CAUSAL)):
            y = _by_blocks(self, super().forward, rows, n)
        else:  # dropout, a bias, other dtypes, a quantized base: PEFT's formula per block, the base read once
            y = self.base_layer(rows)
            y = (y + torch.cat([self._delta(rows[:n], BIDIR), self._delta(rows[n:], CAUSAL)])).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _is_plain(self, x: torch.Tensor) -> bool:
        if type(self.base_layer) is not nn.Linear or self.base_layer.weight.requires_grad or self.fan_in_fan_out:
            return False
        if torch.is_autocast_enabled(x.device.type) or self.base_layer.weight.dtype != x.dtype:
            return False
        return all(
            name not in self.lora_variant
            and not self.lora_bias[name]
            and self.lora_A[name].weight.dtype == x.dtype
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
            for name in (BIDIR, CAUSAL)
        )

    def _delta(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]


def _by_blocks(module, forward, x: torch.Tensor, n: int) -> torch.Tensor:
    with _using(module, BIDIR):
        bidir = forward(x[:n])
    with _using(module, CAUSAL):
        return torch.cat([bidir, forward(x[n:])])


def _before(module, args):
    # The first block runs here with its own adapter; the module's own call then gets the rest of the rows.
    p = current()
    block = None if p is None or not args else p.split(args[0])
    if block is None:
        return None
    dim, n = block
    x, *others = args
    with _using(module, BIDIR):
        bidir = module.forward(x.narrow(dim, 0, n), *others)
    p.pending.append((module, dim, bidir))
    return x.narrow(dim, n, x.shape[dim] - n), *others


def _after(module, args, output):
    p = current()
    if p is None or not p.pending or p.pending[-1][0] is not module:
        return None
    _, dim, bidir = p.pending.pop()
    return torch.cat([bidir, output], dim=dim)


def adapter_configs(config: PeftConfig) -> tuple[PeftConfig, PeftConfig]:
    """Two copies of the user's PEFT config, for "causal" and "bidir"."""
    copies = copy.deepcopy(config), copy.deepcopy(config)
    for c in copies:
        c.inference_mode = False
        if isinstance(c, LoraConfig):
            c._register_custom_module({nn.Linear: SegmentLoraLinear})
    return copies


def base_module(module: nn.Module) -> nn.Module:
    """What an adapted module was before it got adapters."""
    return module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module


def route_rows(model: nn.Module) -> list[nn.Module]:
    """Hook every adapted module that doesn't route rows by itself; returns all adapted modules."""
    adapted = []
    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if type(module).__name__ == "ParamWrapper":
            raise ValueError(
                f"peft: adapters on the expert parameters of {name} can't serve two streams, since experts see a "
                "selection of the tokens; expected target_modules without experts (attention only, for example)"
            )
        adapted.append(module)
    for module in adapted:
        if not isinstance(module, SegmentLoraLinear):
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after)
    return adapted
