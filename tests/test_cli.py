"""bitune on a tiny model and local files: a run and its resuming, answers, figures, and what is refused by name."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from bitune_kernels import BituneChat, BituneConfig, BituneModel, __version__
from bitune_kernels.cli import main
from bitune_kernels.commands.plot import _load_mixing
from bitune_kernels.config import GRANULARITIES, LOSSES, MIXINGS, TURNS, VARIANTS
from bitune_kernels.modeling import export_merged, stream_attention, stream_distance
from bitune_kernels.plots import plot_attention
from bitune_kernels.training.data import READERS, TEMPLATE, tokenize
from bitune_kernels.training.recipe import Recipe
from bitune_kernels.training.run import _arguments, _last_checkpoint
from tests.test_training_data import byte_tokenizer
from tests.test_turns import TEMPLATE as TEMPLATE_OF_CHATS
from tests.tiny import base_model, bitune_model

RECIPES = Path(__file__).parent.parent / "recipes"
VOCAB = 272  # one token per byte and the special ones


@pytest.fixture
def place(tmp_path):
    """A folder with a model that has its tokenizer, and questions with answers."""
    base_model(vocab_size=VOCAB).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(place, *options, output="run", recipe=RECIPES / "gsm8k.yaml"):
    settings = "--dtype float32 --max-steps 6 --accumulation 2 --logging-steps 2 --save-steps 2".split()
    paths = ["--model", str(place / "model"), "--output", str(place / output), "--data", str(place / "rows.jsonl")]
    return main(["train", "--recipe", str(recipe), *paths, *settings, *map(str, options)])


def test_a_whole_run(place, capsys, recwarn):
    held_out = [{"question": "2 + 2?", "answer": "4"}, {"question": "Is 7 more than 1?", "answer": "Yes, by 6."}]
    (place / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    options = ["--eval-data", place / "held_out.jsonl", "--eval-steps", "3", "--backend=sdpa"]
    assert run(place, "--theta-lr", "1e-2", *options, "--gradient-checkpointing", "selective") == 0
    folder = place / "run"
    with (folder / "alpha.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), int(r["layer"])) for r in rows] == [(s, n) for s in (2, 4, 6) for n in range(3)]
    assert (folder / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")), "nothing unfinished is left"
    model = BituneModel.from_pretrained(base_model(vocab_size=VOCAB), folder / "final")
    assert model.bitune_config.loss == "sample"
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    measured = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    rows_held_out = tokenize(held_out, byte_tokenizer(), prompt="{question}", completion="{answer}")
    with torch.no_grad():
        each = [
            model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}).loss for row in rows_held_out
        ]
    assert [*measured] == [3, 6] and measured[6] == pytest.approx(float(sum(each)) / 2, abs=1e-5)
    assert float(model.mixing.alpha(2)[0]) == pytest.approx(float(rows[-1]["alpha_k"]), abs=1e-6)
    assert not any(re.match("`(is_)?gradient_checkpointing|'pin_memory'", str(warning.message)) for warning in recwarn)
    assert run(place) == 2  # the folder has a final model
    capsys.readouterr()
    answers = []
    for changes in (["--format", "question"], [], ["--format", "text"]):
        options = ["--model", str(place / "model"), "--adapter", str(folder), "--json", *changes]
        assert main(["generate", *options, "--prompt", "1 + 1?", "--max-new-tokens", "9"]) == 0
        answers += lines(capsys)
    assert answers[0] == answers[1] and answers[2]["prompt_tokens"] < answers[1]["prompt_tokens"]


def test_answers_end_where_the_chat_template_ends_them(place, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(place / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (place / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert run(place, "--max-steps", "1") == 0
    base = base_model(vocab_size=VOCAB)
    model = BituneModel.from_pretrained(base, place / "run" / "final")
    assert model.generation_config.eos_token_id == [2, end] != base.generation_config.eos_token_id
    options = ["--model", str(place / "model"), "--adapter", str(place / "run")]
    capsys.readouterr()
    assert main(["generate", *options, "--prompt", "hi", "--json", "--max-new-tokens", "2"]) == 0
    assert lines(capsys)[0]["prompt_tokens"] == len("<user>hi\n<assistant>") + 1
    assert main(["export", *options, "--output", str(place / "exported")]) == 0
    for folder in ("exported", "exported/bitune"):
        saved = json.loads((place / folder / "generation_config.json").read_text())
        assert saved["eos_token_id"] == [2, end], folder
    assert "`bitune`" in (place / "exported" / "README.md").read_text()
    again = ["--model", str(place / "model"), "--adapter", str(place / "exported" / "bitune")]
    capsys.readouterr()
    assert main(["generate", *again, "--prompt", "hi", "--json", "--max-new-tokens", "2"]) == 0
    assert lines(capsys)[0]["prompt_tokens"] == len("<user>hi\n<assistant>") + 1  # by the chat template again


@pytest.fixture
def attached(monkeypatch):
    """The class of a linear layer of the base model in each run of ``bitune train``."""
    from bitune_kernels import modeling

    def record(base, *config, attach=modeling.get_bitune_model):
        found.append(type(base.model.layers[0].mlp.up_proj).__name__)
        return attach(base, *config)

    found = []
    monkeypatch.setattr(modeling, "get_bitune_model", record)
    return found


def test_a_quantized_base_with_dora_and_dropout_is_trained(place, attached):
    options = "--quantize nf4 --use-dora true --use-rslora true --lora-dropout 0.1 --max-steps 2".split()
    assert run(place, *options, "--dtype", "bfloat16") == 0 and attached == ["Linear4bit"]
    saved = json.loads((place / "run" / "final" / "causal" / "adapter_config.json").read_text())
    assert (saved["use_dora"], saved["use_rslora"], saved["lora_dropout"]) == (True, True, 0.1)
    assert BituneModel.from_pretrained(base_model(vocab_size=VOCAB), place / "run" / "final").peft_config


def test_an_int8_base_is_trained_without_a_line_for_each_product(place, caplog, attached):
    assert run(place, "--quantize", "int8", "--max-steps", "1", "--dtype", "bfloat16") == 0
    assert attached == ["Linear8bitLt"]
    assert "MatMul8bitLt" not in caplog.text


def test_resuming_ends_where_a_whole_run_ends(place, monkeypatch, capsys):
    from bitune_kernels.training import run as module

    assert run(place, output="whole") == 0

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Progress, "on_step_end", stop)
        assert run(place) == 130
    assert not (place / "run" / "final").exists()
    assert run(place) == 2 and "resume it with --resume" in capsys.readouterr().err
    assert run(place, "--resume", "--lr", "1e-4") == 2
    assert "lr: 0.001, got lr: 0.0001" in capsys.readouterr().err
    rows = (place / "rows.jsonl").read_text()
    (place / "rows.jsonl").write_text(rows.replace("7 + 1", "7 + 2"))
    assert run(place, "--resume") == 2 and "resume: expected the run of " in (error := capsys.readouterr().err)
    assert re.search(r"data_sha256: '\w{64}', got data_sha256: '\w{64}'$", error)
    (place / "rows.jsonl").write_text(rows)
    cut = place / "run" / "checkpoint-5"  # cut off before its state was written
    cut.mkdir()
    assert _last_checkpoint(place / "run").endswith("checkpoint-4")
    assert run(place, "--resume") == 0
    assert (place / "run" / "alpha.csv").read_text() == (place / "whole" / "alpha.csv").read_text()
    a, b = (BituneModel.from_pretrained(base_model(vocab_size=VOCAB), place / n / "final") for n in ("run", "whole"))
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "1"], "--learning-rate: expected an option of the recipe"),
        (["--lr"], "--lr: expected a value"),
        (["--lr", "fast"], "lr: expected float"),
        (["--data", "none.jsonl"], "data: expected a file, got none.jsonl"),
        (["--eval-data", "none.jsonl"], "eval_data: expected a file, got none.jsonl"),
        (["--eval-data", "openai/gsm8k"], "eval_data: expected a .json or .jsonl file, got 'openai/gsm8k'"),
        (["--max-length", "3"], "data: expected at least one sample with an answer, got none (12 too long)"),
        (["--target-modules", "[q_proj, query]"], "got query"),
        (["--target-modules", "q_proj,v_proj"], "target_modules: expected all-linear, a list [a, b] of "),
        (["--output", __file__], "output: expected a folder, got"),
        (["--output", f"{__file__}/run"], "which is a file or below one"),
        (["--eval-steps", "3"], "eval_steps: expected null without eval_data, got 3"),
        (["--prompt", "{question"], "prompt: expected a format string over the columns; expected '}'"),
        (["--seed", "4294967296"], "seed: expected a number >= 0 and below 2^32"),
        (["--resume"], "resume: expected a folder with run.json"),
        (["--schedule", "linaer"], "schedule: expected one of linear, cosine"),
        (
            ["--model", "no/such/folder"],
            "model: expected a causal language model with its tokenizer, got no/such/folder",
        ),
        (["--betas", "[0.9"], "--betas: expected yaml, got"),
        (["--backend", "fast"], "backend: expected one of"),
        (["--dtype", "float16"], "dtype: expected bfloat16 or float32 on a CPU, where no loss is scaled, got"),
        (["--data", ""], "data: expected a .json or .jsonl file or an id of the Hub, got nothing"),
        (["--report-to", "paper"], "report_to: expected none"),
        (["--prompt", "{question}" * 50], "max_length: expected at most the 256 tokens of the model, got 2048"),
    ],
)
def test_what_is_wrong_is_named_before_the_model_is_loaded(options, message, place, monkeypatch, capsys):
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    assert run(place, *options) == 2
    assert message in capsys.readouterr().err
    assert not (place / "run").exists()  # nothing hinders the corrected command


def test_a_run_that_would_fail_at_its_end_does_not_begin(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")  # each would write the same folder
        assert run(place) == 2 and "WORLD_SIZE: expected 1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(place) == 2
    assert "bitune train: expected matplotlib, got none" in capsys.readouterr().err and not (place / "run").exists()
    assert run(place, "--variant", "no_mixing", "--max-steps", "1") == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_loss_of_float16_is_scaled(dtype, tmp_path, monkeypatch):
    cuda = property(lambda arguments: arguments._setup_devices and torch.device("cuda"))
    monkeypatch.setattr(TrainingArguments, "device", cuda)
    assert _arguments(Recipe(data="x.jsonl", dtype=dtype), tmp_path).fp16 == (dtype == "float16")


def test_a_loss_that_is_not_finite_stops_with_its_step(place, capsys):
    assert run(place, "--lr", "1e30", "--warmup", "0") == 2
    assert "loss: expected a finite value, got nan at step 2" in capsys.readouterr().err
    assert not (place / "run" / "final").exists()


def test_help_and_version_load_nothing_heavy():
    commands = ["generate", "chat", "serve", "export", "plot", "plot alpha", "env"]
    calls = [["--version"], ["--help"], *([*command.split(), "--help"] for command in commands)]
    code = f"""if True:
        import sys
        from bitune_kernels.cli import main
        for arguments in {calls}:
            try:
                main(arguments)
            except SystemExit as end:
                assert end.code == 0, arguments
        assert main(["chat", "--histry", "x"]) == 2
        assert not {{"torch", "numpy", "transformers", "peft", "datasets"}} & set(sys.modules)
    """
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"bitune_kernels {__version__}\nusage: bitune [-h] [--version]")
    assert printed.count("example: bitune") >= len(commands) - 1


def test_help_lists_the_fields_of_a_recipe(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "example: bitune train" in printed
    assert "  --lora-alpha 1\n" in printed and "  --eval-data null\n" in printed and "  --prompt {prompt}\n" in printed
    described = printed.split("--seed 42")[1]
    names = [field.name for field in fields(Recipe)]
    for word in (*names, *VARIANTS, *MIXINGS, *GRANULARITIES, *LOSSES, *TURNS, *READERS):
        assert re.search(rf"\b{word}\b", described), f"--help says nothing of {word}"


def test_the_commands_of_the_readme_run(place, monkeypatch, capsys):
    readme = (RECIPES.parent / "README.md").read_text()
    commands = [
        shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()
    ]
    rows = [{"prompt": "Is the sky blue?", "completion": "yes"}] * 4
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "Is the sea?"}) + "\n")
    monkeypatch.chdir(place)
    (place / "recipes").symlink_to(RECIPES)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE_OF_CHATS
    tokenizer.save_pretrained("model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    quick = {"train": ["--max-steps", "3", "--logging-steps", "1"], "generate": ["--max-new-tokens", "4"]}
    quick["chat"] = quick["generate"]
    for program, command, *options in commands:
        assert program == "bitune"
        options = [{"google/gemma-2b": "model"}.get(word, word) for word in options]
        if command in ("serve", "evaluate"):  # tests/test_serve.py, tests/test_evaluation.py
            with pytest.raises(SystemExit, match="0"):
                main([command, "--help"])
            continue
        assert main([command, *options, *quick.get(command, [])]) == 0, capsys.readouterr().err
    assert (place / "runs" / "answers" / "final" / "bitune_config.json").is_file()
    every = {"train", "evaluate", "generate", "chat", "serve", "export", "plot", "env"}
    assert {command for _, command, *_ in commands} == every


PROMPTS = ["1 + 1?", "Is the sky blue,\u2028and the sea?", "why"]


@pytest.fixture
def trained(place):
    """The options that name the model, and beside it the same one in three passes, as Python users load it."""
    bitune_model(base=base_model(vocab_size=VOCAB)).save_pretrained(place / "adapter")
    model = BituneModel.from_pretrained(base_model(vocab_size=VOCAB), place / "adapter", use_fused=False)
    return ["--model", str(place / "model"), "--adapter", str(place / "adapter")], model


def greedy(model, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    return model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[
        0, len(tokens) :
    ].tolist()


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_answers_are_those_of_three_passes_one_by_one(place, trained, capsys):
    options, model = trained
    tokenizer, generation = byte_tokenizer(), model.generation_config
    free = [greedy(model, tokenizer(p)["input_ids"], 9) for p in PROMPTS]
    # A model that samples unless told otherwise, whose own end token isn't the tokenizer's, nor that of its training.
    end, last, learned = free[1][3], free[2][5], free[0][7]
    model.end_answers_with([learned])
    model.save_pretrained(place / "adapter")
    generation.update(do_sample=True, temperature=5.0, top_k=3, eos_token_id=end)
    generation.save_pretrained(place / "model")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    tokenizer.save_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    ends = (end, last, learned)
    expected = [row[: next(i + 1 for i, token in enumerate(row) if token in ends)] for row in free]
    assert (expected[1][-1], expected[2][-1], expected[0][-1]) == ends and len({*ends}) == 3
    rows = "\r\n\r\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in PROMPTS)
    (place / "prompts.jsonl").write_text(rows, encoding="utf-8-sig")  # as editors of Windows write it
    several = ["generate", *options, "--file", str(place / "prompts.jsonl"), "--max-new-tokens", "9"]
    assert main([*several, "--batch-size", "2", "--json"]) == 0
    for row, prompt, tokens in zip(lines(capsys), PROMPTS, expected, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        counts = {"prompt_tokens": len(prompt.encode()), "completion_tokens": len(tokens)}
        assert row == {"prompt": prompt, "completion": text} | counts
    assert main([*several, "--batch-size", "3"]) == 0
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)
    assert main(["generate", *options, "--prompt", PROMPTS[0], "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == texts[0] + "\n"


def test_formats_and_sampling(place, trained, capsys):
    options, model = trained
    template = (
        "{% if messages[0].role == 'bot' %}{{ raise_exception('no bots') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    byte_tokenizer(chat_template=template).save_pretrained(place / "model")
    messages = [{"role": "user", "content": "why"}]
    (place / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    command = ["generate", *options, "--max-new-tokens", "8", "--json"]

    def answer(*changes) -> tuple[str, int]:
        assert main([*command, *changes]) == 0
        (row,) = lines(capsys)
        return row["completion"], row["prompt_tokens"]

    plain = answer("--prompt", "why")
    assert answer("--prompt", "why", "--format", "question") == answer("--prompt", TEMPLATE.format(x="why")) != plain
    chat = answer("--prompt", "[user]why[a]")
    assert answer("--prompt", "why", "--format", "chat") == answer("--file", str(place / "chat.jsonl")) == chat != plain
    (place / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "bot", "content": "why"}]}))
    assert main([*command, "--file", str(place / "chat.jsonl")]) == 2
    assert "line 1: expected messages as the chat template takes them; no bots" in capsys.readouterr().err
    seeds = [answer("--prompt", "why", "--temperature", "2", "--seed", seed) for seed in "112"]
    assert seeds[0] == seeds[1] != seeds[2] and plain not in seeds
    ids = torch.tensor([byte_tokenizer()("why")["input_ids"]])
    set_seed(1)
    sampled = model.generate(input_ids=ids, do_sample=True, temperature=2.0, top_k=0, max_new_tokens=8, pad_token_id=0)
    assert seeds[0][0] == byte_tokenizer().decode(sampled[0, 3:], skip_special_tokens=True)
    assert answer("--prompt", "why", "--top-p", "1e-6") == plain, "the likeliest token alone"


def test_figures_show_the_model(place, trained, monkeypatch, capsys):
    from matplotlib.figure import Figure

    options, model = trained
    figures, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or write(self, *args, **kw))
    (place / "run").mkdir()
    (place / "adapter").rename(place / "run" / "final")
    options[-1] = str(place / "run")
    (place / "run" / "alpha.csv").write_text(
        "step,layer,alpha_k,alpha_v\n" + "".join(f"{s},{n},0.{s},0.{n}\n" for s in (5, 9) for n in range(3))
    )
    for name, prompt in (("alpha", []), ("attention", ["--prompt", "a$\nbc$"]), ("streams", ["--prompt", "a$\nbc$"])):
        given = options if prompt else options[2:]
        assert main(["plot", name, *given, *prompt, "--output", str(place / f"{name}.png")]) == 0
        assert (place / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.split() == [str(place / f"{n}.png") for n in ("alpha", "attention", "streams")]
    alpha, attention, streams = figures

    def curves(axes) -> torch.Tensor:
        return torch.tensor([line.get_ydata() for line in axes.lines])

    with torch.no_grad():
        thetas = torch.stack([model.mixing.theta_k, model.mixing.theta_v]).abs()
    torch.testing.assert_close(torch.cat([curves(a) for a in alpha.axes[:2]]).float(), thetas / (thetas + 0.01))
    torch.testing.assert_close(torch.cat([curves(a) for a in alpha.axes[2:4]]).float(), thetas)
    assert curves(alpha.axes[4]).tolist() == [[0.5, 0.9]] * 3
    assert curves(alpha.axes[5]).tolist() == [[0.0, 0.0], [0.1, 0.1], [0.2, 0.2]]
    ids = torch.tensor([byte_tokenizer()("a$\nbc$")["input_ids"]])
    panels = {axes.get_title(): axes for axes in attention.axes if axes.images}
    for name, layers in stream_attention(model, ids).items():
        torch.testing.assert_close(torch.tensor(panels[name].images[0].get_array()), layers.mean(0))
        assert [t.get_text() for t in panels[name].get_xticklabels()] == ["a", "$", "\\n", "b", "c"]
    torch.testing.assert_close(curves(streams.axes[0]), torch.stack(list(stream_distance(model, ids).values())))


def test_one_bright_cell_leaves_the_others_visible(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *args, **kw: figures.append(self))
    matrix = torch.full((20, 20), 0.05).tril()
    matrix[0, 0] = 1.0
    plot_attention({"bidir": matrix, "causal": matrix}, ["x"] * 20, tmp_path / "attention.png")
    assert [axes.images[0].norm.vmax for axes in figures[0].axes[:2]] == [pytest.approx(0.05)] * 2


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("generate", "--prompt x --adapter none", "--adapter: expected a folder with bitune_config.json and causal"),
        ("generate", "--prompt x --adapter none", "got none, which is no folder"),
        ("generate", "--prompt x --adapter model", "got model, which has none"),
        ("generate", "--prompt x --model adapter", "--model: expected a causal language model with its tokenizer"),
        ("generate", "--prompt x --dtype int3", "--dtype: invalid choice: 'int3' (choose from"),
        ("generate", "--prompt x --device gpu7", "--device: expected a device of torch that is there, got 'gpu7'"),
        ("generate", "--prompt x --file y", "--file: not allowed with argument --prompt"),
        ("generate", "--prompt x --max-new-tokens 0", "--max-new-tokens: expected a whole number > 0, got '0'"),
        ("generate", "--prompt x --temperature 0", "--temperature: expected a number > 0 (greedy without it), got '0'"),
        ("generate", "--prompt x --top-p 1.5", "--top-p: expected a number in (0, 1], got '1.5'"),
        ("generate", "--prompt x --seed 1", "--seed: expected --temperature or --top-p with it"),
        (
            "generate",
            "--prompt x --format chat",
            "--prompt: expected a tokenizer with a chat template, got one without",
        ),
        ("generate", "--prompt x --beams 4", "--beams: expected an option of bitune generate, got an unknown one"),
        ("generate", "--prompt ' '", "--prompt: expected some text, got an empty prompt"),
        ("generate", "", "stdin: expected some text, got an empty prompt"),
        ("generate", "--file none", "--file: expected a file of JSON lines, got none, which is no file"),
        ("generate", "--file adapter", "--file: expected a file of JSON lines, got adapter, which is no file"),
        ("generate", "--prompt x --top-p 1 --seed 4294967296", "--seed: expected a whole number below 2^32, got"),
        ("generate", "--file empty", "--file: expected at least one line with a prompt"),
        ("generate", "--file wrong", "--file wrong, line 2: expected JSON, got"),
        ("generate", "--file half", "--file half, line 1: expected JSON, got 'utf-8' codec can't encode"),
        ("generate", "--file rows.jsonl", "line 1: expected a text 'prompt', or 'messages' with role and content"),
        ("generate", "--file parts", "line 1: expected a text 'prompt', or 'messages' with role and content"),
        ("generate", "--file answered", "line 1: expected messages whose last one is to be answered"),
        ("generate", "--prompt 12345 --max-new-tokens 252", "at most the 256 tokens of the model, got 5 and 252"),
        ("plot attention", "--prompt x --output x.png", "--prompt: expected 2 to 256 tokens, got 1"),
        ("plot attention", "--prompt xy --output x.txt", "--output: expected a file that ends in .png, .pdf, .svg"),
        ("plot streams", "--prompt xy --output none/x.png", "--output: expected a file in a folder that exists"),
        ("plot alpha", "--output x.png", "--adapter: expected a variant that mixes two streams, got 'naive_bidir'"),
        ("chat", "", "--model: expected a tokenizer with a chat template, got model without one"),
        ("chat", "--file wrong", "--file: expected JSON, got"),
        ("chat", "--file none/kept.json", "--file: expected a file in a folder that exists, got none/kept.json"),
        ("chat", "--file messages --system x", "--system: expected none with a conversation in --file"),
        ("chat", "--seed 1", "--seed: expected --temperature or --top-p with it"),
        ("chat", "--turns none", "--turns: invalid choice: 'none'"),
        ("talk", "", "invalid choice: 'talk'"),
        ("evaluate", "--adapter none --tasks piqa", "--adapter: expected a folder with"),
        (
            "export",
            "--output rows.jsonl/x",
            "empty folder, got rows.jsonl/x, which is below a file",
        ),
        ("export", "--output adapter", "--output: expected a new or empty folder, other than the current one, got"),
    ],
)
def test_what_is_asked_wrongly_is_named(command, options, message, place, monkeypatch, capsys):
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    monkeypatch.chdir(place)
    Path("adapter", "causal").mkdir(parents=True)
    BituneConfig(variant="naive_bidir").save("adapter")
    Path("empty").write_text("\n")
    Path("half").write_text(r'{"prompt": "\ud83d"}')
    Path("wrong").write_text('{"prompt": "x"}\n{')
    Path("messages").write_text('[{"role": "user", "content": "x"}]')
    Path("parts").write_text('{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}')
    Path("answered").write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    usual = "--adapter adapter" if command == "plot alpha" else "--model model --adapter adapter"  # the last one counts
    assert main(shlex.split(f"{command} {usual} {options}")) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("bitune: ") and error.count("\n") == 1


@pytest.mark.parametrize("turns", ["recompute", "alternating"])
def test_a_chat_is_that_of_python_and_goes_on_from_its_file(turns, place, trained, monkeypatch, capsys):
    options, model = trained
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE_OF_CHATS
    tokenizer.save_pretrained(place / "model")
    chat = BituneChat(model, tokenizer, turns, [{"role": "system", "content": "be brief"}])
    said = ["hi", "x" * 300, "", "why?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said)))
    command = ["chat", *options, "--turns", turns, "--max-new-tokens", "5", "--file", str(place / "kept.json")]
    with model.use_schedule(use_fused=True):
        answers = [chat.send(said[i], max_new_tokens=5, do_sample=False) for i in (0, 3)]
        assert main([*command, "--json", "--system", "be brief"]) == 0
        found = capsys.readouterr()
        assert [json.loads(line)["completion"] for line in found.out.splitlines()] == answers
        assert found.err.count("text: expected a conversation of at most 256 tokens") == 1
        assert json.loads((place / "kept.json").read_text()) == chat.messages
        monkeypatch.setattr(sys, "stdin", io.StringIO("and then?\n"))
        assert main(command) == 0
    kept = json.loads((place / "kept.json").read_text())
    assert len(kept) == 7 and capsys.readouterr().out.strip() == kept[-1]["content"].strip()
    assert not list(place.glob("*.part"))
    (place / "kept.json").write_text(json.dumps([*kept[:-1], {"role": "assistant", "content": None}]))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # what is wrong is found before
    assert main(command) == 2
    assert "--file: messages: expected each with a role and a text as content" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        dict(mixing_granularity="global", dynamic_mixing=True),
        dict(mixing_granularity="head", variant="single_stream_dual", dynamic_mixing=True),
        dict(variant="single_stream", beta_init=0.9),
    ],
    ids=["global", "head", "beta"],
)
def test_saved_coefficients_are_read_without_their_model(config, tmp_path):
    model = bitune_model(**config)
    model.save_pretrained(tmp_path)
    found, expected = _load_mixing(tmp_path).state_dict(), model.mixing.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_that_were_cut_off_are_named(place, trained, capsys):
    options, _ = trained
    figure = ["plot", "alpha", "--adapter", str(place / "adapter"), "--output", str(place / "alpha.png")]
    (place / "adapter" / "alpha.csv").write_text("step,layer,alpha_k,alpha_v\n")
    cases = [
        ("adapter/causal/adapter_model.safetensors", ["generate", *options, "--prompt", "x"], "--adapter: expected"),
        ("adapter/bitune_mixing.safetensors", figure, "bitune_mixing.safetensors: expected a whole file"),
        ("adapter/alpha.csv", figure, "--adapter: expected the table of bitune train in"),
        ("model/model.safetensors", ["generate", *options, "--prompt", "x"], "--model: expected a causal language"),
    ]
    for name, command, message in cases:
        whole = (place / name).read_bytes()
        (place / name).write_bytes(b"step\n1\n" if name.endswith("csv") else whole[:100])
        assert main(command) == 2 and message in capsys.readouterr().err, name
        (place / name).write_bytes(whole)


def test_in_a_terminal(place, trained, capsys):
    options, _ = trained
    command = [*options, "--max-new-tokens", "6"]
    assert main(["generate", *command, "--prompt", "why"]) == 0
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    cli = [sys.executable, "-m", "bitune_kernels.cli", "generate", *command]
    pipes = dict(input="why\n", capture_output=True, encoding="utf-8", env=environment)
    answered = subprocess.run(cli, **pipes)
    assert (answered.returncode, answered.stdout) == (0, capsys.readouterr().out), answered.stderr
    refused = subprocess.run([*cli, "--top-p", "2"], **pipes)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "bitune: --top-p: expected a number in (0, 1], got '2'\n"


def test_nothing_is_said_when_nobody_reads_on():
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([sys.executable, "-m", "bitune_kernels.cli", "env"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (found.returncode, found.stderr) == (1, b"")


def test_a_pipe_of_others_that_breaks_is_an_error_and_no_output_is_none(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("bitune_kernels.cli._env", Mock(side_effect=BrokenPipeError("the server of metrics")))
        assert main(["env"]) == 2 and capsys.readouterr().err == "bitune: the server of metrics\n"
    monkeypatch.setattr(sys, "stdout", None)  # as behind >&-
    assert main(["env"]) == 0


def test_an_exported_model_decodes_a_mixed_cache(place, trained, monkeypatch, capsys):
    options, model = trained
    assert main(["export", *options, "--output", str(place / "exported")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(place / "exported")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    ids = torch.tensor([AutoTokenizer.from_pretrained(place / "exported")("Is the sky blue?")["input_ids"]])
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        for _ in range(5):
            step = plain(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
    assert tokens == greedy(model, ids[0].tolist(), 6)
    again = BituneModel.from_pretrained(base_model(vocab_size=VOCAB), place / "exported" / "bitune")
    assert greedy(again, ids[0].tolist(), 6) == tokens
    with pytest.raises(ValueError, match="folder: expected a new or empty folder"):
        export_merged(again, place / "exported")
    with monkeypatch.context() as patch:
        patch.setattr(type(byte_tokenizer()), "save_pretrained", Mock(side_effect=KeyboardInterrupt))
        assert main(["export", *options, "--output", str(place / "half")]) == 130
    assert not (place / "half").exists()
    assert main(["export", *options, "--output", str(place / "half")]) == 0
    (place / "empty").mkdir()
    monkeypatch.chdir(place / "empty")
    for folder in (".", place / "empty"):
        with pytest.raises(ValueError, match="folder: expected a new or empty folder, other than the current one"):
            export_merged(again, folder)
        assert main(["export", *options, "--output", str(folder)]) == 2
    assert greedy(again, ids[0].tolist(), 6) == tokens


def test_an_export_has_the_adapters_as_they_were_trained(place, trained):
    options, _ = trained
    folders = place / "adapter", place / "exported" / "bitune"
    assert main(["export", *options, "--dtype", "bfloat16", "--output", str(place / "exported")]) == 0
    for name in ("causal", "bidir"):
        before, after = (load_file(folder / name / "adapter_model.safetensors") for folder in folders)
        assert all(torch.equal(after[key], x) for key, x in before.items()), name


def test_env(capsys):
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]["version"] == torch.__version__
    assert main(["env"]) == 0
    assert "native extension" in capsys.readouterr().out
