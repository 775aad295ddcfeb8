"""``bitune chat``: a conversation with a trained model, a line of stdin for each turn."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ..config import HISTORIES
from .load import (
    add_answer_options,
    add_model_options,
    answer_options,
    are_messages,
    check_answer_options,
    load_model,
    load_tokenizer,
    warn_of_chats,
)


def add(commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Answers each line of stdin as a turn of one conversation, while it is made. Ctrl-D ends it.",
        epilog="example: bitune chat --model google/gemma-2b-it --adapter runs/answers --turns alternating",
    )
    add_model_options(parser)
    parser.add_argument(
        "--turns",
        choices=HISTORIES,
        help="read the whole conversation in both directions for each answer, or the new turn over the cache of the "
        "others; default: as the model was trained, else recompute",
    )
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--file", help="JSON file of messages: the conversation goes on from it and is kept in it")
    add_answer_options(parser)
    parser.add_argument("--json", action="store_true", help="each answer as a line with prompt and completion")
    parser.set_defaults(run=_run)


def _run(given) -> None:
    check_answer_options(given)
    messages = _read(given)
    tokenizer = load_tokenizer(given)
    if not tokenizer.chat_template:
        raise ValueError(f"--model: expected a tokenizer with a chat template, got {given.model} without one")

    from transformers import TextStreamer

    from ..modeling import BituneChat
    from ..modeling.chat import check_messages

    try:  # here, since the model takes long to load
        check_messages(messages)
    except ValueError as error:
        raise ValueError(f"--file: {error}") from None
    warn_of_chats(given)
    model = load_model(given)

    options = answer_options(given, model, tokenizer)
    if not given.json:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    chat = BituneChat(model, tokenizer, given.turns, messages)
    for text in _lines():
        try:
            answer = chat.send(text, **options)
        except ValueError as error:  # the conversation is what it was before
            print("bitune:", " ".join(str(error).split()), file=sys.stderr)
            continue
        if given.json:
            print(json.dumps({"prompt": text, "completion": answer}, ensure_ascii=False), flush=True)
        if given.file:
            _write(given.file, chat.messages)


def _read(given) -> list[dict]:
    system = [] if given.system is None else [{"role": "system", "content": given.system}]
    if given.file is not None and not Path(given.file).absolute().parent.is_dir():
        raise FileNotFoundError(f"--file: expected a file in a folder that exists, got {given.file}")
    if given.file is None or not Path(given.file).exists():
        return system
    try:
        messages = json.loads(Path(given.file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"--file: expected JSON, got {error} in {given.file}") from None
    if not are_messages(messages):
        raise ValueError(f"--file: expected a list of messages with role and content, got another one in {given.file}")
    if system and messages:
        raise ValueError(f"--system: expected none with a conversation in --file, got {given.system!r}")
    return messages or system


def _write(path: str, messages: list[dict]) -> None:
    unfinished = Path(f"{path}.part")
    unfinished.write_text(json.dumps(messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _lines():
    """The turns of the user, without empty lines."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
