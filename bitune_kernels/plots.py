"""Figures of a model and its training, each into one file, whose ending (.png, .pdf, .svg) chooses the format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from .mixing import MixingCoefficients

_LABELLED = 48  # with more tokens their texts would overlap


@torch.no_grad()
def plot_mixing(mixing: MixingCoefficients, path: str | Path, history: list[dict[str, Any]] | None = None) -> None:
    """alpha (and beta) and |theta| over the layers (mean over heads, and each head where they differ).

    With dynamic mixing alpha is that of the thetas, which the gate then moves for each prompt.

    Args:
        history: of ``training.alpha_history``, for the weights over the training steps too.
    """
    from matplotlib.figure import Figure

    count = 3 if history else 2
    figure = Figure(figsize=(5 * len(mixing.labels), 3.5 * count), layout="constrained")
    axes = figure.subplots(count, len(mixing.labels), sharey="row", squeeze=False)
    for column, (name, label, alpha) in enumerate(zip(mixing.weights, mixing.labels, mixing.alphas(), strict=True)):
        theta = getattr(mixing, f"theta_{name}").abs()
        for row, (title, values) in enumerate(((label, alpha), (f"|theta_{name}|", theta))):
            values = values.cpu().reshape(len(values), -1)
            over_layers = axes[row, column]
            if values.shape[1] > 1:
                over_layers.plot(values, ".", color="0.7")
            over_layers.plot(values.mean(1), marker="o")
            layers = "one for all layers" if mixing.granularity == "global" else "layer"
            over_layers.set(xlabel=layers, ylabel=title, ylim=(0, 1) if row == 0 else (0, None))
            over_layers.xaxis.get_major_locator().set_params(integer=True)
        if history:
            _draw_over_steps(axes[2, column], history, label)
    figure.savefig(path, dpi=120)


def plot_alpha(rows: list[dict[str, Any]], path: str | Path) -> None:
    """A png: each weight of each layer over the steps (above), and over the layers at the last step (below)."""
    from matplotlib.figure import Figure

    labels = [name for name in rows[0] if name not in ("step", "layer")]
    figure = Figure(figsize=(5 * len(labels), 7), layout="constrained")
    axes = figure.subplots(2, len(labels), sharey=True, squeeze=False)
    last = max(row["step"] for row in rows)
    for column, label in enumerate(labels):
        over_steps, over_layers = axes[:, column]
        _draw_over_steps(over_steps, rows, label)
        at_last = {row["layer"]: row[label] for row in rows if row["step"] == last}
        over_layers.plot(sorted(at_last), [at_last[layer] for layer in sorted(at_last)], marker="o")
        over_layers.set(xlabel=f"layer, at step {last}", ylabel=label)
        over_layers.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, format="png", dpi=120)


def _draw_over_steps(axes, rows: list[dict[str, Any]], label: str) -> None:
    """A curve per layer on matplotlib's ``axes``: the weight of this name in the rows of ``alpha_history``."""
    layers = sorted({row["layer"] for row in rows})
    for layer in layers:
        shade = layer / max(len(layers) - 1, 1)
        curve = sorted((row["step"], row[label]) for row in rows if row["layer"] == layer)
        axes.plot(*zip(*curve, strict=True), color=(shade, 0.3, 1 - shade), label=str(layer), lw=1)
    axes.set(title=label, xlabel="step (blue: first layer, red: last)", ylabel=label)


def plot_attention(matrices: dict[str, torch.Tensor], tokens: list[str], path: str | Path) -> None:
    """Attention matrices side by side, queries downwards and keys to the right, in colours of one square-root scale.

    The scale ends where 1 % of the cells that are not zero lie above: the brightest would leave the others dark.

    Args:
        matrices: by the name of the stream, each [n, n] on the CPU.
        tokens: the n texts that label rows and columns, where there are few.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    side = min(max(4.5, 0.22 * len(tokens)), 11)
    figure = Figure(figsize=(side * len(matrices) + 1, side + 0.5), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    seen = torch.cat([m[m > 0] for m in matrices.values()])
    scale = PowerNorm(0.5, vmin=0, vmax=float(seen.kthvalue(math.ceil(0.99 * len(seen))).values))
    for panel, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = panel.imshow(matrix, norm=scale, cmap="viridis", interpolation="nearest")
        panel.set(title=name, xlabel="key", ylabel="query")
        if len(tokens) <= _LABELLED:
            texts = [repr(text)[1:-1] for text in tokens]  # a line feed as \n
            style = dict(fontsize=7, parse_math=False)  # a $ is no formula
            panel.set_xticks(range(len(texts)), texts, rotation=90, **style)
            panel.set_yticks(range(len(texts)), texts, **style)
    figure.colorbar(image, ax=axes, extend="max", label="attention, mean over heads and layers")
    figure.savefig(path, dpi=120)


def plot_distance(distance: dict[str, torch.Tensor], path: str | Path) -> None:
    """The distances of ``modeling.stream_distance`` over the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("k", "keys"), ("v", "values")):
        axes.plot(distance[name], marker="o", label=label)
    axes.set(xlabel="layer", ylabel="|bidir - causal| / |causal|", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=120)
