"""Questions and answers as tokens: rows of a data set -> input_ids and labels that are -100 on the prompt."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any

from ..config import TURNS

logger = logging.getLogger(__name__)

TEMPLATE = "Question: {x}\n\nAnswer:"


def _ultrafeedback_gpt4(row):
    found = [c["response"] for c in row["completions"] if c["model"] == "gpt-4"]
    return row["instruction"], found[0] if found else None


def _alpaca(row):
    return "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]


def _options(question: str, labels: list[str], texts: list[str], answer: str):
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    # test splits have no answer
    return f"{question}\n{options}", dict(zip(labels, texts, strict=True)).get(answer)


def _multiple_choice(row):
    return _options(row["question"], row["choices"]["label"], row["choices"]["text"], row["answerKey"])


def _piqa(row):
    answer = None if row["label"] == "" else {0: "A", 1: "B"}.get(int(row["label"]))
    return _options(row["goal"], ["A", "B"], [row["sol1"], row["sol2"]], answer)


def _siqa(row):
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    answer = {"1": "A", "2": "B", "3": "C"}.get(str(row["label"]).strip())  # lines of a file, newline included
    return _options(f"{row['context']} {row['question']}", ["A", "B", "C"], texts, answer)


# What a recipe's ``reader`` may name: a row -> (question, answer or None). The paper doesn't print how it writes the
# options of multiple-choice questions; here they stand one per line, and the answer is the text of the right one.
READERS: dict[str, Callable[[dict[str, Any]], tuple[str, str | None]]] = {
    "ultrafeedback_gpt4": _ultrafeedback_gpt4,
    "alpaca": _alpaca,
    "multiple_choice": _multiple_choice,
    "piqa": _piqa,
    "siqa": _siqa,
}


def load_rows(data: str, name: str | None = None, split: str = "train", revision: str | None = None):
    """A ``datasets.Dataset``: a local .json or .jsonl file, or a data set of the Hugging Face Hub.

    Raises:
        FileNotFoundError: ``data`` names a file that isn't there.
        ValueError: the file isn't made of JSON rows, or ``data`` is a folder or another file.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if Path(data).suffix in (".json", ".jsonl"):
        if not Path(data).is_file():
            raise FileNotFoundError(f"data: expected a file, got {data}, which is no file")
        try:
            return load_dataset("json", data_files=data, split="train")
        except (DatasetGenerationError, StopIteration, ValueError) as error:  # the last two: a file without rows
            found = str(error.__cause__ or error) or "none"
            raise ValueError(f"data: expected JSON rows with the same columns in {data}, got {found}") from None
    if Path(data).exists():
        raise ValueError(f"data: expected a .json or .jsonl file or an id of the Hub, got {data}, which is neither")
    return load_dataset(data, name, split=split, revision=revision)


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The conversation in a row: ``messages``, or ``prompt`` and ``completion`` that are both lists of them, as in TRL.

    Raises:
        ValueError: messages without a role, or with a content that is no text.
    """
    messages = row.get("messages")
    if messages is None and all(isinstance(row.get(name), list) for name in ("prompt", "completion")):
        messages = row["prompt"] + row["completion"]
    for message in messages or ():
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"messages: expected each with role and content, got {message!r}")
        if not isinstance(message.get("content"), str | None):
            raise ValueError(f"messages: expected a text as content, got {message['content']!r}")
    return messages


def prompt_formats(rows, reader: str | None = None) -> set[str]:
    """How the prompts of these rows are written: "chat" by the chat template, "question" by ``TEMPLATE``, or both."""
    if reader is not None:
        return {"question"}
    return {"question" if messages_of(row) is None else "chat" for row in rows}


class _Columns(Formatter):
    """``str.format`` over the columns of a row. Of a list it would write Python's repr."""

    def get_field(self, field_name, args, kwargs):
        value, first = super().get_field(field_name, args, kwargs)
        if isinstance(value, list | dict):
            raise ValueError(f"data: expected a text or a number in column {field_name!r}, got {type(value).__name__}")
        return value, first


def _is_answer(message: dict[str, Any]) -> bool:
    return message.get("role") == "assistant" and bool(message.get("content"))


def _before_and_with_answer(messages: list[dict[str, Any]], tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a conversation up to where its last message, an answer, is to begin, and of the whole.

    Without the white space that templates write behind an answer's end token and ``generate()`` never makes.
    """
    from jinja2 import TemplateError

    options = dict(tokenize=True, return_dict=True)
    try:
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"]
        both = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    except TemplateError as error:
        raise ValueError(f"messages: expected messages as the chat template takes them; {error}") from None
    while len(both) > len(before) and not tokenizer.decode(both[-1:]).strip():
        both = both[:-1]
    return before, both


def _read(row: dict[str, Any], reader: str) -> tuple[str, str | None]:
    """Question and answer of a row in the layout of a reader (ValueError: it has another one)."""
    try:
        question, answer = READERS[reader](row)
        if isinstance(question, str) and isinstance(answer, str | None):
            return question, answer
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"data: expected rows as the reader {reader!r} takes them, got {str(row)[:200]}")


def tokenize_row(row: dict[str, Any], tokenizer, prompt="{prompt}", completion="{completion}", reader=None):
    """``(prompt ids, answer ids)`` of one row; the answer is empty where the row has none.

    A row with messages (``messages_of``) goes through the tokenizer's chat template: the last one, by the assistant, is
    the answer, and all before it, earlier answers included, the prompt. Any other row is ``TEMPLATE``, a space, the
    answer and the end token.

    Args:
        prompt, completion: format strings over the columns.
        reader: a key of ``READERS`` instead of them.

    Raises:
        ValueError: a missing column, or one that is no text; a row in another layout than the reader's; a chat template
            that writes the prompt otherwise once the answer follows.
    """
    messages = messages_of(row) if reader is None else None
    if messages is not None:
        if len(messages) < 2 or not _is_answer(messages[-1]):
            return [], []
        first, both = _before_and_with_answer(messages, tokenizer)
        if both[: len(first)] != first:
            raise ValueError("messages: expected a chat template that leaves the prompt as it is, got another prompt")
        return first, both[len(first) :]
    row = {name: "" if value is None else value for name, value in row.items()}
    if reader is not None:
        question, answer = _read(row, reader)
    else:
        try:
            question, answer = (_Columns().vformat(text, (), row) for text in (prompt, completion))
        except KeyError as error:
            raise ValueError(f"data: expected a column {error}, got {', '.join(sorted(row))}") from None
        except (IndexError, AttributeError) as error:
            raise ValueError(f"prompt, completion: expected format strings over the columns; {error}") from None
    first = tokenizer(TEMPLATE.format(x=question))["input_ids"]
    if not (answer or "").strip():
        return first, []
    end = tokenizer.eos_token_id
    if first[-1] == end:  # a tokenizer that ends every text
        first = first[:-1]
    both = tokenizer(f"{TEMPLATE.format(x=question)} {answer}")["input_ids"]
    if both[: len(first)] == first:
        rest = both[len(first) :]
    else:  # the space merged with the colon: keep the prompt as generate() will see it
        rest = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    return first, rest if rest[-1] == end else [*rest, end]


def tokenize_conversation(messages: list[dict[str, Any]], tokenizer) -> tuple[list[int], list[int]]:
    """``(input ids, labels)`` of a conversation through the tokenizer's chat template; every answer has labels.

    What follows the last answer is left out, and so are labels of the white space behind an answer's end token: it
    stands before the next turn. No answer: no ids.

    Raises:
        ValueError: a chat template that writes a turn otherwise once another one follows.
    """
    ids, labels = [], []
    for i in (i for i, m in enumerate(messages) if _is_answer(m)):
        first, both = _before_and_with_answer(messages[: i + 1], tokenizer)
        if first[: len(ids)] != ids or both[: len(first)] != first:
            raise ValueError(
                "messages: expected a chat template that leaves earlier turns as they are, got another one"
            )
        labels += [-100] * (len(first) - len(ids)) + both[len(first) :]
        ids = both
    return ids, labels


def tokenize(
    rows,
    tokenizer,
    *,
    prompt: str = "{prompt}",
    completion: str = "{completion}",
    reader: str | None = None,
    max_length: int = 2048,
    max_answer_length: int | None = None,
    turns: str = "one",
):
    """Samples for a Trainer: a ``datasets.Dataset`` with input_ids, attention_mask and labels (-100 on the prompt).

    Rows without an answer or with too many tokens are left out and counted in one warning. Pad them with transformers'
    ``DataCollatorForSeq2Seq(tokenizer)``, which follows ``tokenizer.padding_side``.

    Args:
        rows: an iterable of dicts, a Dataset for example.
        prompt, completion, reader: as in ``tokenize_row``.
        max_length, max_answer_length: tokens of prompt and answer together, and of the answer, end token included.
        turns: as in ``BituneConfig``. With another than "one" every answer in messages is trained.

    Raises:
        ValueError: no sample is left; a tokenizer without an end token; a chat template that writes none behind an
            answer; as ``tokenize_row``.
    """
    from datasets import Dataset
    from tqdm import tqdm

    for name, value, known in (("reader", reader, (None, *READERS)), ("turns", turns, TURNS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(filter(None, known))}, got {value!r}")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected one with an end token, got one without")

    samples, skipped = [], Counter()
    for row in tqdm(rows, desc="tokenizing", unit="row", leave=False, disable=None):  # 64,000 take minutes
        messages = messages_of(row) if turns != "one" and reader is None else None
        if messages is not None:
            both, labels = tokenize_conversation(messages, tokenizer)
        else:
            first, rest = tokenize_row(row, tokenizer, prompt, completion, reader)
            both, labels = first + rest, [-100] * len(first) + rest
        answered = sum(label != -100 for label in labels)
        if not answered:
            skipped["without an answer"] += 1
        elif len(both) > max_length or answered > (max_answer_length or max_length):
            skipped["too long"] += 1
        else:
            samples.append({"input_ids": both, "attention_mask": [1] * len(both), "labels": labels})
    report = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if not samples:
        raise ValueError(f"data: expected at least one sample with an answer, got none ({report or 'no rows'})")
    tokens = {sample["labels"][-1] for sample in samples} - {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    if tokens:  # nothing would teach the model to end an answer, and generate() where to stop
        raise ValueError(
            "messages: expected a chat template that writes an end token behind an answer, got one that ends it with "
            f"{tokenizer.decode(min(tokens))!r}"
        )
    if skipped:
        logger.warning("data: %d samples; skipped %s", len(samples), report)
    return Dataset.from_list(samples)
