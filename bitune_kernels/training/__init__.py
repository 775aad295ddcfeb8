"""Training a Bitune model with transformers' Trainer: learning rates, logs of alpha, data and recipes."""

from .alpha import AlphaCallback, alpha_history, plot_alpha, write_alpha_csv
from .optim import parameter_groups

__all__ = ["AlphaCallback", "alpha_history", "parameter_groups", "plot_alpha", "write_alpha_csv"]
