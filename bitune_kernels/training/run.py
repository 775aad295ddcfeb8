"""One training run with transformers' Trainer: recipe -> checkpoints, final adapters, table and plot of alpha."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    ProgressCallback,
    SchedulerType,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from ..folders import FORMAT_NAME, whole_folder
from ..plots import plot_alpha
from .alpha import AlphaCallback, alpha_history, write_alpha_csv
from .checkpointing import selective_checkpointing
from .data import load_rows, prompt_formats, tokenize
from .optim import parameter_groups
from .recipe import Recipe

RUN_NAME, FINAL = "run.json", "final"


class _Trainer(Trainer):
    def training_step(self, *args, **kwargs):
        # Before the optimizer's step, so that no checkpoint holds weights made from it.
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"loss: expected a finite value, got {loss} at step {self.state.global_step + 1}")
        return loss


class _Progress(ProgressCallback):
    # Every layer's alpha goes to what the Trainer reports to; the terminal gets the means.
    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {name: x for name, x in (logs or {}).items() if "/layer_" not in name}
        super().on_log(args, state, control, logs=logs, **kwargs)


def train(recipe: Recipe, model: str, output: str | Path, resume: bool = False) -> Path:
    """Train adapters and thetas of ``model`` as the recipe says.

    Args:
        model: folder or id of a causal LM with its tokenizer.
        output: folder of the run: checkpoints, ``run.json``, ``alpha.csv`` and ``alpha.png`` (variants that mix), and
            ``final``, which ``BituneModel.from_pretrained`` reads and which is there only when it is whole.
        resume: go on from the last whole checkpoint of the same run, on the same data.

    Returns:
        The folder ``final``.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the argument, what was expected and what came; all but errors
            of the model itself before its weights are loaded.
        FloatingPointError: a loss that isn't finite, with its step, before it reached the weights.
    """
    from peft import LoraConfig

    from ..modeling import get_bitune_model

    output, run = Path(output), {"model": str(model), **asdict(recipe)}
    if Path(recipe.data).is_file():  # a run that is resumed goes on behind the samples that it has seen
        run["data_sha256"] = _sha256(Path(recipe.data))
    first = int(os.environ.get("RANK", 0)) == 0  # of several processes, the one that writes
    if first:
        _check_output(output, run, resume)
    if recipe.schedule not in {*SchedulerType}:
        raise ValueError(f"schedule: expected one of {', '.join(SchedulerType)}, got {recipe.schedule!r}")
    arguments = _arguments(recipe, output)
    dtype = getattr(torch, recipe.dtype)
    quantization = _quantization(recipe, dtype)
    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a causal language model with its tokenizer, got {model}; {error}") from error
    _check_targets(config, recipe.target_modules)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    names = ("prompt", "completion", "reader", "max_length", "max_answer_length", "turns")
    rows = load_rows(recipe.data, recipe.data_name, recipe.data_split, recipe.data_revision)
    options = {name: getattr(recipe, name) for name in names}
    samples = tokenize(rows, tokenizer, **options)
    held_out = None if recipe.eval_data is None else tokenize(load_rows(recipe.eval_data), tokenizer, **options)
    for some in filter(None, (samples, held_out)):
        _check_lengths(config, some, recipe.max_length)
    formats = prompt_formats(rows, recipe.reader)
    if first:
        output.mkdir(parents=True, exist_ok=True)
        (output / f".{RUN_NAME}").write_text(json.dumps(run, indent=2) + "\n")
        os.replace(output / f".{RUN_NAME}", output / RUN_NAME)

    set_seed(recipe.seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=quantization)
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        target_modules=recipe.target_modules,
        task_type="CAUSAL_LM",
    )
    bitune = get_bitune_model(base, recipe.bitune_config(lora))
    bitune.end_answers_with({labels[-1] for labels in samples["labels"]})
    groups = parameter_groups(bitune, recipe.lr, recipe.theta_lr, recipe.weight_decay)
    trainer = _Trainer(
        model=bitune,
        args=arguments,
        train_dataset=samples,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(groups, lr=recipe.lr, betas=tuple(recipe.betas)), None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress)
    if bitune.mixing is not None:
        trainer.add_callback(AlphaCallback(trainer))
    trainer.train(resume_from_checkpoint=_last_checkpoint(output) if resume else None)

    if trainer.is_world_process_zero():
        history = alpha_history(trainer.state.log_history)
        if history:
            for name, write in (("alpha.csv", write_alpha_csv), ("alpha.png", plot_alpha)):
                write(history, output / f".{name}")
                os.replace(output / f".{name}", output / name)
        with whole_folder(output / FINAL) as unfinished:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if len(formats) == 1:
                (unfinished / FORMAT_NAME).write_text(json.dumps(*formats) + "\n")
    return output / FINAL


def _arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """The Trainer's own settings; what it and the plot at the end need is there."""
    # older releases of transformers know the second name only, newer ones warn of it
    name = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    checkpointing = {
        f"{name}_checkpointing": recipe.gradient_checkpointing is not False,
        f"{name}_checkpointing_kwargs": selective_checkpointing()
        if recipe.gradient_checkpointing == "selective"
        else {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        **checkpointing,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        fp16=recipe.dtype == "float16",  # accelerate scales the loss then, without which gradients vanish
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no" if recipe.eval_data is None else "steps",
        eval_steps=recipe.eval_steps or recipe.save_steps,
        per_device_eval_batch_size=recipe.batch_size,
        prediction_loss_only=True,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        report_to=recipe.report_to,
        dataloader_pin_memory=torch.accelerator.is_available(),  # else every loader warns
        seed=recipe.seed,
    )
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ValueError("dtype: expected bfloat16 or float32 on a CPU, where no loss is scaled, got 'float16'")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != arguments.world_size:
        raise ValueError(
            f"WORLD_SIZE: expected {arguments.world_size}, since here each process would train by itself (on CPUs "
            f"ACCELERATE_USE_CPU=1 makes them one run), got {processes}"
        )
    installed = get_available_reporting_integrations()
    if not set(arguments.report_to) <= set(installed):
        raise ValueError(f"report_to: expected {' or '.join(['none', *installed])} here, got {recipe.report_to}")
    if recipe.bitune_config(None).mixed and find_spec("matplotlib") is None:
        raise ValueError("bitune train: expected matplotlib, got none; pip install 'bitune-kernels[train]' brings it")
    return arguments


def _quantization(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if recipe.quantize is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize: expected null, since bitsandbytes isn't installed, got {recipe.quantize!r}")
    if recipe.quantize == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns at every product
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _check_output(output: Path, run: dict, resume: bool) -> None:
    """Refuse a folder with checkpoints of another run, and of this one unless it is to be resumed."""
    path = output / RUN_NAME
    if any(p.is_file() for p in (output, *output.parents)):
        raise ValueError(f"output: expected a folder, got {output}, which is a file or below one")
    if (output / FINAL).exists():
        raise ValueError(f"output: expected an unfinished run or a new folder, got {output}, which has a final model")
    if not resume:
        if list(output.glob("checkpoint-*")):
            raise ValueError(f"output: expected a new folder, got {output}, which holds a run; resume it with --resume")
        return
    if not path.is_file():
        raise FileNotFoundError(f"resume: expected a folder with {RUN_NAME}, got {output}, which has none")
    before = json.loads(path.read_text())
    other = [name for name in run | before if run.get(name) != before.get(name)]
    if other:
        raise ValueError(
            f"resume: expected the run of {output}, "
            + ", ".join(f"{name}: {before.get(name)!r}" for name in other)
            + ", got "
            + ", ".join(f"{name}: {run.get(name)!r}" for name in other)
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _last_checkpoint(output: Path) -> str | None:
    # The Trainer writes its state last: a checkpoint without a readable one was cut off.
    folders = [p for p in output.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def _check_lengths(config, samples, max_length: int) -> None:
    """No sample is longer than what the model was made for: a pass would refuse it, many updates later."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, samples["input_ids"]))
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_length: expected at most the {limit} tokens of the model, got {max_length} and a sample of {longest}"
        )


def _check_targets(config, targets: str | list[str]) -> None:
    """Each named module exists in the model; its modules are made without weights. PEFT takes one that does."""
    if targets == "all-linear":
        return
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_modules()]
    if isinstance(targets, str):  # a pattern, as in PEFT
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [f"the pattern {targets!r}"]
    else:
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        known = sorted({name.split(".")[-1] for name in names if name and not name.split(".")[-1].isdigit()})
        raise ValueError(
            f"target_modules: expected all-linear, a list [a, b] of {', '.join(known)}, or a pattern that matches "
            f"whole names, got {', '.join(missing)}"
        )
