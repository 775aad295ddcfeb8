"""``bitune train``: adapters and mixing coefficients by a recipe."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path


def add(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train adapters and mixing coefficients",
        description="Each field of a recipe is an option too: --lr 1e-3 --max-steps 20 --data local.jsonl. An unknown "
        "one is answered with the list of them.",
        epilog="example: bitune train --recipe recipes/gsm8k.yaml --model google/gemma-2b --output runs/gsm8k",
    )
    parser.add_argument("--recipe", required=True, help="yaml file, recipes/paper.yaml for example")
    parser.add_argument("--model", required=True, help="folder or id of a causal language model")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.set_defaults(run=_run)


def _run(given) -> None:
    from ..training.recipe import Recipe, load_recipe, read_yaml

    known, changes, left = {f.name: f.type for f in fields(Recipe)}, {}, list(given.fields)
    while left:
        option = left.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not option.startswith("--") or name not in known:
            raise ValueError(f"{option}: expected an option of the recipe ({', '.join(known)}), got an unknown one")
        if not equals:
            if not left:
                raise ValueError(f"{option}: expected a value, got none")
            value = left.pop(0)
        # A text field keeps what was typed: a prompt with braces or a model named 7 are no yaml.
        changes[name] = value if known[name] in ("str", "str | None") else read_yaml(option, value)
    recipe = load_recipe(given.recipe, changes)
    if recipe.data.endswith((".json", ".jsonl")) and not Path(recipe.data).is_file():
        raise FileNotFoundError(f"data: expected a file, got {recipe.data}, which does not exist")

    from ..training.run import train  # transformers takes seconds

    print(train(recipe, given.model, given.output, given.resume))
