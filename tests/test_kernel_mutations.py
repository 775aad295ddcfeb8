"""Whether the tests would see a fault: kernels that were broken on purpose must fail, each in one small case.

A fault replaces one piece of the source in a copy of the Triton backend and of the schedule that it shares with others.
The copy then runs as a backend of its own through the same check as every backend. Nothing here depends on the device,
so it runs in the interpreter alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bitune_kernels import backends, bitune_attention, bitune_prefill
from bitune_kernels.backends import schedule
from bitune_kernels.testing import Case, assert_backend_within_budget, assert_prefilled

pytest.importorskip("triton")

from bitune_kernels.backends.triton import tiles

pytestmark = pytest.mark.skipif(not tiles.interpreted(), reason="Triton's interpreter is off: there is a GPU")

FOLDER = Path(tiles.__file__).parent
FORWARD, BACKWARD, COMMON = "attention_forward.py", "attention_backward.py", "common.py"
SCHEDULE = Path(schedule.__file__).name

# Tiles are 16 packed rows x 32 keys, 16 of the mixed prompt: where a fault is at the ends of tiles, there are several.
PLAIN = Case(prompts=(9,), answers=(18,), heads=(2, 1))
KEYS = Case(prompts=(35,), answers=(3,), heads=(1, 1))
GROUPS = Case(prompts=(3,), answers=(2,), heads=(4, 2))
WINDOW = Case(prompts=(20,), answers=(5,), heads=(1, 1), window=4)
PREFIX = Case(prompts=(9, 2), answers=(3, 4), heads=(1, 1), window=4, prefix=(5, 3))
ANTI_CAUSAL = Case(prompts=(18,), answers=(3,), heads=(1, 1), stream_mask="anti_causal")
SOFTCAP = Case(prompts=(9,), answers=(3,), heads=(1, 1), softcap=1.0)
SINKS = Case(prompts=(9,), answers=(3,), heads=(2, 1), sinks=True)
BETA = Case(prompts=(9,), answers=(3,), heads=(2, 1), beta="head")
NEGATIVE = Case(prompts=(9,), answers=(3,), heads=(1, 1), softmax_scale=-0.5)
ALPHAS = Case(prompts=(3,), answers=(2,), heads=(2, 2), alpha="head")
SHARED = Case(prompts=(18,), answers=(3,), heads=(1, 1), num_streams=1, shared_qkv=True)


def forward(backend: str, case: Case) -> None:
    assert_backend_within_budget(backend, case, torch.float32, backward=False)


def backward(backend: str, case: Case) -> None:
    assert_backend_within_budget(backend, case, torch.float32)


def prefill(backend: str, case: Case) -> None:
    call = case.make_prefill(transposed=False)
    out = bitune_prefill(**call, backend=backend)
    expected, *mixed = bitune_attention(**case.make(), backend="reference")
    torch.testing.assert_close(out, expected)
    assert_prefilled(call, mixed, rtol=1.3e-6, atol=1e-5)


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new``, wherever it stands in the file: ``count`` times."""

    name: str
    file: str
    old: str
    new: str
    case: Case
    check: object = forward
    count: int = 1


FAULTS = [
    # who sees whom
    Fault("causal: a later key is seen", COMMON, "mask == CAUSAL, own + 1,", "mask == CAUSAL, own + 2,", PLAIN),
    Fault("causal: not itself", COMMON, "mask == CAUSAL, own + 1,", "mask == CAUSAL, own,", SHARED),
    Fault("dk: not from itself", BACKWARD, "mask == CAUSAL, own, 0", "mask == CAUSAL, own + 1, 0", PLAIN, backward),
    Fault("anti-causal is causal", SCHEDULE, '"anti_causal": ANTI_CAUSAL', '"anti_causal": CAUSAL', ANTI_CAUSAL),
    Fault("anti-causal: not itself", COMMON, "mask == ANTI_CAUSAL, own,", "mask == ANTI_CAUSAL, own + 1,", ANTI_CAUSAL),
    Fault(
        "dk: anti-causal: not from itself",
        BACKWARD,
        "mask == ANTI_CAUSAL, own + 1,",
        "mask == ANTI_CAUSAL, own,",
        ANTI_CAUSAL,
        backward,
    ),
    Fault("window: one earlier", COMMON, "own - window + 1", "own - window", WINDOW),
    Fault("window: one later", COMMON, "high, own + window)", "high, own + window + 1)", WINDOW),
    Fault("dk: window", BACKWARD, "high, own + window)", "high, own + window - 1)", WINDOW, backward),
    Fault(
        "the last tile of keys is skipped",
        COMMON,
        "tl.cdiv(high_last, BLOCK) * BLOCK, start",
        "high_last // BLOCK * BLOCK, start",
        KEYS,
    ),
    Fault(
        "masked tiles without a mask",
        FORWARD,
        "s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), s, float",
        "s = tl.where(j[None, :] >= 0, s, float",
        PLAIN,
    ),
    Fault(
        "dq: masked tiles without a mask",
        BACKWARD,
        "p = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), p, 0.0)",
        "p = p * 1.0",
        PLAIN,
        backward,
    ),
    Fault(
        "prompt after the prefix: position",
        SCHEDULE,
        'run = {"length": n, "position": m,',
        'run = {"length": n, "position": 0,',
        PREFIX,
    ),
    Fault(
        "dk after the prefix: position",
        SCHEDULE,
        'keys = {"length": n, "position": m}',
        'keys = {"length": n, "position": 0}',
        PREFIX,
        backward,
    ),
    Fault(
        "shared_qkv: the diagonal counts twice", COMMON, "mask == AFTER, own + 1, 0", "mask == AFTER, own, 0", SHARED
    ),
    Fault(
        "prefix of the first sample",
        SCHEDULE,
        '"prefix_row": past, "prefix_length": m, ',
        '"prefix_row": 0, "prefix_length": m, ',
        PREFIX,
    ),
    # the softmax
    Fault(
        "the maximum of negative scores", FORWARD, "softcap is None and softmax_scale > 0", "softcap is None", NEGATIVE
    ),
    Fault("l isn't rescaled", FORWARD, "l = l * rescale +", "l = l +", KEYS),
    Fault("acc isn't rescaled", FORWARD, "acc * rescale[:, None]", "acc", KEYS),
    Fault("lse is a natural logarithm", FORWARD, "(m + tl.log2(l))", "(m + tl.log2(l)) / LOG2E", PLAIN, backward),
    Fault("sinks take no weight", FORWARD, "l += 1.0", "l += 0.0", SINKS),
    Fault("d_sinks: sign", BACKWARD, "grads.append(-(torch.exp2", "grads.append((torch.exp2", SINKS, backward),
    Fault(
        "softcap isn't scaled back",
        FORWARD,
        "* (softcap * LOG2E)",
        "* LOG2E",
        Case(prompts=(9,), answers=(3,), heads=(1, 1), softcap=2.0),
    ),
    Fault(
        "dq: softcap's derivative",
        BACKWARD,
        "ds *= d_cap\n        if weight",
        "ds *= 1.0\n        if weight",
        SOFTCAP,
        backward,
    ),
    Fault(
        "dk: softcap's derivative", BACKWARD, "ds *= d_cap\n        dk =", "ds *= 1.0\n        dk =", SOFTCAP, backward
    ),
    Fault("dq: scale", BACKWARD, "acc * scale, stored", "acc, stored", GROUPS, backward),
    Fault("dk: scale", BACKWARD, "dk_acc *= scale", "dk_acc *= 1.0", GROUPS, backward),
    Fault("dq: delta", BACKWARD, "dp - delta[:, None]", "dp", GROUPS, backward),
    Fault("dk: delta", BACKWARD, "dp - row_delta[None, :]", "dp", GROUPS, backward),
    # heads
    Fault("group", FORWARD, "HEADS_KV * GROUP, head * GROUP", "HEADS_KV * GROUP, head", GROUPS),
    Fault("dq, dk: group", BACKWARD, "HEADS_KV * GROUP, head * GROUP", "HEADS_KV * GROUP, head", GROUPS, backward, 2),
    # streams
    Fault("alpha_k of the first head", FORWARD, "alpha_k + (head if ALPHA_PER_HEAD else 0)", "alpha_k", ALPHAS),
    Fault(
        "dq, dk: alpha_v of the first head",
        BACKWARD,
        "alpha_v + (head if ALPHA_PER_HEAD else 0)",
        "alpha_v",
        ALPHAS,
        backward,
        2,
    ),
    Fault("dq: the second stream is left out", BACKWARD, 'tl.load(item + at(Q, "parts")) if', "1 if", SHARED, backward),
    Fault(
        "dk: the second stream is left out",
        BACKWARD,
        'range(tl.load(item + at(KV, "parts")))',
        "range(1)",
        SHARED,
        backward,
    ),
    Fault("dq: beta", BACKWARD, "ds *= weight[:, None]", "ds *= 1.0", BETA, backward),
    Fault("alpha_k and alpha_v swapped", FORWARD, "mix_k, mix_v, mixed_row", "mix_v, mix_k, mixed_row", PLAIN),
    Fault(
        "dq: alpha_k and alpha_v swapped",
        BACKWARD,
        "mix_k, mix_v, mixed_row",
        "mix_v, mix_k, mixed_row",
        PLAIN,
        backward,
    ),
    Fault(
        "alpha weighs the causal stream",
        COMMON,
        "(1.0 - alpha) * causal.to(tl.float32) + alpha * bidir",
        "alpha * causal.to(tl.float32) + (1.0 - alpha) * bidir",
        PLAIN,
    ),
    Fault(
        "the answer sees the streams exchanged", COMMON, "mix(causal, tile, alpha)", "mix(tile, causal, alpha)", PLAIN
    ),
    Fault(
        "dk: the streams exchanged", BACKWARD, "mix(causal, k_tile, a_k)", "mix(k_tile, causal, a_k)", PLAIN, backward
    ),
    Fault("d_mixed: weights exchanged", "mixing.py", "(1.0 - a) * d, a * d", "a * d, (1.0 - a) * d", GROUPS, backward),
    Fault(
        "d_mixed: to one stream only", "mixing.py", "(1.0 - a) * d, a * d", "(1.0 - a) * d, 0.0 * d", GROUPS, backward
    ),
    Fault(
        "d_mixed: the caller's is dropped", BACKWARD, "mix_backward(d_given,", "mix_backward(None,", GROUPS, backward
    ),
    Fault("d_alpha: sign", "mixing.py", "(b - c) * d", "(c - b) * d", GROUPS, backward),
    Fault("beta weighs the causal stream", FORWARD, "(1.0 - b) * first_o + b * o", "b * first_o + (1.0 - b) * o", BETA),
    Fault(
        "d_out: beta weighs the causal stream",
        BACKWARD,
        "kind == BETA, b, 1.0 - b",
        "kind == BETA, 1.0 - b, b",
        BETA,
        backward,
    ),
    Fault("d_beta: sign", BACKWARD, "delta[:N] - delta[N : 2 * N]", "delta[N : 2 * N] - delta[:N]", BETA, backward),
    Fault("the second stream with the first one's queries", FORWARD, "q_row = own_row\n", "q_row = q_row\n", BETA),
    # the cache
    Fault("answers in the prompt's slots", SCHEDULE, '"write_row": N + r', '"write_row": r', PLAIN, prefill),
    Fault(
        "slots aren't read",
        FORWARD,
        "target = tl.load(slots + target, mask=there, other=0)",
        "target = target + 0",
        PLAIN,
        prefill,
    ),
]


def loaded(name: str, path: Path):
    """The module of this file under another's name."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """A function that makes a copy of the Triton backend with some text replaced the backend "mutant"."""

    def make(file=None, old="", new="", count=1):
        folder = tmp_path / "mutant"
        shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(schedule.__file__, folder)
        if file is not None:
            source = (folder / file).read_text()
            if source.count(old) != count:
                pytest.fail(f"{file}: expected {count} times {old!r}, got {source.count(old)}: this fault is stale")
            (folder / file).write_text(source.replace(old, new))
        name = f"{backends.__name__}.mutant"
        monkeypatch.setattr(backends, "schedule", loaded(schedule.__name__, folder / SCHEDULE))
        monkeypatch.setitem(sys.modules, name, loaded(name, folder / "__init__.py"))
        monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, "mutant"))
        its_tiles = importlib.import_module(f"{name}.tiles")
        monkeypatch.setattr(its_tiles, "choose", lambda *args, **kwargs: its_tiles.Tile(16, 32, 4, 1))
        assert Path(its_tiles.__file__).is_relative_to(tmp_path)

    yield make
    for name in [name for name in sys.modules if name.startswith(f"{backends.__name__}.mutant")]:
        del sys.modules[name]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_seen(fault, mutant):
    mutant(fault.file, fault.old, fault.new, fault.count)
    with pytest.raises(AssertionError, match="values are off"):
        fault.check("mutant", fault.case)


@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, id=f"{check.__name__}-{case.id}")
        for case, check in dict.fromkeys((f.case, f.check) for f in FAULTS)
    ],
)
def test_the_copy_alone_is_right(case, check, mutant):
    mutant()
    check("mutant", case)
