"""Data sets and recipes: each recipe on rows of its hub schema, tokens and labels, what is skipped, what is refused."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from bitune_kernels import BituneConfig
from bitune_kernels.training.data import load_rows, prompt_formats, tokenize
from bitune_kernels.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token per byte, so that every text comes back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    model.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=model, **special | options)


ROWS = {
    "paper": ({"prompt": "Sky?", "completion": "blue"}, "Sky?", "blue"),
    "gsm8k": ({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, "1 + 1?", "It is 2.\n#### 2"),
    "alpaca": (
        {"instruction": "Translate.", "input": "chat", "output": "cat", "text": "..."},
        "Translate.\n\nchat",
        "cat",
    ),
    "ultrafeedback": (
        {
            "source": "flan",
            "instruction": "Why?",
            "models": ["alpaca-7b", "gpt-4"],
            "completions": [{"model": "alpaca-7b", "response": "No."}, {"model": "gpt-4", "response": "Because."}],
        },
        "Why?",
        "Because.",
    ),
    "arc_challenge": (
        {"id": "1", "question": "Hot?", "choices": {"text": ["ice", "sun"], "label": ["1", "2"]}, "answerKey": "2"},
        "Hot?\n1. ice\n2. sun",
        "sun",
    ),
    "csqa": (
        {
            "id": "1",
            "question": "Hot?",
            "question_concept": "heat",
            "choices": {"label": ["A", "B"], "text": ["ice", "sun"]},
            "answerKey": "B",
        },
        "Hot?\nA. ice\nB. sun",
        "sun",
    ),
    "piqa": ({"goal": "Boil.", "sol1": "cool", "sol2": "heat", "label": 1}, "Boil.\nA. cool\nB. heat", "heat"),
    "siqa": (
        {"context": "Al ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3\n"},
        "Al ran. Why?\nA. a\nB. b\nC. c",
        "c",
    ),
}


def test_every_recipe_has_a_row():
    assert set(ROWS) == {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("name", ROWS)
def test_recipes_read_their_data_sets(name, tmp_path):
    row, question, answer = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    recipe = load_recipe(RECIPES / f"{name}.yaml", {"data": str(path)})
    assert (recipe.lora_r, recipe.lora_alpha, recipe.target_modules) == (8, 1, "all-linear")
    assert (recipe.max_steps, recipe.batch_size * recipe.accumulation, recipe.loss) == (3000, 10, "sample")
    assert recipe.lr == (3e-4 if name in ("paper", "alpaca", "ultrafeedback") else 1e-3)
    tok = byte_tokenizer()
    (sample,) = tokenize(
        load_rows(recipe.data), tok, prompt=recipe.prompt, completion=recipe.completion, reader=recipe.reader
    )
    n = sample["labels"].count(-100)
    assert tok.decode(sample["input_ids"][:n]) == f"Question: {question}\n\nAnswer:"
    assert tok.decode(sample["input_ids"][n:]) == f" {answer}</s>" and sample["labels"][n:] == sample["input_ids"][n:]


def test_messages_go_through_the_chat_template():
    tok = byte_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "sky?"), ("assistant", "blue")]
    messages = [{"role": role, "content": text} for role, text in turns]
    without_answers = [{"messages": messages[:n]} for n in (0, 3)] + [
        {"messages": [*messages[:3], {"role": "assistant"}]}
    ]
    (sample,) = tokenize([{"messages": messages}, *without_answers], tok)
    assert list(tokenize([{"prompt": messages[:3], "completion": messages[3:]}], tok)) == [sample]  # as TRL has them
    assert prompt_formats([{"messages": messages}, {"messages": None, "prompt": "x"}]) == {"chat", "question"}
    n = sample["labels"].count(-100)
    assert tok.decode(sample["input_ids"][:n]).endswith("<user>sky?</s>\n<assistant>")
    assert tok.decode(sample["input_ids"][n:]) == "blue</s>"
    with pytest.raises(ValueError, match=r"^messages: expected messages as the chat template takes them; no system"):
        tokenize([{"messages": [{"role": "system", "content": "s"}, *messages]}], tok)
    tok.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tok.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    with pytest.raises(ValueError, match=r"^messages: expected a chat template that writes an end token .* with 'e'"):
        tokenize([{"messages": messages}], tok)


def test_a_space_that_merges_with_the_colon_stays_with_the_answer():
    # ": " as one token would end the prompt otherwise than generate() writes it
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *alphabet, ":Ġ"])}
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.model = models.BPE(vocab, [(":", "Ġ")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert len(tokenizer("a: b")["input_ids"]) == 3
    (sample,) = tokenize([{"prompt": "Sky?", "completion": "blue"}], tokenizer)
    answer = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(answer) == " blue</s>"
    assert tokenizer.decode(sample["input_ids"][: -len(answer)]) == "Question: Sky?\n\nAnswer:"
    assert sample["input_ids"][: -len(answer)] == tokenizer("Question: Sky?\n\nAnswer:")["input_ids"]


def test_a_tokenizer_that_ends_every_text_ends_the_answer_alone():
    plain, ending = byte_tokenizer(), byte_tokenizer()
    ending._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    rows = [{"prompt": "Sky?", "completion": "blue"}]
    assert ending("a")["input_ids"][-1] == 2 and list(tokenize(rows, ending)) == list(tokenize(rows, plain))


def test_every_answer_of_a_conversation_can_be_trained():
    tok = byte_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [("user", "hi"), ("assistant", "hello"), ("user", "sky?"), ("assistant", "blue"), ("user", "bye")]
    messages = [{"role": role, "content": text} for role, text in said]
    (sample,) = tokenize([{"messages": messages}, {"messages": messages[:1]}], tok, turns="alternating")
    text = "<user>hi</s>\n<assistant>hello</s>\n<user>sky?</s>\n<assistant>blue</s>"
    assert tok.decode(sample["input_ids"]) == text
    trained = tok.decode([t for t in sample["labels"] if t != -100])
    assert trained == "hello</s>blue</s>" and len(sample["labels"]) == len(sample["input_ids"])
    assert list(tokenize([{"prompt": messages[:1], "completion": messages[1:]}], tok, turns="alternating")) == [sample]
    tok.chat_template = tok.chat_template.replace("messages %}", "messages[-1:] %}")
    with pytest.raises(ValueError, match="messages: expected a chat template that leaves earlier turns"):
        tokenize([{"messages": messages}], tok, turns="recompute")


def test_what_is_skipped_is_counted_once(caplog):
    rows = [{"prompt": "a", "completion": c} for c in ("yes", "", None, "x" * 50, "no")]
    rows.append({"prompt": "a" * 40, "completion": "yes"})
    with caplog.at_level(logging.WARNING):
        assert len(tokenize(rows, byte_tokenizer(), max_length=40)) == 2
    assert [r.getMessage() for r in caplog.records] == ["data: 2 samples; skipped 2 without an answer, 2 too long"]
    assert len(tokenize(rows, byte_tokenizer(), max_answer_length=4)) == 1  # a space, "no" and the end
    with pytest.raises(ValueError, match="at least one sample"):
        tokenize(rows[1:3], byte_tokenizer())
    with pytest.raises(ValueError, match="expected a column 'prompt', got question"):
        tokenize([{"question": "?"}], byte_tokenizer())
    for wrong in ("{}", "{prompt.text}"):
        with pytest.raises(ValueError, match=r"^prompt, completion: expected format strings over the columns"):
            tokenize(rows, byte_tokenizer(), prompt=wrong)
    said = {"role": "user", "content": "hi"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    for row, message in (
        ({"prompt": [said], "completion": "yes"}, "data: expected a text or a number in column 'prompt', got list"),
        ({"prompt": "a", "completion": {"x": 1}}, "data: expected a text or a number in column 'completion', got dict"),
        ({"messages": [parts, said]}, "messages: expected a text as content, got [{"),
        ({"prompt": ["hi"], "completion": ["yes"]}, "messages: expected each with role and content, got 'hi'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            tokenize([row], byte_tokenizer())
    for options in ({"reader": "mmlu"}, {"turns": "two"}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected one of .*, got '"):
            tokenize(rows, byte_tokenizer(), **options)
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with an end token"):
        tokenize(rows, byte_tokenizer(eos_token=None))


def test_a_terminal_shows_how_far_it_is(monkeypatch, capsys):
    rows = [{"prompt": "a", "completion": "b"}] * 3
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        tokenize(rows, byte_tokenizer())
        assert ("tokenizing" in capsys.readouterr().err) == terminal


@pytest.mark.parametrize("label", ["1\n", 1.0])
def test_a_label_may_be_a_line_of_a_file_or_a_float(label):
    (sample,) = tokenize([ROWS["piqa"][0] | {"label": label}], byte_tokenizer(), reader="piqa")
    assert byte_tokenizer().decode(sample["input_ids"]).endswith("Answer: heat</s>")


def test_null_is_no_text_and_the_word_none_is():
    tok = byte_tokenizer()
    (sample,) = tokenize([{"prompt": "{}", "completion": "None", "input": None}], tok, prompt="{prompt}{input}")
    assert tok.decode(sample["input_ids"]) == "Question: {}\n\nAnswer: None</s>"
    (sample,) = tokenize([ROWS["siqa"][0] | {"context": None}], tok, reader="siqa")
    assert tok.decode(sample["input_ids"]).startswith("Question:  Why?\nA. a")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("piqa", {"label": None}),
        ("piqa", {"label": ""}),
        ("siqa", {"label": None}),
        ("csqa", {"answerKey": None}),
        ("ultrafeedback", {"completions": None}),
        ("alpaca", {"output": None}),
    ],
)
def test_rows_of_data_sets_without_an_answer_are_skipped(name, changes, caplog):
    row = ROWS[name][0]
    reader = load_recipe(RECIPES / f"{name}.yaml", {"data": "x.jsonl"}).reader
    assert len(tokenize([row, row | changes], byte_tokenizer(), reader=reader)) == 1
    assert caplog.messages == ["data: 1 samples; skipped 1 without an answer"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("csqa", {"choices": ["ice", "sun"]}),
        ("csqa", {"choices": None}),
        ("csqa", {"choices": {"label": ["A"], "text": ["ice", "sun"]}}),
        ("csqa", {"choices": {"text": ["ice", "sun"]}}),
        ("ultrafeedback", {"completions": ["yes"]}),
        ("alpaca", {"input": 5}),
        ("alpaca", {"output": ["yes"]}),
    ],
)
def test_rows_of_another_layout_are_named(name, changes):
    reader = load_recipe(RECIPES / f"{name}.yaml", {"data": "x.jsonl"}).reader
    with pytest.raises(ValueError, match=rf"^data: expected rows as the reader {reader!r} takes them, got \{{'"):
        tokenize([ROWS[name][0] | changes], byte_tokenizer(), reader=reader)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_follows_the_tokenizer(side):
    tok = byte_tokenizer(padding_side=side)
    samples = tokenize([{"prompt": "a", "completion": "b"}, {"prompt": "longer", "completion": "c"}], tok)
    batch = DataCollatorForSeq2Seq(tok)(list(samples))
    padding = batch["attention_mask"] == 0
    assert padding[0].sum() == 5 and padding[0, 0] == (side == "left") and not padding[1].any()
    assert (batch["labels"][padding] == -100).all() and (batch["input_ids"][padding] == 0).all()
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "fast"}, "lr: expected float"),
        ({"lr": 0}, "lr: expected a number > 0, got 0"),
        ({"warmup": -1}, "warmup: expected a number >= 0, got -1"),
        ({"max_steps": 1.5}, "max_steps: expected int, got 1.5"),
        ({"variant": "607"}, "variant: expected one of"),
        ({"reader": "mmlu"}, "reader: expected one of"),
        ({"use_fused": 1}, "use_fused: expected bool, got 1"),
        ({"dtype": "int8"}, "dtype: expected float32"),
        ({"quantize": "int4"}, "quantize: expected null, nf4 or int8, got 'int4'"),
        ({"theta_lr": 0}, "theta_lr: expected a number > 0, got 0"),
        ({"max_answer_length": 0}, "max_answer_length: expected a number > 0, got 0"),
        ({"weight_decay": -1}, "weight_decay: expected a number >= 0, got -1"),
        ({"betas": [0.9, 1]}, r"betas: expected two numbers in \[0, 1\), got"),
    ],
)
def test_wrong_fields_are_refused_by_name(changes, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        Recipe(**{"data": "x.jsonl"} | changes)


def test_a_recipe_has_every_setting_of_the_method():
    assert {f.name for f in fields(BituneConfig)} - {f.name for f in fields(Recipe)} == {"peft"}
    changes = {"loss_chunk_rows": 512, "beta_init": 0.25, "variant": "single_stream"}
    found = Recipe(data="x.jsonl", **changes).bitune_config(None)
    assert {name: getattr(found, name) for name in changes} == changes


def test_wrong_files_are_refused_by_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match=r"got learning_rate in .*mine.yaml"):
        load_recipe(path)
    texts = {"lr: [1": " .*mine.yaml: expected yaml, got", "extends: mine.yaml": ": expected recipes that don't extend"}
    for text, message in texts.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^recipe{message}"):
            load_recipe(path)
    with pytest.raises(FileNotFoundError, match=r"^recipe: expected a yaml file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match=r"^data: expected a file"):
        load_rows(str(tmp_path / "none.jsonl"))
    for other in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"^data: expected a .json or .jsonl file .*, got {other}, which"):
            load_rows(str(other))
    for text in ("", "\n", '{"prompt": "x"}\n{"prompt"'):
        path.with_suffix(".jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"^data: expected JSON rows with the same columns in .*mine.jsonl, got"):
            load_rows(str(path.with_suffix(".jsonl")))
