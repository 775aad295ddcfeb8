"""Every variant of Bitune as data: one table, one config, validated when it is made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .folders import existing

CONFIG_NAME = "bitune_config.json"

MIXINGS = ("abs", "relu")
GRANULARITIES = ("layer", "head", "global")
LOSSES = ("token", "sample")
HISTORIES = ("recompute", "alternating")  # the paper's two ways to read a conversation of many turns
TURNS = ("one", *HISTORIES)

_NOT_SAVED = ("peft", "use_fused", "backend", "loss_chunk_rows")


class Variant(NamedTuple):
    """What distinguishes one variant of the paper's ablations from another."""

    num_streams: int  # how often the prompt runs: 2 = bidirectional and causal, 1 = bidirectional alone
    separate_adapters: bool  # whether the bidirectional stream has an adapter of its own
    stream_mask: str  # what a prompt token of the bidirectional stream sees
    mixed: tuple[str, ...] = ()  # what is mixed: keys and values, the outputs of attention ("beta")


# The last two are ours, and experimental: the prompt runs once, each layer computes both attentions of its rows, and
# their outputs are mixed. "dual" has a second adapter for the bidirectional one, on queries, keys and values.
VARIANTS = {
    "bitune": Variant(2, True, "full", ("k", "v")),
    "naive_bidir": Variant(1, False, "full"),
    "no_mixing": Variant(1, True, "full"),
    "only_causal": Variant(2, True, "causal", ("k", "v")),
    "shared_weights": Variant(2, False, "full", ("k", "v")),
    "anti_causal": Variant(2, True, "anti_causal", ("k", "v")),
    "single_stream": Variant(1, False, "full", ("beta",)),
    "single_stream_dual": Variant(1, True, "full", ("k", "v", "beta")),
}


def paper_lora():
    """The LoRA setting of the paper: r=8 on every linear of attention and MLP, scale 1/8."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=1, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass
class BituneConfig:
    """How a decoder is turned into a Bitune model. The defaults are the paper's.

    ``use_fused``, ``backend`` and ``loss_chunk_rows`` say how it runs, not what it is: they are not saved.

    Args:
        peft: a ``peft.PeftConfig`` (LoRA, DoRA, IA3, ...) made once per adapter, or None for full
            finetuning with one set of weights per adapter.
        variant: a key of ``VARIANTS``; the paper's method is "bitune".
        mixing: f in ``alpha = f(theta) / (f(theta) + theta_init)``: "abs" or "relu".
        mixing_granularity: one theta per "layer", per "head" of each layer (beta: query head), or one "global" one.
        theta_init: positive; also the start of theta_k and theta_v, so that alpha starts at 0.5.
        beta_init: in (0, 1), where beta starts, the weight of the bidirectional attention in single-stream variants.
        dynamic_mixing: alpha of a layer also depends on the prompt, through a linear gate on the mean values of both
            streams in that layer. It starts at zero, where alpha is that of the thetas.
        skip_bidir: n > 0 makes the bidirectional stream causal in the first n layers; n < 0 keeps it
            bidirectional in the first -n layers only.
        use_fused: True runs the model once over all rows; False is the paper's schedule of three calls.
        backend: attention backend of the fused pass, see ``bitune_kernels.backends``.
        loss: "token", transformers' mean over the answer tokens of a batch; or "sample", the paper's mean over samples
            of each sample's mean over its answer tokens.
        turns: what labels with -100 between them mean, as in a conversation. "one": nothing, the prompt ends at the
            first label and the rest is answer. "recompute": each answer has all that stands before it as its prompt.
            "alternating" (one pass alone): each turn's prompt is read by both streams over the mixed prompts and the
            answers before it.
        loss_chunk_rows: in training, compute logits and loss for this many answer tokens at a time and their logits
            once more in the backward pass; the output then has no logits. None: all at once.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what came.
    """

    peft: Any = field(default_factory=paper_lora)
    variant: str = "bitune"
    mixing: str = "abs"
    mixing_granularity: str = "layer"
    theta_init: float = 0.01
    beta_init: float = 0.5
    dynamic_mixing: bool = False
    skip_bidir: int = 0
    use_fused: bool = True
    backend: str = "auto"
    loss: str = "token"
    turns: str = "one"
    loss_chunk_rows: int | None = None

    def __post_init__(self):
        from .backends import BACKENDS

        for name, allowed in (
            ("variant", tuple(VARIANTS)),
            ("mixing", MIXINGS),
            ("mixing_granularity", GRANULARITIES),
            ("loss", LOSSES),
            ("turns", TURNS),
            ("backend", ("auto", *BACKENDS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name in ("theta_init", "beta_init"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 < self.theta_init < float("inf"):
            raise ValueError(f"theta_init: expected a finite number > 0, got {self.theta_init}")
        if not 0 < self.beta_init < 1:
            raise ValueError(f"beta_init: expected a number between 0 and 1, got {self.beta_init}")
        if isinstance(self.skip_bidir, bool) or not isinstance(self.skip_bidir, int):
            raise TypeError(f"skip_bidir: expected an int, got {type(self.skip_bidir).__name__}")
        rows = self.loss_chunk_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int)):
            raise TypeError(f"loss_chunk_rows: expected an int or None, got {type(rows).__name__}")
        if rows is not None and rows < 1:
            raise ValueError(f"loss_chunk_rows: expected at least 1, got {rows}")
        for name in ("use_fused", "dynamic_mixing"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(getattr(self, name)).__name__}")
        if self.dynamic_mixing and "k" not in self.mixed:
            raise ValueError(f"dynamic_mixing: expected a variant that mixes keys and values, got {self.variant!r}")
        if self.beta_init != 0.5 and "beta" not in self.mixed:
            raise ValueError(f"beta_init: expected 0.5 for {self.variant!r}, which has no beta, got {self.beta_init}")
        if self.peft is not None and (isinstance(self.peft, type) or not hasattr(self.peft, "peft_type")):
            raise TypeError(f"peft: expected a peft.PeftConfig or None, got {type(self.peft).__name__}")

    @property
    def num_streams(self) -> int:
        """How often the prompt runs through the model: 2, or 1 for the variants without mixing."""
        return VARIANTS[self.variant].num_streams

    @property
    def separate_adapters(self) -> bool:
        """Whether the bidirectional stream uses the adapter "bidir" rather than "causal"."""
        return VARIANTS[self.variant].separate_adapters

    @property
    def mixed(self) -> tuple[str, ...]:
        """What is mixed with trained weights: of "k", "v", "beta"."""
        return VARIANTS[self.variant].mixed

    @property
    def doubles_rows(self) -> bool:
        """Whether attention alone is given the prompt's rows twice, the rest of the model once."""
        return self.num_streams == 1 and "k" in self.mixed

    def stream_masks(self, num_layers: int) -> tuple[str, ...]:
        """The mask of the bidirectional stream in each layer, ``skip_bidir`` applied."""
        if abs(self.skip_bidir) > num_layers:
            raise ValueError(f"skip_bidir: expected at most the {num_layers} layers, got {self.skip_bidir}")
        mask, skip = VARIANTS[self.variant].stream_mask, self.skip_bidir
        if skip >= 0:
            return ("causal",) * skip + (mask,) * (num_layers - skip)
        return (mask,) * -skip + ("causal",) * (num_layers + skip)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved, as json types; ``peft`` only as its type, since PEFT saves its own configs."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _NOT_SAVED}
        return fields | {"peft_type": None if self.peft is None else str(getattr(self.peft.peft_type, "value", ""))}

    def save(self, folder: str | Path) -> None:
        """Write ``bitune_config.json`` into ``folder``."""
        Path(folder, CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, peft: Any, **changes) -> BituneConfig:
        """Read ``bitune_config.json`` from ``folder``.

        ``peft`` is the adapter's own saved config, unused after full finetuning; ``changes`` override fields.
        """
        path = existing(folder, CONFIG_NAME)
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: expected fields and values as JSON, got {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: expected fields and values as JSON, got {type(fields).__name__}")
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__) - {"peft_type"})
        if unknown:
            raise ValueError(f"{path}: unknown fields {', '.join(unknown)}; written by a newer bitune_kernels?")
        full_finetuning = fields.pop("peft_type", None) is None
        return cls(peft=None if full_finetuning else peft, **fields | changes)
