"""Recipe: everything a training run is made of, from a yaml file and a few changes; checked before anything loads."""

from __future__ import annotations

import types
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..config import BituneConfig
from .data import READERS


@dataclass
class Recipe:
    """One training run. Defaults that the paper fixes are in ``recipes/paper.yaml``; lengths are in tokens.

    Fields:
        data: a .json or .jsonl file, or an id of the Hub with data_name (its configuration), data_split, data_revision.
        eval_data: a file whose loss is measured every eval_steps updates (null: save_steps) and that doesn't train.
        prompt, completion: format strings over a row's columns, "{question}" for example. Rows with messages need none.
        reader: instead of them, the layout of a data set: ultrafeedback_gpt4, alpaca, multiple_choice, piqa or siqa.
        max_length, max_answer_length: samples with more tokens in all, or in the answer with its end, are left out.
        lora_r, lora_alpha, lora_dropout, use_rslora, use_dora, target_modules: as in PEFT's LoraConfig.
        variant: bitune, naive_bidir, no_mixing, only_causal, shared_weights, anti_causal, single_stream or
            single_stream_dual.
        mixing: abs or relu; mixing_granularity: layer, head or global; theta_init; beta_init; dynamic_mixing;
            skip_bidir; use_fused: false is three passes; backend; loss: token or sample, which it is the mean over;
            loss_chunk_rows: answer tokens whose logits are computed at a time (null: all); turns: one, recompute or
            alternating. All as in BituneConfig.
        dtype: of the base, float32, bfloat16 or float16 (not on a CPU: it takes a scaled loss); quantize: nf4 or int8,
            by bitsandbytes.
        lr, theta_lr: of the adapters and of the mixing coefficients (null: lr).
        schedule: a scheduler of transformers; warmup: a share of the steps (below 1) or their number.
        betas (null: 0.9, 0.999), weight_decay: of AdamW; clip: the largest gradient norm (0: none).
        max_steps: updates, each of accumulation passes over batch_size samples.
        gradient_checkpointing: false, true or selective.
        logging_steps, save_steps, save_total_limit, report_to (wandb, tensorboard, none), seed: as in transformers.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what came.
    """

    data: str | None = None
    data_name: str | None = None
    data_split: str = "train"
    data_revision: str | None = None
    eval_data: str | None = None
    eval_steps: int | None = None
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    reader: str | None = None
    max_length: int = 2048
    max_answer_length: int | None = None
    lora_r: int = 8
    lora_alpha: float = 1
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | list[str] = "all-linear"
    variant: str = BituneConfig.variant
    mixing: str = BituneConfig.mixing
    mixing_granularity: str = BituneConfig.mixing_granularity
    theta_init: float = BituneConfig.theta_init
    beta_init: float = BituneConfig.beta_init
    dynamic_mixing: bool = BituneConfig.dynamic_mixing
    skip_bidir: int = BituneConfig.skip_bidir
    use_fused: bool = BituneConfig.use_fused
    backend: str = BituneConfig.backend
    loss: str = BituneConfig.loss
    loss_chunk_rows: int | None = BituneConfig.loss_chunk_rows
    turns: str = BituneConfig.turns
    dtype: str = "bfloat16"
    quantize: str | None = None
    lr: float = 3e-4
    theta_lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.1
    betas: list[float] | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    max_steps: int = 3000
    batch_size: int = 1
    accumulation: int = 10
    gradient_checkpointing: bool | str = False
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2
    report_to: str = "none"
    seed: int = 42

    def __post_init__(self):
        for name, kind in get_type_hints(Recipe).items():
            setattr(self, name, _convert(name, kind, getattr(self, name)))
        if not self.data:
            raise ValueError("data: expected a .json or .jsonl file or an id of the Hub, got nothing")
        if self.eval_data is not None and not self.eval_data.endswith((".json", ".jsonl")):
            raise ValueError(f"eval_data: expected a .json or .jsonl file, got {self.eval_data!r}")
        if self.eval_data is None and self.eval_steps is not None:
            raise ValueError(f"eval_steps: expected null without eval_data, got {self.eval_steps}")
        for name in ("prompt", "completion"):
            try:
                list(Formatter().parse(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: expected a format string over the columns; {error}") from None
        if self.reader is not None and self.reader not in READERS:
            raise ValueError(f"reader: expected one of {', '.join(READERS)}, got {self.reader!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")
        if self.quantize not in (None, "nf4", "int8"):
            raise ValueError(f"quantize: expected null, nf4 or int8, got {self.quantize!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout}")
        if self.gradient_checkpointing not in (True, False, "selective"):
            raise ValueError(
                f"gradient_checkpointing: expected true, false or 'selective', got {self.gradient_checkpointing!r}"
            )
        self.betas = [0.9, 0.999] if self.betas is None else self.betas
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        positive = "lora_r lora_alpha lr max_length max_steps batch_size accumulation logging_steps save_steps".split()
        optional = [name for name in ("theta_lr", "max_answer_length", "eval_steps") if getattr(self, name) is not None]
        for name in positive + optional:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        for name in ("warmup", "clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number >= 0 and below 2^32, got {self.seed}")
        self.bitune_config(None)

    def bitune_config(self, peft) -> BituneConfig:
        """The method, with the given adapters."""
        names = {f.name for f in fields(BituneConfig)} & {f.name for f in fields(self)}
        return BituneConfig(peft=peft, **{name: getattr(self, name) for name in names})


def _convert(name: str, kind, value) -> Any:
    """``value`` as a field's type: a text of the command line is read as yaml reads it."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    for k in kinds:
        if k is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # yaml takes 1e-3 for a text
            except ValueError:
                continue
        if get_origin(k) is list and isinstance(value, (list, tuple)):
            return [_convert(name, get_args(k)[0], item) for item in value]
        if k is not float and get_origin(k) is None and type(value) is k:
            return value
    wanted = " or ".join(getattr(k, "__name__", str(k)) if get_origin(k) is None else str(k) for k in kinds)
    raise TypeError(f"{name}: expected {wanted.replace('NoneType', 'null')}, got {value!r}")


def read_yaml(name: str, text: str) -> Any:
    """What a text says as yaml; one that isn't yaml is an error of ``name``."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: expected yaml, got {error}") from None


def load_recipe(path: str | Path, changes: dict[str, Any] | None = None) -> Recipe:
    """A yaml file of Recipe's fields, over the file that it ``extends`` (beside it), under ``changes``.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the file or the field, what was expected and what came.
    """
    values, path, read = {}, Path(path), set()
    while path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"recipe: expected a yaml file, got {path}, which does not exist")
        if path.resolve() in read:
            raise ValueError(f"recipe: expected recipes that don't extend themselves, got {path}, which does")
        read.add(path.resolve())
        found = read_yaml(f"recipe {path}", path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"recipe: expected fields and values in {path}, got {type(found).__name__}")
        base = found.pop("extends", None)
        unknown = sorted(map(str, set(found) - {f.name for f in fields(Recipe)}))
        if unknown:
            known = ", ".join(f.name for f in fields(Recipe))
            raise ValueError(f"recipe: expected the fields {known}, got {', '.join(unknown)} in {path}")
        values = found | values
        path = None if base is None else path.parent / str(base)
    return Recipe(**values | (changes or {}))
