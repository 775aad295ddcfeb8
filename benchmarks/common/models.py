"""Models by name, with random weights, and the contexts in which one of them is what a provider's name says."""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig
from peft.tuners import lora
from transformers import AutoConfig, AutoModelForCausalLM

from bitune_kernels import BituneConfig, BituneModel, get_bitune_model
from bitune_kernels.modeling.adapters import SegmentLora, by_blocks


def _decoder(kind, hidden_size, mlp, layers, heads, heads_kv, vocab_size, positions, **rest):
    return kind, dict(
        hidden_size=hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        **rest,
    )


def _rope(theta: float, **rest) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **rest}


# Published configs with random weights, which multiply as fast as trained ones.
MODELS = {
    "tiny": _decoder("llama", 64, 128, 2, 4, 2, 512, 2048),
    "small": _decoder("llama", 768, 2048, 12, 12, 4, 32000, 8192),
    "gemma-2b": _decoder("gemma", 2048, 16384, 18, 8, 1, 256000, 8192, head_dim=256),
    "gemma-7b": _decoder("gemma", 3072, 24576, 28, 16, 16, 256000, 8192, head_dim=256),
    "llama2-7b": _decoder("llama", 4096, 11008, 32, 32, 32, 32000, 4096, rms_norm_eps=1e-5),
    "llama3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256, 8192, rms_norm_eps=1e-5, rope_parameters=_rope(5e5)),
    "phi-2": _decoder(
        "phi", 2560, 10240, 32, 32, 32, 51200, 2048, rope_parameters=_rope(1e4, partial_rotary_factor=0.4)
    ),
}


DEFAULT_MODEL = "small"


@dataclass
class Machine:
    """The checked arguments that say where a benchmark runs."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Setup(Machine):
    """And those that name the model."""

    name: str
    config: object  # of transformers
    folder: Path | None
    layers: int

    @property
    def text_config(self):
        return self.config.get_text_config()

    @property
    def max_length(self) -> int:
        return getattr(self.text_config, "max_position_embeddings", None) or 1 << 20


def find_device(p: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        p.error(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        p.error(f"--device: {name} asked for, but torch sees {torch.cuda.device_count()} GPUs here")
    if device.type == "cuda" and device.index is not None:  # set_device refuses "cuda"
        torch.cuda.set_device(device)
    return device


def model_config(p: argparse.ArgumentParser, model: str):
    if model in MODELS:
        kind, values = MODELS[model]
        return None, AutoConfig.for_model(kind, **values)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        p.error(f"--model: expected {', '.join(MODELS)} or a folder with a config.json, got {model!r}")
    return folder, AutoConfig.from_pretrained(folder, local_files_only=True)


def default_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16
    # A CPU without bfloat16 instructions takes several times longer for it than for float32: try.
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(256, 768, dtype=dtype)
        b = torch.ones(1024, 768, dtype=dtype)
        runs = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)
    return min(seconds, key=seconds.get)


def load_base(setup: Setup) -> torch.nn.Module:
    """The model in its dtype on its device, random or from its folder."""
    torch.manual_seed(0)
    with setup.device:
        if setup.folder is None:
            return AutoModelForCausalLM.from_config(setup.config, dtype=setup.dtype).eval()
        model = AutoModelForCausalLM.from_pretrained(
            setup.folder, config=setup.config, dtype=setup.dtype, local_files_only=True
        )
    return model.to(setup.device).eval()


# What is timed beside Bitune over the same weights, as fields of its config. "lora-packed" is plain LoRA through
# Bitune's path: one causal stream, all of whose rows have the adapter "causal".
TWINS = {
    "lora-packed": dict(variant="naive_bidir"),
    "single-stream": dict(variant="single_stream"),
    "single-stream-dual": dict(variant="single_stream_dual"),
}


@dataclass
class Models:
    """Models over the same weights: what runs beside what.

    Attributes:
        bitune: Bitune; with both streams off also plain LoRA in PEFT's own layers.
        twins: of ``TWINS``. Base weights and adapters are those of ``bitune``, so their gradients arrive there too.
    """

    bitune: BituneModel
    twins: dict[str, BituneModel]

    def of(self, provider: str) -> BituneModel:
        """The model that a provider's name asks for."""
        return self.twins.get(provider.partition("[")[0], self.bitune)

    @property
    def all(self) -> list[BituneModel]:
        return [self.bitune, *self.twins.values()]

    def zero_grad(self) -> None:
        for model in self.all:
            model.zero_grad(set_to_none=True)


def attach(base: torch.nn.Module, providers: Sequence[str] = ()) -> Models:
    """Two LoRA adapters (r=8, every linear) that differ and do something, in the dtype of the model, and the twins that
    these providers need."""
    peft = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    layers = base.config.get_text_config().num_hidden_layers

    def make(model: torch.nn.Module, **options) -> BituneModel:
        config = BituneConfig(peft=peft, **options)
        return get_bitune_model(model, config, autocast_adapter_dtype=False).eval()

    twins = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names in transformers that PEFT still asks for
        for name, options in TWINS.items():
            if name in {provider.partition("[")[0] for provider in providers}:
                twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # other modules, the same parameters
                causal = dict(skip_bidir=layers) if name == "lora-packed" else {}
                twins[name] = make(twin, **options, **causal)
        models = Models(make(base), twins)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in [x for model in models.all for x in model.named_parameters()]:
            if "lora_B" in name:  # PEFT starts them at zero, where a lost adapter would go unnoticed
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif "theta" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.03 + 0.002)
    for twin in twins.values():
        for name, module in list(twin.named_modules()):
            if isinstance(module, lora.Linear):
                original = models.bitune.get_submodule(name)
                for own, theirs in ((module.lora_A, original.lora_A), (module.lora_B, original.lora_B)):
                    for adapter in list(own):
                        own[adapter] = theirs[adapter]
    return models


@contextmanager
def scope(models: Models, provider: str):
    """Yields the model whose calls, inside, are what the provider's name says."""
    name, _, backend = provider.removesuffix("]").partition("[")
    model = models.of(provider)
    schedule = model.use_schedule(use_fused=bool(backend), backend=backend or None)
    layers = patch.object(SegmentLora, "_rows", _peft_rows) if name == "one-pass+peft" else nullcontext()
    with model.disable_bitune() if name == "lora" else schedule, layers:
        yield model


def _peft_rows(module: SegmentLora, x: torch.Tensor, n: int) -> torch.Tensor:
    # What a pass costs without a LoRA layer of its own: PEFT's, once for each adapter's block of rows.
    return by_blocks(module, partial(lora.Linear.forward, module), 0, n, x)


@contextmanager
def float32_inference(model: torch.nn.Module):
    """Inside, calls without gradients compute in float32, one block's weights widened at a time.

    So the oracle needs the memory of one more layer and not that of a second model; rounding back is exact.
    """

    def widen(module, args):
        for parameter in module.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                narrow[parameter] = parameter.dtype
                parameter.data = parameter.data.float()

    def restore(module, args, output):
        for parameter in module.parameters():
            if parameter in narrow:
                parameter.data = parameter.data.to(narrow.pop(parameter))

    narrow: dict[torch.nn.Parameter, torch.dtype] = {}
    handles = []
    for block in _blocks(model):
        handles += [
            block.register_forward_pre_hook(widen, prepend=True),
            block.register_forward_hook(restore, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    # The largest modules that are called as a whole: the layers of a list, and whatever holds no list.
    if isinstance(module, torch.nn.ModuleList):
        return list(module)
    if not any(isinstance(m, torch.nn.ModuleList) for m in module.modules()):
        return [module]
    return [block for child in module.children() for block in _blocks(child)]


@contextmanager
def float32_weights(model: torch.nn.Module):
    """Inside, all parameters are float32 (for gradients, which need the weights of the forward again)."""
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for parameter, _ in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
