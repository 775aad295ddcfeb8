"""alpha_k and alpha_v over training: logged through the Trainer, then a table and a plot."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from transformers import TrainerCallback


class AlphaCallback(TrainerCallback):
    """Logs alpha beside each logged loss: ``trainer.add_callback(AlphaCallback(trainer))``.

    Keys: ``alpha_k/mean``, ``alpha_v/mean`` and ``alpha_k/layer_00``, ... (mean over heads), floats in [0, 1]. They go
    through ``trainer.log``, so to whatever it reports to, and into ``trainer.state.log_history``, which checkpoints
    keep: ``alpha_history`` reads them back from there.

    Raises:
        ValueError: a model without mixing coefficients.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.mixing = getattr(trainer.accelerator.unwrap_model(trainer.model), "mixing", None)
        if self.mixing is None:
            raise ValueError("trainer: expected a Bitune model that mixes two streams, got one without alpha")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):  # the log of a training step, and not the one made here
            self.trainer.log(alphas(self.mixing))


@torch.no_grad()
def alphas(mixing) -> dict[str, float]:
    """The values of ``AlphaCallback`` at this moment. Synchronizes a GPU."""
    layers = [[a.mean() for a in mixing.alpha(layer)] for layer in range(mixing.num_layers)]
    k, v = torch.stack([torch.stack(pair) for pair in layers]).T.tolist()
    values = {"alpha_k/mean": sum(k) / len(k), "alpha_v/mean": sum(v) / len(v)}
    for name, column in (("alpha_k", k), ("alpha_v", v)):
        values |= {f"{name}/layer_{layer:02d}": alpha for layer, alpha in enumerate(column)}
    return values


def alpha_history(log_history: list[dict]) -> list[tuple[int, int, float, float]]:
    """(step, layer, alpha_k, alpha_v) of every logged step, from ``trainer.state.log_history``."""
    rows = []
    for entry in log_history:
        for key in sorted((k for k in entry if k.startswith("alpha_k/layer_")), key=lambda k: int(k.split("_")[-1])):
            alpha_v = entry[key.replace("alpha_k", "alpha_v")]
            rows.append((entry["step"], int(key.split("_")[-1]), entry[key], alpha_v))
    return rows


def write_alpha_csv(rows: list[tuple[int, int, float, float]], path: str | Path) -> None:
    """The rows of ``alpha_history`` as a csv file with a header."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "layer", "alpha_k", "alpha_v"))
        writer.writerows(rows)


def plot_alpha(rows: list[tuple[int, int, float, float]], path: str | Path) -> None:
    """A png: alpha of each layer over the steps (above), and over the layers at the last step (below)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True, squeeze=True)
    last = max(row[0] for row in rows)
    for column, name in enumerate(("alpha_k", "alpha_v")):
        over_steps, over_layers = axes[:, column]
        draw_alpha_over_steps(over_steps, rows, column)
        at_last = {layer: values[column] for step, layer, *values in rows if step == last}
        over_layers.plot(sorted(at_last), [at_last[layer] for layer in sorted(at_last)], marker="o")
        over_layers.set(xlabel=f"layer, at step {last}", ylabel=name)
    figure.savefig(path, format="png", dpi=120)


def draw_alpha_over_steps(axes, rows: list[tuple[int, int, float, float]], column: int) -> None:
    """A curve per layer on matplotlib's ``axes``: alpha_k (column 0) or alpha_v (1) of ``alpha_history``'s rows."""
    name, layers = ("alpha_k", "alpha_v")[column], sorted({row[1] for row in rows})
    for layer in layers:
        shade = layer / max(len(layers) - 1, 1)
        curve = sorted((step, values[column]) for step, at, *values in rows if at == layer)
        axes.plot(*zip(*curve, strict=True), color=(shade, 0.3, 1 - shade), label=str(layer), lw=1)
    axes.set(title=name, xlabel="step (blue: first layer, red: last)", ylabel=name)
