"""Weights saved by the authors' code, under its names, into a Bitune model.

Their adapters are called "default" (here: causal) and "prefill" (here: bidir), and theta lies in the modules
``pass_scale_k`` and ``pass_scale_v``, of which only PEFT's copy for "default" is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from .adapters import BIDIR, CAUSAL

_ADAPTERS = {"default": CAUSAL, "prefill": BIDIR}
_ADAPTER_PARTS = r"lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l"
_THETA = re.compile(r"(?:^|\.)pass_scale_([kv])\.(?:modules_to_save\.default\.)?weight$")
_UNUSED = re.compile(r"(?:^|\.)pass_scale_[kv]\.|\.rotary_emb\.inv_freq$")


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    # PEFT writes "default" into the folder itself and other adapters into folders of their own, without adapter names.
    state = {}
    for adapter, place in (("default", folder), ("prefill", folder / "prefill")):
        files = [*sorted(place.glob("*.safetensors")), *sorted(place.glob("*.bin"))] if place.is_dir() else []
        for file in files:
            if file.suffix == ".safetensors":
                weights = load_file(file)
            else:  # which names the device that the tensors were saved from
                weights = torch.load(file, map_location="cpu", weights_only=True)
            for name, tensor in weights.items():
                if adapter == "prefill" and "pass_scale" in name:
                    continue
                state[re.sub(rf"\.({_ADAPTER_PARTS})(\.weight)?$", rf".\1.{adapter}\2", name)] = tensor
    if not state:
        raise FileNotFoundError(f"{folder}: expected *.safetensors or *.bin files of a checkpoint, found none")
    return state


def _our_name(name: str, ours: Mapping[str, torch.Tensor]) -> str | None:
    """The name here of one of the authors' tensors, or None if this model has no such tensor."""
    part = re.search(rf"\.(?:{_ADAPTER_PARTS})\.(\w+)(\.weight)?$", name)
    if part:
        if part[1] not in _ADAPTERS:
            return None
        name = f"{name[: part.start(1)]}{_ADAPTERS[part[1]]}{part[2] or ''}"
    for candidate in (name, f"{name}.weight", re.sub(r"\.(weight|bias)$", r".base_layer.\1", name)):
        if candidate in ours:
            return candidate
    return None


def load_official_checkpoint(model, state_dict_or_folder: Mapping[str, torch.Tensor] | str | Path) -> None:
    """Load adapters, theta and (where present) base weights that the authors' code saved.

    Args:
        model: a BituneModel of the same base model, adapters and variant.
        state_dict_or_folder: tensors under the authors' names, or a folder with their ``.safetensors`` or ``.bin``
            files.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: a tensor that is missing, unexpected, not finite or of another shape; nothing is changed then.
    """
    if isinstance(state_dict_or_folder, Mapping):
        theirs = dict(state_dict_or_folder)
    elif Path(state_dict_or_folder).is_dir():
        theirs = _read_folder(Path(state_dict_or_folder))
    else:
        raise FileNotFoundError(f"{state_dict_or_folder}: expected a state dict or an existing folder")

    if model.config.model_type == "gemma" and model.config.hidden_act == "gelu":
        raise ValueError(
            "model: expected hidden_act='gelu_pytorch_tanh', got 'gelu', by which Gemma configs of the authors' time "
            "mean the tanh approximation; load the base model with the changed config"
        )
    ours = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    mixed = model.bitune_config.mixed
    thetas = {name: getattr(model.mixing, f"theta_{name}") for name in ("k", "v") if name in mixed}
    two_adapters = BIDIR in model.peft_config
    loads, loaded, unexpected = [], set(), []
    for name, tensor in theirs.items():
        theta = _THETA.search(name)
        if theta and theta[1] in thetas:
            parameter = thetas[theta[1]]
            if tensor.numel() != parameter.numel():
                raise ValueError(
                    f"{name}: expected {parameter.numel()} values (mixing_granularity="
                    f"{model.mixing.granularity!r}), got {list(tensor.shape)}"
                )
            loads.append((name, parameter, tensor.reshape(parameter.shape)))
            loaded.add(f"mixing.theta_{theta[1]}")
            continue
        if _UNUSED.search(name) or (not two_adapters and re.search(rf"\.(?:{_ADAPTER_PARTS})\.prefill\b", name)):
            continue
        found = _our_name(name, ours)
        if found is None:
            unexpected.append(name)
        elif tuple(ours[found].shape) != tuple(tensor.shape):
            raise ValueError(f"{name}: expected shape {list(ours[found].shape)}, got {list(tensor.shape)}")
        else:
            loads.append((name, ours[found], tensor))
            loaded.add(found)

    adapter = re.compile(rf"\.(?:{_ADAPTER_PARTS})\.(?:{CAUSAL}|{BIDIR})\b|^mixing\.")
    missing = sorted(name for name in ours if adapter.search(name) and name not in loaded)
    if unexpected or missing:
        raise ValueError(
            f"state_dict: expected the tensors of this model's adapters and theta; missing {missing[:3]} "
            f"({len(missing)}), unexpected {sorted(unexpected)[:3]} ({len(unexpected)})"
        )
    for name, _, tensor in loads:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values, got nan or infinite ones")
    with torch.no_grad():
        for _, parameter, tensor in loads:
            parameter.copy_(tensor)
