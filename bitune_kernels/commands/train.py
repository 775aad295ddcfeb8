"""``bitune train``: adapters and mixing coefficients by a recipe."""

from __future__ import annotations

import json
from argparse import SUPPRESS, Action
from dataclasses import fields
from inspect import getdoc
from pathlib import Path


class _Help(Action):
    """Lists the fields of a recipe too, for which torch loads."""

    def __call__(self, parser, namespace, values, option_string=None):
        from ..training.recipe import Recipe

        parser.print_help()
        print("\nfields of a recipe, with what they are where it says nothing:")
        for field in fields(Recipe):
            default = field.default if isinstance(field.default, str) else json.dumps(field.default)  # as in yaml
            print(f"  --{field.name.replace('_', '-')} {default}")
        print(getdoc(Recipe).partition("Fields:")[2].partition("\n\nRaises:")[0])
        parser.exit()


def add(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train adapters and mixing coefficients",
        description="Each field of a recipe is an option too: --lr 1e-3 --max-steps 20 --data local.jsonl.",
        epilog="example: bitune train --recipe recipes/gsm8k.yaml --model google/gemma-2b --output runs/gsm8k",
        add_help=False,
    )
    about = "show this message, with the fields of a recipe"
    parser.add_argument("-h", "--help", action=_Help, nargs=0, default=SUPPRESS, help=about)
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
    for name, data in (("data", recipe.data), ("eval_data", recipe.eval_data)):
        if data is not None and data.endswith((".json", ".jsonl")) and not Path(data).is_file():
            raise FileNotFoundError(f"{name}: expected a file, got {data}, which is no file")

    from ..training.run import train  # transformers takes seconds

    print(train(recipe, given.model, given.output, given.resume))
