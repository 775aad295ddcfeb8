"""A tiny Llama with two trained-looking adapters, for tests that aren't about model families."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitune_kernels import BituneConfig, BituneModel, get_bitune_model

VOCAB = 96


def base_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM._from_config(LlamaConfig(**settings | changes), dtype=dtype)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**dict(r=4, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM") | changes)


def bitune_model(seed: int = 0, *, base: nn.Module | None = None, randomize: bool = True, **config) -> BituneModel:
    """Both adapters and every theta differ from their start, so that nothing is hidden by an initial value."""
    base = base_model(seed) if base is None else base
    model = get_bitune_model(base, BituneConfig(**{"peft": lora()} | config))
    if randomize:
        randomize_adapters(model, seed)
    return model


@torch.no_grad()
def randomize_adapters(model: BituneModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif name.startswith("mixing."):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def ragged_batch(side: str = "right", seed: int = 0, prompts=(5, 1, 9, 2), answers=(3, 4, 1, 6)):
    """input_ids, attention_mask, labels of samples padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(p + a for p, a in zip(prompts, answers, strict=True)) + 1
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for b, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        start = 0 if side == "right" else width - p - a
        tokens = torch.randint(3, VOCAB, (p + a,), generator=generator)
        ids[b, start : start + p + a] = tokens
        mask[b, start : start + p + a] = 1
        labels[b, start + p : start + p + a] = tokens[p:]
    return ids, mask, labels
