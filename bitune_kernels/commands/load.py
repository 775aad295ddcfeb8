"""What the commands on a trained model share: their options, the model with its tokenizer, and a prompt's tokens."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from contextlib import contextmanager
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("text", "question", "chat")


def add_model_options(parser) -> None:
    parser.add_argument("--model", required=True, help="folder or id of the causal language model that was trained")
    add_adapter_option(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the model's weights and adapters; auto: as the weights are saved",
    )
    parser.add_argument("--device", help="of torch, cuda:0 for example; default: cuda where there is one, else cpu")


def add_adapter_option(parser) -> None:
    parser.add_argument("--adapter", required=True, help="folder of BituneModel.save_pretrained or of bitune train")


def add_format_option(parser) -> None:
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="how a prompt reaches the model: as it is (text), as bitune train writes prompts (question: "
        "'Question: ...\\n\\nAnswer:'), or as the user's turn in the tokenizer's chat template (chat); default: as in "
        "the run of bitune train, and text for other folders and for runs that had both",
    )


def prompt_format(given) -> str:
    """``--format``, or without it what the samples of the run had."""
    from ..folders import FORMAT_NAME

    path = adapter_folder(given.adapter) / FORMAT_NAME
    trained = json.loads(path.read_text()) if path.is_file() else "text"
    return getattr(given, "format", None) or trained


def warn_of_chats(given) -> None:
    """Say on stderr that a model wasn't trained on conversations."""
    if prompt_format(given) == "question":
        print("bitune: trained on single questions and answers, not on the chat template", file=sys.stderr)


def add_answer_options(parser) -> None:
    parser.add_argument("--max-new-tokens", type=at_least_one, default=128, help="default: 128")
    parser.add_argument(
        "--temperature",
        type=number(float, lambda x: x > 0, "a number > 0 (greedy without it)"),
        help="sample at this temperature; default: greedy decoding",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, lambda x: 0 < x <= 1, "a number in (0, 1]"),
        help="sample from the likeliest tokens of this probability",
    )
    parser.add_argument(
        "--seed", type=number(int, lambda x: 0 <= x < 2**32, "a whole number below 2^32"), help="of the sampling"
    )


def check_answer_options(given) -> None:
    """Refuse a seed that nothing would use, before anything is loaded."""
    if given.seed is not None and given.temperature is None and given.top_p is None:
        raise ValueError(f"--seed: expected --temperature or --top-p with it (decoding is greedy), got {given.seed}")


def answer_options(given, model, tokenizer) -> dict:
    """The arguments of ``generate()``, the seed set: every field that the model's own config may say otherwise."""
    from transformers import set_seed

    sampled = given.temperature is not None or given.top_p is not None
    if given.seed is not None:
        set_seed(given.seed)
    options = dict(do_sample=sampled, temperature=given.temperature or 1.0, top_p=given.top_p or 1.0)
    options |= dict(top_k=0 if sampled else 50, max_new_tokens=given.max_new_tokens)
    return options | dict(eos_token_id=end_tokens(model, tokenizer))


def end_tokens(model, tokenizer) -> list[int] | None:
    """Those of the model's generation_config, with what ended the answers in training, and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}) or None


def are_messages(value) -> bool:
    """Whether ``value`` is what chat templates take: a list of messages with a role and a text as content."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() and isinstance(m["content"], str | None) for m in value
    )


def number(kind, accept, expected: str):
    """An argparse type: ``kind`` of the text, if ``accept`` takes it."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


at_least_one = number(int, lambda x: x > 0, "a whole number > 0")


@contextmanager
def _blaming(option: str, expected: str):
    """Inside, what a library raises becomes an error of this option."""
    from safetensors import SafetensorError  # a file that was cut off

    try:
        yield
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{option}: expected {expected}; {' '.join(lines[:2])}") from error


def adapter_folder(folder: str) -> Path:
    """The folder with adapters: ``folder`` itself, or ``final`` in a run of ``bitune train``."""
    from ..config import CONFIG_NAME

    names = (CONFIG_NAME, "causal")
    found = [p for p in (Path(folder), Path(folder, "final")) if all(Path(p, name).exists() for name in names)]
    if not found:
        what = f"got {folder}, which has none" if Path(folder).is_dir() else f"got {folder}, which is no folder"
        raise FileNotFoundError(
            f"--adapter: expected a folder with {' and '.join(names)}, of BituneModel.save_pretrained or bitune "
            f"train, {what}"
        )
    return found[0]


def load_tokenizer(given):
    """The tokenizer of ``--model``, once ``--adapter`` and ``--device`` are known to be good. Loads no weights."""
    adapter_folder(given.adapter)
    torch_device(given.device)
    from transformers import AutoTokenizer

    with _blaming("--model", f"a causal language model with its tokenizer, got {given.model}"):
        return AutoTokenizer.from_pretrained(given.model)


def load_model(given, *, autocast_adapter_dtype: bool = False, **changes):
    """The ``BituneModel`` of ``--model`` and ``--adapter`` on ``--device``.

    ``changes`` override fields of its ``BituneConfig``. A pass computes in the model's dtype anyway, and adapters in
    float32 would cost casts in every layer: only what writes them needs ``autocast_adapter_dtype``.
    """
    folder, device = adapter_folder(given.adapter), torch_device(given.device)
    import torch
    from transformers import AutoModelForCausalLM

    from ..modeling import BituneModel

    dtype = given.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    with _blaming("--model", f"a causal language model, got {given.model}"):
        base = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(device)
    with _blaming("--adapter", f"adapters of {given.model}, got {folder}"):
        return BituneModel.from_pretrained(base, folder, autocast_adapter_dtype=autocast_adapter_dtype, **changes)


def torch_device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _blaming("--device", f"a device of torch that is there, got {name!r}"):
        return torch.empty(0, device=name).device


def max_tokens(given) -> int | None:
    """The longest text that ``--model`` was made for, in tokens; None where its config doesn't say."""
    from transformers import AutoConfig

    with _blaming("--model", f"a causal language model, got {given.model}"):
        config = AutoConfig.from_pretrained(given.model).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def encode(prompt: str | list[dict[str, str]], tokenizer, kind: str) -> list[int]:
    """Token ids of a prompt. A list of messages is a conversation for the chat template, whatever the format.

    Raises:
        ValueError: no text; no chat template, or one that refuses the messages.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("expected some text, got an empty prompt")
    if kind == "chat" or not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise ValueError("expected a tokenizer with a chat template, got one without")
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        options = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
        try:
            return tokenizer.apply_chat_template(messages, **options)["input_ids"]
        except TemplateError as error:
            raise ValueError(f"expected messages as the chat template takes them; {error}") from None
    if kind == "question":
        from ..training.data import TEMPLATE

        prompt = TEMPLATE.format(x=prompt)
    tokens = tokenizer(prompt)["input_ids"]
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens  # a tokenizer that ends every text
