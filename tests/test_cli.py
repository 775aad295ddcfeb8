"""bitune train on a tiny model and local files: a whole run, resuming, and what is refused by name."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitune_kernels import BituneModel
from bitune_kernels.cli import main
from bitune_kernels.training.run import _last_checkpoint
from tests.test_training_data import byte_tokenizer
from tests.tiny import base_model

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


def test_a_whole_run(place):
    assert run(place, "--theta-lr", "1e-2", "--backend=sdpa", "--gradient-checkpointing", "selective") == 0
    folder = place / "run"
    with (folder / "alpha.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), int(r["layer"])) for r in rows] == [(s, n) for s in (2, 4, 6) for n in range(3)]
    assert (folder / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")), "nothing unfinished is left"
    model = BituneModel.from_pretrained(base_model(vocab_size=VOCAB), folder / "final")
    assert (model.bitune_config.loss, model.bitune_config.backend) == ("sample", "sdpa")
    assert float(model.mixing.alpha(2)[0]) == pytest.approx(float(rows[-1]["alpha_k"]), abs=1e-6)
    assert run(place) == 2  # the folder has a final model


def test_resuming_ends_where_a_whole_run_ends(place, monkeypatch, capsys):
    from bitune_kernels.training import run as module

    assert run(place, output="whole") == 0

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Progress, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(place)
    assert not (place / "run" / "final").exists()
    assert run(place) == 2 and "resume it with --resume" in capsys.readouterr().err
    assert run(place, "--resume", "--lr", "1e-4") == 2
    assert "lr: 0.001, got lr: 0.0001" in capsys.readouterr().err
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
        (["--max-length", "3"], "data: expected at least one sample with an answer, got none (12 too long)"),
        (["--target-modules", "[q_proj, query]"], "got query"),
        (["--resume"], "resume: expected a folder with run.json"),
        (["--backend", "fast"], "backend: expected one of"),
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


def test_a_loss_that_is_not_finite_stops_with_its_step(place, capsys):
    assert run(place, "--lr", "1e30", "--warmup", "0") == 2
    assert "loss: expected a finite value, got nan at step 2" in capsys.readouterr().err
    assert not (place / "run" / "final").exists()


def test_the_command_loads_nothing_heavy_to_print_its_help():
    code = "import sys, bitune_kernels.cli; assert not {'transformers', 'peft', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-m", "bitune_kernels.cli", "train", "--help"], check=True, capture_output=True)


def test_the_command_of_the_readme_runs(place, monkeypatch):
    readme = (RECIPES.parent / "README.md").read_text()
    command = re.search(r"```sh\n(.*?)```", readme, re.DOTALL)[1].split()
    assert command[0] == "bitune"
    rows = [{"prompt": "Is the sky blue?", "completion": "yes"}] * 4
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(place)
    (place / "recipes").symlink_to(RECIPES)
    options = [{"google/gemma-2b": "model"}.get(word, word) for word in command[1:]]
    assert main([*options, "--max-steps", "3", "--logging-steps", "1"]) == 0
    assert (place / "runs" / "answers" / "final" / "bitune_config.json").is_file()
