"""SegmentPlan: where the rows of a packed batch come from, and how they go back.

One row per token and stream, segment-major over the batch, without padding:

    two streams   [ bidir prompts | causal prompts | answers ]    T = 2 N + A rows
    one stream    [ prompts | answers ]                           T =   N + A rows

The last prompt token supplies the first query of the answer, so it opens the answer segment: a prompt of P
tokens gives P - 1 rows per stream. Pure tensor code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch.nn.functional import pad


def _cumulative(lengths: Sequence[int], device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _ints(name: str, values, batch: int | None = None) -> tuple[int, ...]:
    if isinstance(values, torch.Tensor):
        values = values.reshape(-1).tolist()
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected integers, one for each sample, got {values!r}")
    values = tuple(values)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"{name}: expected integers, got {values!r}")
    if batch is not None and len(values) != batch:
        raise ValueError(f"{name}: expected one length for each of the {batch} samples, got {len(values)}")
    return values


def find_samples(
    shape: tuple[int, int], attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> list[tuple[int, int]]:
    """Where samples lie in the flattened [batch * seq] tokens: ``(first token, number of tokens)`` of each, in order.

    Arguments and errors as in ``SegmentPlan.from_batch``.
    """
    shape = tuple(shape)
    real = torch.ones(shape, dtype=torch.bool, device="cpu")
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            raise TypeError(f"attention_mask: expected a tensor [batch, seq], got {type(attention_mask).__name__}")
        if tuple(attention_mask.shape) != shape:
            raise ValueError(f"attention_mask: expected shape {shape} as the tokens, got {tuple(attention_mask.shape)}")
        real = attention_mask.ne(0).cpu()
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    runs = begins.sum(1).tolist()
    if 0 in runs:
        raise ValueError(f"attention_mask: expected at least one real token per row, row {runs.index(0)} has none")
    if position_ids is None:
        if max(runs, default=1) > 1:
            raise ValueError(
                "attention_mask: expected the real tokens of each row in one run (left or right padding), "
                f"row {runs.index(max(runs))} has a gap"
            )
    else:
        if not isinstance(position_ids, torch.Tensor):
            raise TypeError(f"position_ids: expected an integer tensor, got {type(position_ids).__name__}")
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise TypeError(f"position_ids: expected integers, got a tensor of {position_ids.dtype}")
        if tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids: expected shape {shape} as the tokens, got {tuple(position_ids.shape)}")
        position_ids = position_ids.cpu().expand(shape)
        begins |= real & (position_ids == 0)
    starts = begins.flatten().nonzero()[:, 0]
    sample = (begins.flatten().cumsum(0) - 1)[real.flatten()]  # of each real token
    if position_ids is not None:
        tokens = real.flatten().nonzero()[:, 0]
        found = position_ids.flatten()[tokens]
        wrong = (found != tokens - starts[sample]).nonzero()[:, 0].tolist()
        if wrong:
            row, place = divmod(int(tokens[wrong[0]]), shape[1])
            raise ValueError(
                "position_ids: expected 0, 1, 2, ... from the first token of each sample, got "
                f"{int(found[wrong[0]])} for token {place} of row {row}"
            )
    return list(zip(starts.tolist(), sample.bincount(minlength=len(starts)).tolist(), strict=True))


def find_turns(
    labels: torch.Tensor, samples: Sequence[tuple[int, int]], prompt_lengths: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """The turns of conversations: each a prompt, whose labels are -100, and an answer, whose labels are not.

    Tokens behind a conversation's last answer belong to no turn; one without any answer is a prompt alone.

    Args:
        labels: int64 [batch, seq].
        samples: the conversations, as ``find_samples`` returns them.
        prompt_lengths: tokens before the first answer of each.

    Returns:
        ``(first token, number of tokens)`` of each turn, its prompt tokens, and how many tokens of the same
        conversation stand before it.
    """
    is_answer = (labels != -100).flatten().cpu()
    turns, prompts, history = [], [], []
    for (first, length), n in zip(samples, _ints("prompt_lengths", prompt_lengths, len(samples)), strict=True):
        answered = pad(is_answer[first : first + length].int(), (1, 1))
        answered[: n + 1] = 0
        begins, ends = ((answered.diff() == step).nonzero()[:, 0].tolist() for step in (1, -1))
        start = 0
        for begin, end in zip(begins, ends, strict=True) if begins else [(length, length)]:
            turns.append((first + start, end - start))
            prompts.append((begin if start else n) - start)
            history.append(start)
            start = end
    return turns, prompts, history


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """Lengths of one packed batch, and the maps between [batch, seq] tokens and packed rows.

    Attributes:
        prompt_lengths: rows of each sample's prompt in one stream (its prompt tokens less one), may be 0.
        answer_lengths: rows of each sample's answer segment, may be 0.
        num_streams: how often the prompt rows stand in the layout: 2 or 1.
        cu_prompt, cu_answer: int32 [batch + 1], cumulative lengths, on the device of the batch.
        prefix_lengths, cu_prefix: rows of an already cached past per sample, or None.
        prefix_index: int64 [num_prefix], where that past is other rows of the plan (earlier turns of a conversation):
            rows of [mixed prompts | answers], so 0 .. N + A. None: it is given from outside.
        token_index: int64 [N + A], the place of each prompt and answer row in the flattened [batch * seq] tokens,
            or None for a plan made from lengths alone.
        padded_shape: (batch, seq) that ``token_index`` refers to; a row may hold several samples.
        num_prompt, num_answer, num_prefix: N, A and the cached rows: sums of the lengths.
        max_prompt, max_answer: the longest prompt and answer segment.
        lengths: int64 [2 or 3, batch] on the CPU: prompt, answer and, if there is one, prefix lengths. What a
            compiled graph is given instead of the numbers, and what the host can read without waiting for a GPU.
    """

    prompt_lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]
    num_streams: int
    cu_prompt: torch.Tensor
    cu_answer: torch.Tensor
    prefix_lengths: tuple[int, ...] | None = None
    cu_prefix: torch.Tensor | None = None
    prefix_index: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    num_prefix: int = field(init=False)
    max_prompt: int = field(init=False)
    max_answer: int = field(init=False)
    lengths: torch.Tensor = field(init=False, repr=False)
    _extent: torch.Tensor = field(init=False, repr=False)  # [N, A, 0] on the CPU: N and A as sizes

    def __post_init__(self):
        # Of copies with other lengths too: kernels write where these say.
        for name in ("prompt_lengths", "answer_lengths", "prefix_lengths"):
            given = getattr(self, name) or ()
            if any(n < 0 for n in given):
                raise ValueError(f"{name}: expected lengths >= 0, got {given}")
        if type(self.num_streams) is not int or self.num_streams not in (1, 2):
            raise ValueError(f"num_streams: expected 1 or 2, got {self.num_streams!r}")
        # Plain attributes: torch.compile can't trace the lock of a cached_property, and would guard on each length
        # if it traced the sums.
        counts = {
            "num_prefix": sum(self.prefix_lengths or ()),
            "max_prompt": max(self.prompt_lengths, default=0),
            "max_answer": max(self.answer_lengths, default=0),
        }
        for name, value in counts.items():
            object.__setattr__(self, name, value)
        lengths = [self.prompt_lengths, self.answer_lengths]
        if self.prefix_lengths is not None:
            lengths.append(self.prefix_lengths)
        # A compiled graph specializes on a number that it reaches through a global, as the current pass is, and not on
        # the size of a tensor.
        extent = torch.empty(sum(self.prompt_lengths), sum(self.answer_lengths), 0, device="cpu")
        object.__setattr__(self, "_extent", extent)
        object.__setattr__(self, "lengths", torch.tensor(lengths, dtype=torch.int64, device="cpu"))

    @classmethod
    def from_lengths(
        cls,
        prompt_lengths: Sequence[int] | torch.Tensor,
        answer_lengths: Sequence[int] | torch.Tensor,
        *,
        num_streams: int = 2,
        prefix_lengths: Sequence[int] | torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> SegmentPlan:
        """A plan from the number of rows of each sample's prompt (per stream) and answer segment, each 0 or more.

        Raises:
            ValueError, TypeError: a length out of range, or too many or too few of them.
        """
        prompt = _ints("prompt_lengths", prompt_lengths)
        answer = _ints("answer_lengths", answer_lengths, len(prompt))
        prefix = None if prefix_lengths is None else _ints("prefix_lengths", prefix_lengths, len(prompt))
        for name, lengths in (("prompt", prompt), ("answer", answer), ("prefix", prefix or ())):
            if sum(lengths) >= 2**31:
                raise ValueError(f"{name}_lengths: expected fewer than 2**31 rows in all, got {sum(lengths)}")
        return cls(
            prompt_lengths=prompt,
            answer_lengths=answer,
            num_streams=num_streams,
            cu_prompt=_cumulative(prompt, device),
            cu_answer=_cumulative(answer, device),
            prefix_lengths=prefix,
            cu_prefix=None if prefix is None else _cumulative(prefix, device),
        )

    @classmethod
    def from_batch(
        cls,
        shape: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: Sequence[int] | torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        num_streams: int = 2,
        device: torch.device | str | None = None,
    ) -> SegmentPlan:
        """A plan for tokens [batch, seq]: a sample per row with padding on the left or on the right, or several.

        Args:
            shape: (batch, seq) of the tokens.
            attention_mask: [batch, seq], nonzero at real tokens, which must be one run per sample. None: no padding.
            prompt_lengths: prompt tokens of each sample in the order of the tokens, 1 .. its number of real tokens;
                None: every token is prompt.
            position_ids: integers [batch, seq] or [1, seq], 0, 1, 2, ... from the first token of each sample. They
                say where packed samples begin. None: one sample per row.
            num_streams: 2, or 1 for the variants without mixing.
            device: where the index tensors go.

        Raises:
            ValueError, TypeError: a mask of another shape or with holes, a row without tokens, positions that leave
                out a number, a length out of range.
        """
        samples = find_samples(shape, attention_mask, position_ids)
        if prompt_lengths is None:
            prompt_lengths = [length for _, length in samples]
        return cls.from_samples(shape, samples, prompt_lengths, num_streams=num_streams, device=device)

    @classmethod
    def from_samples(
        cls,
        shape: tuple[int, int],
        samples: Sequence[tuple[int, int]],
        prompt_lengths: Sequence[int] | torch.Tensor,
        *,
        prefix_lengths: Sequence[int] | None = None,
        num_streams: int = 2,
        device: torch.device | str | None = None,
    ) -> SegmentPlan:
        """A plan for runs of tokens, which may overlap.

        Args:
            shape: (batch, seq) of the tokens.
            samples: (first token, number of tokens) of each in the flattened [batch * seq] tokens.
            prompt_lengths: prompt tokens of each, 1 .. its number of tokens.
            prefix_lengths: rows of an already cached past per sample.
            num_streams, device: as in ``from_batch``.

        Raises:
            ValueError, TypeError: a length out of range, or too many or too few of them.
        """
        prompt_lengths = _ints("prompt_lengths", prompt_lengths, len(samples))
        for s, (p, (_, length)) in enumerate(zip(prompt_lengths, samples, strict=True)):
            if not 1 <= p <= length:
                raise ValueError(f"prompt_lengths: expected 1 to {length} (tokens of sample {s}), got {p}")
        rows = [p - 1 for p in prompt_lengths]
        answers = [length - n for (_, length), n in zip(samples, rows, strict=True)]
        plan = cls.from_lengths(rows, answers, num_streams=num_streams, prefix_lengths=prefix_lengths, device=device)
        index = [torch.arange(first, first + n, device="cpu") for (first, _), n in zip(samples, rows, strict=True)]
        index += [
            torch.arange(first + n, first + length, device="cpu")
            for (first, length), n in zip(samples, rows, strict=True)
        ]
        return replace(plan, token_index=torch.cat(index).to(plan.cu_prompt.device), padded_shape=tuple(shape))

    @classmethod
    def from_turns(
        cls,
        shape: tuple[int, int],
        turns: Sequence[tuple[int, int]],
        prompt_lengths: Sequence[int],
        history: Sequence[tuple[int, int]],
        *,
        num_streams: int = 2,
        device: torch.device | str | None = None,
    ) -> SegmentPlan:
        """A plan for turns that attend to the mixed prompts and the answers of turns before them.

        Args:
            shape, turns, prompt_lengths: as ``samples`` in ``from_samples``, without overlaps.
            history: (first token, number of tokens) of the whole turns that each one attends to. Several turns may
                share theirs.
            num_streams, device: as in ``from_batch``.
        """
        lengths = [length for _, length in history]
        options = dict(prefix_lengths=lengths, num_streams=num_streams, device=device)
        plan = cls.from_samples(shape, turns, prompt_lengths, **options)
        row = torch.empty(shape[0] * shape[1], dtype=torch.int64, device="cpu")  # of each token
        row[plan.token_index.cpu()] = torch.arange(plan.num_prompt + plan.num_answer, device="cpu")
        past = [torch.arange(first, first + length, device="cpu") for first, length in history]
        return replace(plan, prefix_index=row[torch.cat(past)].to(plan.cu_prompt.device))

    def with_prefix(self, length: int) -> SegmentPlan:
        """The plan of one sample whose cached past is of another length, as in a layer with a sliding window."""
        if self.prefix_lengths == (length,):
            return self
        return replace(self, prefix_lengths=(length,), cu_prefix=_cumulative((length,), self.cu_prompt.device))

    def split(self) -> tuple[SegmentPlan, SegmentPlan]:
        """Two plans of lengths for the same rows: the prompts without answers, and the answers alone, whose cached past
        are then the prompts' rows (behind each sample's own past), wherever their mix is not made by the operator."""
        nothing = (0,) * self.batch_size
        options = dict(device=self.cu_prompt.device)
        prompts = self.from_lengths(
            self.prompt_lengths, nothing, num_streams=self.num_streams, prefix_lengths=self.prefix_lengths, **options
        )
        before = [m + n for m, n in zip(self.past_lengths, self.prompt_lengths, strict=True)]
        answers = self.from_lengths(nothing, self.answer_lengths, num_streams=1, prefix_lengths=before, **options)
        return prompts, answers

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_prompt: torch.Tensor,
        cu_answer: torch.Tensor,
        cu_prefix: torch.Tensor | None = None,
        num_streams: int = 2,
    ) -> SegmentPlan:
        """A plan from cumulative lengths, as flash-attn's varlen functions take them, on their device.

        Reads the tensors: synchronizes a GPU, once. Make one plan per batch, not one per layer.

        Args:
            cu_prompt: integers [batch + 1], 0 and then the sums of the first 1, 2, .. batch ``prompt_lengths``.
            cu_answer: likewise of ``answer_lengths``.
            cu_prefix: likewise of ``prefix_lengths``, or None.
            num_streams: 2, or 1 for the variants without mixing.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        given = {"cu_prompt": cu_prompt, "cu_answer": cu_answer}
        if cu_prefix is not None:
            given["cu_prefix"] = cu_prefix
        for name, cu in given.items():
            if not isinstance(cu, torch.Tensor):
                raise TypeError(f"{name}: expected an integer tensor, got {type(cu).__name__}")
            if cu.is_floating_point() or cu.is_complex() or cu.dtype == torch.bool:
                raise TypeError(f"{name}: expected integers, got a tensor of {cu.dtype}")
            if cu.ndim != 1 or not cu.shape[0]:
                raise ValueError(f"{name}: expected shape [batch + 1], got {list(cu.shape)}")
            if cu.shape != cu_prompt.shape or cu.device != cu_prompt.device:
                raise ValueError(
                    f"{name}: expected {list(cu_prompt.shape)} on {cu_prompt.device} as cu_prompt, got "
                    f"{list(cu.shape)} on {cu.device}"
                )
        rows = torch.stack([cu.to(torch.int64) for cu in given.values()]).tolist()  # one transfer for all of them
        lengths = []
        for name, cu in zip(given, rows, strict=True):
            if cu[0] != 0:
                raise ValueError(f"{name}: expected 0 as its first value, got {cu[0]}")
            lengths.append([end - start for start, end in pairwise(cu)])
            if any(n < 0 for n in lengths[-1]):
                raise ValueError(f"{name}: expected values that never decrease, got {cu}")
        prompt, answer, *prefix = lengths
        return cls.from_lengths(
            prompt,
            answer,
            num_streams=num_streams,
            prefix_lengths=prefix[0] if prefix else None,
            device=cu_prompt.device,
        )

    @property
    def batch_size(self) -> int:
        return len(self.prompt_lengths)

    @property
    def past_lengths(self) -> tuple[int, ...]:
        """``prefix_lengths``, zeros where there are none."""
        return self.prefix_lengths or (0,) * self.batch_size

    @property
    def num_prompt(self) -> int:
        return self._extent.shape[0]

    @property
    def num_answer(self) -> int:
        return self._extent.shape[1]

    @property
    def num_rows(self) -> int:
        """T: all rows, ``num_streams * N + A``."""
        return self.num_streams * self.num_prompt + self.num_answer

    @property
    def answer_start(self) -> int:
        """The first answer row."""
        return self.num_streams * self.num_prompt

    def segments(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[num_rows or num_answer, ...] -> the prompts of each stream, if they are there, then the answers.

        By split(), whose backward is one copy; slices would each fill a gradient of all rows.
        """
        prompts = [self.num_prompt] * self.num_streams if rows.shape[0] == self.num_rows else []
        return rows.split([*prompts, self.num_answer])

    @cached_property
    def row_index(self) -> torch.Tensor:
        """int64 [T]: the flattened token of each packed row."""
        prompt = self.token_index[: self.num_prompt]
        return torch.cat([*[prompt] * (self.num_streams - 1), self.token_index])

    @cached_property
    def answer_index(self) -> torch.Tensor:
        """int64 [A]: the flattened token of each answer row."""
        return self.token_index[self.num_prompt :]

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [T]: position of each packed row in its own sample, counted after the prefix if there is one."""
        past = self.past_lengths
        prompt = [torch.arange(m, m + n, device="cpu") for m, n in zip(past, self.prompt_lengths, strict=True)]
        answer = [
            torch.arange(m + n, m + n + a, device="cpu")
            for m, n, a in zip(past, self.prompt_lengths, self.answer_lengths, strict=True)
        ]
        return torch.cat([*prompt * self.num_streams, *answer]).to(self.cu_prompt.device)

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, seq, ...] -> [T, ...]: one row per token and stream."""
        return tokens.flatten(0, 1).index_select(0, self.row_index)

    def pack_answers(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, seq, ...] -> [A, ...]: the answer rows alone."""
        return tokens.flatten(0, 1).index_select(0, self.answer_index)

    def unpack_answers(self, rows: torch.Tensor) -> torch.Tensor:
        """[A, ...] -> [batch, seq, ...], zeros where there is no answer row. Differentiable."""
        batch, seq = self.padded_shape
        padded = rows.new_zeros(batch * seq, *rows.shape[1:])
        return padded.index_copy(0, self.answer_index, rows).view(batch, seq, *rows.shape[1:])
