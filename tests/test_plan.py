"""SegmentPlan: which token each packed row is, and the way back."""

from dataclasses import replace

import pytest
import torch

from bitune_kernels import SegmentPlan

# tokens of each sample, prompt tokens of each sample
RAGGED = ((7, 1, 5, 4), (3, 1, 5, 2))


def padded_batch(lengths, side):
    """int64 tokens and mask [batch, seq]: token 100 b + i is number i of sample b, -1 is padding."""
    seq = max(lengths) + 2
    tokens = torch.full((len(lengths), seq), -1)
    for b, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(seq - length, seq)
        tokens[b, place] = 100 * b + torch.arange(length)
    return tokens, (tokens >= 0).long()


def expected_rows(lengths, prompts, num_streams):
    """Tokens in the order of the packed layout. The last prompt token belongs to the answer."""
    prompt = [100 * b + i for b, p in enumerate(prompts) for i in range(p - 1)]
    answer = [100 * b + i for b, (n, p) in enumerate(zip(lengths, prompts, strict=True)) for i in range(p - 1, n)]
    return prompt * num_streams + answer, answer


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_pack_and_back(side, num_streams, mask_dtype):
    lengths, prompts = RAGGED
    tokens, mask = padded_batch(lengths, side)
    plan = SegmentPlan.from_batch(tokens.shape, mask.to(mask_dtype), prompts, num_streams=num_streams)
    rows, answer = expected_rows(lengths, prompts, num_streams)
    assert plan.pack(tokens).tolist() == rows
    assert plan.pack_answers(tokens).tolist() == answer
    assert plan.positions.tolist() == [token % 100 for token in rows]
    assert tokens.flatten()[plan.row_index].tolist() == rows

    back = plan.unpack_answers(plan.pack_answers(tokens) + 1)
    is_answer = torch.isin(tokens, torch.tensor(answer))
    assert torch.equal(back, torch.where(is_answer, tokens + 1, 0))


def test_pack_keeps_trailing_dimensions_and_gradients():
    lengths, prompts = RAGGED
    tokens, mask = padded_batch(lengths, "left")
    plan = SegmentPlan.from_batch(tokens.shape, mask, prompts)
    x = torch.randn(*tokens.shape, 2, 3, requires_grad=True)
    assert plan.pack(x).shape == (plan.num_rows, 2, 3)
    back = plan.unpack_answers(plan.pack_answers(x))
    assert back.shape == x.shape
    back.sum().backward()
    is_answer = torch.isin(tokens, plan.pack_answers(tokens))
    assert torch.equal(x.grad, is_answer[:, :, None, None].expand_as(x).float())


def test_samples_begin_where_position_ids_do():
    # two samples with padding between them, then one that fills its row but for the end
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 1, 2, 9, 0, 1], [0, 1, 2, 3, 4, 0]])
    tokens = torch.arange(12).view(2, 6)
    plan = SegmentPlan.from_batch(tokens.shape, mask, [2, 1, 4], position_ids=positions, num_streams=1)
    assert (plan.prompt_lengths, plan.answer_lengths) == ((1, 0, 3), (2, 2, 2))
    assert plan.pack(tokens).tolist() == [0, 6, 7, 8, 1, 2, 4, 5, 9, 10]
    assert plan.positions.tolist() == [0, 0, 1, 2, 1, 2, 0, 1, 3, 4]
    assert plan.unpack_answers(plan.pack_answers(tokens)).tolist() == [[0, 1, 2, 0, 4, 5], [0, 0, 0, 9, 10, 0]]

    one_for_all = SegmentPlan.from_batch((2, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert (one_for_all.prompt_lengths, one_for_all.padded_shape) == ((1, 1, 1, 1), (2, 4))
    with pytest.raises(ValueError, match=r"^position_ids: .* got 2 for token 4 of row 0"):
        SegmentPlan.from_batch((1, 5), torch.tensor([[1, 1, 0, 0, 1]]), position_ids=torch.tensor([[0, 1, 0, 0, 2]]))


def test_counts():
    lengths, prompts = RAGGED
    tokens, mask = padded_batch(lengths, "right")
    plan = SegmentPlan.from_batch(tokens.shape, mask, torch.tensor(prompts))
    assert (plan.prompt_lengths, plan.answer_lengths) == ((2, 0, 4, 1), (5, 1, 1, 3))
    assert plan.cu_prompt.tolist() == [0, 2, 2, 6, 7] and plan.cu_answer.tolist() == [0, 5, 6, 7, 10]
    assert plan.cu_prompt.dtype == plan.cu_answer.dtype == torch.int32
    assert (plan.batch_size, plan.num_prompt, plan.num_answer, plan.num_rows) == (4, 7, 10, 24)
    assert (plan.answer_start, plan.max_prompt, plan.max_answer, plan.num_prefix) == (14, 4, 5, 0)
    assert plan.prefix_lengths is None and plan.cu_prefix is None


def test_without_mask_and_prompt_lengths_every_token_is_prompt():
    plan = SegmentPlan.from_batch((2, 4))
    assert (plan.prompt_lengths, plan.answer_lengths) == ((3, 3), (1, 1))
    assert plan.pack(torch.arange(8).view(2, 4)).tolist() == [0, 1, 2, 4, 5, 6] * 2 + [3, 7]


def test_one_token_prompts_have_answer_rows_only():
    tokens = torch.arange(6).view(2, 3)
    plan = SegmentPlan.from_batch(tokens.shape, None, [1, 1])
    assert (plan.num_prompt, plan.num_rows) == (0, 6)
    assert torch.equal(plan.unpack_answers(plan.pack_answers(tokens)), tokens)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_positions_count_after_the_prefix(num_streams):
    plan = SegmentPlan.from_lengths([2, 0], [1, 2], prefix_lengths=[4, 3], num_streams=num_streams)
    assert plan.positions.tolist() == [4, 5] * num_streams + [6, 3, 4]
    assert plan.cu_prefix.tolist() == [0, 4, 7] and plan.num_prefix == 7


LENGTHS = {"prompt_lengths": (0, 5, 2), "answer_lengths": (3, 0, 1), "prefix_lengths": (1, 0, 2)}


def test_lengths_may_be_tensors():
    plan = SegmentPlan.from_lengths(**{key: torch.tensor(x) for key, x in LENGTHS.items()})
    assert all(getattr(plan, key) == values for key, values in LENGTHS.items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_cu_seqlens_make_the_same_plan(dtype):
    plan = SegmentPlan.from_lengths(**LENGTHS, num_streams=1)
    given = [cu.to(dtype, copy=True) for cu in (plan.cu_prompt, plan.cu_answer, plan.cu_prefix)]
    again = SegmentPlan.from_cu_seqlens(*given, num_streams=1)
    assert all(getattr(again, key) == values for key, values in LENGTHS.items())
    for key in ("cu_prompt", "cu_answer", "cu_prefix"):
        assert torch.equal(getattr(again, key), getattr(plan, key)) and getattr(again, key).dtype == torch.int32
    assert again.num_streams == 1
    given[0].zero_()  # the plan doesn't change with buffers that its caller uses again
    assert torch.equal(again.cu_prompt, plan.cu_prompt)


def test_cu_seqlens_without_prefix_have_two_streams():
    plan = SegmentPlan.from_cu_seqlens(torch.tensor([0, 2, 2]), torch.tensor([0, 1, 4]))
    assert (plan.prompt_lengths, plan.answer_lengths, plan.prefix_lengths) == ((2, 0), (1, 3), None)
    assert plan.num_streams == 2
    assert SegmentPlan.from_cu_seqlens(torch.tensor([0]), torch.tensor([0])).num_rows == 0


def test_lengths_as_one_tensor_on_the_cpu():
    with torch.device("meta"):
        plan, past = SegmentPlan.from_lengths([2, 0], [1, 3]), SegmentPlan.from_lengths(**LENGTHS)
    assert plan.cu_prompt.device.type == "meta"
    assert plan.lengths.device.type == past.lengths.device.type == "cpu"
    assert plan.lengths.dtype == torch.int64
    assert plan.lengths.tolist() == [[2, 0], [1, 3]]
    assert past.lengths.tolist() == [list(x) for x in LENGTHS.values()]
    assert SegmentPlan.from_lengths([], []).lengths.shape == (2, 0)
    assert SegmentPlan.from_batch((2, 4), None, [3, 1]).lengths.tolist() == [[2, 0], [2, 4]]


def test_empty_batch():
    plan = SegmentPlan.from_lengths([], [])
    assert (plan.num_rows, plan.max_prompt, plan.max_answer) == (0, 0, 0)
    assert plan.cu_prompt.tolist() == [0]


HOLE = torch.tensor([[1, 1, 1], [1, 0, 1]])

BAD_BATCH = [
    ((2, 3), torch.ones(2, 4), None, ValueError, r"attention_mask: expected shape \(2, 3\) .* got \(2, 4\)"),
    ((2, 3), HOLE, None, ValueError, "attention_mask: .* row 1 has a gap"),
    ((2, 3), torch.tensor([[0, 1, 1], [0, 0, 0]]), None, ValueError, "attention_mask: .* row 1 has none"),
    ((2, 0), None, None, ValueError, "attention_mask: expected at least one real token"),
    ((2, 3), None, [0, 2], ValueError, r"prompt_lengths: expected 1 to 3 \(tokens of sample 0\), got 0"),
    ((2, 3), None, [3, 4], ValueError, r"prompt_lengths: expected 1 to 3 \(tokens of sample 1\), got 4"),
    ((2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]]), [3, 3], ValueError, "prompt_lengths: expected 1 to 2"),
    ((2, 3), None, [1], ValueError, "prompt_lengths: expected one length for each of the 2 samples, got 1"),
    ((2, 3), None, 3, TypeError, "prompt_lengths: expected integers, one for each sample, got 3"),
    ((2, 3), None, [1.0, 2.0], TypeError, "prompt_lengths: expected integers"),
    ((2, 3), None, torch.tensor([1.0, 2.0]), TypeError, "prompt_lengths: expected integers, got"),
]


@pytest.mark.parametrize(("shape", "mask", "prompts", "error", "message"), BAD_BATCH)
def test_bad_batch_is_refused(shape, mask, prompts, error, message):
    with pytest.raises(error, match=f"^{message}"):
        SegmentPlan.from_batch(shape, mask, prompts)


BAD_LENGTHS = [
    (([1], [1, 2]), {}, ValueError, "answer_lengths: expected one length for each of the 1 samples, got 2"),
    (([1, -1], [1, 2]), {}, ValueError, "prompt_lengths: expected lengths >= 0"),
    (([1, 1], [1, -2]), {}, ValueError, "answer_lengths: expected lengths >= 0"),
    (([1], [1]), {"prefix_lengths": [-3]}, ValueError, "prefix_lengths: expected lengths >= 0"),
    (([1], [1]), {"prefix_lengths": [3, 3]}, ValueError, "prefix_lengths: expected one length for each"),
    (([1], [True]), {}, TypeError, "answer_lengths: expected integers"),
    (([torch.tensor(1)], [1]), {}, TypeError, "prompt_lengths: expected integers"),
    (([2**30] * 2, [1, 1]), {}, ValueError, r"prompt_lengths: expected fewer than 2\*\*31 rows in all, got 2147483648"),
    (([1], [1]), {"num_streams": 3}, ValueError, "num_streams: expected 1 or 2, got 3"),
    (([1], [1]), {"num_streams": 0}, ValueError, "num_streams: expected 1 or 2, got 0"),
    (([1], [1]), {"num_streams": 2.0}, ValueError, r"num_streams: expected 1 or 2, got 2\.0"),
]


@pytest.mark.parametrize(("lengths", "options", "error", "message"), BAD_LENGTHS)
def test_bad_lengths_are_refused(lengths, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        SegmentPlan.from_lengths(*lengths, **options)


@pytest.mark.parametrize("name", ["prompt_lengths", "answer_lengths", "prefix_lengths"])
def test_a_copy_with_bad_lengths_is_refused(name):
    # with the same number of rows, so that tensors fit
    plan = SegmentPlan.from_lengths([4, 3], [4, 3], prefix_lengths=[4, 3])
    with pytest.raises(ValueError, match=rf"^{name}: expected lengths >= 0, got \(9, -2\)"):
        replace(plan, **{name: (9, -2)})


GOOD_CU = torch.tensor([0, 2, 5], dtype=torch.int32)

BAD_CU = [
    ({"cu_prompt": [0, 2, 5]}, TypeError, "cu_prompt: expected an integer tensor, got list"),
    ({"cu_answer": None}, TypeError, "cu_answer: expected an integer tensor, got NoneType"),
    ({"cu_answer": GOOD_CU.float()}, TypeError, "cu_answer: expected integers, got a tensor of torch.float32"),
    ({"cu_prefix": GOOD_CU.bool()}, TypeError, "cu_prefix: expected integers, got a tensor of torch.bool"),
    ({"cu_prompt": GOOD_CU[None]}, ValueError, r"cu_prompt: expected shape \[batch \+ 1\], got \[1, 3\]"),
    ({"cu_prompt": GOOD_CU[:0]}, ValueError, r"cu_prompt: expected shape \[batch \+ 1\], got \[0\]"),
    ({"cu_answer": GOOD_CU[:2]}, ValueError, r"cu_answer: expected \[3\] on cpu as cu_prompt, got \[2\] on cpu"),
    ({"cu_prefix": GOOD_CU.to("meta")}, ValueError, r"cu_prefix: expected \[3\] on cpu as cu_prompt, got .* meta"),
    ({"cu_prompt": GOOD_CU + 1}, ValueError, "cu_prompt: expected 0 as its first value, got 1"),
    ({"cu_prefix": -GOOD_CU}, ValueError, r"cu_prefix: expected values that never decrease, got \[0, -2, -5\]"),
    ({"cu_answer": GOOD_CU[[0, 2, 1]]}, ValueError, r"cu_answer: expected .* never decrease, got \[0, 5, 2\]"),
    ({"num_streams": 3}, ValueError, "num_streams: expected 1 or 2, got 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CU)
def test_bad_cu_seqlens_are_refused(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        SegmentPlan.from_cu_seqlens(**{"cu_prompt": GOOD_CU, "cu_answer": GOOD_CU, "cu_prefix": GOOD_CU} | change)


@pytest.mark.parametrize(("streams", "sizes"), [(1, [5, 4]), (2, [5, 5, 4])])
def test_segments(streams, sizes):
    plan = SegmentPlan.from_lengths([3, 2], [1, 3], num_streams=streams)
    rows = torch.arange(plan.num_rows)
    assert [len(x) for x in plan.segments(rows)] == sizes and torch.equal(torch.cat(plan.segments(rows)), rows)
    assert [x.tolist() for x in plan.segments(rows[-4:])] == [rows[-4:].tolist()]  # queries of the answers alone
    empty = SegmentPlan.from_lengths([0], [2], num_streams=streams)
    assert [len(x) for x in empty.segments(torch.arange(2))] == [0] * streams + [2]
