"""What the benchmarks share: models, real text, the floor in FLOPs, the check before timing, the reports."""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import matplotlib.figure
    import torch
    from peft import LoraConfig
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tqdm import tqdm
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
except ModuleNotFoundError as e:
    raise SystemExit(f"benchmarks need {e.name}: pip install 'bitune-kernels[bench]'") from None

from bitune_kernels import BituneConfig, BituneModel, backends, get_bitune_model
from bitune_kernels.testing.timing import Timing, interleaved, provenance

HERE = Path(__file__).resolve().parent
DTYPES = ("bfloat16", "float16", "float32")
# A provider may be off by twice the error of the reference backend in the same dtype, or by this much: relative,
# norm of the difference over norm. A mask that is wrong in one layer of many shows as several percent.
SMALLEST_BOUND = {"bfloat16": 2 * 2**-7, "float16": 2 * 2**-10, "float32": 1e-4}


def _decoder(kind, hidden_size, mlp, layers, heads, heads_kv, vocab_size, positions, **rest):
    return kind, dict(
        hidden_size=hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        **rest,
    )


def _rope(theta: float, **rest) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **rest}


# Published configs with random weights, which multiply as fast as trained ones.
MODELS = {
    "tiny": _decoder("llama", 64, 128, 2, 4, 2, 512, 2048),
    "small": _decoder("llama", 768, 2048, 12, 12, 4, 32000, 8192),
    "gemma-2b": _decoder("gemma", 2048, 16384, 18, 8, 1, 256000, 8192, head_dim=256),
    "gemma-7b": _decoder("gemma", 3072, 24576, 28, 16, 16, 256000, 8192, head_dim=256),
    "llama2-7b": _decoder("llama", 4096, 11008, 32, 32, 32, 32000, 4096, rms_norm_eps=1e-5),
    "llama3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256, 8192, rms_norm_eps=1e-5, rope_parameters=_rope(5e5)),
    "phi-2": _decoder(
        "phi", 2560, 10240, 32, 32, 32, 51200, 2048, rope_parameters=_rope(1e4, partial_rotary_factor=0.4)
    ),
}


def parser(description: str, providers: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of whole models have."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--model", default="small", help=f"{', '.join(MODELS)} (random weights) or a model's folder")
    p.add_argument("--layers", type=int, help="cut the model to its first layers (default: all)")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; on a CPU float32 where that is faster")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    p.add_argument("--providers", nargs="+", metavar="NAME", help=providers)
    p.add_argument("--seconds", type=float, default=10.0, help="of timing per shape (default: 10)")
    p.add_argument("--min-rounds", type=int, default=3, help="at least (default: 3)")
    p.add_argument("--warmup", type=int, default=1, help="rounds before that (default: 1)")
    p.add_argument("--instructions", type=Path, default=HERE / "instructions.jsonl", help='lines of {"prompt"}')
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder of CSV file and plot")
    return p


@dataclass
class Setup:
    """The checked arguments that name the model and where it runs."""

    name: str
    config: object  # of transformers
    folder: Path | None
    layers: int
    device: torch.device
    dtype: torch.dtype

    @property
    def text_config(self):
        return self.config.get_text_config()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def max_length(self) -> int:
        return getattr(self.text_config, "max_position_embeddings", None) or 1 << 20


def check_setup(p: argparse.ArgumentParser, args) -> Setup:
    """Everything about the common arguments that can be wrong, before any work."""
    for name, value, smallest in (
        ("threads", args.threads, 1),
        ("layers", args.layers, 1),
        ("min-rounds", args.min_rounds, 1),
        ("warmup", args.warmup, 0),
        ("seconds", args.seconds, 0),
    ):
        if value is not None and not smallest <= value < math.inf:
            p.error(f"--{name}: expected a number >= {smallest}, got {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(p, args.device)
    folder, config = _model_config(p, args.model)
    text_config = config.get_text_config()
    layers = args.layers or text_config.num_hidden_layers
    if layers > text_config.num_hidden_layers:
        p.error(f"--layers: expected at most {text_config.num_hidden_layers} ({args.model}), got {layers}")
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
    if not args.instructions.is_file():
        p.error(f"--instructions: {args.instructions} is not a file")
    if args.out.exists() and not args.out.is_dir():
        p.error(f"--out: expected a folder, got the file {args.out}")
    name = args.model if folder is None else folder.resolve().name
    dtype = getattr(torch, args.dtype) if args.dtype else _default_dtype(device)
    return Setup(name, config, folder, layers, device, dtype)


def _device(p: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        p.error(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        p.error(f"--device: {name} asked for, but torch sees {torch.cuda.device_count()} GPUs here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _model_config(p: argparse.ArgumentParser, model: str):
    if model in MODELS:
        kind, values = MODELS[model]
        return None, AutoConfig.for_model(kind, **values)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        p.error(f"--model: expected {', '.join(MODELS)} or a folder with a config.json, got {model!r}")
    return folder, AutoConfig.from_pretrained(folder, local_files_only=True)


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16
    # A CPU without bfloat16 instructions takes several times longer for it than for float32: try.
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(256, 768, dtype=dtype)
        b = torch.ones(1024, 768, dtype=dtype)
        runs = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)
    return min(seconds, key=seconds.get)


def backend_reasons(setup: Setup, *, training: bool) -> dict[str, str | None]:
    """Each backend of the package, and why it can't run this model here, or None."""
    c = setup.text_config
    call = dict(
        device=setup.device,
        dtype=setup.dtype,
        head_dim=head_dim_of(c),
        head_dim_v=head_dim_of(c),
        window=getattr(c, "sliding_window", None),
        softcap=getattr(c, "attn_logit_softcapping", None),
        requires_grad=training,
    )
    reasons = {}
    for name in backends.BACKENDS:
        try:
            reasons[name] = backends.load(name).unsupported(**call)
        except (ImportError, RuntimeError) as e:
            reasons[name] = f"{type(e).__name__}: {_first_line(e)}"
    return reasons


def _first_line(e: Exception) -> str:
    return str(e).strip().partition("\n")[0]


def _usual_backends(reasons: dict[str, str | None], device: torch.device) -> tuple[list[str], list[str]]:
    """What "one-pass" stands for, and a note on each backend that it leaves out."""
    chosen, notes = [], []
    for name, reason in reasons.items():
        if reason is None and name == "reference":
            reason = "the oracle, written to be read; ask for it by name"
        elif reason is None and device.type == "cpu" and name not in backends.AUTO:
            reason = "compiles for minutes on a CPU; ask for it by name"
        if reason is None:
            chosen.append(f"one-pass[{name}]")
        else:
            notes.append(f"left out: one-pass[{name}]: {reason}")
    return chosen, notes


def choose_providers(
    p: argparse.ArgumentParser,
    setup: Setup,
    names: Sequence[str],
    *,
    extra: Sequence[str] = (),
    training: bool,
) -> tuple[list[str], list[str]]:
    """The providers behind the names of the command line, and a note on each backend that can't run."""
    reasons = backend_reasons(setup, training=training)
    single = ("three-pass", "lora", *extra)
    chosen, notes = [], []
    for name in names:
        backend = name[len("one-pass[") : -1] if name.startswith("one-pass[") and name.endswith("]") else None
        if name == "one-pass":
            usual, notes = _usual_backends(reasons, setup.device)
            chosen += usual
        elif backend in reasons:
            if reasons[backend] is not None:
                p.error(f"--providers: {name} can't run here: {reasons[backend]}")
            chosen.append(name)
        elif name in single:
            chosen.append(name)
        else:
            known = ", ".join([*single, "one-pass", *(f"one-pass[{b}]" for b in reasons)])
            p.error(f"--providers: expected names of {known}; got {name!r}")
    return list(dict.fromkeys(chosen)), notes


def prepare(benchmark: str, args, setup: Setup, notes: Sequence[str], outputs: Sequence[str]):
    """Everything between the arguments and the first measurement, with what it says on the terminal."""
    facts = provenance(setup.device) | {
        "benchmark": benchmark,
        "model": setup.name,
        "layers": setup.layers,
        "dtype": setup.dtype_name,
        "warmup": args.warmup,
    }
    fields = [*facts, "text", *CASE_FIELDS, *TIME_FIELDS]
    fields += [f"{kind}_{name}" for kind in ("error", "bound") for name in outputs]
    try:
        results = Results(args.out / f"{benchmark}.csv", fields)
        text = Text(args.instructions, setup.text_config.vocab_size, setup.folder)
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"{benchmark}.py: error: {type(e).__name__}: {e}") from None
    facts["text"] = text.source
    print(f"model: {title(setup, facts)}, LoRA r=8 on every linear")
    print(f"text: {len(text.ids)} instructions, token ids of {text.source}")
    for note in notes:
        print(note)
    try:
        base = load_base(setup)
        dims = dims_of(base)
        model = attach(base)
    except (OSError, ValueError) as e:
        raise SystemExit(f"{benchmark}.py: error: {e}") from None
    return results, facts, text, model, dims


def title(setup: Setup, facts: dict) -> str:
    """Model and machine in one line."""
    machine = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    return f"{setup.name}, {setup.layers} layers, {setup.dtype_name}, {machine}"


def load_base(setup: Setup) -> torch.nn.Module:
    """The model in its dtype on its device, random or from its folder."""
    torch.manual_seed(0)
    with setup.device:
        if setup.folder is None:
            return AutoModelForCausalLM.from_config(setup.config, dtype=setup.dtype).eval()
        model = AutoModelForCausalLM.from_pretrained(
            setup.folder, config=setup.config, dtype=setup.dtype, local_files_only=True
        )
    return model.to(setup.device).eval()


def attach(base: torch.nn.Module) -> BituneModel:
    """Two LoRA adapters (r=8, every linear) that differ and do something, in the dtype of the model."""
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # of names in transformers that PEFT still asks for
        warnings.simplefilter("ignore", FutureWarning)
        model = get_bitune_model(base, BituneConfig(peft=lora), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT starts them at zero, where a lost adapter would go unnoticed
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif "theta" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.03 + 0.002)
    return model.eval()


def scope(model: BituneModel, provider: str):
    """The context in which a call of the model is what the provider's name says."""
    if provider == "lora":
        return model.disable_bitune()
    if provider.startswith("one-pass["):
        return model.use_schedule(use_fused=True, backend=provider[len("one-pass[") : -1])
    return model.use_schedule(use_fused=False)


@contextmanager
def float32_inference(model: torch.nn.Module):
    """Inside, calls without gradients compute in float32, one block's weights widened at a time.

    So the oracle needs the memory of one more layer and not that of a second model; rounding back is exact.
    """

    def widen(module, args):
        for parameter in module.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                narrow[parameter] = parameter.dtype
                parameter.data = parameter.data.float()

    def restore(module, args, output):
        for parameter in module.parameters():
            if parameter in narrow:
                parameter.data = parameter.data.to(narrow.pop(parameter))

    narrow: dict[torch.nn.Parameter, torch.dtype] = {}
    handles = []
    for block in _blocks(model):
        handles += [
            block.register_forward_pre_hook(widen, prepend=True),
            block.register_forward_hook(restore, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    # The largest modules that are called as a whole: the layers of a list, and whatever holds no list.
    if isinstance(module, torch.nn.ModuleList):
        return list(module)
    if not any(isinstance(m, torch.nn.ModuleList) for m in module.modules()):
        return [module]
    return [block for child in module.children() for block in _blocks(child)]


@contextmanager
def float32_weights(model: torch.nn.Module):
    """Inside, all parameters are float32 (for gradients, which need the weights of the forward again)."""
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for parameter, _ in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


class Text:
    """The instruction file as token ids of a model's vocabulary."""

    def __init__(self, path: Path, vocab_size: int, folder: Path | None = None):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [json.loads(line)["prompt"] for line in lines]
        if len(texts) < 2:
            raise ValueError(f"{path}: expected at least 2 instructions, got {len(texts)}")
        if folder is None:
            tokenizer = _train_bpe(texts)
            self.source = f"a byte-level BPE of {tokenizer.get_vocab_size()} tokens trained on {path.name}"
            self.first = []

            def encode(text):
                return tokenizer.encode(text).ids
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.source = f"the tokenizer of {folder.resolve().name}"
            self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

            def encode(text):
                return tokenizer.encode(text, add_special_tokens=False)

        self.ids = [[t % vocab_size for t in encode(text)] for text in texts]
        self.gap = [t % vocab_size for t in encode("\n\n")]
        self.first = [t % vocab_size for t in self.first]

    def prompts(self, batch: int, length: int, seed: int = 0) -> list[list[int]]:
        """``batch`` prompts: the first is cut to exactly ``length`` tokens, the others end where they end.

        Instructions are joined until the next one doesn't fit; one that is too long by itself is cut. So a
        batch is as ragged as its text, and ``length`` is its width.
        """
        source = self._in_turn(seed)
        rows = [self._joined(source, length, fill=True)]
        while len(rows) < batch:
            rows.append(self._joined(source, length, fill=False))
        return rows

    def samples(self, count: int, max_length: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
        """``count`` pairs: an instruction, cut to half of ``max_length``, and a cut of another as its answer."""
        source, pairs = self._in_turn(seed), []
        for _ in range(count):
            prompt = (self.first + next(source))[: max_length // 2]
            pairs.append((prompt, next(source)[: max_length - len(prompt)]))
        return pairs

    def _in_turn(self, seed: int) -> Iterable[list[int]]:
        order = list(range(len(self.ids)))
        random.Random(seed).shuffle(order)
        while True:
            for i in order:
                yield self.ids[i]

    def _joined(self, source, length: int, fill: bool) -> list[int]:
        row = self.first + next(source)
        while len(row) < length:
            more = self.gap + next(source)
            if len(row) + len(more) > length and not fill:
                break
            row += more
        return row[:length]


def _train_bpe(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded(rows: Sequence[Sequence[int]], side: str, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 tokens [batch, width] and their mask, padded on one side."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[b, where] = torch.tensor(row)
        mask[b, where] = 1
    return tokens, mask


@dataclass(frozen=True)
class Dims:
    """What a forward multiplies: parameters of linear layers, and the size of a score's dot product."""

    layers: int
    linear: int  # of all linears of a layer
    linear_kv: int  # of its key and value projections
    head: int  # of the output matrix
    heads_q: int
    head_dim: int


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def dims_of(base: torch.nn.Module) -> Dims:
    """The dimensions of a decoder whose layers are alike; ask before it has adapters."""
    config = base.config.get_text_config()
    layers = next(m for m in base.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    heads_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Dims(
        layers=len(layers),
        linear=sum(m.weight.numel() for m in layers[-1].modules() if isinstance(m, torch.nn.Linear)),
        linear_kv=2 * config.hidden_size * heads_kv * head_dim_of(config),
        head=base.get_output_embeddings().weight.numel(),
        heads_q=config.num_attention_heads,
        head_dim=head_dim_of(config),
    )


@dataclass(frozen=True)
class Floor:
    """What one pass must compute, in units of the plain LoRA pass that is timed beside it.

    It bounds the time where both are bound by FLOPs; short prompts are bound by launches and by reading weights.

    Attributes:
        rows: (2P + A) / (P + A): rows of linear layers over tokens, nothing else.
        linear: FLOPs of the linear layers as they have to run: the prompt's rows stop at the last layer's keys
            and values, the output matrix sees the rows it must, and the LoRA pass computes its padding.
        attention: the same with the attention's FLOPs, the pairs that the masks show.
    """

    rows: float
    linear: float
    attention: float


def floor(dims: Dims, prompts: Sequence[int], answers: Sequence[int], *, training: bool) -> Floor:
    """The floor of a batch of n prompt rows per stream and a answer rows per sample.

    Per sample one pass has 2n + a rows in every layer, of which the 2n prompt rows end at the last layer's keys
    and values; the prompt attends to itself, n^2 pairs bidirectional and n (n + 1) / 2 causal, and the answer to
    prompt and answer. In prefill a = 1, the last prompt token. The LoRA pass has batch x width rows in all
    layers; its output matrix sees every row in training and one per sample in prefill. With its backward pass a
    step has twice the FLOPs of frozen linears (gradients of the input only) and three times those of attention.
    """
    samples = list(zip(prompts, answers, strict=True))
    batch, width = len(samples), max(n + a for n, a in samples)
    answer_pairs = sum(a * n + a * (a + 1) // 2 for n, a in samples)
    one_pass = _flops(
        dims,
        rows=sum(2 * n + a for n, a in samples),
        last_rows=sum(answers),
        pairs=sum(n * n + n * (n + 1) // 2 for n, _ in samples) + answer_pairs,
        last_pairs=answer_pairs,
        head_rows=sum(answers),
    )
    causal = batch * width * (width + 1) // 2
    lora = _flops(
        dims,
        rows=batch * width,
        last_rows=batch * width,
        pairs=causal,
        last_pairs=causal,
        head_rows=batch * width if training else batch,
    )
    linear, attention = (2, 3) if training else (1, 1)
    totals = [linear * flops[0] + attention * flops[1] for flops in (one_pass, lora)]
    return Floor(
        rows=sum(2 * n + a for n, a in samples) / sum(n + a for n, a in samples),
        linear=one_pass[0] / lora[0],
        attention=totals[0] / totals[1],
    )


def _flops(dims: Dims, *, rows, last_rows, pairs, last_pairs, head_rows) -> tuple[int, int]:
    """FLOPs of linears and of attention in one forward."""
    before = dims.layers - 1
    last = dims.linear_kv * rows + (dims.linear - dims.linear_kv) * last_rows
    linear = 2 * (before * dims.linear * rows + last + dims.head * head_rows)
    return linear, 4 * dims.heads_q * dims.head_dim * (before * pairs + last_pairs)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in float32; infinite where ``found`` is not finite."""
    if not bool(torch.isfinite(found).all()):
        return math.inf
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30))


class Wrong(Exception):
    """A provider computes something else than the oracle."""


def check_errors(provider: str, errors: dict[str, float], bounds: dict[str, float]) -> None:
    """Refuse a provider that is off by more than rounding explains."""
    bad = [f"{e:.1e} (bound {bounds[name]:.1e}) in {name}" for name, e in errors.items() if not e <= bounds[name]]
    if bad:
        raise Wrong(f"{provider} differs from the oracle by {', '.join(bad)}")


def peak_memory_mib(device: torch.device, function) -> float | None:
    """Peak of the allocator in one call, weights included. None on a CPU: its allocator keeps what was freed."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


class Case:
    """One shape of a benchmark: its inputs, one call per provider, and what the oracle says.

    Attributes:
        batch, length: the shape.
        tokens: real tokens of the batch.
        padding: share of the padded batch's places that hold none.
        floor: what one pass must cost.
        outputs: names of what is compared with the oracle.
    """

    batch: int
    length: int
    tokens: int
    padding: float
    floor: Floor
    outputs: tuple[str, ...]

    def run(self, provider: str) -> object:
        """One call, the one that is timed."""
        raise NotImplementedError

    def errors(self, provider: str) -> dict[str, float]:
        """Run a provider and compare each of its outputs with the oracle."""
        raise NotImplementedError

    def forget_oracle(self) -> None:
        """Free what is needed for ``errors`` only."""


def measure(
    shapes: Sequence[tuple[int, int]],
    make_case: Callable[[int, int], Case],
    providers: Sequence[str],
    setup: Setup,
    args,
    results: Results,
    facts: dict,
    deadline: float | None = None,
) -> bool:
    """Check, time and report each shape, smallest first; what is done is on disk when this is interrupted.

    Returns:
        whether all providers computed what the oracle says.
    """
    print(table_head())
    right, seconds_per_token = True, 0.0
    bar = tqdm(total=len(shapes), unit="shape", leave=False, disable=None)
    try:
        for done, (batch, length) in enumerate(sorted(shapes, key=lambda shape: shape[0] * shape[1])):
            start = time.perf_counter()
            expected = max(args.seconds, seconds_per_token * batch * length)
            if deadline is not None and done and start + expected > deadline:
                tqdm.write(f"{batch:>5}  {length:>6}  left out: it would pass --minutes")
                continue
            bar.set_description(f"batch {batch}, length {length}: checking")
            case = make_case(batch, length)
            checks, refused = _check(case, providers, setup)
            right, needed = right and not refused, time.perf_counter() - start
            if checks:
                memory = {n: peak_memory_mib(setup.device, partial(case.run, n)) for n in checks}
                bar.set_description(f"batch {batch}, length {length}: timing")
                times = interleaved(
                    {name: partial(case.run, name) for name in checks},
                    seconds=args.seconds,
                    min_rounds=args.min_rounds,
                    warmup=args.warmup,
                    device=setup.device,
                    progress=lambda share, done=done: _advance(bar, done + share),
                )
                rows = measurements(facts | case_facts(case), times, case.tokens, checks, memory)
                results.append(rows)
                for row in rows:
                    tqdm.write(table_line(row))
                needed += (args.warmup + args.min_rounds) * sum(t.quantile(0.5) for t in times.values())
            seconds_per_token = needed / (batch * length)
            _advance(bar, done + 1)
    except KeyboardInterrupt:
        tqdm.write("interrupted: shapes that were done are kept")
    finally:
        bar.close()
    return right


def _advance(bar, position: float) -> None:
    bar.n = round(position, 2)
    bar.refresh()


def _check(case: Case, providers: Sequence[str], setup: Setup) -> tuple[dict[str, dict[str, float]], bool]:
    """Errors and bounds of each provider that may be timed, and whether one was refused because it is wrong."""
    checks, refused = {}, False
    try:
        bounds = _bounds(case, setup)
    except RuntimeError as e:
        tqdm.write(f"{case.batch:>5}  {case.length:>6}  not timed: the oracle failed: {_first_line(e)}")
        return {}, False
    for name in providers:
        try:
            errors = case.errors(name)
            check_errors(name, errors, bounds)
            checks[name] = {f"error_{what}": e for what, e in errors.items()}
            checks[name] |= {f"bound_{what}": bound for what, bound in bounds.items()}
        except Wrong as e:
            refused = True
            tqdm.write(f"{case.batch:>5}  {case.length:>6}  not timed: {e}")
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as e:
            tqdm.write(f"{case.batch:>5}  {case.length:>6}  not timed: {name}: {type(e).__name__}: {_first_line(e)}")
    case.forget_oracle()
    return checks, refused


def _bounds(case: Case, setup: Setup) -> dict[str, float]:
    smallest = SMALLEST_BOUND[setup.dtype_name]
    if setup.dtype == torch.float32:  # the oracle itself
        return dict.fromkeys(case.outputs, smallest)
    return {name: max(2 * error, smallest) for name, error in case.errors("one-pass[reference]").items()}


COLUMNS = (
    ("batch", 5),
    ("length", 6),
    ("provider", 19),
    ("tokens/s", 9),
    ("p20 ms", 8),
    ("p50 ms", 8),
    ("p80 ms", 8),
    ("speedup", 7),
    ("x LoRA", 6),
    ("floor", 5),
    ("MiB", 6),
    ("error", 7),
)
LEGEND = """\
speedup: over three-pass.  x LoRA: cost in plain LoRA passes.  floor: the same in FLOPs of linear layers alone, which
the time can pass below where both are bound by overhead or memory.
MiB: peak of the allocator.  error: of the worst output, relative, against the reference backend in float32."""


def table_head() -> str:
    return f"{LEGEND}\n\n{_line([name for name, _ in COLUMNS])}"


def table_line(row: dict) -> str:
    """One measurement (a row of the CSV file) on the terminal."""

    def number(key, digits=2):
        return "n/a" if row[key] == "" else f"{row[key]:.{digits}f}"

    cells = [str(row["batch"]), str(row["length"]), row["provider"], number("tokens_per_s", 0)]
    cells += [number(q, 1) for q in ("p20_ms", "p50_ms", "p80_ms")]
    cells += [number("speedup_over_three_pass"), number("cost_in_lora_passes")]
    cells += ["" if row["provider"] == "lora" else number("floor_linear"), number("peak_mib", 0)]
    return _line([*cells, f"{row['error']:.1e}"])


def _line(cells: Sequence[str]) -> str:
    aligned = (
        cell.ljust(width) if name == "provider" else cell.rjust(width)
        for cell, (name, width) in zip(cells, COLUMNS, strict=True)
    )
    return "  ".join(aligned).rstrip()


CASE_FIELDS = ("batch", "length", "tokens", "padding", "floor_rows", "floor_linear", "floor_attention")
TIME_FIELDS = (
    "provider",
    "rounds",
    "tokens_per_s",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "speedup_over_three_pass",
    "cost_in_lora_passes",
    "peak_mib",
    "error",
)


def case_facts(case: Case) -> dict:
    """The columns ``CASE_FIELDS``."""
    floors = (round(x, 4) for x in (case.floor.rows, case.floor.linear, case.floor.attention))
    values = (case.batch, case.length, case.tokens, round(case.padding, 4), *floors)
    return dict(zip(CASE_FIELDS, values, strict=True))


def measurements(
    facts: dict, times: dict[str, Timing], tokens: int, checks: dict[str, dict], memory: dict[str, float | None]
) -> list[dict]:
    """One CSV row per provider: ``facts``, which all share, ``TIME_FIELDS``, and ``checks`` of the provider."""
    three, lora = times.get("three-pass"), times.get("lora")
    rows = []
    for name, t in times.items():
        values = (
            name,
            t.rounds,
            round(tokens / t.quantile(0.5), 2),
            *(round(t.quantile(q) * 1e3, 4) for q in (0.2, 0.5, 0.8)),
            "" if three is None else round(three.ratio(t), 4),
            "" if lora is None else round(t.ratio(lora), 4),
            "" if memory[name] is None else round(memory[name], 1),
            max(value for what, value in checks[name].items() if what.startswith("error_")),
        )
        rows.append(facts | dict(zip(TIME_FIELDS, values, strict=True)) | checks[name])
    return rows


class Results:
    """The CSV file that every run appends to."""

    def __init__(self, path: Path, fields: Sequence[str]):
        self.path, self.fields, self.rows = path, list(fields), []
        if path.is_file():
            with path.open(newline="") as file:
                found = next(csv.reader(file), None)
            if found is not None and found != self.fields:
                raise ValueError(f"{path}: has other columns than this version writes; move it away")

    def append(self, rows: Sequence[dict]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows


def plot(path: Path, rows: Sequence[dict], title: str) -> None:
    """Cost of each provider in plain LoRA passes, grouped by shape, and the floor of each group."""
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    names = [n for n in dict.fromkeys(row["provider"] for row in rows) if n != "lora"]
    width = max(6.0, 2 + 0.6 * len(shapes) * max(1, len(names)))
    figure = matplotlib.figure.Figure(figsize=(width, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [(shapes.index((r["batch"], r["length"])), r) for r in rows if r["provider"] == name]
        x = [place - 0.4 + width * (i + 0.5) for place, _ in bars]
        drawn = axes.bar(x, [r["cost_in_lora_passes"] for _, r in bars], width * 0.92, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    floors = {(r["batch"], r["length"]): r["floor_linear"] for r in rows}
    for place, shape in enumerate(shapes):
        label = "floor (FLOPs of linears)" if place == 0 else None
        ends = place - 0.45, place + 0.45
        axes.plot(ends, [floors[shape]] * 2, color="black", linestyle="dashed", label=label)
    axes.set_xticks(range(len(shapes)), [f"{batch} x {length}" for batch, length in shapes])
    axes.set_xlabel("batch x length")
    axes.set_ylabel("cost in plain LoRA passes (lower is better)")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def finish(results: Results, title: str) -> None:
    """Say where the numbers are, and draw them."""
    if not results.rows:
        print("nothing was measured")
        return
    print(f"\n{len(results.rows)} rows appended to {results.path}")
    rows = [row for row in results.rows if row["cost_in_lora_passes"] != ""]
    if not rows:
        print("no plot: it shows costs in LoRA passes, and lora was not among the providers")
        return
    path = results.path.with_suffix(".png")
    plot(path, rows, title)
    print(f"plot: {path}")
