"""``bitune generate``: answers of a trained model to one prompt, or to a file of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .load import (
    add_answer_options,
    add_format_option,
    add_model_options,
    answer_options,
    are_messages,
    at_least_one,
    check_answer_options,
    encode,
    load_model,
    load_tokenizer,
    max_tokens,
    prompt_format,
)


def add(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a prompt, or a file of them",
        description="Answers --prompt, each line of --file, or stdin. A single answer appears while it is made.",
        epilog="example: bitune generate --model google/gemma-2b --adapter runs/answers --prompt 'Is the sky blue?'",
    )
    add_model_options(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="one prompt")
    prompts.add_argument("--file", help="JSON lines, each with a prompt, or with messages for the chat template")
    add_format_option(parser)
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="prompts of --file at a time; default: 8")
    add_answer_options(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="a line for each prompt, with its completion and the tokens of both (the end token counts)",
    )
    parser.set_defaults(run=_run)


def _run(given) -> None:
    check_answer_options(given)
    prompts = _read(given)
    tokenizer = load_tokenizer(given)
    rows = _encode(prompts, tokenizer, given)
    model = load_model(given)

    options = answer_options(given, model, tokenizer)
    if given.file is None and not given.json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        _answer(model, tokenizer, rows, options | {"streamer": streamer})
    else:
        _write_answers(model, tokenizer, [prompt for _, prompt in prompts], rows, options, given)


def _encode(prompts: list[tuple[str, str | list]], tokenizer, given) -> list[list[int]]:
    limit, kind, rows = max_tokens(given), prompt_format(given), []
    for place, prompt in prompts:
        try:
            rows.append(encode(prompt, tokenizer, kind))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if limit is not None and len(rows[-1]) + given.max_new_tokens > limit:
            raise ValueError(
                f"{place}: expected prompt and --max-new-tokens to be at most the {limit} tokens of the model, got "
                f"{len(rows[-1])} and {given.max_new_tokens}"
            )
    return rows


def _write_answers(model, tokenizer, prompts, rows, options, given) -> None:
    from tqdm import tqdm

    with tqdm(total=len(rows), unit="prompt", disable=None if given.file else True) as bar:
        for first in range(0, len(rows), given.batch_size):
            batch = rows[first : first + given.batch_size]
            for i, answer in enumerate(_answer(model, tokenizer, batch, options), start=first):
                text = tokenizer.decode(answer, skip_special_tokens=True)
                if given.json:
                    line = {"prompt" if isinstance(prompts[i], str) else "messages": prompts[i], "completion": text}
                    line |= {"prompt_tokens": len(rows[i]), "completion_tokens": len(answer)}
                    text = json.dumps(line, ensure_ascii=False)
                tqdm.write(text, file=sys.stdout)  # print would tear the bar
            sys.stdout.flush()
            bar.update(len(batch))


def _read(given) -> list[tuple[str, str | list]]:
    """The prompts, each a text or messages, and where each stands."""
    if given.prompt is not None:
        return [("--prompt", given.prompt)]
    if given.file is None:
        if sys.stdin.isatty():
            raise ValueError("--prompt: expected --prompt, --file or a text on stdin, got none")
        return [("stdin", sys.stdin.read().removesuffix("\n"))]
    if not Path(given.file).is_file():
        raise FileNotFoundError(f"--file: expected a file of JSON lines, got {given.file}, which is no file")
    prompts = []
    # not splitlines(), which also splits at separators inside of a text
    for i, line in enumerate(Path(given.file).read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            place = f"--file {given.file}, line {i}"
            prompts.append((place, _prompt(line, place)))
    if not prompts:
        raise ValueError(f"--file: expected at least one line with a prompt, got {given.file}, which is empty")
    return prompts


def _prompt(line: str, place: str) -> str | list:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except ValueError as error:
        raise ValueError(f"{place}: expected JSON, got {error}") from None
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("messages")
    if not messages or not are_messages(messages):
        raise ValueError(f"{place}: expected a text 'prompt', or 'messages' with role and content, got {line[:80]}")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{place}: expected messages whose last one is to be answered, got one by the assistant")
    return messages


def _answer(model, tokenizer, rows: list[list[int]], options: dict) -> list[list[int]]:
    """The tokens of each answer, up to its end token."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ends = options["eos_token_id"] or []
    pad = next(x for x in (tokenizer.pad_token_id, *ends, 0) if x is not None)
    left = dict(batch_first=True, padding_side="left")
    tokens = pad_sequence([torch.tensor(row) for row in rows], padding_value=pad, **left).to(model.device)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **left).to(model.device)
    found = model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=pad, **options)
    answers = found[:, tokens.shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in answers]
