"""What the operator means, for each backend: who sees whom, and what may not depend on what."""

import pytest
import torch

from bitune_kernels import SegmentPlan, bitune_attention, bitune_prefill
from bitune_kernels.testing import Case, runnable_backends

RAGGED = {"prompts": (9, 0, 5, 1), "answers": (3, 4, 0, 2)}
EXACT = {"rtol": 0, "atol": 1e-12}

each_backend = pytest.mark.parametrize("backend", runnable_backends(Case(**RAGGED), torch.float64))


def attend(inputs, backend):
    return bitune_attention(**inputs, backend=backend)


def copied(inputs):
    """The same call with tensors that a test may change."""
    return {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}


def plain_causal(q, k, v):
    """Ordinary causal attention of one sequence: [rows, heads, head_dim] each."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    later = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def changed_rows(before, after):
    return {i for i in range(len(before)) if not torch.allclose(before[i], after[i], **EXACT)}


def rows_of(x, blocks, b):
    """The rows of sample b; ``blocks`` has the samples' lengths in each block of the packed layout."""
    parts = zip(x.split([sum(block) for block in blocks]), blocks, strict=True)
    return torch.cat([part.split(list(block))[b] for part, block in parts])


# Which rows carry weight, as the docstring of bitune_attention draws it: 3 prompt rows per stream and
# 3 answer rows, one line per query row, x where it sees the row of that column.
VISIBLE = {
    "full": (
        {},
        """
        xxx --- ---
        xxx --- ---
        xxx --- ---

        --- x-- ---
        --- xx- ---
        --- xxx ---

        xxx xxx x--
        xxx xxx xx-
        xxx xxx xxx
        """,
    ),
    "causal": (
        {"stream_mask": "causal"},
        """
        x-- --- ---
        xx- --- ---
        xxx --- ---

        --- x-- ---
        --- xx- ---
        --- xxx ---

        xxx xxx x--
        xxx xxx xx-
        xxx xxx xxx
        """,
    ),
    "anti_causal": (
        {"stream_mask": "anti_causal"},
        """
        xxx --- ---
        -xx --- ---
        --x --- ---

        --- x-- ---
        --- xx- ---
        --- xxx ---

        xxx xxx x--
        xxx xxx xx-
        xxx xxx xxx
        """,
    ),
    "window": (
        {"window": 2},
        """
        xx- --- ---
        xxx --- ---
        -xx --- ---

        --- x-- ---
        --- xx- ---
        --- -xx ---

        --x --x x--
        --- --- xx-
        --- --- -xx
        """,
    ),
    "anti_causal window": (
        {"stream_mask": "anti_causal", "window": 2},
        """
        xx- --- ---
        -xx --- ---
        --x --- ---

        --- x-- ---
        --- xx- ---
        --- -xx ---

        --x --x x--
        --- --- xx-
        --- --- -xx
        """,
    ),
    "alpha 0": (
        {"alpha_k": 0.0, "alpha_v": 0.0, "answer_only": True},
        """
        --- xxx x--
        --- xxx xx-
        --- xxx xxx
        """,
    ),
    "alpha 1": (
        {"alpha_k": 1.0, "alpha_v": 1.0, "answer_only": True},
        """
        xxx --- x--
        xxx --- xx-
        xxx --- xxx
        """,
    ),
    # num_streams 1: the columns are prompt and answer rows
    "one stream": (
        {"num_streams": 1},
        """
        xxx ---
        xxx ---
        xxx ---

        xxx x--
        xxx xx-
        xxx xxx
        """,
    ),
    "shared_qkv": (
        {"num_streams": 1, "shared_qkv": True},
        """
        xxx ---
        xxx ---
        xxx ---

        x-- ---
        xx- ---
        xxx ---

        xxx x--
        xxx xx-
        xxx xxx
        """,
    ),
}


@pytest.mark.parametrize("backend", ["reference", "sdpa"])  # a head_dim_v of its own is not every backend's
@pytest.mark.parametrize("name", VISIBLE)
def test_who_sees_whom(name, backend):
    options, picture = VISIBLE[name]
    changes = {key: x for key, x in options.items() if key.startswith("alpha")}
    options = {key: x for key, x in options.items() if key not in changes}
    inputs = Case(prompts=(3,), answers=(3,), heads=(1, 1), **options).make(torch.float64) | changes
    # With one-hot values the output of a row is its weight on each row.
    rows = inputs["plan"].num_rows
    inputs["v"] = torch.eye(rows, dtype=torch.float64)[:, None]
    out, _, _ = attend(inputs, backend)
    expected = [[mark == "x" for mark in line.replace(" ", "")] for line in picture.split("\n") if line.strip()]
    assert (out[:, 0] != 0).tolist() == expected
    torch.testing.assert_close(out.sum(-1), torch.ones(len(out), 1, dtype=torch.float64))


@each_backend
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_is_the_causal_model_and_alpha_1_has_bidirectional_keys_and_values(alpha, backend):
    inputs = Case(prompts=(9,), answers=(4,)).make(torch.float64) | {"alpha_k": alpha, "alpha_v": alpha}
    out, k_mixed, v_mixed = attend(inputs, backend)
    q, k, v = (inputs[x] for x in "qkv")
    first = 9 if alpha == 0 else 0
    assert torch.equal(k_mixed, k[first : first + 9]) and torch.equal(v_mixed, v[first : first + 9])
    q, k, v = (torch.cat([x[first : first + 9], x[18:]]) for x in (q, k, v))
    expected = plain_causal(q, k, v)
    torch.testing.assert_close(out[18:], expected[9:], **EXACT)
    if alpha == 0:
        torch.testing.assert_close(out[9:18], expected[:9], **EXACT)


@each_backend
def test_key_and_value_have_their_own_alpha(backend):
    inputs = Case(prompts=(6,), answers=(2,)).make(torch.float64) | {"alpha_k": 1.0, "alpha_v": 0.0}
    _, k_mixed, v_mixed = attend(inputs, backend)
    assert torch.equal(k_mixed, inputs["k"][:6]) and torch.equal(v_mixed, inputs["v"][6:12])


@each_backend
@pytest.mark.parametrize(
    ("stream_mask", "bidir_changes"),
    [("full", {0, 1, 2, 3, 4, 5}), ("causal", {3, 4, 5}), ("anti_causal", {0, 1, 2, 3})],
)
def test_what_a_later_prompt_token_changes(stream_mask, bidir_changes, backend):
    inputs = Case(prompts=(6,), answers=(2,), stream_mask=stream_mask).make(torch.float64)
    before, _, _ = attend(inputs, backend)
    changed = copied(inputs)
    for x in "kv":
        changed[x][[3, 9]] += 1.0  # token 3 in both streams
    after, _, _ = attend(changed, backend)
    causal_changes = {9, 10, 11}
    assert changed_rows(before, after) == bidir_changes | causal_changes | {12, 13}


@each_backend
def test_later_answer_tokens_change_nothing_before_them(backend):
    inputs = Case(prompts=(5,), answers=(4,)).make(torch.float64)
    before = attend(inputs, backend)
    changed = copied(inputs)
    for x in "qkv":
        changed[x][12] += 1.0  # the third of the answer rows 10 .. 13
    after = attend(changed, backend)
    assert changed_rows(before[0], after[0]) == {12, 13}
    for mixed, still in zip(before[1:], after[1:], strict=True):
        assert torch.equal(mixed, still)


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3, "prefix": (2, 0, 4, 1)},
        {"stream_mask": "anti_causal", "beta": "head"},
        {"num_streams": 1},
        {"num_streams": 1, "shared_qkv": True},
        {"answer_only": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_packed_equals_one_by_one(options, backend):
    case = Case(**RAGGED, **options)
    inputs = case.make(torch.float64)
    packed = attend(inputs, backend)
    answer = [case.answers]
    blocks_kv = [case.prompts] * case.num_streams + answer
    blocks_q = answer if case.answer_only else blocks_kv
    blocks_out = [case.prompts] * ((len(packed[0]) - sum(case.answers)) // sum(case.prompts)) + answer
    for b, (n, a) in enumerate(zip(case.prompts, case.answers, strict=True)):
        past = case.prefix and case.prefix[b : b + 1]
        alone = inputs | {
            "plan": SegmentPlan.from_lengths([n], [a], num_streams=case.num_streams, prefix_lengths=past),
            "q": rows_of(inputs["q"], blocks_q, b),
            "k": rows_of(inputs["k"], blocks_kv, b),
            "v": rows_of(inputs["v"], blocks_kv, b),
        }
        if case.prefix:
            alone["prefix"] = tuple(rows_of(x, [case.prefix], b) for x in inputs["prefix"])
        out, k_mixed, v_mixed = attend(alone, backend)
        torch.testing.assert_close(out, rows_of(packed[0], blocks_out, b), **EXACT)
        torch.testing.assert_close(k_mixed, rows_of(packed[1], [case.prompts], b), **EXACT)
        torch.testing.assert_close(v_mixed, rows_of(packed[2], [case.prompts], b), **EXACT)


@each_backend
@pytest.mark.parametrize("prefix", [None, (2, 3, 4)], ids=["", "prefix"])
def test_garbage_in_one_sample_never_leaks(prefix, backend):
    prompts, answers = (4, 6, 3), (2, 3, 4)
    inputs = Case(prompts=prompts, answers=answers, prefix=prefix, alpha="head").make(torch.float64)
    # the rows of the second sample
    rows = {
        "kv": [*range(4, 10), *range(17, 23), *range(28, 31)],
        "mixed": range(4, 10),
        "prefix": range(2, 5),
    }
    poisoned = copied(inputs)
    for x in "qkv":
        poisoned[x][rows["kv"]] = float("nan")
    if prefix:
        poisoned["prefix"] = tuple(x.index_fill(0, torch.tensor(rows["prefix"]), torch.nan) for x in inputs["prefix"])

    def others(x, own):
        return x[[i for i in range(len(x)) if i not in own]]

    def run(inputs):
        given = [inputs[x].requires_grad_() for x in "qkv"]
        outputs = attend(inputs, backend)
        kept = [others(o, rows[own]) for o, own in zip(outputs, ("kv", "mixed", "mixed"), strict=True)]
        grads = torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in kept), given)
        return [o.detach() for o in kept] + [others(g, rows["kv"]) for g in grads]

    for clean, actual in zip(run(copied(inputs)), run(poisoned), strict=True):
        torch.testing.assert_close(actual, clean, **EXACT)


@each_backend
def test_window_counts_from_the_first_token_of_the_prefix(backend):
    # 4 cached tokens, 3 prompt tokens, 2 answer tokens; only the values of the prefix are not 0
    inputs = Case(prompts=(3,), answers=(2,), prefix=(4,), heads=(1, 1), window=4).make(torch.float64)
    v_prefix = torch.zeros_like(inputs["prefix"][1])
    inputs["v"] = torch.zeros_like(inputs["v"])
    reached = []
    for j in range(4):
        one = v_prefix.index_fill(0, torch.tensor([j]), 1.0)
        out, _, _ = attend(inputs | {"prefix": (inputs["prefix"][0], one)}, backend)
        reached.append((out[:, 0, 0] != 0).tolist())
    positions = [4, 5, 6, 4, 5, 6, 7, 8]
    assert reached == [[i - j < 4 for i in positions] for j in range(4)]


@each_backend
def test_prompt_after_a_prefix_continues_one_longer_causal_sequence(backend):
    m, n, a = 5, 4, 3
    whole = Case(prompts=(m + n,), answers=(a,)).make(torch.float64)
    q, k, v = (torch.cat([whole[x][m + n : 2 * (m + n)], whole[x][2 * (m + n) :]]) for x in "qkv")
    expected = plain_causal(q, k, v)
    # the bidirectional stream is anything: alpha 0 keeps it from the answer
    inputs = {x: torch.cat([whole[x][m : m + n], rows[m:]]) for x, rows in zip("qkv", (q, k, v), strict=True)}
    plan = SegmentPlan.from_lengths([n], [a], prefix_lengths=[m])
    out, _, _ = bitune_attention(**inputs, alpha_k=0.0, alpha_v=0.0, plan=plan, prefix=(k[:m], v[:m]), backend=backend)
    torch.testing.assert_close(out[n:], expected[m:], **EXACT)


@each_backend
@pytest.mark.parametrize("window", [None, 4], ids=["", "window"])
def test_prefill_then_decoding_equals_one_full_pass(window, backend):
    prompts, answers = (6, 0, 3), (4, 3, 4)
    case = Case(prompts=prompts, answers=answers, alpha="head", window=window)
    inputs = case.make(torch.float64)
    expected, _, _ = attend(inputs, backend)
    expected = expected[18:].split(answers)
    prompt_rows = {x: inputs[x][:18] for x in "qkv"}
    answer_rows = {x: inputs[x][18:].split(answers) for x in "qkv"}

    # Sample b owns the slots 16 b .. 16 b + 15. The first answer row comes with the prompt, as in generation.
    k_cache, v_cache = (torch.full((48, 2, 16), float("nan"), dtype=torch.float64) for _ in range(2))
    seen = list(prompts)
    shared = {"k_cache": k_cache, "v_cache": v_cache, "window": window, "backend": backend}

    def step(plan, rows, slots, **more):
        slots = torch.tensor(slots, dtype=torch.int64)
        alphas = {"alpha_k": inputs["alpha_k"], "alpha_v": inputs["alpha_v"]}
        return bitune_prefill(**rows, **alphas, plan=plan, cache_positions=slots, **shared, **more)

    first = {x: torch.cat([prompt_rows[x], *(rows[:1] for rows in answer_rows[x])]) for x in "qkv"}
    slots = [16 * b + i for b, n in enumerate(prompts) for i in range(n)]
    slots += [16 * b + n for b, n in enumerate(prompts)]
    out = step(SegmentPlan.from_lengths(prompts, [1, 1, 1]), first, slots)
    decoded = [[row] for row in out[18:].split(1)]
    for t in range(1, 3):
        seen = [n + 1 for n in seen]
        cached = torch.tensor([16 * b + i for b, n in enumerate(seen) for i in range(n)])
        rows = {x: torch.cat([sample[t : t + 1] for sample in answer_rows[x]]) for x in "qkv"}
        plan = SegmentPlan.from_lengths([0] * 3, [1] * 3, prefix_lengths=seen)
        out = step(plan, rows, [16 * b + n for b, n in enumerate(seen)], prefix=(k_cache[cached], v_cache[cached]))
        for sample, row in zip(decoded, out.split(1), strict=True):
            sample.append(row)
    for sample, wanted in zip(decoded, expected, strict=True):
        torch.testing.assert_close(torch.cat(sample), wanted[:3], **EXACT)
