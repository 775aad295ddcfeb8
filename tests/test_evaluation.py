"""The plug-in of the lm-evaluation-harness, run by the harness on local files in the schemas of its own tasks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy
import pytest
import torch

from bitune_kernels import BituneConfig, get_bitune_model
from bitune_kernels.modeling import score_choices
from bitune_kernels.training.data import READERS, TEMPLATE
from bitune_kernels.training.recipe import load_recipe
from tests.families import BY_ID
from tests.test_training_data import ROWS, byte_tokenizer
from tests.test_turns import TEMPLATE as CHAT_TEMPLATE
from tests.test_turns import model_of
from tests.tiny import base_model, bitune_model, lora

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import Registry, get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from bitune_kernels.evaluation import BituneLM  # noqa: E402

ROOT = Path(__file__).parent.parent
HARNESS = Path(lm_eval.__file__).parent / "tasks"
CHOICES = {"label": ["A", "B", "C"], "text": ["the sun", "ice", "a"]}
# the harness's own file, rows as on the hub
TASKS = {
    "piqa": (
        "piqa/piqa.yaml",
        [{"goal": f"Boil {n}.", "sol1": "cool it", "sol2": "heat", "label": n % 2} for n in range(3)],
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        [{"id": str(n), "question": f"Hot {n}?", "choices": CHOICES, "answerKey": "ABC"[n]} for n in range(3)],
    ),
    "commonsense_qa": (
        "commonsense_qa/default.yaml",
        [
            {"question": f"Why {n}?", "choices": {"label": [*"ABCDE"], "text": [*"vwxyz"]}, "answerKey": "ABCDE"[n]}
            for n in range(3)
        ],
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        [
            {
                "context": f"Al ran {n}.",
                "question": "Why?",
                "answerA": "a",
                "answerB": "to be",
                "answerC": "c",
                "label": "2",
            }
            for n in range(3)
        ],
    ),
    "mmlu_abstract_algebra": (
        "mmlu/default/mmlu_abstract_algebra.yaml",
        [{"question": f"1 + {n}?", "subject": "abstract_algebra", "choices": [*"1234"], "answer": n} for n in range(3)],
    ),
    "gsm8k": ("gsm8k/gsm8k.yaml", [{"question": f"2 + {n}?", "answer": f"It is.\n#### {n + 2}"} for n in range(3)]),
}
GROUPS = {
    "arc_challenge": "arc_challenge",
    "csqa": "commonsense_qa",
    "siqa": "social_iqa",
    "piqa": "piqa",
    "gsm8k": "gsm8k",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files: the harness's own, under their names, but for where the rows come from."""
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(ROOT / "recipes" / "tasks", folder / "recipes")
    for name, (path, rows) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {split: str(folder / f"{name}.jsonl") for split in ("train", "validation", "test", "dev")}
        task = {"include": str(HARNESS / path), "task": name, "dataset_path": "json", "dataset_name": None}
        task["dataset_kwargs"] = {"data_files": files}
        if name == "gsm8k":
            task["generation_kwargs"] = {"until": ["Question:", "e"], "do_sample": False, "max_gen_toks": 8}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    (folder / "mmlu.yaml").write_text(json.dumps({"group": "mmlu", "task": ["mmlu_abstract_algebra"]}))
    return folder


def tiny(**changes):
    config = {name: changes.pop(name) for name in ("variant", "backend") if name in changes}
    return bitune_model(
        base=base_model(**dict(vocab_size=272, max_position_embeddings=2048) | changes), **config
    ).eval()


def plugin(**changes) -> BituneLM:
    return BituneLM(tiny(), tokenizer=byte_tokenizer(), **changes)


@torch.no_grad()
def by_hand(model, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    """The paper's three passes over one prompt and one answer."""
    ids = torch.tensor([prompt + answer])
    with model.use_schedule(use_fused=False):
        logits = model(input_ids=ids, prompt_lengths=[len(prompt)]).logits[0, len(prompt) - 1 : -1].double()
    tokens = torch.tensor(answer)
    each = logits.log_softmax(-1).gather(1, tokens[:, None])
    return float(each.sum()), bool((logits.argmax(-1) == tokens).all())


def test_every_task_of_the_paper_by_the_harness(tasks):
    lm, tok = plugin(batch_size=2), byte_tokenizer()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = dict(num_fewshot=0, bootstrap_iters=0, task_manager=manager)
    results = lm_eval.simple_evaluate(model=lm, tasks=[*TASKS], **options)
    for name in TASKS:
        for sample in results["samples"][name]:
            for arguments, (found,) in zip(sample["arguments"], sample["resps"], strict=True):
                prompt = tok(arguments[0])["input_ids"]
                if name == "gsm8k":
                    ids = torch.tensor([prompt])
                    with lm.model.use_schedule(use_fused=False):
                        out = lm.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
                    text = tok.decode(out[0, len(prompt) :], skip_special_tokens=True)
                    assert found == text.split("Question:")[0].split("e")[0]
                else:
                    expected, greedy = by_hand(lm.model, prompt, tok(arguments[1])["input_ids"])
                    assert found[0] == pytest.approx(expected, abs=1e-4) and found[1] == greedy
    scores = {name: results["results"][name] for name in TASKS}
    assert len(results["samples"]["commonsense_qa"][0]["arguments"]) == 5
    samples = results["samples"]["arc_challenge"]
    best = [max(range(3), key=lambda i: s["resps"][i][0][0]) for s in samples]
    assert scores["arc_challenge"]["acc,none"] == sum(b == n for n, b in enumerate(best)) / 3
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= scores["gsm8k"].keys()


def test_chat_templates_and_few_shots_are_prompt_too(tasks):
    lm, tok = plugin(), byte_tokenizer()
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = dict(num_fewshot=1, bootstrap_iters=0, task_manager=manager, limit=1, apply_chat_template=True)
    results = lm_eval.simple_evaluate(model=lm, tasks=["arc_challenge"], **options)
    (sample,) = results["samples"]["arc_challenge"]
    for (prompt, answer), (found,) in zip(sample["arguments"], sample["resps"], strict=True):
        assert prompt.startswith("<user>Question: Hot") and prompt.count("<assistant>") == 2
        assert found[0] == pytest.approx(
            by_hand(lm.model, tok(prompt)["input_ids"], tok(answer)["input_ids"])[0], abs=1e-4
        )


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", "bitune"), ("llama", "shared_weights"), ("gemma3_text", "bitune"), ("gpt2", "naive_bidir")],
)
def test_choices_in_one_pass_are_those_one_by_one(family, variant):
    model = model_of(family, variant=variant).eval()
    vocab = model.get_base_model().config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    prompts = [tokens(n) for n in (9, 1, 5)]
    choices = [[tokens(n) for n in lengths] for lengths in ((4, 1, 7), (1, 2), (1, 1, 1))]
    ids = torch.tensor([prompts[0]])
    likeliest = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    choices[0].append(likeliest[0, 9:].tolist())
    rows = []
    with model._hooks.observing(lambda plan, *_: rows.append(plan.num_rows)):
        found = score_choices(model, prompts, choices)
    streams = model.bitune_config.num_streams
    assert set(rows) == {streams * (8 + 0 + 4) + 3 + (3 + 6 + 2 + 1)}, (
        "each prompt is read once, each answer up to its last"
    )
    assert found[0][3][1] and not found[0][0][1]
    for prompt, answers, scores in zip(prompts, choices, found, strict=True):
        for answer, (score, greedy) in zip(answers, scores, strict=True):
            expected = by_hand(model, prompt, answer)
            assert score == pytest.approx(expected[0], abs=1e-5) and greedy == expected[1]


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array], ids=["torch", "numpy"])
def test_choices_may_be_arrays(kind):
    model, prompts, choices = bitune_model().eval(), [[5, 6], [7, 8]], [[[8], [9, 3, 4]], [[4, 5]]]
    arrays = [[kind(ids) for ids in answers] for answers in choices]
    assert score_choices(model, kind(prompts), arrays) == score_choices(model, prompts, choices)


def test_choices_of_a_model_that_was_made_for_three_passes():
    # gpt2's last layer can't drop rows, which the comparison of both shows
    found, expected = (
        score_choices(model_of("gpt2", use_fused=fused).eval(), [[5, 6, 7]], [[[8], [9, 3]]]) for fused in (False, True)
    )
    for x, y in zip(found[0], expected[0], strict=True):
        assert x[0] == pytest.approx(y[0], abs=1e-5) and x[1] == y[1]
    base = BY_ID["gemma3_text"].build()  # the norms of its heads can't have two sets of weights in one pass
    model = get_bitune_model(base, BituneConfig(peft=None, use_fused=False)).eval()
    with pytest.raises(ValueError, match=r"^base_model: Gemma3ForCausalLM can't be used in one pass"):
        score_choices(model, [[5, 6, 7]], [[[8], [9, 3]]])


def test_choices_are_scored_without_dropout():
    model = bitune_model(peft=lora(lora_dropout=0.5)).train()
    first, second = (score_choices(model, [[5, 6, 7]], [[[8, 9]]]) for _ in range(2))
    assert first == second and model.training


@pytest.fixture(scope="module")
def short() -> BituneLM:
    """A model of 20 tokens."""
    return plugin(max_length=20)


def switched_off(model):
    with model.disable_bitune():
        score_choices(model, [[1]], [[[1]]])


def requests(*pairs, kind="loglikelihood") -> list[Instance]:
    options = dict(metadata=("quiz", 7, 1))
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i, **options) for i, pair in enumerate(pairs)]


def test_long_and_empty_prompts(caplog, short, monkeypatch):
    lm, tok, kept = short, byte_tokenizer(), {}
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, pair, score: kept.update({(kind, *pair): score}))
    long, answer = "What is the answer to this question?", " forty-two"
    pairs = ((long, answer), (long, " no"), ("Why?", " no"), ("", "no"))
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    ids = tok(long)["input_ids"]
    prompts = [ids[-11:], ids[-18:], tok("Why?")["input_ids"], [tok.bos_token_id]]
    for prompt, text, (score, _) in zip(prompts, (answer, " no", " no", "no"), found, strict=True):
        assert score == pytest.approx(by_hand(lm.model, prompt, tok(text)["input_ids"])[0], abs=1e-4)
    assert kept == {("loglikelihood", *pair): score for pair, score in zip(pairs, found, strict=True)}
    assert "2 of 4 prompts are cut on the left, to the 20 tokens" in caplog.text


def test_an_answer_ends_at_the_tokenizers_end_token():
    model, tok, prompts = tiny(), byte_tokenizer(), ("Is it so?", "Why is that?")

    def greedy(prompt):
        ids = torch.tensor([tok(prompt)["input_ids"]])
        out = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out[0, ids.shape[1] :].tolist()

    first, second = map(greedy, prompts)
    # a character, after which the first goes on while the second has none of it
    end = next(i for i, t in enumerate(first) if i and t not in [*first[:i], *second] and tok.decode([t]).isascii())
    tok.add_special_tokens({"eos_token": tok.convert_ids_to_tokens(first[end])})
    lm = BituneLM(model, tokenizer=tok, batch_size=2)
    found = lm.generate_until(requests(*((p, {"max_gen_toks": 40}) for p in prompts), kind="generate_until"))
    assert found == [tok.decode(tokens, skip_special_tokens=True) for tokens in (first[:end], second)]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda lm: lm.loglikelihood(requests(("Why?", " no"), ("Why?", " "))),
            "quiz, document 7: expected choices with",
        ),
        (lambda lm: lm.loglikelihood(requests(("", ""))), "quiz, document 7: expected choices with some text"),
        (
            lambda lm: lm.loglikelihood(requests(("Why?", "x" * 21))),
            "continuation: expected 1 to 20 tokens, got 21 for",
        ),
        (
            lambda lm: lm.loglikelihood_rolling(requests(("a text",), kind="loglikelihood_rolling")),
            "quiz: expected tasks with a prompt and an answer",
        ),
        (
            lambda lm: BituneLM(lm.model, tokenizer=lm.tokenizer, batch_size="auto"),
            "batch_size: expected a number of questions",
        ),
        (lambda lm: BituneLM(lm.model, tokenizer=lm.tokenizer, batch_size=0), "batch_size: expected a number of"),
        (lambda lm: BituneLM(lm.model), "tokenizer: expected that of the BituneModel"),
        (lambda lm: BituneLM(base_model()), "pretrained: expected a folder, an id or a BituneModel"),
        (lambda lm: BituneLM("model"), "adapter: expected a folder of BituneModel.save_pretrained"),
        (lambda lm: BituneLM("model", "none"), "--adapter: expected a folder with"),
        (lambda lm: BituneLM("model", "none", dtype="int8"), "dtype: expected one of auto, float32"),
        (
            lambda lm: score_choices(lm.model, [[1]], [[[]]]),
            r"choices: expected at least one token in each, got none in",
        ),
        (lambda lm: score_choices(lm.model, [[1]], [[[-1]]]), r"choices: expected token ids, got -1 in choices\[0\]"),
        (lambda lm: score_choices(lm.model, ["a"], [[[1]]]), "prompts: expected token ids, got 'a'"),
        (lambda lm: score_choices(lm.model, [[1]], [[1, 2]]), r"choices: expected token ids, got 1 in choices\[0\]"),
        (
            lambda lm: lm.generate_until(requests(("Why?", {"max_gen_toks": 20}), kind="generate_until")),
            r"Invalid configuration: requested max tokens to generate \(20\) must be less than",
        ),
        (lambda lm: score_choices(lm.model, [[1]], []), "choices: expected those of each of the 1 prompts, got 0"),
        (lambda lm: score_choices(base_model(), [[1]], [[[1]]]), "model: expected a BituneModel"),
        (lambda lm: switched_off(lm.model), "model: expected its streams to be on"),
    ],
)
def test_what_is_asked_wrongly_is_named(ask, message, short):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"^{message}"):
        ask(short)


def test_the_command_line(tasks, tmp_path):
    """In a process of its own, on weights from a folder: the scores of the same model in Python."""
    model, tok = tiny(), byte_tokenizer()
    model.save_pretrained(tmp_path / "adapter")
    base_model(vocab_size=272, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "bitune_kernels.cli", "evaluate", "--model", "model", "--adapter", "adapter"]
    command += ["--tasks", "bitune_piqa,bitune_mmlu,bitune_gsm8k", "--include_path", str(tasks)]
    command += ["--batch_size", "2", "--limit", "2", "--output_path", "scores", "--log_samples"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "bitune" in done.stdout and "exact_match" in done.stdout
    read = 0
    for path in (tmp_path / "scores").rglob("samples_*.jsonl"):
        for sample in map(json.loads, path.read_text().splitlines()):
            for i, (found,) in enumerate(sample["resps"]):
                prompt, answer = (sample["arguments"][f"gen_args_{i}"][f"arg_{j}"] for j in (0, 1))
                assert prompt.startswith("Question: ") and prompt.endswith("\n\nAnswer:")
                ids, read = tok(prompt)["input_ids"], read + 1
                if isinstance(answer, str):
                    expected = by_hand(model, ids, tok(answer)["input_ids"])
                    assert float(found[0]) == pytest.approx(expected[0], abs=1e-4)
    assert read == 2 * (2 + 4 + 2)  # GSM8K's are written once for each of its two filters


@pytest.mark.parametrize("recipe", GROUPS)
def test_tasks_ask_as_their_recipe_trains(recipe, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    task = manager.load([f"bitune_{recipe}"])["tasks"][GROUPS[recipe]]
    row, question, answer = ROWS[recipe]
    settings = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", {"data": "x.json"})
    if settings.reader is not None:
        assert READERS[settings.reader](row) == (question, answer)
    assert task.doc_to_text(row) == TEMPLATE.format(x=question)
    target = task.doc_to_target(row)
    assert (task.doc_to_choice(row)[int(target)] if isinstance(target, int) else target) == answer
    assert task.config.target_delimiter == " " and task.config.num_fewshot == 0


def test_the_entry_point_is_what_the_harness_looks_for():
    section = re.search(
        r'\[project.entry-points."(lm_eval.models)"\]\n(\w+) = "(.*)"', (ROOT / "pyproject.toml").read_text()
    )
    group, name, value = section.groups()
    registry = Registry("model")  # releases after 0.4.13 hand it the entry points of this group
    registry.register(name, target=EntryPoint(name=name, value=value, group=group))
    assert registry.get("bitune") is get_model("bitune") is BituneLM and "hf" in lm_eval.api.registry.model_registry
