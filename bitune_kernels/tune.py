"""Which tiles of the Triton kernels are fastest on this GPU: the table's or its neighbours, timed in turns.

    python -m bitune_kernels.tune

A tile whose results differ from the table's is left out, and so is one that gains less than ``MARGIN``. The fastest go
to a file in the user's cache, which ``tiles.choose`` reads at the next start.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from functools import partial

import torch
from tqdm import tqdm

from .backends.triton import tiles
from .backends.triton.tiles import MAX_BLOCK, Tile
from .testing.timing import Timing, interleaved

# (query heads, key/value heads) of common models, by head dim; two samples, half prompt and half answer.
HEADS = {64: (32, 8), 128: (32, 8), 256: (8, 1)}
LENGTH = 1024

# How many times as fast as the table's tile another one must be: the best of a dozen is always ahead by chance.
MARGIN = 1.02


def neighbours(tile: Tile) -> list[Tile]:
    """The tile itself, then those with one number changed."""
    values = {name: (n // 2, 2 * n) for name, n in asdict(tile).items()}
    values["num_stages"] = tile.num_stages - 1, tile.num_stages + 1
    limits = {"block_m": (16, MAX_BLOCK), "block_n": (16, MAX_BLOCK), "num_warps": (4, 8), "num_stages": (1, 4)}
    return [tile] + [
        replace(tile, **{name: n}) for name, (low, high) in limits.items() for n in values[name] if low <= n <= high
    ]


def calls(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, entry: Callable[[str], Tile]):
    """A function from a tile to the tensors that a call with it gives; other kernels of the call keep their tiles."""
    from .backends.triton.attention_backward import backward
    from .backends.triton.attention_forward import forward
    from .testing.cases import Case

    two_parts = {"num_streams": 1, "shared_qkv": True} if kernel.endswith("two_parts") else {}
    case = Case(
        prompts=(LENGTH, LENGTH), answers=(LENGTH, LENGTH), heads=HEADS[head_dim], head_dim=head_dim, **two_parts
    )
    (*tensors, plan), options = case.call(dtype, device)
    run = partial(forward, *tensors, plan, options, save=True)
    if kernel.startswith("forward"):
        return lambda tile: [x for x in run(tile=tile) if x.numel()]
    out, _, _, streams, lse = run(tile=entry("forward_two_parts" if two_parts else "forward"))
    given = (torch.randn_like(out), None, None, *tensors, None, None, None, None, out, streams, lse, plan)

    def run_backward(tile):
        tile_q, tile_kv = (entry("dq"), tile) if kernel == "dkv" else (tile, entry("dkv"))
        return backward(*given, **options.without_tensors(), tile_q=tile_q, tile_kv=tile_kv)

    return run_backward


def fastest(
    entry: Tile, call: Callable[[Tile], list[torch.Tensor]], measure: Callable[[dict], dict[Tile, Timing]]
) -> tuple[Tile, float]:
    """The fastest right tile among ``neighbours(entry)``, and how many times as fast as the entry it is.

    The entry itself, unless another one is faster by ``MARGIN``.
    """
    expected, providers = call(entry), {}
    eps = max(torch.finfo(x.dtype).eps for x in expected)  # float32 results too are made of rounded products
    for tile in neighbours(entry):
        try:
            actual = call(tile)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=0, atol=8 * eps * float(e.abs().max()))
        except Exception as e:  # too large for the GPU or for the compiler, or wrong
            print(f"    {tile}: left out: {type(e).__name__}: {e}".partition("\n")[0], file=sys.stderr)
        else:
            providers[tile] = partial(call, tile)
    times = measure(providers)
    best = min(times, key=lambda tile: times[tile].quantile(0.5))
    gain = 1 / times[best].ratio(times[entry])
    return (best, gain) if gain >= MARGIN else (entry, 1.0)


def store(found: dict[str, Tile]) -> None:
    """Write tiles by ``tiles.tuned_key``, beside those that the file already has."""
    path = tiles.tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: astuple(tile) for key, tile in (tiles.tuned() | found).items()}
    written = path.with_suffix(".new")
    written.write_text(json.dumps(kept, indent=1))
    written.replace(path)  # a process that starts meanwhile reads the old file or the new one


def main(argv: list[str] | None = None, measure=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--seconds", type=float, default=3.0, help="of timing per kernel and head dim (default: 3)")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.error("no CUDA device to tune for")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    gpu = torch.cuda.get_device_name(device)
    measure = measure or partial(interleaved, seconds=args.seconds, device=device, device_alone=True)
    todo, found = [(kernel, head_dim) for head_dim in HEADS for kernel in tiles.KERNELS], {}
    for kernel, head_dim in tqdm(todo, unit="kernel", leave=False, disable=None):
        table = partial(tiles.of_device, head_dim=head_dim, element_size=dtype.itemsize, device=device)
        best, ratio = fastest(table(kernel), calls(kernel, head_dim, dtype, device, table), measure)
        found[tiles.tuned_key(gpu, kernel, head_dim, dtype.itemsize)] = best
        line = f"{kernel}, head dim {head_dim}: {best}, {ratio:.2f} times as fast as the table's {table(kernel)}"
        tqdm.write(line)
        store(found)  # what is done is kept when the rest is interrupted
    print(f"written to {tiles.tuned_path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
