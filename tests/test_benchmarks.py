"""The benchmarks run, refuse what is wrong, and say where their numbers come from."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitune_kernels.testing import timing

for _needed in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(_needed)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
common_floor, common_models, common_run, common_text = (
    importlib.import_module(f"common.{name}") for name in ("floor", "models", "run", "text")
)
prefill, train_step = (importlib.import_module(name) for name in ("prefill", "train_step"))

# One thread, so that tests in parallel don't wait for each other's threads.
QUICK = ["--threads", "1", "--model", "tiny", "--device", "cpu", "--seconds", "0", "--min-rounds", "2", "--warmup", "0"]
SHAPES = {
    "prefill": ["--batch-sizes", "1", "2", "--lengths", "12"],
    "train_step": ["--samples", "3", "--max-lengths", "24"],
}
PROVENANCE = "timestamp_utc bitune_kernels git_sha git_dirty torch triton transformers peft python cpu threads".split()
PROVENANCE += ["gpu", "driver", "cuda"]
SCRIPTS = {"prefill": prefill, "train_step": train_step}


def run(name: str, out: Path, *more: str) -> int:
    return SCRIPTS[name].main([*QUICK, *SHAPES[name], "--out", str(out), *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    p = common_run.parser("", "")
    args = p.parse_args(["--model", "tiny", "--dtype", "float32", "--device", "cpu"])
    return common_models.load_base(common_run.check_setup(p, args))


@pytest.fixture(scope="module")
def text():
    return common_text.Text(BENCHMARKS / "instructions.jsonl", 512)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_a_table_rows_and_a_plot(name, dtype, tmp_path, capsys):
    assert run(name, tmp_path, "--dtype", dtype) == 0
    printed = capsys.readouterr().out
    assert len(SCRIPTS[name].EXPLANATION.strip().splitlines()) == 2
    assert printed.startswith(SCRIPTS[name].EXPLANATION)
    assert "BPE" in printed and "instructions.jsonl" in printed
    rows = rows_of(tmp_path / f"{name}.csv")
    expected = {"three-pass", "one-pass[sdpa]", "lora"} | ({"authors-schedule"} if name == "train_step" else set())
    assert {row["provider"] for row in rows} == expected
    for row in rows:
        assert row["provider"] in printed
        assert list(row)[: len(PROVENANCE)] == PROVENANCE
        for field in PROVENANCE[:2] + PROVENANCE[6:11] + ["torch"]:
            assert row[field], field
        assert (row["model"], row["layers"], row["dtype"], row["rounds"]) == ("tiny", "2", dtype, "2")
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["tokens_per_s"]) == pytest.approx(float(row["tokens"]) / float(row["p50_ms"]) * 1e3, rel=1e-2)
        outputs = {"prefill": ("logits", "cache"), "train_step": ("loss", "gradient")}[name]
        for field in (f"error_{output}" for output in outputs):
            assert float(row[field]) <= float(row[field.replace("error_", "bound_")])
        if row["provider"] == "three-pass":
            assert float(row["speedup_over_three_pass"]) == 1
        if row["provider"] == "lora":
            assert float(row["cost_in_lora_passes"]) == 1
    assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [line for line in printed.splitlines() if line.split()[:2] == ["batch", "length"]]


def test_rows_are_appended_and_other_columns_are_refused(tmp_path):
    lora = ["--providers", "lora"]
    assert run("prefill", tmp_path, *lora) == 0 and run("prefill", tmp_path, *lora) == 0
    rows = rows_of(tmp_path / "prefill.csv")
    assert len(rows) == 4
    assert {row["speedup_over_three_pass"] for row in rows} == {""}
    (tmp_path / "prefill.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other columns"):
        run("prefill", tmp_path, *lora)
    assert (tmp_path / "prefill.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_provider_is_not_timed(name, tmp_path, capsys, monkeypatch):
    scope = common_models.scope

    def three_pass_without_its_bidirectional_stream(model, provider):
        return model.disable_bitune() if provider == "three-pass" else scope(model, provider)

    monkeypatch.setattr(SCRIPTS[name], "scope", three_pass_without_its_bidirectional_stream)
    assert run(name, tmp_path) == 1
    assert "not timed: three-pass differs from the oracle" in capsys.readouterr().out
    assert "three-pass" not in {row["provider"] for row in rows_of(tmp_path / f"{name}.csv")}


def test_an_interrupted_run_keeps_what_is_done(tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return timing.interleaved(*args, **kwargs)

    monkeypatch.setattr(common_run, "interleaved", interrupted)
    assert run("prefill", tmp_path, "--providers", "three-pass", "lora") == 0
    assert "interrupted" in capsys.readouterr().out
    assert [row["batch"] for row in rows_of(tmp_path / "prefill.csv")] == ["1", "1"]
    assert (tmp_path / "prefill.png").is_file()


def test_a_time_limit_leaves_out_the_larger_shapes(tmp_path, capsys):
    assert run("prefill", tmp_path, "--providers", "lora", "--minutes", "1e-6") == 0
    assert "left out: it would pass --minutes" in capsys.readouterr().out
    assert [row["batch"] for row in rows_of(tmp_path / "prefill.csv")] == ["1"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("prefill", ["--model", "no-such-model"], "--model: expected tiny, small"),
        ("prefill", ["--layers", "3"], "--layers: expected at most 2"),
        ("prefill", ["--lengths", "1"], "--lengths: expected 2 to 2048"),
        ("prefill", ["--lengths", "4096"], "--lengths: expected 2 to 2048"),
        ("prefill", ["--batch-sizes", "0"], "--batch-sizes: expected numbers >= 1"),
        ("prefill", ["--seconds", "nan"], "--seconds: expected a number >= 0"),
        ("prefill", ["--threads", "0"], "--threads: expected a number >= 1"),
        ("prefill", ["--minutes", "0"], "--minutes: expected a number > 0"),
        ("prefill", ["--device", "abacus"], "--device: expected auto, cpu, cuda"),
        ("prefill", ["--device", "cuda:99"], "--device: cuda:99 asked for"),
        ("prefill", ["--providers", "two-pass"], "--providers: expected names of three-pass, lora, one-pass"),
        ("prefill", ["--providers", "one-pass[sparse]"], "--providers: expected names of"),
        ("prefill", ["--instructions", "nowhere.jsonl"], "--instructions: nowhere.jsonl is not a file"),
        ("prefill", ["--out", str(BENCHMARKS / "prefill.py")], "--out: expected a folder"),
        ("prefill", ["--dtype", "int8"], "--dtype: invalid choice"),
        ("train_step", ["--samples", "0"], "--samples: expected numbers >= 1"),
        ("train_step", ["--max-lengths", "3"], "--max-lengths: expected 4 to 2048"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(name, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(name, tmp_path, *arguments)
    assert e.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_script_is_a_command():
    command = [sys.executable, str(BENCHMARKS / "prefill.py"), "--lengths", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "--lengths: expected 2 to" in done.stderr


def test_a_model_folder_brings_its_own_tokenizer(base, tmp_path, capsys):
    from transformers import PreTrainedTokenizerFast

    texts = ["one two three four five six seven", "eight nine ten"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=common_text._train_bpe(texts), bos_token="o")
    folder = tmp_path / "model"
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--layers", "1", "--lengths", "12", "--providers", "three-pass", "one-pass"]
    assert prefill.main([*QUICK, *arguments, "--out", str(out)]) == 0
    assert "tokenizer of model" in capsys.readouterr().out
    assert {(row["model"], row["layers"]) for row in rows_of(out / "prefill.csv")} == {("model", "1")}
    assert not (out / "prefill.png").exists()  # without lora there is no unit to draw


@pytest.mark.parametrize("length", [2, 12, 64, 700])
def test_prompts_have_the_wanted_width(text, length):
    rows = text.prompts(4, length)
    assert len(rows) == 4 and len(rows[0]) == length
    assert all(1 <= len(row) <= length for row in rows)
    assert len({tuple(row) for row in rows}) == 4 or length < 12
    assert max(map(max, rows)) < 512
    assert rows == text.prompts(4, length) != text.prompts(4, length, seed=1)
    if length == 700:
        assert len(set(map(len, rows))) > 1  # ragged as the text is


def test_samples_fit_and_have_both_parts(text):
    samples = text.samples(10, 100)
    assert all(1 <= len(prompt) <= 50 and answer and len(prompt) + len(answer) <= 100 for prompt, answer in samples)
    assert len({len(prompt) + len(answer) for prompt, answer in text.samples(10, 512)}) > 1


def test_padding_sides():
    for side, first in (("left", [0, 1, 2]), ("right", [1, 2, 0])):
        tokens, mask = common_text.padded([[1, 2], [3, 4, 5]], side)
        assert tokens.tolist() == [first, [3, 4, 5]]
        assert mask.tolist() == [[int(t > 0) for t in first], [1, 1, 1]]


def test_floor_against_a_count_by_hand():
    dims = common_floor.Dims(layers=3, linear=100, linear_kv=20, head=50, heads_q=2, head_dim=4)
    # One sample, 4 prompt tokens: 3 in each stream and the last one as the answer segment.
    rows = 3 + 3 + 1
    one_pass = 2 * (2 * 100 * rows + 20 * rows + 80 * 1 + 50 * 1)
    lora = 2 * (3 * 100 * 4 + 50 * 1)
    pairs = 3 * 3 + (1 + 2 + 3) + 4
    attention = 4 * 2 * 4 * (2 * pairs + 4), 4 * 2 * 4 * 3 * (1 + 2 + 3 + 4)
    found = common_floor.floor(dims, [3], [1], training=False)
    assert found.rows == pytest.approx(7 / 4)
    assert found.linear == pytest.approx(one_pass / lora)
    assert found.attention == pytest.approx((one_pass + attention[0]) / (lora + attention[1]))

    # Two samples, of which the second is padded from 2 to 6 places in the LoRA step; its loss needs every row's logits.
    found = common_floor.floor(dims, [3, 0], [3, 2], training=True)
    one_pass = 2 * (2 * 100 * (9 + 2) + 20 * (9 + 2) + 80 * (3 + 2) + 50 * (3 + 2))
    assert found.rows == pytest.approx((9 + 2) / (6 + 2))
    assert found.linear == pytest.approx(one_pass / (2 * (3 * 100 * 12 + 50 * 12)))


def test_dimensions_are_those_that_torch_counts(base):
    dims = common_floor.dims_of(base)
    ids = torch.arange(10).view(2, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base(input_ids=ids, logits_to_keep=1)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linears = sum(flops for op, flops in counts.items() if op in ("aten.mm", "aten.addmm"))
    assert linears == 2 * (dims.layers * dims.linear * 10 + dims.head * 2)
    assert (dims.linear_kv, dims.heads_q, dims.head_dim) == (2 * 64 * 2 * 16, 4, 16)


@pytest.mark.parametrize("name", common_models.MODELS)
def test_every_model_is_known_to_transformers(name):
    p = common_run.parser("", "")
    setup = common_run.check_setup(p, p.parse_args(["--model", name, "--layers", "1", "--dtype", "float32"]))
    with torch.device("meta"):
        model = common_models.AutoModelForCausalLM.from_config(setup.config)
    assert len(list(model.get_decoder().layers)) == setup.layers == 1
    assert common_floor.dims_of(model).head_dim == {"tiny": 16, "small": 64, "phi-2": 80}.get(
        name, 256 if "gemma" in name else 128
    )


def test_the_oracle_leaves_the_weights_as_they_were(text):
    p = common_run.parser("", "")
    setup = common_run.check_setup(p, p.parse_args(["--model", "tiny", "--dtype", "bfloat16", "--device", "cpu"]))
    model = common_models.attach(common_models.load_base(setup))
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    ids = torch.tensor([text.prompts(1, 12)[0]])
    for inside in (common_models.float32_inference, common_models.float32_weights):
        with inside(model), torch.no_grad():
            assert model(input_ids=ids).logits.dtype == torch.float32
        after = model.state_dict()
        assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())


def test_errors_are_relative_and_never_nan():
    expected = torch.tensor([3.0, 4.0])
    assert common_run.relative_error(torch.tensor([3.0, 3.0]), expected) == pytest.approx(0.2)
    assert common_run.relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    for error in (0.3, float("nan"), float("inf")):
        with pytest.raises(common_run.Wrong, match="one-pass differs from the oracle"):
            common_run.check_errors("one-pass", {"logits": error}, {"logits": 0.2})


def test_interleaved_gives_every_provider_each_place():
    order, shares = [], []
    times = timing.interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"},
        seconds=0,
        min_rounds=3,
        warmup=1,
        progress=shares.append,
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {t.rounds for t in times.values()} == {3}
    assert shares == sorted(shares) and shares[-1] == 1
    with pytest.raises(ValueError, match="at least one function"):
        timing.interleaved({}, seconds=0)
    with pytest.raises(ValueError, match="min_rounds"):
        timing.interleaved({"a": nullcontext}, seconds=0, min_rounds=0)


def test_quantiles_and_ratios():
    t = timing.Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert [t.quantile(q) for q in (0, 0.2, 0.5, 0.875, 1)] == [1, 1.8, 3, 4.5, 5]
    assert t.ratio(timing.Timing((2.0, 1.0, 1.0, 1.0, 1.0))) == 2  # of 2, 1, 2, 3, 5
    assert timing.Timing((7.0,)).quantile(0.8) == 7


def test_provenance_of_this_repository():
    facts = timing.provenance()
    assert set(facts) == set(PROVENANCE)
    assert facts["gpu"] == facts["driver"] == ""
    if facts["git_sha"]:
        assert len(facts["git_sha"]) == 40 and facts["git_dirty"] in (0, 1)
