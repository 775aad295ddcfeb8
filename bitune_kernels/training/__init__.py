"""Training a Bitune model with transformers' Trainer: learning rates, logs of alpha, checkpointing, data
and recipes."""

from .alpha import AlphaCallback, alpha_history, plot_alpha, read_alpha_csv, write_alpha_csv
from .checkpointing import selective_checkpointing
from .optim import parameter_groups

__all__ = [
    "AlphaCallback",
    "alpha_history",
    "parameter_groups",
    "plot_alpha",
    "read_alpha_csv",
    "selective_checkpointing",
    "write_alpha_csv",
]
