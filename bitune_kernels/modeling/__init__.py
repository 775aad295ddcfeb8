"""Bitune on Hugging Face models: transformers decoders with PEFT adapters."""

from .model import BituneModel, get_bitune_model
from .official import load_official_checkpoint

__all__ = ["BituneModel", "get_bitune_model", "load_official_checkpoint"]
