"""The command bitune: train and score a model, let it answer, talk with it, serve it, look inside, see what is here."""

from __future__ import annotations

import argparse
import os
import select
import sys
import warnings

from ._version import __version__
from .commands import chat, evaluate, export, generate, plot, serve, train


class _Parser(argparse.ArgumentParser):
    """Of bitune and of each of its commands, which argparse makes of the same class."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))


def _add_env(commands) -> None:
    parser = commands.add_parser(
        "env",
        help="what is installed and what can run here",
        description="What is installed and what can run here, for bug reports.",
        epilog="example: bitune env --json",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_env)


def _env(given) -> None:
    from . import env

    env.main(["--json"] if given.json else [])


def _nobody_reads() -> bool:
    """Whether what reads the output, `head` for example, has seen enough."""
    output = select.poll()
    output.register(1, 0)
    return any(events & select.POLLERR for _, events in output.poll(0))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 if nobody reads on, 130 after Ctrl-C, or 2 after an error, which goes to stderr in one line."""
    # what PEFT asks transformers for under an old name is nothing that a user can change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    parser = _Parser(prog="bitune", description=__doc__)
    parser.add_argument("--version", action="version", version=f"bitune_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, evaluate, generate, chat, serve, export, plot):
        command.add(commands)
    _add_env(commands)
    try:
        given, given.fields = parser.parse_known_args(arguments)
        if given.fields and given.command not in ("train", "evaluate"):
            raise ValueError(f"{given.fields[0]}: expected an option of bitune {given.command}, got an unknown one")
        given.run(given)
        print(end="", flush=True)
    except (OSError, ValueError, TypeError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at the exit
            return 1
        print("bitune:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind a prompt or a bar
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
