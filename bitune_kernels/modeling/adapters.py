"""Which adapter serves which rows of a pass.

Plain LoRA on nn.Linear is our own PEFT layer, made through PEFT's door for custom LoRA modules. Every other tuner
layer (DoRA, IA3, VeRA, LoRA on embeddings, trained copies of whole modules, ...) keeps its own forward, which hooks
let run once per block of rows with that block's adapter: exact for any tuner.
"""

from __future__ import annotations

import copy
from collections import Counter
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


class CausalMerge:
    """The adapter "causal" added to the base weights, and taken out again to the bit.

    Subtracting what was added would leave the rounding of both steps in the base weights. They are kept beside the
    merged ones instead, which costs the memory of every adapted weight once more.

    Raises:
        ValueError: base weights that can't be merged and restored: quantized, sharded, or used elsewhere unadapted.
    """

    def __init__(self, model: nn.Module):
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for module in self._layers:
            if module.merged:
                raise ValueError(f"merged_decoding: expected unmerged adapters, got {module.merged_adapters} merged")
            for name, p in module.get_base_layer().named_parameters():
                kind = type(module.get_base_layer()).__name__
                if type(p) is not nn.Parameter or not p.is_floating_point():
                    raise ValueError(
                        f"merged_decoding: expected whole floating-point base weights, got the {name} of a {kind} as "
                        f"{type(p).__name__} of {p.dtype}"
                    )
                if names[id(p)] > 1:
                    raise ValueError(
                        f"merged_decoding: expected base weights of one module each, got the {name} of a {kind}, which "
                        "is tied to a module without this adapter"
                    )

    @torch.no_grad()
    def apply(self) -> None:
        """Merge, unless they are merged; what fails on the way leaves the base weights as they were."""
        if self._kept:
            return
        try:
            for module in self._layers:
                self._kept += [(p, p.detach().clone()) for p in module.get_base_layer().parameters()]
                module.merge(adapter_names=[CAUSAL])
        except Exception:
            self.undo()
            raise

    @torch.no_grad()
    def undo(self) -> None:
        """Put the base weights back, if they are merged."""
        if not self._kept:
            return
        for module in self._layers:
            if module.merged:
                module.unmerge()
        for p, kept in self._kept:
            p.copy_(kept)
        self._kept.clear()
