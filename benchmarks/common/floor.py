"""The least that a pass can cost, in FLOPs and in plain LoRA passes, and what the machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bitune_kernels.testing.timing import interleaved

PEAK_FIELDS = ("measured_tflops", "measured_tb_per_s")


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


def visible_pairs(prompts: Sequence[int], answers: Sequence[int], streams: Sequence[str] = ("bidir", "causal")) -> int:
    """Query-key pairs that the masks show, per query head.

    A prompt of n rows attends to itself, n^2 pairs bidirectional and n (n + 1) / 2 causal; its a answer rows see the
    prompt and, causally, each other: a n + a (a + 1) / 2.
    """
    of_stream = {"bidir": lambda n: n * n, "causal": lambda n: n * (n + 1) // 2}
    return sum(
        sum(of_stream[s](n) for s in streams) + a * n + a * (a + 1) // 2 for n, a in zip(prompts, answers, strict=True)
    )


@dataclass(frozen=True)
class Floor:
    """What one pass must compute, in units of plain LoRA passes that are timed beside it.

    In those of packed LoRA, which wastes nothing, it bounds the time where both are bound by FLOPs; short prompts are
    bound by launches and by reading weights. In those of padded LoRA it is a ratio of FLOPs and no bound.

    Attributes:
        rows: (2P + A) / (P + A): rows of linear layers over tokens, nothing else.
        linear: FLOPs of the linear layers as they have to run: the prompt's rows stop at the last layer's keys
            and values, the output matrix sees the rows it must, and the LoRA pass computes its padding.
        attention: the same with the attention's FLOPs, the pairs that the masks show.
        packed_linear, packed_attention: the same in units of a LoRA pass over packed rows, which has no padding, stops
            the prompt's rows at the same place and has the same rows in its output matrix.
        flops: of linears and attention together.
    """

    rows: float
    linear: float
    attention: float
    packed_linear: float
    packed_attention: float
    flops: int


def floor(dims: Dims, prompts: Sequence[int], answers: Sequence[int], *, training: bool) -> Floor:
    """The floor of a batch of n prompt rows per stream and a answer rows per sample.

    Per sample one pass has 2n + a rows in every layer, of which the 2n prompt rows end at the last layer's keys
    and values; ``visible_pairs`` counts the attention. In prefill a = 1, the last prompt token. The padded LoRA pass
    has batch x width rows in all layers; its output matrix sees every row in training and one per sample in prefill.
    The packed one has n + a rows per sample and is otherwise as the one pass, less a stream. With its backward pass a
    step has twice the FLOPs of frozen linears (gradients of the input only) and three times those of attention.
    """
    samples = list(zip(prompts, answers, strict=True))
    batch, width = len(samples), max(n + a for n, a in samples)

    def packed_flops(streams: Sequence[str]) -> tuple[int, int]:
        return _flops(
            dims,
            rows=len(streams) * sum(prompts) + sum(answers),
            last_rows=sum(answers),
            pairs=visible_pairs(prompts, answers, streams),
            last_pairs=visible_pairs(prompts, answers, streams=()),
            head_rows=sum(answers),
        )

    one_pass, packed = packed_flops(("bidir", "causal")), packed_flops(("causal",))
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
    total, total_lora, total_packed = (linear * f[0] + attention * f[1] for f in (one_pass, lora, packed))
    return Floor(
        rows=sum(2 * n + a for n, a in samples) / sum(n + a for n, a in samples),
        linear=one_pass[0] / lora[0],
        attention=total / total_lora,
        packed_linear=one_pass[0] / packed[0],
        packed_attention=total / total_packed,
        flops=total,
    )


def _flops(dims: Dims, *, rows, last_rows, pairs, last_pairs, head_rows) -> tuple[int, int]:
    """FLOPs of linears and of attention in one forward."""
    before = dims.layers - 1
    last = dims.linear_kv * rows + (dims.linear - dims.linear_kv) * last_rows
    linear = 2 * (before * dims.linear * rows + last + dims.head * head_rows)
    return linear, 4 * dims.heads_q * dims.head_dim * (before * pairs + last_pairs)


def measured_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """TFLOP/s of a large matrix product and TB/s of a large copy, read and write counted; "" on a CPU."""
    if device.type != "cuda":
        return dict.fromkeys(PEAK_FIELDS, "")
    size, elements = 8192, 2**30 // dtype.itemsize
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    work = {"product": partial(torch.mm, a, b), "copy": partial(target.copy_, source)}
    times = interleaved(work, seconds=0.5, min_rounds=20, warmup=5, device=device)
    seconds = {name: t.quantile(0.5) for name, t in times.items()}
    values = 2 * size**3 / seconds["product"] / 1e12, 2 * source.nbytes / seconds["copy"] / 1e12
    return {name: round(value, 3) for name, value in zip(PEAK_FIELDS, values, strict=True)}
