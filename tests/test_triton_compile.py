"""The Triton kernels as the compiler leaves them, and the choice of their tiles. Nothing here needs a GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bitune_kernels import tune
from bitune_kernels.backends.triton import tiles
from bitune_kernels.backends.triton.tiles import Tile
from bitune_kernels.testing.timing import Timing

# For GPUs of 163, 99, 227 and 227 KB of shared memory per block.
ARCHS = (80, 89, 90, 100)
KB = 1024


@pytest.fixture
def compiled(cache):
    """Runs a command in a fresh Python, in which kernels are compiled and not interpreted.

    Binaries are kept in pytest's cache from run to run, under Triton's own hash of their source, options and compiler:
    what didn't change is not compiled again, which takes minutes, but is loaded and inspected as before.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache.mkdir("triton")), "TRITON_STORE_BINARY_ONLY": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(*command):
        return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("arch", ARCHS)
def test_the_tiles_of_the_table_compile_within_their_gpu(arch, compiled):
    # No spills, matrix instructions, no product twice but where compiled.py says so, and shared memory that Triton
    # itself accepts: a row is broken by OutOfResources.
    done = compiled("-m", "bitune_kernels.testing.compiled", "--arch", str(arch))
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in tiles.KERNELS:
        for head_dim in tiles.HEAD_DIMS:
            assert re.search(rf"^sm_{arch} .* {head_dim} bfloat16 +{kernel} ", done.stdout, re.M), done.stdout


LENGTHS = """
import torch
from bitune_kernels.backends import Options, autograd, triton
from bitune_kernels.backends.triton import tiles
from bitune_kernels.testing import Case
from bitune_kernels.testing.compiled import compiling_for

tiles.choose = lambda *args: tiles.Tile(16, 16, 1, 1)
lengths = (
    ((1,), (1,), (1,)),
    ((16,), (16,), (16,)),
    ((17,), (3,), (5,)),
    ((5, 0, 40), (0, 7, 1), (0, 2, 9)),
)
weights = torch.full((3, len(lengths)), 0.5, requires_grad=True)
with compiling_for(90) as compiled:
    for layer, (prompts, answers, past) in enumerate(lengths):
        inputs = Case(prompts, answers, prefix=past, beta="scalar", sinks=True).make(torch.bfloat16, requires_grad=True)
        inputs["softmax_scale"] = 0.25 * len(prompts)
        inputs |= zip(("alpha_k", "alpha_v", "beta"), weights[:, layer])
        options = Options(**{name: inputs.pop(name) for name in Options._fields})
        outputs = autograd.attention(triton, **inputs, options=options, requires_grad=True)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        triton.mix(inputs["k"], inputs["k"], inputs["alpha_k"])
print(*sorted(name for name, _, _ in compiled.binaries))
"""


def test_one_kernel_serves_all_lengths_and_layers(compiled):
    # A layer's weights lie where they do in the tensor of all layers': few of them are aligned to 16 bytes.
    done = compiled("-c", LENGTHS)
    assert done.stdout.split() == ["dkv", "dq", "forward", "mix", "mix_backward"], done.stdout + done.stderr


def test_bad_tiles_are_refused(compiled):
    # One beyond shared memory: otherwise the stand-in for the driver would let everything through. One with too few
    # keys for eight warps: each score is computed twice, so of a loop's two products one counts double.
    code = """
import torch
from bitune_kernels.backends.triton.tiles import Tile
from bitune_kernels.testing.compiled import compile_rows
for tile in (Tile(128, 64, 8, 4), Tile(64, 32, 8, 2)):
    print(*compile_rows(89, "one", 128, torch.bfloat16, backward=False, chosen={"forward": tile}))
"""
    done = compiled("-c", code)
    large, twice = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert "out of resource: shared memory" in large
    assert "work 1.50" in twice and twice.endswith("computes products twice"), twice


@pytest.mark.parametrize("arch", sorted(tiles.SHARED_MEMORY))
def test_every_call_has_a_tile(arch):
    for kernel in tiles.KERNELS:
        for head_dim in (1, 64, 80, 128, 192, 256):
            for element_size in (2, 4):
                tile = tiles.entry(kernel, tiles.bucket(head_dim), element_size, arch, tiles.SHARED_MEMORY[arch])
                assert min(tile.block_m, tile.block_n) >= 16 and max(tile.block_m, tile.block_n) <= tiles.MAX_BLOCK


def test_a_part_that_the_table_does_not_name_takes_the_nearest_older_that_fits():
    def of(arch, shared_memory):
        found = tiles.entry("dq", 128, 2, arch, shared_memory * KB)
        return [a for a, entries in tiles.HALF.items() if entries["dq"][1] is found]

    assert of(80, 163) == of(87, 163) == [80]
    assert of(86, 99) == of(89, 99) == of(120, 99) == of(121, 99) == of(150, 128) == [86]
    assert of(90, 227) == [90]
    assert of(100, 227) == of(103, 227) == of(200, 300) == [100]
    assert tiles.bucket(64) == 64 and tiles.bucket(65) == 128 and tiles.bucket(129) == 256


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert tiles.unsupported("cuda", torch.float16, 64) == "needs compute capability 8.0 or newer, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert tiles.unsupported("cuda", torch.float16, 64) is None


def test_a_gpu_is_asked_once_for_its_capability(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(str(device)) or (7, 5))
    tiles._capability.cache_clear()
    try:
        for device in ("cuda:0", "cuda:0", "cuda:1", "cuda", "cuda"):  # which one the last means can change
            assert tiles.unsupported(device, torch.float16, 64).endswith("got 7.5")
    finally:
        tiles._capability.cache_clear()
    assert asked == ["cuda:0", "cuda:1", "cuda", "cuda"]


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """As if there were an H100, with an empty cache folder."""
    properties = type("Properties", (), {"shared_memory_per_block_optin": 227 * KB})
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process()
    yield
    new_process()


def new_process():
    tiles.tuned.cache_clear()
    tiles._of_device.cache_clear()


def chosen(kernel="dq", head_dim=128, dtype=torch.bfloat16):
    x = torch.empty(1, 1, head_dim, dtype=dtype)
    return tiles.choose(kernel, x, x)


def table(kernel="dq", head_dim=128, element_size=2):
    return tiles.entry(kernel, head_dim, element_size, 90, 227 * KB)


def test_a_tile_is_looked_up_once(hopper, monkeypatch):
    asked, bucket = [], tiles.bucket
    monkeypatch.setattr(tiles, "bucket", lambda head_dim: asked.append(head_dim) or bucket(head_dim))
    assert chosen(head_dim=80) == chosen(head_dim=80) == table(head_dim=128)
    assert asked == [80]


def test_tuning_keeps_the_fastest_right_tile_and_choose_reads_it(hopper, monkeypatch, capsys):
    slow, wrong = table(), Tile(64, 64, 8, 2)
    best = Tile(128, 32, 8, 2)
    assert {slow, wrong, best} <= set(tune.neighbours(slow))

    def call(tile):
        if tile.num_stages == 1:
            raise RuntimeError("out of resource")
        return [torch.ones(3), torch.full((2,), 1.0 + (tile == wrong))]

    def measure(providers):
        assert wrong not in providers and not any(tile.num_stages == 1 for tile in providers)
        seconds = {best: 1.0, slow: 4.0}
        return {tile: Timing((seconds.get(tile, 5.0),) * 3) for tile in providers}

    assert tune.fastest(slow, call, measure) == (best, 4.0)
    within_margin = {tile: Timing((1.0 if tile == slow else 0.99,) * 3) for tile in tune.neighbours(slow)}
    assert tune.fastest(slow, call, lambda providers: within_margin) == (slow, 1.0)
    assert "Tile(block_m=64, block_n=64, num_warps=8, num_stages=2): left out" in capsys.readouterr().err

    monkeypatch.setattr(tune, "calls", lambda *args: call)
    monkeypatch.setattr(tune, "HEADS", {128: (8, 2)})
    monkeypatch.setattr(tiles, "KERNELS", ("dq",))
    assert tune.main([], measure) == 0
    printed = capsys.readouterr().out
    assert "4.00 times" in printed and str(tiles.tuned_path()) in printed
    assert chosen() == slow  # read once per process
    new_process()
    assert chosen() == best
    assert chosen("dkv") == table("dkv") and chosen(head_dim=64) == table(head_dim=64)
    assert chosen(dtype=torch.float32) == table(element_size=4)
    for owner, name, another in (
        (torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200"),
        (tiles, "__version__", "another version of the kernels"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, another)
            new_process()
            assert chosen() == slow
    new_process()
    assert chosen() == best

    found = {"another": Tile(16, 16, 4, 1)}
    tune.store(found)
    assert len(json.loads(tiles.tuned_path().read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '{"dq": 3}', '{"dq": [64, 64, 4]}', '{"dq": [64, 64, 4, "2"]}', "\x00"])
def test_a_broken_file_is_ignored(hopper, text):
    path = tiles.tuned_path()
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        assert chosen() == table()
