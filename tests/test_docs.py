"""What the README says is run: its example, its commands, its paths and its list of families."""

from __future__ import annotations

import csv
import io
import re
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from tests.families import FAMILIES
from tests.test_trainers import WORDS, tokenizer
from tests.tiny import base_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import attention  # noqa: E402
import generate  # noqa: E402
import tables  # noqa: E402
from common import report as common_report  # noqa: E402

from bitune_kernels.testing import timing  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = [*("README.md", "CONTRIBUTING.md", "CHANGELOG.md"), *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
DOCS = {name: (ROOT / name).read_text() for name in PAGES}


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


def run_example(name: str, words: list[str], monkeypatch, tmp_path) -> dict:
    """The names that a document's example leaves behind."""
    # nothing can be downloaded in a test: the same calls give a tiny model and a tokenizer of these words
    (example,) = blocks("python", DOCS[name])
    model = staticmethod(lambda name, **options: base_model(**options))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", staticmethod(lambda name: tokenizer(words)))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(example, name, "exec"), scope)
    return scope


def test_the_example_runs(monkeypatch, tmp_path):
    scope = run_example("README.md", WORDS, monkeypatch, tmp_path)
    assert scope["tokens"].shape[1] > scope["prompt"]["input_ids"].shape[1]
    assert (tmp_path / "my-bitune" / "bitune_config.json").is_file()


def test_the_example_of_related_systems_runs(monkeypatch, tmp_path):
    scope = run_example("docs/related.md", WORDS, monkeypatch, tmp_path)
    width, answer = scope["both"].shape[1], scope["answer"].shape[1]
    assert width == scope["text"].shape[1] + answer
    assert not torch.allclose(*(scope[name][:, -answer:] for name in ("sequence_to_sequence", "left_to_right")))
    assert scope["bidirectional"].get_seq_length() == width - answer
    assert scope["batch"]["labels"].shape == scope["batch"]["input_ids"].shape
    assert any(p.grad is not None for p in scope["model"].parameters())


def test_what_the_page_of_related_systems_names():
    from bitune_kernels.config import VARIANTS
    from bitune_kernels.training import UL2_DENOISERS

    page = DOCS["docs/related.md"]
    paper = {"naive_bidir", "no_mixing", "only_causal", "shared_weights", "anti_causal"}
    assert set(re.findall(r'variant="(\w+)"', page)) == paper < set(VARIANTS)
    (length, needed) = map(int, re.search(r"(\d+) tokens need (\d+) sentinels", page).groups())
    assert max(d.num_spans(length) for d in UL2_DENOISERS) == needed
    assert max(d.num_spans(600) for d in UL2_DENOISERS) == 100


def test_the_example_of_learned_instructions_runs(monkeypatch, tmp_path, capsys):
    scope = run_example("docs/instructions.md", WORDS, monkeypatch, tmp_path)
    assert scope["optimizer"].k == 1 and "grad_norm" in capsys.readouterr().out
    assert float(scope["instruction"].logits.detach().abs().max()) > 0


def test_the_example_of_encoding_runs(monkeypatch, tmp_path):
    (texts,) = re.findall(r"^texts = \[(.*?)\]", DOCS["docs/encoding.md"], re.MULTILINE | re.DOTALL)
    words = sorted(set(re.findall(r"[\w.]+", texts)))
    scope = run_example("docs/encoding.md", words, monkeypatch, tmp_path)
    assert scope["vectors"].shape == scope["echo"].shape == (3, 32) and scope["vectors"].dtype == torch.float32
    trained = [p for n, p in scope["model"].named_parameters() if ".bidir." in n]
    assert len(trained) == 2 * 7 * 3 and all(p.grad is not None for p in trained)


def test_links_between_pages_lead_somewhere():
    links = [(name, link) for name, text in DOCS.items() for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert links and not [(name, link) for name, link in links if not ((ROOT / name).parent / link).is_file()]


def test_its_make_targets_exist():
    (commands,) = blocks("bash")
    targets = re.findall(r"^make (\w+)", commands, re.MULTILINE)
    assert targets == ["prefill", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_its_module_commands_run():
    modules = set(re.findall(r"python -m (bitune_kernels(?:\.\w+)+)", README + DOCS["docs/kernels.md"]))
    # in full by tests/test_triton_compile.py and tests/test_packaging.py, which take minutes, and with a GPU
    arguments = {
        "bitune_kernels.env": [],
        "bitune_kernels.testing.compiled": ["--help"],
        "bitune_kernels.testing.native": ["--help"],
        "bitune_kernels.tune": ["--help"],
    }
    assert modules == set(arguments)
    for module in modules:
        subprocess.run([sys.executable, "-m", module, *arguments[module]], cwd=ROOT, check=True, capture_output=True)


def test_the_command_that_profiles_sees_every_kernel():
    (block,) = blocks("sh", DOCS["docs/kernels.md"])
    command = shlex.split(block.splitlines()[-1])
    options = command[command.index("benchmarks/attention.py") + 1 :]
    args, *_ = attention.parse([*(x.replace("triton", "sdpa") for x in options), "--device", "cpu"])
    assert args.providers == ["sdpa"] and args.modes == ["forward", "backward"]
    paths = (*ROOT.glob("bitune_kernels/backends/triton/attention_*.py"), *ROOT.glob("csrc/attention_*.cu"))
    sources = "".join(path.read_text() for path in paths)
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE) + re.findall(r"__global__ .* (\w+)\(", sources)
    assert sorted(kernels) == ["attend_sm80", "attend_sm90", "dkv_kernel", "dq_kernel", "forward_kernel"]
    pattern = command[command.index("--kernel-name") + 1].removeprefix("regex:")
    assert [name for name in kernels if not re.search(pattern, name)] == []


@pytest.mark.parametrize("name", DOCS)
def test_paths_and_public_names_exist(name):
    import transformers

    import bitune_kernels

    for path in re.findall(r"`((?:[\w.]+/)*[\w.]+(?:/|\.(?:py|md|yaml|csv|png|jsonl|txt|h|cuh|cu)))`", DOCS[name]):
        places = (ROOT / path, ROOT / "bitune_kernels" / path, ROOT / "bitune_kernels" / "modeling" / path)
        assert any(p.exists() for p in (*places, ROOT / "bitune_kernels" / "backends" / path)), f"{name} names {path}"
    for public in re.findall(
        r"`(bitune_\w+|mix_kv|get_bitune_model|load_official_checkpoint|[A-Z]\w+)[`(]", DOCS[name]
    ):
        if public.startswith("BITUNE_"):
            assert public in (ROOT / "setup.py").read_text(), f"{name} names {public}"
        elif public.endswith("Trainer"):
            assert public in dir(transformers) or public in dir(pytest.importorskip("trl")), f"{name} names {public}"
        elif public != "bitune_kernels":
            assert hasattr(bitune_kernels, public), f"{name} names {public}"


def test_the_commands_of_the_paper_are_right(monkeypatch, tmp_path):
    """Each is parsed by its own program, with its recipe loaded and its tasks looked up; none is run."""
    pytest.importorskip("lm_eval")
    import lm_eval.__main__ as harness
    from lm_eval._cli import HarnessCLI
    from lm_eval.tasks import TaskManager

    import bitune_kernels.training.run as training
    from bitune_kernels import cli
    from bitune_kernels.commands import evaluate, plot

    adapters, scored = set(), []

    def train(recipe, model, output, resume):
        adapters.add(output)

    def parse():
        scored.append(HarnessCLI().parse_args())

    def draw(given):
        assert given.adapter in adapters

    tasks = Path(harness.__file__).parent / "tasks"
    places = [tasks / name for name in "piqa arc commonsense_qa siqa mmlu/default gsm8k".split()]
    known = TaskManager(include_path=[*places, ROOT / "recipes" / "tasks"], include_defaults=False).all_tasks
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "conversations.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(harness, "cli_evaluate", parse)
    monkeypatch.setattr(evaluate, "adapter_folder", lambda folder: adapters.__contains__(folder) or pytest.fail(folder))
    monkeypatch.setattr(plot, "_alpha", draw)
    monkeypatch.setattr(plot, "_attention", draw)
    programs = Counter()
    for line in "".join(blocks("sh", DOCS["docs/reproducing.md"])).splitlines():
        program, *words = shlex.split(line)
        programs[program] += 1
        if program == "bitune":
            assert cli.main(words) == 0, line
        elif program == "lm_eval":
            monkeypatch.setattr(sys, "argv", [program, *words])
            parse()
        else:
            assert words[:-1] == ["install"]
            (extras,) = re.findall(r"^\.\[(.*)\]$", words[-1])
            assert set(extras.split(",")) <= set(
                re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
            )
    for given in scored:
        assert set(given.tasks) <= set(known) and Path(given.include_path).is_dir(), given.tasks
    assert programs["bitune"] > 20 and len(scored) == 9 and programs["lm_eval"] == programs["pip"] == 1
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes == {
        path.partition(".")[0] for path in re.findall(r"recipes/(\w+\.yaml)", DOCS["docs/reproducing.md"])
    }


def test_the_families_are_those_that_are_tested():
    listed = re.search(r"checkpointing: (.*?)\.\n", README, re.DOTALL)[1]
    families = {family.model_type or family.id for family in FAMILIES}
    assert sorted(re.split(r",\s+", listed)) == sorted(families) and f"[{len(families)} model families]" in README


def test_every_backend_is_in_the_table():
    from bitune_kernels.backends import BACKENDS

    assert sorted(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == sorted(BACKENDS)


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """The rows as they were committed: `make prefill` adds those of this machine to the files."""
    command = ("git", "-C", str(ROOT), "archive", "HEAD", "benchmarks/results")
    archive = subprocess.run(command, capture_output=True).stdout
    if not archive:  # no checkout
        return tables.RESULTS
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "benchmarks" / "results")
    return tables.RESULTS


def test_the_measured_tables_are_those_of_the_rows(results):
    printed = {name: table() for name, table in tables.TABLES.items()}
    assert all(table.count("\n") > 1 for table in printed.values())
    pages = {name: DOCS["README.md" if name == "README" else "docs/performance.md"] for name in printed}
    assert not [name for name, table in printed.items() if f"\n{table}\n" not in pages[name]]
    of_gpus = [table for table in (table() for table in tables.GPU_TABLES.values()) if table]
    assert all(any(f"\n{table}\n" in page for page in DOCS.values()) for table in of_gpus)
    # the README's first screen says it in words; for one prompt both are the same
    state = re.sub(r"\s+", " ", README)
    found = tables.runs(tables.whole("prefill"), "cpu", "dtype", "batch", "length")
    for provider, words in (("three-pass", "padded calls"), ("authors-schedule", "calls per prompt")):
        ratios = []
        for (_, _, batch, _), same in found.items():
            name = "three-pass" if batch == "1" else provider
            ratios += [tables.faster(r, name) for r in same if {tables.ONE_PASS, name} <= r.keys()]
        assert f"{min(ratios):.1f} to {max(ratios):.1f} times faster than three {words}" in state, (name, ratios)
    chosen = [tables.newest(same, ("three-pass", tables.ONE_PASS, tables.PACKED, "lora")) for same in found.values()]
    units = ("cost_in_lora_passes", "cost_in_lora_packed_passes")
    costs = [float(run[tables.ONE_PASS][unit]) for run in chosen if run for unit in units]
    assert f"A prefill still takes {min(costs):.1f} to {max(costs):.1f} times as long as plain LoRA's" in state
    found = tables.runs(tables.whole("train_step"), "cpu", "dtype", "batch", "length")
    needed = {tables.ONE_PASS, "authors-schedule", tables.PACKED}
    steps = {
        (cpu, dtype): [tables.faster(run, "authors-schedule") for run in same if needed <= run.keys()]
        for (cpu, dtype, _, length), same in found.items()
        if length == "512"
    }
    every = [ratio for ratios in steps.values() for ratio in ratios]
    assert f"a training step {min(every):.2f} to {max(every):.2f} times faster than the authors'" in state
    *first, last = (f"{ratio:.2f}" for ratio in steps["AVX512", "bfloat16"])
    assert f"{', '.join(first)} and {last} times faster" in re.sub(r"\s+", " ", DOCS["docs/performance.md"])


def test_tables_leave_out_other_models_and_name_a_gpu(tmp_path, monkeypatch, capsys):
    with (tables.RESULTS / "generate.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    changes = [{"model": "tiny"}, {"layers": "2"}, {"gpu": "A GPU", "provider": "bitune"}]
    with (tmp_path / "generate.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(row | change for change in changes)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (line,) = tables.request().splitlines()[2:]
    assert line.startswith("| A GPU, ")
    with pytest.raises(SystemExit):
        tables.main(["--help"])
    assert "usage:" in capsys.readouterr().out


def test_the_tables_of_a_gpu(tmp_path, monkeypatch):
    facts = timing.provenance() | {"git_sha": "1234567", "git_dirty": "0", "gpu": "A GPU", "dtype": "bfloat16"}

    def write(benchmark, *rows):
        with (tmp_path / f"{benchmark}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, {name: None for row in rows for name in (*facts, *row)}, restval="")
            writer.writeheader()
            writer.writerows(facts | row for row in rows)

    def lines(name):
        return [line.strip("| ").split(" | ") for line in tables.GPU_TABLES[name]().splitlines()[2:]]

    def provider(name, **values):
        return dict.fromkeys((*common_report.CASE_FIELDS, *common_report.TIME_FIELDS), "") | values | {"provider": name}

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert not any(table() for table in tables.GPU_TABLES.values())

    checks = [("first-triton", "FAILED", "1"), ("first-triton", "passed", "2"), ("first-cuda", "skipped", "2")]
    checks += [("sanitizer-triton-memcheck", "FAILED", "1"), ("sanitizer-triton-racecheck", "passed", "1")]
    write(
        "gpu_check",
        *({"stage": s, "state": x, "timestamp_utc": t, "backend": s.split("-")[1]} for s, x, t in checks),
        {"stage": "large-triton", "state": "passed", "backend": "triton", "git_dirty": "1"},
    )
    (line,) = lines("hardware")
    nothing = "not run"
    said = ["passed `1234567`", *[nothing] * 3, "1 of 2 passed `1234567`", nothing]
    assert line[:-1] == ["A GPU", "`triton`", *said] and f"torch {torch.__version__}" in line[-1]

    shape = dict.fromkeys((*attention.CASE_FIELDS, *attention.TIME_FIELDS), "")
    shape |= {"mode": "forward", "heads_q": 32, "heads_kv": 8, "head_dim": 128, "batch": 4, "length": 512, "ragged": 0}
    rows = [("triton", "1", 9, ""), ("triton", "2", 300, ""), ("cuda", "2", 400, "0.8"), ("varlen", "2", 500, "1.0")]
    rows += [("triton[one-stream]", "2", 900, ""), ("varlen", "3", 1, "1.0")]
    names = ("provider", "timestamp_utc", "useful_tflops", "speedup_over_best_peer")
    write("attention", *(shape | dict(zip(names, row, strict=True)) | {"time_over_floor": 2} for row in rows))
    expected = ["A GPU, bfloat16", "forward", "32/8 x 128", "4 x 512", "400", "300", "500", "0.80", "2.00", "`1234567`"]
    assert lines("attention") == [expected]

    model = {"model": "gemma-2b", "layers": 18, "batch": 1, "length": 128, "floor_linear": 1.9, "p50_ms": 7}
    model |= {"floor_packed_linear": 1.95, "utilisation": 0.5, "peak_mib": 2048, "cost_in_lora_packed_passes": 2}
    write("prefill", provider("one-pass[cuda]", **model), provider("lora-packed[cuda]", **model))
    one, lora = lines("prefill on a GPU")
    assert one[1:] == [
        *(
            "gemma-2b, 18 layers",
            "1 x 128",
            "`one-pass[cuda]`",
            "7.0",
            "",
            "",
            "2.00 (1.95)",
            "0.50",
            "2.0",
            "`1234567`",
        )
    ]
    assert lora[3] == "`lora-packed[cuda]`" and lora[7] == "2.00"
    assert not lines("train_step on a GPU")

    request = dict.fromkeys(generate.FIELDS, "") | {"model": "gemma-2b", "batch": 1, "prompt": 128, "new": 50}
    write("generate", request | {"provider": "bitune", "first_ms": 9, "cost_of_first": 1.2}, request)
    (line,) = lines("generate on a GPU")
    assert line[1:] == ["gemma-2b", "1 x 128 + 50", "9.0", "1.20", "", "", "`1234567`"]


def test_the_quality_tables_are_those_of_the_rows(results):
    quality = pytest.importorskip("quality")
    rows, page = quality.read(results / "quality.csv"), DOCS["docs/quality.md"]
    assert quality.table(rows).strip() in page
    (sha,) = {row["git_sha"] for row in rows}
    assert f"commit `{sha[:7]}`" in page and {row["git_dirty"] for row in rows} == {"0"}
    runs = {(row["task"], row["method"], row["seed"]) for row in rows}
    seeds = {seed for _, _, seed in runs}
    assert len(seeds) >= 5 and len(runs) == len(rows) == len(quality.TASKS) * len(quality.METHODS) * len(seeds)
    apart = quality.gap([row for row in rows if row["task"] == "unique"], quality.BOTH, quality.CAUSAL)
    assert f"{apart}" in page and apart.mean - 2 * apart.error > 0.1
    for line in "".join(blocks("sh", page)).splitlines():
        program, script, *options = shlex.split(line, comments=True)
        assert (program, script) == ("python", "benchmarks/quality.py") and quality.parse(options).seeds
    (sha,) = re.findall(r"`benchmarks/train_step.py` [\w ]+, commit `(\w+)`", page)
    lines = re.findall(r"^\| ([\w ]+) " + r"\| ([\d.]+) " * 4 + r"\|$", page, re.M)
    assert len(lines) == 4
    providers = ("lora-packed", "single-stream", "single-stream-dual", "one-pass")
    for provider, (_, *costs) in zip(providers, lines, strict=True):
        found = []
        for benchmark in ("prefill", "train_step"):
            own = [r for r in tables.read(benchmark) if r["provider"] == f"{provider}[sdpa]"]
            (own,) = (r for r in own if r["git_sha"].startswith(sha))
            found += [own["cost_in_lora_passes"], own["cost_in_lora_packed_passes"]]
        assert [f"{float(x):.2f}" for x in found] == costs, provider


def test_the_cost_of_learned_instructions_is_that_of_the_rows(results):
    page = DOCS["docs/instructions.md"]
    (sha,) = re.findall(r"2 threads, commit `(\w+)`", page)
    rows = [r for r in tables.read("bilevel") if r["git_sha"].startswith(sha)]
    names = {"plain LoRA": "lora", "Bitune in one pass": "one-pass", "Bitune in three passes": "three-pass"}
    for title, name in names.items():
        (cells,) = re.findall(rf"^\| {title} \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
        own = {r["k"]: r for r in rows if r["provider"] == name}
        assert cells[0] == own["plain"]["method"]
        assert [float(c) for c in cells[1:]] == [round(float(own[k]["cost_in_plain_steps"]), 2) for k in "013"]
    assert "(with k = 1 6.70 plain steps, floor 6)" in README and "6.70" in page
