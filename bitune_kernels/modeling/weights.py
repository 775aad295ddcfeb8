"""What a pass needs the base weights to be: whole, on one device and as they were loaded; and accelerate's state."""

from __future__ import annotations

import sys
import warnings

from torch import nn


def check_weights(model: nn.Module) -> None:
    """Refuse weights that a pass can't read (ValueError), and keep 4-bit ones as they are."""
    for name, parameter in model.named_parameters():
        refuse_partitioned(name, parameter)
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"base_model: expected whole weights, got {name} as a DTensor (tp_plan, distributed_config or "
                "fully_shard); FSDP2 shards a Bitune model once it is one"
            )
    devices = sorted(set(map(str, getattr(model, "hf_device_map", {}).values())))
    if len(devices) > 1:
        raise ValueError(
            f"base_model: expected all layers on one device, got a device_map over {', '.join(devices)}; FSDP2 spreads "
            "a model over several GPUs"
        )
    _refuse_packed(model)
    _keep_as_loaded(model)


def refuse_partitioned(name: str, parameter: nn.Parameter) -> None:
    """Raise ValueError if DeepSpeed ZeRO-3 has partitioned the parameter.

    It gathers weights while the module that holds them is called. A pass reads adapters and their base weight from one
    place, and the mixing coefficients from outside of their module, where only empty tensors would be found.
    """
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            f"base_model: expected whole parameters or FSDP2's (fully_shard), got {name} partitioned by DeepSpeed "
            "ZeRO-3, which doesn't gather weights where a Bitune pass reads them; use ZeRO stage 1 or 2"
        )


def check_accelerate() -> None:
    """Refuse or warn of what accelerate's state says of this process, where it has any.

    Raises:
        ValueError: the tokens of a sample are spread over processes.
    """
    module = sys.modules.get("accelerate.state")
    state = module.AcceleratorState._shared_state if module else {}
    for name in ("cp_size", "sp_size"):
        size = getattr(state.get("parallelism_config"), name, 1)
        if size > 1:
            raise ValueError(f"parallelism_config: expected {name}=1, since a pass needs whole samples, got {size}")
    kind = getattr(state.get("fsdp_plugin"), "state_dict_type", None)
    if kind is not None and kind.name == "SHARDED_STATE_DICT":
        warnings.warn(
            "state_dict_type: expected FULL_STATE_DICT, since Trainer's sharded checkpoints hold the active adapter "
            "alone, neither 'bidir' nor the mixing coefficients; got SHARDED_STATE_DICT",
            stacklevel=3,
        )


def _refuse_packed(model: nn.Module) -> None:
    """Refuse weights in a packed format without the layer of a library that knows how to multiply by them."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module) is nn.Linear and type(weight) is nn.Parameter and weight.dtype.itemsize == 1:
            raise ValueError(
                f"base_model: expected floating-point weights, or layers of a library that dequantizes them "
                f"(bitsandbytes, torchao), got a plain nn.Linear of {weight.dtype} at {name}"
            )
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"base_model: expected 4-bit weights as they were loaded, got {name} as bitsandbytes packs it in a "
                "pass without gradients, for a product that has none; load the model again"
            )


def _keep_as_loaded(model: nn.Module) -> None:
    """Let 4-bit weights stay what training can go on with.

    On a CPU with AVX512-BF16, bitsandbytes packs them anew in the first pass without gradients, rounded, and for a
    product through which no gradient comes back in a later pass either.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
