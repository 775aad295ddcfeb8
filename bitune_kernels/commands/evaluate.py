"""``bitune evaluate``: tasks of the lm-evaluation-harness, run by its own command line."""

from __future__ import annotations

import json
import sys

from .load import adapter_folder, add_model_options, torch_device


def add(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model on tasks of the lm-evaluation-harness",
        description="Runs lm_eval --model bitune and hands every further option on to it: --tasks, --num_fewshot, "
        "--include_path, --limit, --output_path, ... --batch_size counts questions.",
        epilog="example: bitune evaluate --model google/gemma-2b --adapter runs/answers --tasks piqa,mmlu",
    )
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(given) -> None:
    adapter_folder(given.adapter)
    try:
        from lm_eval.__main__ import cli_evaluate

        from .. import evaluation  # noqa: F401  registers the model
    except ImportError as error:
        raise ValueError(f"evaluate: expected lm-eval (pip install 'bitune-kernels[eval]'), got {error}") from None
    model_args = {"pretrained": given.model, "adapter": given.adapter, "dtype": given.dtype}
    options = ["--model", "bitune", "--model_args", json.dumps(model_args)]
    options += ["--device", str(torch_device(given.device))]  # without it lm_eval takes cuda:0 for there
    before = sys.argv
    sys.argv = ["lm_eval", "run", *options, *given.fields]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
