"""The benchmarks run, refuse what is wrong, and say where their numbers come from."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from peft.tuners import lora
from torch.utils.flop_counter import FlopCounterMode

from bitune_kernels import backends, masks
from bitune_kernels.backends import flash, sdpa
from bitune_kernels.backends.outputs import allocate
from bitune_kernels.modeling import row_chunks
from bitune_kernels.testing import timing
from tests.test_peers import varlen_attn
from tests.tiny import base_model, bitune_model

for _needed in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(_needed)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
common_floor, common_memory, common_models, common_report, common_run, common_text = (
    importlib.import_module(f"common.{name}") for name in ("floor", "memory", "models", "report", "run", "text")
)
attention, prefill, train_step = (importlib.import_module(name) for name in ("attention", "prefill", "train_step"))
choices, generate, lora_linear, memory = (
    importlib.import_module(name) for name in ("choices", "generate", "lora", "memory")
)
bilevel = importlib.import_module("bilevel")
quality, quality_tasks = (importlib.import_module(name) for name in ("quality", "quality_tasks"))

# One thread, so that tests in parallel don't wait for each other's threads.
QUICK = ["--threads", "1", "--model", "tiny", "--device", "cpu", "--seconds", "0", "--min-rounds", "2", "--warmup", "0"]
SHAPES = {  # of which the larger one is ragged
    "prefill": ["--batch-sizes", "1", "3", "--lengths", "24"],
    "train_step": ["--samples", "3", "--max-lengths", "24"],
}
PROVENANCE = "timestamp_utc bitune_kernels git_sha git_dirty torch triton transformers peft python cpu threads".split()
PROVENANCE += ["gpu", "driver", "cuda"]
SCRIPTS = {"prefill": prefill, "train_step": train_step}
PACKED = ["one-pass+peft[sdpa]", "lora-packed[sdpa]"]
SINGLE = ["single-stream[sdpa]", "single-stream-dual[sdpa]"]


# The attention operator alone: no model.
QUICK_ATTENTION = [word for word in QUICK if word not in ("--model", "tiny")] + ["--dtype", "float32"]


def run(name: str, out: Path, *more: str) -> int:
    if name == "attention":
        return attention.main([*QUICK_ATTENTION, "--heads", "4,2,16", "--out", str(out), *more])
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


@pytest.fixture
def step(text):
    """The training step that ``SHAPES`` asks for."""
    p = common_run.parser("", "")
    setup = common_run.check_setup(p, p.parse_args(["--model", "tiny", "--dtype", "float32", "--device", "cpu"]))
    base = common_models.load_base(setup)
    dims = common_floor.dims_of(base)
    models = common_models.attach(base, common_models.TWINS)
    for model in models.all:
        model.train()
    return train_step.TrainStep(models, dims, text, 3, 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_a_table_rows_and_a_plot(name, dtype, tmp_path, capsys):
    assert run(name, tmp_path, "--dtype", dtype) == 0
    printed = capsys.readouterr().out
    assert len(SCRIPTS[name].EXPLANATION.strip().splitlines()) == 2
    assert printed.startswith(SCRIPTS[name].EXPLANATION)
    assert "BPE" in printed and "instructions.jsonl" in printed
    rows = rows_of(tmp_path / f"{name}.csv")
    expected = {"authors-schedule", "three-pass", "one-pass[sdpa]", "lora-packed[sdpa]", "lora"}
    expected |= {*PACKED} if name == "train_step" else set()
    for batch in {row["batch"] for row in rows}:
        alone = {"authors-schedule"} if batch == "1" else set()  # which is three-pass there
        assert {row["provider"] for row in rows if row["batch"] == batch} == expected - alone
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
            assert float(row["cost_in_lora_passes"]) == float(row["memory_over_lora"]) == 1
        if row["provider"] == "lora-packed[sdpa]":
            assert float(row["cost_in_lora_packed_passes"]) == float(row["memory_over_lora_packed"]) == 1
        # FLOPs over those of one pass, which has those of three passes
        method = float(row["floor_packed_attention"]) if row["provider"].startswith("lora") else 1
        flops = float(row["useful_tflops"]) * 1e9 * float(row["p50_ms"]) * method
        assert flops == pytest.approx(float(row["floor_flops"]), rel=0.1)  # of rounded TFLOP/s
        assert row["utilisation"] == row["measured_tflops"] == ""
        assert float(row["step_mib"]) > 0 and row["peak_mib"] == ""  # which a CPU's allocator doesn't count
        assert row["cost_in_lora_packed_passes"] and row["memory_over_lora_packed"]
    assert (tmp_path / f"{name}-tiny.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (head,) = [line for line in printed.splitlines() if line.split()[:2] == ["batch", "length"]]
    columns = re.split(r"\s{2,}", head.strip())
    # what bounds one pass is set beside packed LoRA alone; padded LoRA has FLOPs to spare
    start = columns.index("x LoRA")
    assert columns[start : start + 4] == ["x LoRA", "FLOPs", "x packed", "floor"] and columns.count("floor") == 1
    shown = {tuple(cells[:3]): cells for cells in (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines())}
    for shape in {(row["batch"], row["length"]) for row in rows}:
        speedups = {r["provider"]: r["speedup_over_three_pass"] for r in rows if (r["batch"], r["length"]) == shape}
        fastest = max(float(speedups[x]) for x in ("three-pass", "authors-schedule") if x in speedups)
        for provider, speedup in speedups.items():
            found = shown[(*shape, provider)][columns.index("speedup")]
            assert found == f"{float(speedup) / fastest:.2f}"
    assert "MFU" not in head and "n/a" not in printed
    assert "MFU" in common_report.whole_model(expected, torch.device("cuda")).head()
    assert "packed" not in common_report.whole_model({"lora"}, torch.device("cpu")).head()


def test_rows_are_appended_and_other_columns_are_refused(tmp_path):
    lora = ["--providers", "lora", *PACKED, *SINGLE]
    assert run("prefill", tmp_path, *lora) == 0 and run("prefill", tmp_path, *lora) == 0
    rows = rows_of(tmp_path / "prefill.csv")
    assert len(rows) == 20 and {row["provider"] for row in rows} == {"lora", *PACKED, *SINGLE}
    assert {row["speedup_over_three_pass"] for row in rows} == {""}
    (tmp_path / "prefill.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other columns"):
        run("prefill", tmp_path, *lora)
    assert (tmp_path / "prefill.csv").read_text() == "a,b\n1,2\n"


def test_a_row_that_was_cut_off_spoils_none(tmp_path):
    path = tmp_path / "rows.csv"
    common_report.Results(path, "ab").append([{"a": 1, "b": 2}])
    with path.open("a") as file:
        file.write("3,4")
    common_report.Results(path, "ab").append([{"a": 5, "b": 6}])
    assert path.read_text().split() == ["a,b", "1,2", "5,6"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_provider_is_not_timed(name, tmp_path, capsys, monkeypatch):
    scope = common_models.scope
    other = {"three-pass": "lora", "lora-packed[sdpa]": "one-pass[sdpa]", "one-pass+peft[sdpa]": "lora-packed[sdpa]"}
    other |= {"single-stream[sdpa]": "single-stream-dual[sdpa]", "single-stream-dual[sdpa]": "one-pass[sdpa]"}
    monkeypatch.setattr(SCRIPTS[name], "scope", lambda models, provider: scope(models, other.get(provider, provider)))
    assert run(name, tmp_path, "--providers", *other, "lora", "one-pass[sdpa]") == 1
    printed = capsys.readouterr().out
    assert all(f"not timed: {provider} differs from the oracle" in printed for provider in other)
    assert {row["provider"] for row in rows_of(tmp_path / f"{name}.csv")} == {"lora", "one-pass[sdpa]"}


def test_committed_rows_have_the_columns_of_this_version():
    for name in SCRIPTS:
        header = list(rows_of(BENCHMARKS / "results" / f"{name}.csv")[0])
        shared = header[header.index("batch") : header.index("error") + 1]
        assert shared == [*common_report.CASE_FIELDS, *common_report.TIME_FIELDS]


@pytest.mark.parametrize("name", ["authors-schedule", "three-pass", "one-pass[sdpa]", *PACKED, *SINGLE, "lora"])
def test_memory_against_the_allocator(name, step):
    found = step.memory(step.device, name)
    assert step.memory(step.device, name) == found
    step.models.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        step.run(name)
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    assert found.step == pytest.approx(max(allocated) / 2**20, rel=0.01) and found.peak is None


def test_packed_lora_has_the_rows_and_the_layer_of_one_pass(step, monkeypatch):
    layer = common_models.SegmentLora
    blocks, found = set(), {}
    right = layer._rows

    def rows(self, x, n):
        blocks.add(n)
        return right(self, x, n)

    def count(module, args):
        found[name] += args[0].numel() // args[0].shape[-1] * getattr(module, "base_layer", module).weight.numel()

    monkeypatch.setattr(layer, "_rows", rows)
    for model in step.models.all:
        for module in [*model.modules()]:
            if isinstance(module, lora.Linear) or module is model.get_output_embeddings():
                module.register_forward_pre_hook(count)
    N = sum(int(x) for x in (step.labels == -100).sum(1) - (step.mask == 0).sum(1) - 1)
    A = step.tokens - N
    for name, expected in (
        ("one-pass[sdpa]", {N, 0}),
        ("one-pass+peft[sdpa]", set()),  # our layer is not called
        ("lora-packed[sdpa]", {0}),
        ("lora", set()),
    ):
        blocks.clear()
        found[name] = 0
        step.run(name)
        assert blocks == expected, name
    # The floor has no queries of the prompt in the last layer; a pass drops their rows behind the projection.
    queries = step.models.bitune.get_base_model().model.layers[-1].self_attn.q_proj.base_layer.weight.numel()
    one_pass = found["one-pass[sdpa]"] - queries * 2 * N
    assert found["one-pass+peft[sdpa]"] == found["one-pass[sdpa]"]
    assert one_pass / found["lora"] == pytest.approx(step.floor.linear)
    assert one_pass / (found["lora-packed[sdpa]"] - queries * N) == pytest.approx(step.floor.packed_linear)
    assert step.floor.rows == pytest.approx((2 * N + A) / (N + A))


def test_costs_are_set_against_packed_lora_on_the_same_backend():
    costs = {"lora": 5.0, "lora-packed[sdpa]": 3.0, "lora-packed[triton]": 2.0, "lora-packed[cuda]": 4.0}
    for name, unit in (
        ("one-pass[sdpa]", "sdpa"),
        ("one-pass+peft[cuda]", "cuda"),
        ("lora-packed[cuda]", "cuda"),
        ("one-pass[flash]", "triton"),
        ("three-pass", "triton"),
        ("lora", "triton"),
    ):
        assert common_report.packed_unit(name, costs) == f"lora-packed[{unit}]"
    assert common_report.packed_unit("lora", {"lora": 5.0}) is None


ATTENTION = ["--lengths", "12", "--batch-sizes", "3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_leaves_a_table_rows_and_a_plot(dtype, tmp_path, capsys):
    # ragged batches and those of equal lengths take different ways through the calls of SDPA
    providers = ["sdpa", "sdpa-flash", "reference"]
    assert run("attention", tmp_path, *ATTENTION, "--dtype", dtype, "--providers", *providers) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(attention.EXPLANATION) and len(attention.EXPLANATION.strip().splitlines()) == 2
    rows = rows_of(tmp_path / "attention.csv")
    assert {(r["mode"], r["ragged"]) for r in rows} == {(m, x) for m in attention.MODES for x in "01"}
    variants = {"sdpa[one-stream]", "sdpa[causal]", "sdpa[two-calls]"}
    outputs = {"forward": ["out", "mixed"], "prefill": ["out", "cache"], "shared_qkv": ["out"]}
    outputs["backward"] = ["d_q", "d_k", "d_v"]
    for mode in attention.MODES:
        found = [r["provider"] for r in rows if r["mode"] == mode]
        assert set(found) == {*providers, *(variants if mode == "shared_qkv" else ())}
    for row in rows:
        assert list(row)[: len(PROVENANCE)] == PROVENANCE
        assert row["provider"] in printed
        assert (row["dtype"], row["batch"], row["length"], row["rounds"]) == (dtype, "3", "12", "2")
        assert row["answer"] == ("1" if row["mode"] == "prefill" else "3")
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["useful_tflops"]) == pytest.approx(
            float(row["useful_gflop"]) / float(row["p50_ms"]), rel=1e-2, abs=1e-6
        )
        # peaks and the host's time are printed where they are measured, on a GPU
        assert (
            row["host_ms"]
            == row["measured_tflops"]
            == row["floor_ms"]
            == row["time_over_floor"]
            == row["peak_mib"]
            == ""
        )
        assert row["best_peer"] in providers and float(row["floor_mib"]) > 0
        if row["provider"] == row["best_peer"]:
            assert float(row["speedup_over_best_peer"]) == 1
        if row["provider"].endswith("[one-stream]"):
            assert float(row["cost_in_one_stream_passes"]) == 1
        checked = [name for name in outputs[row["mode"]] if row[f"error_{name}"]]
        assert checked == outputs[row["mode"]] or (row["provider"] == "sdpa-flash" and checked == ["out"])
        assert all(float(row[f"error_{name}"]) <= float(row[f"bound_{name}"]) for name in checked)
    assert (tmp_path / "attention.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_packed_flash_attention_of_torch_is_called_as_it_is_documented(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run("attention", tmp_path, "--providers", "varlen")
    assert "varlen can't run here: flash-attn needs a CUDA device, got cpu" in capsys.readouterr().err
    monkeypatch.setattr(flash, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "unsupported", lambda **call: None)
    assert run("attention", tmp_path, *ATTENTION, "--providers", "varlen", "flash") == 0
    rows = rows_of(tmp_path / "attention.csv")
    assert {(r["mode"], r["ragged"], r["provider"]) for r in rows} == {
        (mode, x, provider) for mode in attention.MODES for x in "01" for provider in ("varlen", "flash")
    }


def test_every_form_of_flexattention_may_be_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    assert run("prefill", tmp_path, "--providers", "lora") == 0
    assert torch._dynamo.config.recompile_limit > 8, "a prefill takes as many, attention.py's kinds of heads take more"


def test_attention_runs_without_arguments_and_says_what_it_leaves_out(tmp_path, capsys):
    assert attention.main([*QUICK_ATTENTION, "--modes", "prefill", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "left out: sdpa-cudnn: cuDNN's attention needs a CUDA device" in printed
    assert "left out: triton: " in printed
    assert {row["provider"] for row in rows_of(tmp_path / "attention.csv")} == {"sdpa"}


def test_a_kernel_is_set_against_its_peers_and_its_own_one_stream_pass(tmp_path, capsys, monkeypatch):
    # sdpa under the name of the package's own kernel, whether this version has that backend or not
    monkeypatch.setitem(sys.modules, "bitune_kernels.backends.triton", sdpa)
    monkeypatch.setattr(backends, "BACKENDS", tuple({**dict.fromkeys(backends.BACKENDS), "triton": None}))
    modes = ["--modes", "forward", "shared_qkv", "--only", "equal"]
    assert run("attention", tmp_path, *ATTENTION, *modes, "--providers", "triton", "sdpa-flash") == 0
    rows = rows_of(tmp_path / "attention.csv")
    assert {row["best_peer"] for row in rows} == {"sdpa-flash"}
    shared = {row["provider"]: row for row in rows if row["mode"] == "shared_qkv"}
    variants = ("one-stream", "causal", "two-calls")
    assert set(shared) == {"triton", "sdpa-flash", *(f"triton[{kind}]" for kind in variants)}
    assert float(shared["triton"]["cost_in_one_stream_passes"]) > 0
    assert float(shared["triton"]["useful_gflop"]) == float(shared["triton[two-calls]"]["useful_gflop"])

    monkeypatch.setattr(sdpa, "unsupported", lambda **call: "no such unit")
    with pytest.raises(SystemExit):
        run("attention", tmp_path, *ATTENTION, "--providers", "triton")
    assert "--providers: triton can't run here: no such unit" in capsys.readouterr().err
    assert run("attention", tmp_path, *ATTENTION, *modes, "--providers", "sdpa-flash") == 0


def test_a_kernel_can_be_left_out(capsys, monkeypatch):
    monkeypatch.setattr(backends.load("triton"), "unsupported", lambda **call: None)
    *_, notes = attention.parse([*QUICK_ATTENTION, "--without", "triton"])
    assert "left out: triton: --without" in notes
    with pytest.raises(SystemExit):
        attention.parse([*QUICK_ATTENTION, "--without", "triton", "--providers", "triton"])
    assert "triton can't run here: --without" in capsys.readouterr().err


@pytest.mark.parametrize("mode", attention.MODES)
@pytest.mark.parametrize("wrong", ["answers", "mix", "unwritten"])
def test_wrong_attention_is_not_timed(mode, wrong, tmp_path, capsys, monkeypatch):
    right = attention.SdpaCalls.__call__

    def calls(self, q, k, v, alpha_k=None, alpha_v=None, caches=None):
        if wrong == "mix":
            alpha_k = None if alpha_k is None else alpha_k + 0.2
        outputs = right(self, q, k, v, alpha_k, alpha_v, caches)
        if wrong == "answers":  # the last row of each sample
            rows, o = outputs[-1]
            outputs[-1] = rows, torch.cat([o[:, :, :-1], o[:, :, -1:] * 0.9], dim=2)
        return outputs[:-1] if wrong == "unwritten" else outputs

    monkeypatch.setattr(attention.SdpaCalls, "__call__", calls)
    code = run(
        "attention", tmp_path, *ATTENTION, "--modes", mode, "--only", "equal", "--providers", "sdpa-flash", "sdpa"
    )
    found = {row["provider"].partition("[")[0] for row in rows_of(tmp_path / "attention.csv")}
    if (wrong, mode) == ("mix", "shared_qkv"):  # which mixes nothing
        assert code == 0 and found == {"sdpa", "sdpa-flash"}
    else:
        # a graph without the answer depends on no alpha: there the backward pass can't run at all
        fails = (wrong, mode) == ("unwritten", "backward")
        assert code == int(not fails) and found == {"sdpa"}
        message = "not timed: sdpa-flash" + (": RuntimeError" if fails else " differs from the oracle")
        assert message in capsys.readouterr().out


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mode", attention.MODES)
def test_useful_flops_against_a_count_of_the_visible_pairs(mode, ragged):
    case = attention.Attention(common_models.Machine(torch.device("cpu"), torch.float32), 3, 21, mode, ragged, 4, 2, 8)
    assert (len(set(case.prompts)) > 1) == ragged and max(case.prompts) == 21
    pairs = dict.fromkeys(("full", "causal", "answer"), 0)
    for n, a in zip(case.prompts, case.answers, strict=True):
        for mask in ("full", "causal"):
            pairs[mask] += int(masks.visible_to_prompt(mask, n).sum())
        pairs["answer"] += int(masks.visible_to_answer(a, n).sum())
    products = 5 if mode == "backward" else 2  # scores and values; backward: dV, dP, dQ, dK and the scores again
    flops = 2 * products * 8 * 4
    assert case.useful_flops("triton") == flops * sum(pairs.values())
    assert case.useful_flops("triton[two-calls]") == flops * sum(pairs.values())
    assert case.useful_flops("triton[one-stream]") == flops * (pairs["full"] + pairs["answer"])
    assert case.useful_flops("triton[causal]") == flops * (pairs["causal"] + pairs["answer"])


@pytest.mark.skipif(backends.load("triton").unsupported(dtype=torch.float32) is not None, reason="needs triton")
def test_a_launch_that_writes_nothing_is_wrong(monkeypatch):
    def forward(q, k, v, alpha_k, alpha_v, plan, options, **call):
        return allocate(q, k, v, plan, shared_qkv=False, beta=False, save=call["save"], to_cache=False)

    case = attention.Attention(
        common_models.Machine(torch.device("cpu"), torch.float32), 2, 12, "forward", False, 4, 2, 8
    )
    case.errors("sdpa")
    monkeypatch.setattr(backends.load("triton"), "forward", forward)
    assert not max(case.errors("triton").values()) < float("inf")


def test_fewest_bytes_against_a_count_by_hand():
    machine = common_models.Machine(torch.device("cpu"), torch.float32)
    q, kv, row = 4 * 8, 2 * 2 * 8, 4  # elements of one row of q or out, of one of k and v, bytes of one element
    of = {mode: attention.Attention(machine, 2, 12, mode, False, 4, 2, 8) for mode in attention.MODES}
    N, A = 24, 6
    inputs, out = (2 * N + A) * (q + kv), (2 * N + A) * q
    assert of["forward"].floor_bytes("triton") == row * (inputs + out + N * kv)
    assert of["backward"].floor_bytes("triton") == row * (2 * inputs + 2 * out)  # dq, dk, dv; out and its gradient
    assert of["prefill"].floor_bytes("triton") == row * ((2 * N + 2) * (2 * q + kv) + (N + 2) * kv)
    assert of["shared_qkv"].floor_bytes("triton") == row * ((N + A) * (q + kv) + out)
    for kind in attention.ONE_STREAM:
        assert of["shared_qkv"].floor_bytes(f"triton[{kind}]") == row * (N + A) * (2 * q + kv)


def test_a_full_run_on_a_gpu_covers_the_lengths():
    args = attention.argparse.Namespace(
        heads=None,
        lengths=None,
        batch_sizes=None,
        tokens=None,
        quick=False,
        only=["equal", "ragged"],
        modes=["forward"],
    )
    shapes = attention.shapes_of(args, on_cpu=False)
    assert len(set(shapes)) == len(shapes) < 40
    assert {s[1] for s in shapes if s[4:] == attention.MAIN_HEADS} == set(attention.LENGTHS)
    assert {s[6] for s in shapes} == {64, 128, 256}
    assert all(s[0] <= 64 and s[0] * s[1] <= 16384 for s in shapes)
    assert any(s[3] for s in shapes) and (1, 64) in {s[:2] for s in shapes}


@pytest.mark.parametrize("failing", ["three-pass", "one-pass[sdpa]", "all", "oracle"])
def test_a_run_fails_where_a_kernel_of_ours_or_everything_raises(failing, tmp_path, capsys, monkeypatch):
    right = prefill.Prefill.errors

    def errors(case, provider):
        if failing in ("all", provider):
            raise RuntimeError("illegal memory access")
        return right(case, provider)

    def no_bounds(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(prefill.Prefill, "errors", errors)
    monkeypatch.setattr(common_run, "OWN", ("sdpa",))  # in place of those that need a GPU
    if failing == "oracle":
        monkeypatch.setattr(common_run, "_bounds", no_bounds)
    found = run("prefill", tmp_path, "--providers", "three-pass", "one-pass[sdpa]")
    assert found == int(failing != "three-pass")
    assert "not timed" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_is_done(tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return timing.interleaved(*args, **kwargs)

    monkeypatch.setattr(common_run, "interleaved", interrupted)
    assert lora_linear.main(["--rows", "4", "8", "--features", "8", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "interrupted" in capsys.readouterr().out
    assert {row["rows"] for row in rows_of(tmp_path / "lora.csv")} == {"4"}
    assert run("prefill", tmp_path, "--providers", "three-pass", "lora") == 0
    assert "interrupted" in capsys.readouterr().out
    assert [row["batch"] for row in rows_of(tmp_path / "prefill.csv")] == ["1", "1"]
    assert (tmp_path / "prefill-tiny.png").is_file()


@pytest.mark.parametrize("batches", ["1 2", "1 2 3"])
def test_a_time_limit_leaves_out_the_larger_shapes(batches, tmp_path, capsys):
    arguments = ["--providers", "lora", "--minutes", "1e-6", "--batch-sizes", *batches.split()]
    most = batches == "1 2 3"
    assert run("prefill", tmp_path, *arguments) == int(most)
    printed = capsys.readouterr().out
    assert "left out: it would pass --minutes" in printed
    assert printed.splitlines()[-1] == f"1 of {3 if most else 2} shapes, as many as --minutes allow"
    assert [row["batch"] for row in rows_of(tmp_path / "prefill.csv")] == ["1"]


def test_compiling_for_the_first_shape_leaves_out_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(prefill.Prefill, "errors", lambda *args: next(checks))
    checks = ({"logits": time.sleep(wait) or 0.0, "cache": 0.0} for wait in (1, 0))
    shapes = ["--batch-sizes", "1", "--lengths", "4", "400", "--providers", "lora", "--dtype", "float32"]
    assert run("prefill", tmp_path, *shapes, "--minutes", "1") == 0
    assert len(rows_of(tmp_path / "prefill.csv")) == 2


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
        ("prefill", ["--providers", "two-pass"], "--providers: expected names of three-pass, authors-schedule, lora"),
        ("prefill", ["--providers", "one-pass[sparse]"], "--providers: expected names of"),
        ("train_step", ["--providers", "lora-packed[sdpa"], "--providers: expected names of"),
        ("train_step", ["--providers", "lora-packed[flex]"], "lora-packed[flex] can't run here: FlexAttention has no"),
        ("prefill", ["--instructions", "nowhere.jsonl"], "--instructions: nowhere.jsonl is not a file"),
        ("prefill", ["--out", str(BENCHMARKS / "prefill.py")], "--out: expected a folder"),
        ("prefill", ["--dtype", "int8"], "--dtype: invalid choice"),
        ("attention", ["--lengths", "0"], "--lengths: expected numbers >= 1"),
        ("attention", ["--heads", "3,2,16"], "--heads: expected query heads a multiple of"),
        ("attention", ["--heads", "4,2"], "--heads: expected three numbers"),
        ("attention", ["--tokens", "0"], "--tokens: expected a number >= 1"),
        ("attention", ["--batch-sizes", "1", "--only", "ragged"], "--only: ragged batches need more than one sample"),
        ("attention", ["--providers", "sdpa-cudnn"], "--providers: sdpa-cudnn can't run here: cuDNN's attention needs"),
        ("attention", ["--providers", "dense"], "--providers: expected names of sdpa"),
        ("attention", ["--device", "cuda:99"], "--device: cuda:99 asked for"),
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
    assert not list(out.glob("*.png"))  # without lora there is no unit to draw


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
    longest = max(map(len, text.ids))
    filled = text.samples(2, 4 * longest, fill=True)
    assert [(len(prompt), len(answer)) for prompt, answer in filled] == [(2 * longest, 2 * longest)] * 2


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
    assert found.flops == one_pass + attention[0]
    packed = 2 * (2 * 100 * (3 + 1) + 20 * (3 + 1) + 80 * 1 + 50 * 1)
    packed_attention = 4 * 2 * 4 * (2 * (1 + 2 + 3 + 4) + 4)
    assert found.packed_linear == pytest.approx(one_pass / packed)
    assert found.packed_attention == pytest.approx((one_pass + attention[0]) / (packed + packed_attention))

    second = timing.Timing((1.0,))
    for name, flops in (
        ("three-pass", found.flops),
        ("lora", packed + packed_attention),
        ("single-stream[sdpa]", None),
    ):
        expected = ["", ""] if flops is None else [pytest.approx(flops), pytest.approx(flops / 2000)]
        huge = dataclasses.replace(found, flops=found.flops * 10**12)
        assert common_report.utilisation(name, huge, second, 2000.0) == expected

    # Two samples, of which the second is padded from 2 to 6 places in the LoRA step; its loss needs every row's logits.
    found = common_floor.floor(dims, [3, 0], [3, 2], training=True)
    one_pass = 2 * (2 * 100 * (9 + 2) + 20 * (9 + 2) + 80 * (3 + 2) + 50 * (3 + 2))
    assert found.rows == pytest.approx((9 + 2) / (6 + 2))
    assert found.linear == pytest.approx(one_pass / (2 * (3 * 100 * 12 + 50 * 12)))
    packed = 2 * (2 * 100 * (6 + 2) + 20 * (6 + 2) + 80 * (3 + 2) + 50 * (3 + 2))
    answer = (1 + 2 + 3 + 3 * 3) + (1 + 2)
    pairs, packed_pairs = 3 * 3 + (1 + 2 + 3) + answer, (1 + 2 + 3) + answer
    attention, packed_attention = (4 * 2 * 4 * (2 * x + answer) for x in (pairs, packed_pairs))
    assert found.packed_linear == pytest.approx(one_pass / packed)
    assert found.packed_attention == pytest.approx((2 * one_pass + 3 * attention) / (2 * packed + 3 * packed_attention))


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
    model = common_models.attach(common_models.load_base(setup)).bitune
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


def test_the_time_of_a_device_alone(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 7.0

    class Buffer:
        def zero_(self):
            log.append("flush")

    for name, fake in (("Event", Event), ("synchronize", lambda: log.append("idle")), ("_sleep", log.append)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing.torch, "empty", lambda size, dtype, device: Buffer())
    call = {"a": lambda: time.sleep(0.01) or log.append("call")}
    times = timing.interleaved(call, seconds=0, min_rounds=2, warmup=1, device="cuda", device_alone=True)
    assert times["a"].seconds == (7e-3, 7e-3) and 0.01 <= times["a"].host < 0.1
    rounds = [log[i : i + 7] for i in range(0, len(log), 7)]
    assert [r[:2] + r[3:] for r in rounds] == [["idle", "flush", "event", "call", "event", "wait"]] * 3
    # the device sleeps for longer than the host needs, whose time is known from the warm-up on
    cycles = [r[2] for r in rounds]
    assert cycles[0] == 0 and min(cycles[1:]) >= 2 * 0.01 * 1.98e9
    log.clear()
    assert timing.interleaved(call, seconds=0, min_rounds=1, device="cuda")["a"].host is None
    assert log == ["idle", "event", "call", "event", "wait"] * 2  # of a call as it is, the host's time included


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


def test_a_copy_without_git_is_of_the_commit_that_it_is_said_to_be(monkeypatch):
    monkeypatch.setattr(timing, "_run", lambda *command: None)
    for said, found in (("", ("", "")), ("1" * 40, ("1" * 40, 0)), (f"{'1' * 40}-dirty", ("1" * 40, 1))):
        monkeypatch.setenv("BITUNE_COMMIT", said)
        facts = timing.provenance()
        assert (facts["git_sha"], facts["git_dirty"]) == found


def test_rows_of_a_gpu_say_that_tiles_were_tuned(monkeypatch):
    from bitune_kernels.backends.triton import tiles

    found = {tiles.tuned_key(gpu, "dq", head_dim, 2): None for gpu in ("mine", "another") for head_dim in (64, 128)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "mine")
    for tuned, said in (({}, ""), (found, ", 2 tuned tiles")):
        monkeypatch.setattr(tiles, "tuned", lambda tuned=tuned: tuned)
        assert timing.provenance("cuda")["triton"] == timing.provenance("cpu")["triton"] + said


@pytest.mark.parametrize(("name", "asked"), [("auto", []), ("cuda", []), ("cuda:0", [0]), ("cuda:1", [1])])
def test_the_gpu_that_is_asked_for_becomes_the_current_one(name, asked, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    assert common_models.find_device(common_run.parser("", ""), name).type == "cuda"
    assert chosen == asked


LORA_LINEAR = "--rows 20 --features 24 --seconds 0 --min-rounds 2 --device cpu".split()
REQUEST = "--model tiny --lengths 9 --new-tokens 4 --seconds 0 --min-rounds 2 --device cpu".split()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lora_linear_alone(dtype, tmp_path, capsys):
    assert lora_linear.main([*LORA_LINEAR, "--dtype", dtype, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "lora.csv")
    kinds = dict.fromkeys([dtype, "float32"])
    assert [(r["adapter_dtype"], r["provider"]) for r in rows] == [(k, p) for k in kinds for p in lora_linear.PROVIDERS]
    for r in rows:
        assert (float(r["speedup_over_peft"]) == 1) == (r["provider"] == "peft")
        assert (float(r["cost_in_base_layers"]) == 1) == (r["provider"] == "base")
        # 2 products of the base, 3 of each adapter's two matrices, of which a row meets one adapter's
        assert float(r["floor"]) == pytest.approx(1 + 3 * 2 * 8 * 24 / (2 * 24 * 24), abs=1e-4)
    assert (tmp_path / "lora.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_lora_linear_is_not_timed(tmp_path, capsys, monkeypatch):
    right = lora_linear.segment_lora_linear
    swapped = lambda x, weight, bias, n, bidir, causal: right(x, weight, bias, n, causal, bidir)  # noqa: E731
    monkeypatch.setattr(lora_linear, "segment_lora_linear", swapped)
    assert lora_linear.main([*LORA_LINEAR, "--dtype", "float32", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "lora.csv").exists()


def test_a_request_to_generate(tmp_path, capsys, monkeypatch):
    command = [*REQUEST, "--dtype", "float32", "--out", str(tmp_path)]
    assert generate.main(command) == 0
    rows = rows_of(tmp_path / "generate.csv")
    assert [r["provider"] for r in rows] == list(generate.PROVIDERS)
    for r in rows:
        assert all(float(r[name]) > 0 for name in ("request_ms", "first_ms", "tokens_per_s"))
        assert (float(r["cost_of_request"]) == 1) == (r["provider"] == "lora")
    assert (tmp_path / "generate-tiny.png").read_bytes().startswith(b"\x89PNG")
    right = generate.Request.run
    monkeypatch.setattr(generate.Request, "run", lambda *args: right(*args).flip(1))
    assert generate.main(command) == 1 and len(rows_of(tmp_path / "generate.csv")) == len(rows)


def test_memory_of_a_prefill(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(row_chunks, "ROWS", 32)
    command = "--model tiny --device cpu --dtype float32 --threads 1 --lengths 256 512".split()
    command += ["--out", str(tmp_path), "--providers", *memory.PROVIDERS]
    assert memory.main(command) == 0
    rows = rows_of(tmp_path / "memory.csv")
    assert [(int(r["length"]), r["provider"]) for r in rows] == [(n, p) for n in (256, 512) for p in memory.PROVIDERS]
    assert (tmp_path / "memory-tiny.png").read_bytes().startswith(b"\x89PNG")
    for r in rows:
        length, count = int(r["length"]), int(r["rows"])
        assert count == (2 * length - 1 if r["provider"].startswith("one-pass") else length)
        # tiny: 2 layers of 2 key/value heads of 16, 64 hidden and 4 heads
        floor = 4 * (length * 2 * 2 * 32 + count * (2 * 64 + 2 * 64 + 2 * 32)) / 2**20
        assert float(r["floor_mib"]) == pytest.approx(floor, abs=1e-3)
        assert (
            float(r["over_floor"]) == pytest.approx(float(r["step_mib"]) / floor, rel=1e-2)
            and float(r["step_mib"]) > floor
        )
    step = {(int(r["length"]), r["provider"]): float(r["step_mib"]) for r in rows}
    assert (
        step[512, "one-pass"] < 0.95 * step[512, "one-pass+whole-mlp"]
        and step[512, "one-pass"] < 2.1 * step[256, "one-pass"]
    )
    # as chunked as one pass, so that it alone is a fair unit of it
    assert step[512, "lora-packed"] < 0.95 * step[512, "lora"] < 0.95 * step[512, "one-pass"]
    right = memory.Prefill.run

    def wrong(case, provider):
        out = right(case, provider)
        out.logits *= 1 if provider in ("one-pass", "lora") else 2
        return out

    monkeypatch.setattr(memory.Prefill, "run", wrong)
    for pair in (["one-pass", "three-pass"], ["lora", "lora-packed"]):
        ragged = ["--batch-sizes", "3", "--lengths", "24"]
        assert memory.main([*command[: command.index("--providers") + 1], *pair, *ragged]) == 1
    assert len(rows_of(tmp_path / "memory.csv")) == len(rows)
    monkeypatch.setattr(memory.Prefill, "run", right)
    assert memory.main([*command, *ragged]) == 0
    assert {r["provider"] for r in rows_of(tmp_path / "memory.csv") if r["batch"] == "3"} == {*memory.PROVIDERS}


def test_one_layers_cache_is_there_twice_and_not_all():
    layers, heads, tokens = 24, 4, 100
    options = dict(num_hidden_layers=layers, head_dim=64, num_key_value_heads=heads, max_position_embeddings=tokens)
    model = bitune_model(base=base_model(**options)).eval()
    with torch.no_grad(), common_memory.LiveBytes() as live:
        out = model(torch.full((1, tokens), 5), use_cache=True, logits_to_keep=1)
    cache = 4 * layers * heads * tokens * 64 * 2
    assert out.past_key_values.get_seq_length() == tokens and cache < live.peak < 1.6 * cache


def test_the_choices_of_a_question(tmp_path, capsys, monkeypatch):
    command = [*QUICK, *"--lengths 12 --choices 2 --answer-tokens 3 --dtype float32 --out".split(), str(tmp_path)]
    assert choices.main(command) == 0
    rows = rows_of(tmp_path / "choices.csv")
    assert [r["provider"] for r in rows] == list(choices.PROVIDERS)
    assert all(set(PROVENANCE) <= r.keys() and float(r["p50_ms"]) > 0 for r in rows)
    assert [r["provider"] for r in rows if float(r["speedup_over_one_by_one"]) == 1] == ["one-by-one"]
    assert [int(r["rows"]) for r in rows] == [2 * (11 + 3), 2 * (22 + 3), 22 + 1 + 2 * 2]
    assert (tmp_path / "choices-tiny.png").read_bytes().startswith(b"\x89PNG")
    right = choices.score_choices
    monkeypatch.setattr(choices, "score_choices", lambda *args: [each[::-1] for each in right(*args)])
    assert choices.main(command) == 1 and len(rows_of(tmp_path / "choices.csv")) == len(rows)


def test_a_step_of_instruction_optimization(tmp_path, capsys, monkeypatch):
    command = [*QUICK, *"--samples 2 --max-lengths 12 --k 0 1 --out".split(), str(tmp_path)]
    assert bilevel.main(command) == 0
    rows = rows_of(tmp_path / "bilevel.csv")
    assert [(r["provider"], r["k"]) for r in rows] == [(p, k) for p in bilevel.METHODS for k in ("plain", "0", "1")]
    assert [r["floor"] for r in rows] == ["1", "4", "6"] * 2 + [""] * 3
    assert all((float(r["cost_in_plain_steps"]) == 1) == (r["k"] == "plain") for r in rows)
    assert (tmp_path / "bilevel-tiny.png").read_bytes().startswith(b"\x89PNG")
    right = bilevel.Training.hypergradient
    wrong = {"one-pass": 1.1, "three-pass": 1}
    monkeypatch.setattr(bilevel.Training, "hypergradient", lambda self, name: wrong[name] * right(self, name))
    assert bilevel.main(command) == 1 and len(rows_of(tmp_path / "bilevel.csv")) == len(rows)


def test_a_folder_that_cannot_be_made_ends_a_benchmark_before_it_measures(monkeypatch):
    monkeypatch.setattr(lora_linear, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=r"^lora\.py: error: NotADirectoryError: "):
        lora_linear.main(["--out", f"{__file__}/rows"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (choices, "--answer-tokens 0", "--answer-tokens: expected a number >= 1, got 0"),
        (bilevel, "--k -1 --model tiny", "--k: expected numbers >= 0, got -1"),
        (bilevel, "--dtype bfloat16 --model tiny", "--dtype: expected float32, which differences of gradients need"),
        (lora_linear, "--rows 1", "--rows: expected numbers >= 2, got 1"),
        (lora_linear, "--providers x", "--providers: expected names of peft, segment, base; got 'x'"),
        (generate, "--new-tokens 1", "--new-tokens: expected a number >= 2, got 1"),
        (generate, "--lengths 2047 --model tiny", "--lengths: expected at most 2048 tokens with the new ones"),
        (generate, "--providers x --model tiny", "--providers: expected names of lora, bitune; got 'x'"),
        (memory, "--lengths 1 --model tiny", "--lengths: expected 2 to 2048 tokens (tiny), got 1"),
        (memory, "--layers 3 --model tiny", "--layers: expected at most 2 (tiny), got 3"),
        (quality, "--methods x", "--methods: expected names of LoRA r8, LoRA r10"),
        (quality, "--tasks sorting", "--tasks: expected names of unique, renamed; got 'sorting'"),
        (quality, "--seeds 0", "--seeds: expected a number >= 1, got 0"),
        (quality, f"--cache {__file__}", "--cache: expected a folder, got the file"),
        (memory, "--providers x --model tiny", "--providers: expected names of one-pass, one-pass+whole-mlp, three"),
    ],
)
def test_bad_arguments_of_the_smaller_benchmarks(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.fixture
def little(monkeypatch):
    """The quality experiment in seconds: an untrained base, a few steps and samples."""
    monkeypatch.setattr(quality, "PRETRAINING", dict(steps=2, samples_per_skill=4, lr=3e-3))
    monkeypatch.setattr(quality, "TEST", dict(task=16, skill=4))
    tasks = {"unique": quality_tasks.Task("UNQ", None, 2), "renamed": quality_tasks.Task("BACK", 8, 2)}
    monkeypatch.setattr(quality, "TASKS", tasks)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))


def test_the_tasks_are_what_they_say():
    def parts(name, n=200):
        batch = quality_tasks.samples(name, n, torch.Generator().manual_seed(3))
        answers = batch.ids[:, quality_tasks.ITEMS + 3 :]
        assert bool((batch.ids[:, 0] == quality_tasks.ASK).all() and (answers[:, -1] == quality_tasks.END).all())
        assert torch.equal(batch.labels[:, quality_tasks.ITEMS + 3 :], answers)
        assert bool((batch.labels[:, : quality_tasks.ITEMS + 3] == -100).all())
        return zip(batch.ids[:, 1 : quality_tasks.ITEMS + 1].tolist(), answers[:, :-1].tolist(), strict=True)

    for items, answer in parts("UNQ"):
        assert sorted(map(items.count, set(items))) == [1, 2, 2, 3] and items.count(answer[0]) == 1
    rules = {"SORT": sorted, "COPY": list, "REV": lambda x: x[::-1], "BACK": lambda x: x[::-1]}
    for name, rule in rules.items():
        assert all(answer == rule(items) for items, answer in parts(name))
    batch = quality_tasks.samples("LOOK", 50, torch.Generator().manual_seed(3)).ids.tolist()
    assert all(row[1:9].index(row[10]) % 2 == 0 and row[12] == row[1:9][row[1:9].index(row[10]) + 1] for row in batch)
    # what is tuned for doesn't occur in the pretraining text
    for task in quality_tasks.TASKS.values():
        assert task.operation not in quality_tasks.SKILLS
    names = [quality_tasks.SYMBOLS.stop + quality_tasks.OPERATIONS.index(name) for name in quality_tasks.SKILLS]
    text = quality_tasks.joined([quality_tasks.samples(n, 9, torch.Generator()) for n in quality_tasks.SKILLS])
    assert set(text.ids.unique().tolist()) <= {*range(4), *quality_tasks.SYMBOLS, *names}


def test_quality_is_resumed_and_repeats_itself(little, tmp_path, monkeypatch, capsys):
    facts = quality.provenance("cpu") | {"git_sha": "a commit", "git_dirty": 0}  # whatever is changed in this tree
    monkeypatch.setattr(quality, "provenance", lambda device: facts)
    command = ["--methods", "LoRA r8", "dual", "--seeds", "2", "--cache", str(tmp_path / "cache"), "--workers", "1"]
    command += ["--out", str(tmp_path)]
    assert quality.main([*command, "--tasks", "renamed"]) == 0
    assert quality.main(command) == 0
    printed = capsys.readouterr().out
    assert "8 runs, of which 4 are there already" in printed and printed.count("4 rows appended") == 2
    rows = rows_of(tmp_path / "quality.csv")
    keys = [(r["task"], r["method"], r["seed"]) for r in rows]
    assert len(set(keys)) == len(keys) == 8 and len(list((tmp_path / "cache").iterdir())) == 2
    assert {r["base"] for r in rows} == {"0", "1"} and all(r["git_sha"] and r["settings"] for r in rows)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "quality.csv").unlink()
    assert quality.main(command) == 0
    again = {(r["task"], r["method"], r["seed"]): r for r in rows_of(tmp_path / "quality.csv")}
    for row in rows:
        same = again[row["task"], row["method"], row["seed"]]
        assert all(row[f] == same[f] for f in ("accuracy", "skills_before", "skills_after", "final_loss", "settings"))


def test_quality_learns(tmp_path, monkeypatch):
    """That training reaches the adapters: a base that can copy, and an operation that means the same."""
    monkeypatch.setitem(quality_tasks.SAMPLERS, "BACK", quality_tasks.SAMPLERS["COPY"])
    monkeypatch.setattr(quality, "TASKS", {"renamed": quality_tasks.Task("BACK", None, 40)})
    monkeypatch.setattr(quality, "SKILLS", ("COPY",))
    monkeypatch.setattr(quality, "PRETRAINING", dict(steps=120, samples_per_skill=32, lr=5e-3))
    monkeypatch.setattr(quality, "TEST", dict(task=64, skill=64))
    row = quality.run("renamed", "single stream", 0, tmp_path)
    assert row["accuracy"] > 0.5 and row["skills_before"] > 0.5


def test_every_method_of_the_quality_table_attaches(little, tmp_path):
    base = quality.pretrained(0, tmp_path)
    sizes = {}
    for name, method in quality.METHODS.items():
        model = quality.adapted(copy.deepcopy(base), method)
        sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert 0.0 <= quality.skills(model.eval()) <= 1.0
    assert abs(sizes["LoRA r10"] / sizes["dual"] - 1) < 0.02 and sizes["LoRA r8"] < sizes["Bitune"] < sizes["LoRA r16"]


def test_differences_are_paired_by_seed():
    rows = [dict(task="t", method="Bitune", seed=s, accuracy=a) for s, a in ((0, 0.9), (1, 0.5), (2, 0.7))]
    rows += [dict(task="t", method="LoRA r8", seed=s, accuracy=a) for s, a in ((0, 0.8), (1, 0.4), (3, 0.1))]
    found = quality.difference(rows, "Bitune", "LoRA r8")
    assert found.mean == pytest.approx(0.1) and found.error == pytest.approx(0) and found.is_clear
    spread = quality.estimate([0.9, 0.5, 0.7])
    assert spread.error == pytest.approx(0.2 / 3**0.5) and f"{spread}" == "0.700 ± 0.115"
    assert not quality.estimate([0.3, -0.1, 0.1]).is_clear and f"{quality.estimate([0.25]):+}" == "+0.250"
    assert quality.difference(rows, "Bitune", "Bitune") is None and quality.difference(rows, "dual", "Bitune") is None
    assert not quality.estimate([0.3]).is_clear
    two = [r for r in rows if r["seed"] < 2] + [dict(task="t", method="dual", seed=s, accuracy=0.7) for s in (0, 1)]
    apart = quality.gap(two, ["Bitune", "dual"], ["LoRA r8"])  # .8 - .8 and .6 - .4
    assert apart.mean == pytest.approx(0.1) and apart.error == pytest.approx(0.1)
    assert set(quality.CAUSAL).isdisjoint(quality.BOTH) and {*quality.CAUSAL, *quality.BOTH, *quality.MAIN} <= set(
        quality.METHODS
    )
