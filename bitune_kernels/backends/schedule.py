"""Which tiles a launch computes: one row of int32 per program, made on the host where all lengths are known.

A kernel reads its own row and nothing else about the batch, so no program is surplus, and the rows are sorted by
their work, longest first, so that short tiles fill the gaps that long ones leave. The rows of one plan serve every
layer of a model: they are kept as long as the plan lives.

All tiles count *packed* query rows: row r of a segment is token r // group_size and query head r % group_size of one
key/value head, so that the heads of a group share each key and value tile, and one answer token is not a tile of
one row.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..plan import SegmentPlan

# Which keys of a run a query sees, by position. AFTER: j > i. NONE: no key.
FULL, CAUSAL, ANTI_CAUSAL, AFTER, NONE = range(5)
MASKS = {"full": FULL, "causal": CAUSAL, "anti_causal": ANTI_CAUSAL}

# Where the keys of a backward tile stand.
OWN, MIXED, PREFIX = range(3)

# By what the cotangent of a stream's output is multiplied.
ONE, BETA, ONE_MINUS_BETA = range(3)

# One row of q, or of one stream's prompt, is "a row"; lengths count tokens; positions count from the sample's first
# cached token. Keys are up to three runs: the prefix, the mixed prompt (answer tiles), and the segment's own.
FORWARD = (
    "q_row",  # first row of the segment in q
    "length",  # tokens of the segment
    "position",  # of its first token
    "block",  # which tile of the segment
    "own_row",  # first row of the segment in k and v
    "mask",
    "mixed_row",
    "mixed_length",
    "prefix_row",
    "prefix_length",
    "out_row",  # first row in out
    "stream_row",  # first row in lse and in the streams' outputs
    "second_row",  # a second part, the bidir stream: its first row in q, k and v
    "second_mask",
    "second_stream_row",  # -1: there is no second part
    "write_row",  # where this tile's tokens go in the mixed keys, or in the list of cache slots
    "write_length",  # 0: nothing to write
    "write_mixed",  # 1: the mix of both streams; 0: the rows of the segment themselves
)

# Up to two parts per tile: the streams that share one q (shared_qkv).
BACKWARD_Q = (
    "q_row",
    "length",
    "position",
    "block",
    "own_row",
    "mixed_row",
    "mixed_length",
    "prefix_row",
    "prefix_length",
    "parts",
    *(f"{name}_{part}" for part in range(2) for name in ("stream_row", "out_row", "mask", "weight")),
)

# A tile of keys, and up to three runs of queries that see it.
BACKWARD_KV = (
    "kind",
    "k_row",
    "length",
    "position",
    "block",
    "parts",
    *(
        f"{name}_{part}"
        for part in range(3)
        for name in ("q_row", "length", "position", "stream_row", "out_row", "mask", "weight")
    ),
)


class Launch(NamedTuple):
    """What the tiles of a launch depend on, beside the plan and their size.

    Attributes:
        group_size: query heads per key/value head.
        window, stream_mask, shared_qkv: as in ``bitune_attention``.
        beta: whether the prompt's two outputs become one.
        answer_only: whether q has the answer rows alone.
    """

    group_size: int
    window: int | None
    stream_mask: str
    shared_qkv: bool
    beta: bool
    answer_only: bool


_SCHEDULES: WeakKeyDictionary[SegmentPlan, dict] = WeakKeyDictionary()


def cached(plan: SegmentPlan, device: torch.device, make, launch: Launch, block: int, *more) -> torch.Tensor:
    """``make(plan, launch, block, *more)`` as int32 on ``device``, made once per plan.

    The device is that of the rows: the plan's own tensors may be on another one, and no kernel notices.

    Raises:
        RuntimeError: it would be made while a CUDA graph is captured.
    """
    schedules = _SCHEDULES.setdefault(plan, {})
    key = (device, make.__name__, launch, block, *more)
    if key not in schedules:
        items = make(plan, launch, block, *more).to(torch.int32)
        if device.type == "cuda":
            # The graph would copy it anew in each replay, from memory that is given back here, and nothing until then.
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("plan: expected a call with these options before its CUDA graph is captured")
            items = items.pin_memory()  # a copy from pageable memory would wait for all that the GPU still has to do
        schedules[key] = items.to(device, non_blocking=True)
    return schedules[key]


def forward_items(plan: SegmentPlan, launch: Launch, block: int, to_cache: bool) -> torch.Tensor:
    """int64 [items, len(FORWARD)] on the CPU, longest first.

    Args:
        block: packed query rows per tile.
        to_cache: the answer's keys are written too.
    """
    N, S = plan.num_prompt, plan.answer_start
    mixes, segments = plan.num_streams == 2, []
    for sample in _samples(plan):
        p, n, r, a, m, past = sample
        *prompts, answer = _query_parts(plan, sample, launch)
        common = {"prefix_row": past, "prefix_length": m, "second_stream_row": -1, "second_mask": NONE}
        write = {"write_row": p, "write_length": n, "write_mixed": int(mixes)} if mixes or to_cache else {}
        if launch.answer_only and write:  # a tile that only writes
            prompts = [{"q_row": p, "prefix_length": 0}]
        elif (launch.beta or launch.shared_qkv) and prompts:
            second, first = prompts
            mask = second["mask"]
            if launch.shared_qkv and launch.stream_mask != "anti_causal":  # goes on where the causal part ended
                mask = AFTER if launch.stream_mask == "full" else NONE
            prompts = [first | {"second_row": p, "second_stream_row": p, "second_mask": mask}]
        for part in prompts:
            segments.append(common | {"own_row": part["q_row"]} | part | write)
            write = {}  # once
        mixed = {"mixed_row": p, "mixed_length": n}
        written = {"write_row": N + r, "write_length": a} if to_cache else {}
        segments.append(common | answer | {"own_row": S + r, "mask": CAUSAL} | mixed | written)
    items = _table(segments, FORWARD)
    rows = np.maximum(_column(items, FORWARD, "length"), _column(items, FORWARD, "write_length"))
    items = _in_tiles(items, FORWARD, rows * launch.group_size, block)
    work = _visited(items, FORWARD, "mask", launch, block) + _visited(items, FORWARD, "second_mask", launch, block)
    work += 2 * _column(items, FORWARD, "mixed_length") + _column(items, FORWARD, "prefix_length")
    return _longest_first(items, work)


def backward_q_items(plan: SegmentPlan, launch: Launch, block: int) -> torch.Tensor:
    """int64 [items, len(BACKWARD_Q)] on the CPU, longest first. ``block``: packed query rows per tile."""
    S = plan.answer_start
    segments = []
    for sample in _samples(plan):
        p, n, r, a, m, past = sample
        common = {"prefix_row": past, "prefix_length": m}
        *prompts, answer = _query_parts(plan, sample, launch)
        for streams in [prompts] if launch.shared_qkv and prompts else [[part] for part in prompts]:
            q_row = streams[0]["q_row"]
            segment = common | {"q_row": q_row, "own_row": q_row, "length": n, "position": m, "parts": len(streams)}
            segments.append(segment | _numbered(streams))
        segment = common | {"q_row": answer["q_row"], "own_row": S + r, "length": a, "position": m + n, "parts": 1}
        segments.append(segment | {"mixed_row": p, "mixed_length": n} | _numbered([answer | {"mask": CAUSAL}]))
    items = _table(segments, BACKWARD_Q)
    items = _in_tiles(items, BACKWARD_Q, _column(items, BACKWARD_Q, "length") * launch.group_size, block)
    work = _visited(items, BACKWARD_Q, "mask_0", launch, block)
    work += _visited(items, BACKWARD_Q, "mask_1", launch, block) * (_column(items, BACKWARD_Q, "parts") > 1)
    work += 2 * _column(items, BACKWARD_Q, "mixed_length") + _column(items, BACKWARD_Q, "prefix_length")
    return _longest_first(items, work)


def backward_kv_items(plan: SegmentPlan, launch: Launch, block: int) -> torch.Tensor:
    """int64 [items, len(BACKWARD_KV)] on the CPU, longest first. ``block``: keys per tile."""
    N, S = plan.num_prompt, plan.answer_start
    segments = []
    for sample in _samples(plan):
        p, n, r, a, m, past = sample
        *prompts, answer = _query_parts(plan, sample, launch)
        keys = {"length": n, "position": m}
        if plan.num_streams == 2:
            for stream, row in enumerate((p, N + p)):
                segments.append(keys | {"kind": OWN, "k_row": row} | _queries(prompts[stream : stream + 1]))
            segments.append(keys | {"kind": MIXED, "k_row": p} | _queries([answer]))
        else:
            segments.append(keys | {"kind": OWN, "k_row": p} | _queries([*prompts, answer]))
        own = answer | {"mask": CAUSAL}
        segments.append({"kind": OWN, "k_row": S + r, "length": a, "position": m + n} | _queries([own]))
        everyone = [part | {"mask": FULL} for part in (*prompts, answer)]
        segments.append({"kind": PREFIX, "k_row": past, "length": m, "position": 0} | _queries(everyone))
    items = _table(segments, BACKWARD_KV)
    items = _in_tiles(items, BACKWARD_KV, _column(items, BACKWARD_KV, "length"), block)
    work = sum(_seeing(items, part, block, launch.window) for part in range(3)) * launch.group_size
    return _longest_first(items, work)


def _samples(plan: SegmentPlan):
    # first prompt row, prompt rows, first answer row, answer rows, prefix rows, first prefix row
    p = r = past = 0
    for n, a, m in zip(plan.prompt_lengths, plan.answer_lengths, plan.past_lengths, strict=True):
        yield p, n, r, a, m, past
        p, r, past = p + n, r + a, past + m


def _query_parts(plan: SegmentPlan, sample: tuple, launch: Launch) -> list[dict]:
    # The runs of queries of one sample: bidir prompt, causal prompt, answer; each as it sees its own stream's prompt.
    p, n, r, a, m, _ = sample
    N, S, beta, answer_only = plan.num_prompt, plan.answer_start, launch.beta, launch.answer_only
    two = plan.num_streams == 2 or launch.shared_qkv
    parts = []
    if not answer_only:
        run = {"length": n, "position": m, "q_row": p, "stream_row": p, "out_row": p}
        parts.append(run | {"mask": MASKS[launch.stream_mask], "weight": BETA if beta else ONE})
        if two:
            causal = {"q_row": S - N + p, "stream_row": N + p, "out_row": p if beta else N + p}
            parts.append(run | causal | {"mask": CAUSAL, "weight": ONE_MINUS_BETA if beta else ONE})
    before = 0 if answer_only else N * (2 if two else 1)
    answer = {"length": a, "position": m + n, "q_row": (0 if answer_only else S) + r, "stream_row": before + r}
    out_row = before - N * (beta and not answer_only) + r
    return [*parts, answer | {"out_row": out_row, "mask": FULL, "weight": ONE}]


def _numbered(parts: list[dict]) -> dict:
    return {f"{name}_{i}": value for i, part in enumerate(parts) for name, value in part.items()}


def _queries(parts: list[dict]) -> dict:
    return {"parts": len(parts)} | _numbered(parts)


def _table(segments: list[dict], columns: tuple[str, ...]) -> np.ndarray:
    rows = [[segment.get(name, 0) for name in columns] for segment in segments]
    return np.array(rows, np.int64).reshape(-1, len(columns))


def _column(items: np.ndarray, columns: tuple[str, ...], name: str) -> np.ndarray:
    return items[:, columns.index(name)]


def _in_tiles(items, columns, rows, block) -> np.ndarray:
    # Each segment as often as it has tiles, with the number of the tile in "block".
    tiles = (rows + block - 1) // block
    items = items.repeat(tiles, axis=0)
    first = (tiles.cumsum() - tiles).repeat(tiles)
    items[:, columns.index("block")] = np.arange(len(items)) - first
    return items


def _visited(items, columns, mask, launch, block) -> np.ndarray:
    # How many of the segment's own keys the tokens of a tile see, from the first that any sees to the last.
    mask, length, group_size = _column(items, columns, mask), _column(items, columns, "length"), launch.group_size
    first = _column(items, columns, "block") * block // group_size
    last = np.minimum(first + (block + group_size - 1) // group_size, length) - 1
    return _span(mask, first, last, length, launch.window)


def _seeing(items, part, block, window) -> np.ndarray:
    # How many tokens of a run of queries see the keys of a tile.
    mask = _column(items, BACKWARD_KV, f"mask_{part}")
    mirrored = np.array([FULL, ANTI_CAUSAL, CAUSAL])[mask]
    shift = _column(items, BACKWARD_KV, "position") - _column(items, BACKWARD_KV, f"position_{part}")
    first = _column(items, BACKWARD_KV, "block") * block
    last = np.minimum(first + block, _column(items, BACKWARD_KV, "length")) - 1
    return _span(mirrored, first + shift, last + shift, _column(items, BACKWARD_KV, f"length_{part}"), window)


def _span(mask, first, last, length, window) -> np.ndarray:
    low = np.where(mask == ANTI_CAUSAL, first, np.where(mask == AFTER, first + 1, 0))
    high = np.where(mask == CAUSAL, last + 1, length)
    if window is not None:
        low, high = np.maximum(low, first - window + 1), np.minimum(high, last + window)
    span = np.minimum(high, length) - low
    return np.where(mask == NONE, 0, span.clip(0))


def _longest_first(items, work) -> torch.Tensor:
    return torch.from_numpy(items[(-work).argsort(kind="stable")])
