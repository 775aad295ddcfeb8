"""``bitune export``: an ordinary causal LM for other engines, with the causal adapter merged."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..folders import FORMAT_NAME, check_new, whole_folder
from .load import adapter_folder, add_model_options, load_model, load_tokenizer


def add(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model for engines without Bitune",
        description="Writes the model with the adapter 'causal' merged, which decodes a mixed cache in any engine, "
        "and in its folder bitune what reads the prompt. An engine that prefills by itself reads it causally alone.",
        epilog="example: bitune export --model google/gemma-2b --adapter runs/answers --output exported",
    )
    add_model_options(parser)
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.set_defaults(run=_run)


def _run(given) -> None:
    output = Path(given.output)
    check_new("--output", output)  # here, since the model takes long to load
    tokenizer = load_tokenizer(given)
    model = load_model(given, autocast_adapter_dtype=True)  # it is merged and written as it was trained

    from ..modeling.export import export_merged

    prompts = adapter_folder(given.adapter) / FORMAT_NAME
    with whole_folder(output) as unfinished:
        export_merged(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        if prompts.is_file():
            shutil.copy(prompts, unfinished / "bitune")
    print(output)
