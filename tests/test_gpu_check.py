"""benchmarks/gpu_check.py on a machine without a GPU: its stages, their order, their commands and what they find."""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bitune_kernels import backends
from bitune_kernels.testing import timing
from tests.test_benchmarks import attention, generate, lora_linear, prefill, rows_of, train_step

gpu_check = importlib.import_module("gpu_check")  # the import before has made benchmarks/ known


def test_the_gpu_check_asks_for_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_of_no_commit_are_not_made(checkout, tmp_path, capsys, monkeypatch):
    facts = gpu_check.provenance("cuda") | {"git_sha": "", "git_dirty": ""}
    monkeypatch.setattr(gpu_check, "provenance", lambda device: facts)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "BITUNE_COMMIT" in capsys.readouterr().err and not (tmp_path / "out").exists()


# In place of setup.py: "builds" the name of what it was asked for, or fails.
SETUP = """
import os, pathlib, sys, sysconfig
def find_nvcc(env):
    return env.get("CUDACXX"), "CUDACXX"
if __name__ == "__main__":
    kind = "debug" if os.environ["BITUNE_DEBUG"] == "1" else "release"
    print(kind, *sys.argv[1:])
    if os.environ.get("BROKEN") == kind:
        sys.exit("ptxas: no")
    folder = pathlib.Path("lib/bitune_kernels")
    folder.mkdir(parents=True)
    (folder / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).write_text(kind)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the repository with stand-ins for its sources, on a machine with a GPU."""
    root = tmp_path / "checkout"
    for name in ("csrc/device", "python", "bitune_kernels"):
        (root / name).mkdir(parents=True)
    (root / "csrc" / "device" / "ptx.cuh").write_text("// 1")
    (root / "CMakeLists.txt").write_text("")
    (root / "setup.py").write_text(SETUP)
    monkeypatch.setattr(gpu_check, "ROOT", root)
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    facts = timing.provenance() | {"git_sha": "1", "git_dirty": 0}
    monkeypatch.setattr(gpu_check, "provenance", lambda device: dict(facts, timestamp_utc=str(time.time())))
    monkeypatch.delenv("BITUNE_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("CUDACXX", "nvcc")
    return root


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def commands(stage: str, names="cuda,triton", failed=None) -> dict[str, list[str] | str]:
    args = gpu_check.argparse.Namespace(backends=names.split(","), out=Path("out"))
    found = gpu_check.commands_of(stage, args, failed or {}, 300)
    return {"-".join(filter(None, (backend, name))): command for backend, name, command in found}


def only(*args, **options) -> list[str] | str:
    (command,) = commands(*args, **options).values()
    return command


def test_a_failed_stage_does_not_stop_the_others(checkout, tmp_path, capsys, monkeypatch):
    command = {
        "tests": python("print('3 passed')"),
        "repeats": python("raise SystemExit('broken')"),
        "large": python("import time; print('2nd case'); time.sleep(60)"),
        "sanitizer": "compute-sanitizer is not on PATH",
        "attention": python("print('end')"),
    }
    monkeypatch.setattr(gpu_check, "commands_of", lambda stage, *_: [gpu_check.Command("triton", "", command[stage])])
    monkeypatch.setitem(gpu_check.SECONDS, "large", 1)
    run = ["--out", str(tmp_path), "--stages"]
    assert gpu_check.main([*run, "tests,repeats,sanitizer,large,attention"]) == 1
    *lines, total = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert total[1:] == ["s", "in all"]
    summary = {stage.removesuffix("-triton"): (state, rest) for stage, state, rest in lines}
    states = {stage: state for stage, (state, _) in summary.items()}
    assert states == {
        "tests": "passed", "repeats": "FAILED", "sanitizer": "skipped", "large": "FAILED", "attention": "passed"
    }  # fmt: skip
    assert "3 passed" in summary["tests"][1] and "broken" in summary["repeats"][1]
    assert "limit of 1 s; 2nd case" in summary["large"][1] and "not on PATH" in summary["sanitizer"][1]
    assert "broken" in (tmp_path / "gpu_check" / "repeats-triton.log").read_text()
    rows = rows_of(tmp_path / "gpu_check.csv")
    assert {row["stage"]: row["state"] for row in rows} == {f"{stage}-triton": state for stage, state in states.items()}
    assert {row["backend"] for row in rows} == {"triton"}
    assert gpu_check.main([*run, "tests,attention", "--again", "--minutes", "1e-6"]) == 0
    assert capsys.readouterr().out.count("--minutes are over") == 2


def test_what_the_minutes_end_is_no_fault(checkout, tmp_path, capsys, monkeypatch):
    command = [gpu_check.Command("triton", "", python("import time; print('1st case', flush=True); time.sleep(60)"))]
    monkeypatch.setattr(gpu_check, "commands_of", lambda *args: command)
    assert gpu_check.main(["--out", str(tmp_path), "--stages", "first", "--minutes", "0.05"]) == 0
    assert "skipped" in (printed := capsys.readouterr().out) and "--minutes were over after" in printed
    assert "1st case" in printed
    facts = gpu_check.provenance("cuda")
    assert gpu_check.earlier(tmp_path / "gpu_check.csv", facts) == (set(), {})


def test_what_runs_behind_tuning_is_of_the_tiles_it_found(checkout, tmp_path, monkeypatch):
    assert only("tune", "triton")[1:] == ["-m", "bitune_kernels.tune"] and not commands("tune", "cuda")
    assert only("tune", failed={"triton": "first-triton: NaN"}) == "first-triton: NaN"
    assert {"brief", "tune"}.isdisjoint(gpu_check.DEFAULT_STAGES.split(","))
    facts, tuned = gpu_check.provenance("cuda"), tmp_path / "tuned"
    monkeypatch.setattr(gpu_check, "provenance", lambda device: facts | {"triton": str(tuned.exists())})
    command = {"tune": python(f"open({str(tuned)!r}, 'w')")}
    right = python("print('right')")
    monkeypatch.setattr(
        gpu_check, "commands_of", lambda stage, *_: [gpu_check.Command("triton", "", command.get(stage, right))]
    )
    for _ in range(2):
        assert gpu_check.main(["--out", str(tmp_path), "--stages", "first,tune,large"]) == 0
    rows = [(row["stage"], row["triton"]) for row in rows_of(tmp_path / "gpu_check.csv")]
    once = [("first-triton", "False"), ("tune-triton", "True"), ("large-triton", "True")]
    assert rows == [*once, ("first-triton", "True")], "tiles are tuned once, and what ran before with others runs again"


def test_tools_are_found_where_their_installer_puts_them(checkout, tmp_path, monkeypatch):
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho no leaks")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tool.parents[1]))
    command = commands("sanitizer", "triton")["triton-memcheck"]
    assert command[0] == "compute-sanitizer"
    assert gpu_check.perform(command, tmp_path / "log", 60, 60) == ("passed", "no leaks")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands("sanitizer", "triton")["triton-memcheck"] == "compute-sanitizer is not on PATH"


def test_what_has_passed_is_not_run_again(checkout, tmp_path, capsys, monkeypatch):
    ran = {stage: python(f"print('{stage}')") for stage in ("build", "first", "tests", "large")}
    seen = []

    def commands_of(stage, args, failed, seconds):
        seen.append(dict(failed))
        return [gpu_check.Command("triton", "", ran[stage])]

    def run(*options) -> list[str]:
        gpu_check.main(["--out", str(tmp_path), "--stages", ",".join(ran), *options])
        lines = capsys.readouterr().out.splitlines()
        return [line.split("-")[0] for line in lines if "-triton" in line and not line.endswith("earlier")]

    monkeypatch.setattr(gpu_check, "commands_of", commands_of)
    ran["first"] = python("raise SystemExit('broken')")
    assert run() == list(ran)
    assert run() == ["build", "first"]
    assert seen[len(ran)] == {"triton": "first-triton: exit code 1; broken"}  # before the second run's first stage
    ran["first"] = python("print('first')")
    seen.clear()
    assert run() == ["build", "first"] and seen[2] == {}, "what has passed now is at fault no longer"
    assert run() == ["build"]
    assert run("--again") == list(ran)
    for change in ({"git_sha": "2"}, {"git_sha": "2", "gpu": "another"}, {"git_dirty": 1}):
        facts = gpu_check.provenance("cuda") | change
        monkeypatch.setattr(gpu_check, "provenance", lambda device, facts=facts: facts)
        assert run() == list(ran)


def test_the_benchmarks_of_a_gpu_are_asked_for_rightly(checkout):
    assert gpu_check.build() == 0
    for name, module in (
        ("prefill", prefill),
        ("train_step", train_step),
        ("generate", generate),
        ("lora", lora_linear),
    ):
        for command in commands(name, failed={"cuda": "large-cuda: NaN"}).values():
            assert command[:2] == [sys.executable, f"benchmarks/{name}.py"]
            args = module.parse([*command[2:], "--device", "cpu"])[0]
            assert args.out == Path("out").resolve()
            if name in ("prefill", "train_step"):
                assert args.without == ["cuda"] and args.minutes == 4 and len(args.providers) >= 4
                assert args.model in gpu_check.MODELS and args.layers is None
    brief = commands("brief", failed={"cuda": "large-cuda: NaN"})
    modules = {"attention": attention, "prefill": prefill, "train_step": train_step}
    found = {n: m.parse([*brief[f"{n}-without-cuda"][2:], "--device", "cpu"])[0] for n, m in modules.items()}
    assert all(args.without == ["flex", "flash", "cuda"] and args.minutes == 4 for args in found.values())
    assert found["attention"].lengths == [512, 4096, 16384] and found["attention"].heads is None
    assert {found[name].model for name in ("prefill", "train_step")} == {"gemma-2b"}
    assert (found["prefill"].lengths, found["prefill"].batch_sizes) == ([128, 2000], [1])
    assert (found["train_step"].max_lengths, found["train_step"].samples) == ([512], [10])
    found = commands("prefill").items()
    assert {*commands("prefill", "triton")} == {f"{model}-without-cuda" for model in gpu_check.MODELS}
    lengths = {name: prefill.parse([*command[2:], "--device", "cpu"])[0].lengths for name, command in found}
    assert lengths["phi-2"] == [128, 512, 2048] and lengths["gemma-2b"][-1] == 8192
    found = [train_step.parse([*c[2:], "--device", "cpu"])[0] for c in commands("train_step").values()]
    shapes = {(args.samples[0], n, args.fill) for args in found for n in args.max_lengths if args.model == "llama3-8b"}
    assert shapes == {(10, 128, False), (10, 512, False), (1, 2048, True), (1, 8192, True)}
    assert max(n for args in found for n in args.max_lengths if args.model == "phi-2") == 2048


def test_the_docstring_says_how_long_it_takes(checkout):
    text = gpu_check.__doc__

    def seconds(stages):
        return sum(gpu_check.SECONDS[stage] * len(commands(stage)) for stage in stages)

    (hours,) = re.findall(r"All of it takes up to (\d+) hours", text)
    assert seconds(gpu_check.DEFAULT_STAGES.split(",")) <= 3600 * int(hours)
    ((there, stages, minutes),) = re.findall(r"for (\d+) minutes run --stages (\S+), which\ntakes up to (\d+)", text)
    assert seconds(stages.split(",")) <= 60 * int(minutes) < 60 * int(there)


def test_each_stage_loads_its_build_and_users_get_theirs(checkout, tmp_path, monkeypatch):
    assert gpu_check.build() == 0
    extension = checkout / "bitune_kernels" / gpu_check.built("debug").name
    show, right = python(f"print(open({str(extension)!r}).read())"), gpu_check.commands_of
    monkeypatch.setattr(gpu_check, "commands_of", lambda *args: [c._replace(command=show) for c in right(*args)])
    run = ["--out", str(tmp_path), "--stages", "first,tests,large,operators,repeats,sanitizer", "--backends"]
    assert gpu_check.main([*run, "triton"]) == 1 and not extension.exists()  # leaves alone what it doesn't need
    assert gpu_check.main([*run, "cuda"]) == 0
    found = [row for row in rows_of(tmp_path / "gpu_check.csv") if row["backend"] == "cuda"]
    seen = {row["stage"].partition("-")[0]: row["summary"] for row in found}
    kinds = dict.fromkeys(("first", "tests", "operators", "sanitizer"), "debug")
    assert seen == kinds | dict.fromkeys(("large", "repeats"), "release")
    assert extension.read_text() == "release" and [*extension.parent.iterdir()] == [extension]


def test_what_was_built_from_other_sources_is_not_used(checkout, capsys, monkeypatch):
    assert gpu_check.build() == 0
    printed = capsys.readouterr().out
    assert "debug build_ext --build-lib lib --build-temp tmp" in printed and "release build_ext" in printed
    first = {kind: gpu_check.built(kind) for kind in ("debug", "release")}
    assert {kind: path.read_text() for kind, path in first.items()} == {"debug": "debug", "release": "release"}
    assert gpu_check.build() == 0  # at once
    assert "build_ext" not in capsys.readouterr().out
    for change in (
        lambda: (checkout / "csrc" / "device" / "ptx.cuh").write_text("// 2"),
        lambda: monkeypatch.setenv("BITUNE_CUDA_ARCHS", "90"),
    ):
        before = gpu_check.built("debug")
        change()
        assert gpu_check.built("debug") != before and not gpu_check.built("debug").is_file()
    monkeypatch.setenv("BROKEN", "debug")
    assert gpu_check.build() == 1
    printed = capsys.readouterr().out
    assert "ptxas: no" in printed and printed.strip().endswith("failed: debug")


def test_without_the_extension_triton_is_still_checked(checkout, monkeypatch):
    assert commands("build")["cuda"][-2:] == ["--run", "build"]
    monkeypatch.delenv("CUDACXX")
    assert commands("build") == {"cuda": "nvcc was not found; looked at CUDACXX"}
    assert commands("build", "triton") == {}
    for stage in ("first", "tests", "operators", "repeats", "sanitizer", "large"):
        found = commands(stage)
        assert any(isinstance(command, list) or "compute-sanitizer" in command for command in found.values())
        for name, command in found.items():
            assert ("was not built" in command) == name.startswith("cuda"), name
    assert only("attention")[-2:] == ["--without", "cuda"]


def test_a_backend_with_a_fault_is_not_timed(checkout):
    assert gpu_check.build() == 0
    assert "--without" not in only("attention")
    assert only("attention", "triton")[-2:] == ["--without", "cuda"]
    for backend in ("cuda", "triton"):
        assert only("attention", failed={backend: f"repeats-{backend}: NaN"})[-2:] == ["--without", backend]
    nothing = only("attention", "cuda", failed={"cuda": "large-cuda: NaN"})
    assert nothing == "no kernel to time: cuda: large-cuda: NaN; triton: not among --backends"
    assert "--without" not in only("attention", failed={"": "tests-peers: 1 failed"})


def test_a_hang_is_met_once(checkout):
    assert gpu_check.build() == 0
    wrong = {"cuda": "first-cuda: exit code 1; 3 of 16"}
    hang = {"cuda": f"first-cuda: {gpu_check.ENDED} of 150 s; p9-a3-h4,2-d16 torch.bfloat16"}
    for stage in ("tests", "sanitizer", "repeats", "large"):
        for failed, skipped in ((wrong, stage in gpu_check.ON_RELEASE), (hang, True)):
            for name, command in commands(stage, failed=failed).items():
                assert (f"would hang here too: {failed['cuda']}" in command) == (skipped and name.startswith("cuda"))


def test_the_table_runs_in_a_process_for_each_backend(checkout):
    found = commands("tests", "triton")
    assert [*found] == ["triton", "triton-bugs", "peers"]
    assert found["triton"][-2:] == ["-k", "triton- or triton]"]
    assert found["triton"][-3].endswith("::test_cuda_graph")
    assert found["peers"][-1] == "not triton- and not cuda- and not flex-"
    assert [*commands("tests", "cuda")] == ["cuda", "peers"]
    if gpu_check.shutil.which("compute-sanitizer"):
        assert all("--backends" in c for c in commands("sanitizer", "triton").values())
    assert {*commands("sanitizer", "triton")} == {f"triton-{tool}" for tool in gpu_check.TOOLS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "tests,lint"], "--stages: expected some of build,first,tests"),
        (["--backends", "cuda,cutlass"], "--backends: expected some of sdpa,cuda,triton"),
        (["--minutes", "0"], "--minutes: expected a number > 0"),
    ],
)
def test_the_gpu_check_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_the_gpu_check_takes_dtypes_that_a_backend_computes(monkeypatch):
    assert gpu_check.dtypes_of("sdpa", "cpu") == [torch.float32, torch.bfloat16]
    cuda = backends.load("cuda")
    monkeypatch.setattr(cuda, "unsupported", lambda **call: "no" if call["dtype"] == torch.float32 else None)
    assert gpu_check.dtypes_of("cuda", "cpu") == [torch.bfloat16, torch.float16]
    monkeypatch.setattr(cuda, "unsupported", lambda **call: "no such device")
    with pytest.raises(ValueError, match="'cuda' can't run this call: no such device"):
        gpu_check.dtypes_of("cuda", "cpu")


SHORT = (gpu_check.Case(prompts=(5, 2), answers=(2, 4), alpha="head"),)


def test_the_first_cases_name_what_is_wrong(capsys, monkeypatch):
    assert gpu_check.first("sdpa", "cpu", SHORT) == 0
    assert "sdpa: 2 of 2 cases" in capsys.readouterr().out
    right = gpu_check.assert_backend_within_budget

    def wrong(backend, case, dtype, device, backward):
        right(backend, case, dtype, device, backward)
        assert dtype != torch.bfloat16, "out[0] is nan"

    monkeypatch.setattr(gpu_check, "assert_backend_within_budget", wrong)
    assert gpu_check.first("sdpa", "cpu", SHORT) == 1
    wanted = f"1 of 2 cases are within the budget; {SHORT[0].id} torch.bfloat16: AssertionError: out[0] is nan"
    assert wanted in capsys.readouterr().out


def test_a_case_that_does_not_compile_does_not_hide_the_others(capsys, monkeypatch):
    right = gpu_check.assert_backend_within_budget

    def broken(backend, case, dtype, *args, **options):
        if dtype == torch.float32:
            raise RuntimeError("out of resource: shared memory\nhint")
        right(backend, case, dtype, *args, **options)

    monkeypatch.setattr(gpu_check, "assert_backend_within_budget", broken)
    for stage, times in ((gpu_check.first, {}), (gpu_check.repeats, {"times": 2})):
        assert stage("sdpa", "cpu", cases=SHORT, **times) == 1
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("sdpa: 1 of 2 cases") and last.endswith("RuntimeError: out of resource: shared memory")


def test_the_operators_are_checked(capsys, monkeypatch):
    assert gpu_check.operators("sdpa", "cpu", SHORT) == 0
    assert "6 of 6" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "_check_compiled", lambda *args: None)
    monkeypatch.setattr(gpu_check, "_check_registered", lambda *args: None)
    right = gpu_check.bitune_prefill
    for broken, message in (
        (lambda out, call: out.mul_(1.01), "out differs"),
        (lambda out, call: call["k_cache"].mul_(1.01), "k_cache: values are off"),
        (lambda out, call: call["v_cache"].nan_to_num_(7.0), "v_cache: values are off"),
    ):

        def prefill(broken=broken, **call):
            out = right(**call)
            broken(out, call)
            return out

        monkeypatch.setattr(gpu_check, "bitune_prefill", prefill)
        assert gpu_check.operators("sdpa", "cpu", SHORT) == 1
        assert message in capsys.readouterr().out.splitlines()[-1]


def test_a_compiled_call_is_held_to_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda **x: (f(**x)[0] + 1, *f(**x)[1:]))
    with pytest.raises(AssertionError, match="out differs"):
        gpu_check._check_compiled(*SHORT, "sdpa", torch.float32, "cpu")


def test_the_small_cases_repeat_bitwise(capsys, monkeypatch):
    assert gpu_check.repeats("sdpa", "cpu", times=3, cases=gpu_check.REPEATED[:1]) == 0
    assert "3 times" in capsys.readouterr().out
    right, calls = gpu_check._outputs_and_gradients, []

    def changing(*args):
        calls.append(args)
        found = right(*args)
        return found | {"d_q": found["d_q"] * 1.001} if len(calls) == 3 else found

    monkeypatch.setattr(gpu_check, "_outputs_and_gradients", changing)
    assert gpu_check.repeats("sdpa", "cpu", times=3, cases=SHORT) == 1
    assert "1 of 2 cases" in (printed := capsys.readouterr().out) and "d_q changed between runs" in printed


def test_what_the_sanitizer_watches_runs(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "SMALL", SHORT)
    assert gpu_check.small("sdpa", "cpu") == 0
    assert "sdpa: 2 small cases ran" in capsys.readouterr().out


def test_the_large_case_is_compared_at_its_far_end(capsys, monkeypatch):
    size = {"elements": 2**19, "sample": (12, 3)}  # the same code with a small batch
    assert gpu_check.large("sdpa", "cpu", **size) == 0
    assert "sample" in capsys.readouterr().out
    right = gpu_check.bitune_attention

    def overflow(q, *args, **options):
        out, k_mixed, v_mixed = right(q, *args, **options)
        if q.numel() > 2**19:
            out = out.index_fill(0, torch.tensor([len(out) - 1]), 1.0)
        return out, k_mixed, v_mixed

    monkeypatch.setattr(gpu_check, "bitune_attention", overflow)
    assert gpu_check.large("sdpa", "cpu", **size) == 1
