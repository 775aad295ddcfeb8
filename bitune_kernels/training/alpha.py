"""alpha_k, alpha_v and beta over training: logged through the Trainer, then a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class AlphaCallback(TrainerCallback):
    """Logs the mixing weights beside each logged loss: ``trainer.add_callback(AlphaCallback(trainer))``.

    Keys: ``alpha_k/mean``, ``alpha_v/mean`` and ``alpha_k/layer_00``, ... (mean over heads), floats in [0, 1], and
    ``beta/...`` in single-stream models. They go through ``trainer.log``, so to whatever it reports to, and into
    ``trainer.state.log_history``, which checkpoints keep: ``alpha_history`` reads them back from there.

    Raises:
        ValueError: a model without mixing coefficients.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        if self._mixing() is None:
            raise ValueError("trainer: expected a Bitune model that mixes two streams, got one without alpha")

    def _mixing(self):
        # of the model that is trained: with model_init each run makes another one
        return getattr(self.trainer.accelerator.unwrap_model(self.trainer.model), "mixing", None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):  # the log of a training step, and not the one made here
            self.trainer.log(alphas(self._mixing()))


@torch.no_grad()
def alphas(mixing) -> dict[str, float]:
    """The values of ``AlphaCallback`` at this moment. Synchronizes a GPU."""
    whole = (a.full_tensor() if hasattr(a, "full_tensor") else a for a in mixing.alphas())  # FSDP2 shards them
    means = [a.reshape(len(a), -1).mean(1).expand(mixing.num_layers) for a in whole]
    values, layers = {}, torch.stack(means).tolist()
    for label, column in zip(mixing.labels, layers, strict=True):
        values[f"{label}/mean"] = sum(column) / len(column)
    for label, column in zip(mixing.labels, layers, strict=True):
        values |= {f"{label}/layer_{layer:02d}": alpha for layer, alpha in enumerate(column)}
    return values


def alpha_history(log_history: list[dict]) -> list[dict[str, Any]]:
    """``step``, ``layer`` and the weights ("alpha_k", ...) of every logged step, from ``trainer.state.log_history``."""
    rows = []
    for entry in log_history:
        by_layer: dict[int, dict[str, float]] = {}
        for key, value in entry.items():
            label, found, layer = key.partition("/layer_")
            if found:
                by_layer.setdefault(int(layer), {})[label] = value
        rows += [{"step": entry["step"], "layer": layer, **by_layer[layer]} for layer in sorted(by_layer)]
    return rows


def write_alpha_csv(rows: list[dict[str, Any]], path: str | Path) -> None:
    """The rows of ``alpha_history`` as a csv file with a header."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_alpha_csv(path: str | Path) -> list[dict[str, Any]]:
    """What ``write_alpha_csv`` wrote."""
    with Path(path).open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"]), "layer": int(row["layer"])} for row in rows]
