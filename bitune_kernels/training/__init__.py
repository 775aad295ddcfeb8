"""Training a Bitune model with transformers' Trainer: learning rates, logs of alpha, checkpointing, data,
recipes, denoising samples and learned instructions."""

from ..plots import plot_alpha
from .alpha import AlphaCallback, alpha_history, read_alpha_csv, write_alpha_csv
from .bilevel import hypergradient, largest_curvature
from .checkpointing import selective_checkpointing
from .denoising import UL2_DENOISERS, Denoiser, UL2Collator
from .instructions import (
    EncodedInstruction,
    InstructionOptimizer,
    InstructionSelector,
    SoftInstruction,
    prepend_instruction,
)
from .optim import parameter_groups

__all__ = [
    "UL2_DENOISERS",
    "AlphaCallback",
    "Denoiser",
    "EncodedInstruction",
    "InstructionOptimizer",
    "InstructionSelector",
    "SoftInstruction",
    "UL2Collator",
    "alpha_history",
    "hypergradient",
    "largest_curvature",
    "parameter_groups",
    "plot_alpha",
    "prepend_instruction",
    "read_alpha_csv",
    "selective_checkpointing",
    "write_alpha_csv",
]
