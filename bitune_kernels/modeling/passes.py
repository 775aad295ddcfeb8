"""What is true while a packed batch runs through a backbone: the current pass.

Adapters, attention and trimming ask for it. It is kept per thread beside the model and not in the model's keyword
arguments, because some families drop unknown arguments before their attention is called.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch import nn

from .structure import ATTENTION_NAME, Structure


class _State(threading.local):
    """Of one thread.

    Attributes:
        current: the pass that it is in, or None.
        call: the call of a backbone, over packed or padded rows, that it is in, or None.
        prefilled: whether the next rows of the head are zeros but for the prompts' last tokens.
    """

    def __init__(self):
        self.current = self.call = None
        self.prefilled = False
        self.switched: list[list[tuple]] = []  # (object, name, value outside) of what is switched, outermost first


state = _State()

# A pass switches what belongs to the model (its attention implementation, for one): threads take turns.
one_at_a_time = threading.RLock()


def current() -> Pass | None:
    """The pass that this thread is in, or None."""
    return state.current


@contextmanager
def _switching(*changes: tuple):
    """Inside, attributes have other values: (object, name, value) of each."""
    before = [(x, name, getattr(x, name)) for x, name, _ in changes]
    state.switched.append(before)
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        while any(x is before for x in state.switched):
            _switch_back()


def _switch_back() -> None:
    for change in state.switched[-1]:
        setattr(*change)
    state.switched.pop()


def leave_passes() -> None:
    """Put back what passes of this thread have switched, wherever a KeyboardInterrupt ended them."""
    while state.switched:
        _switch_back()


@contextmanager
def evaluating(model: nn.Module):
    """Inside, evaluation without gradients, in turn; behind it each module is in its own mode again."""
    with one_at_a_time:
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for m in training:
                m.training = True


def new_strides(x: torch.Tensor) -> torch.Tensor:
    """``x`` with the strides of a new tensor, copied only where its rows aren't neighbours.

    A linear layer takes rows that were cut from a longer [1, rows, features] for no matrix, and then multiplies them by
    a copy of its weight if that is frozen (PyTorch 2.13; in bfloat16 on a CPU that takes longer than the product).
    """
    return x.contiguous().view(-1).view(x.shape)


class Past:
    """What a user's cache holds of earlier turns, for a turn that is read by both streams over it."""

    def __init__(self, cache, structure: Structure):
        self.cache, self.structure = cache, structure

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [1, num_heads_kv, m, head_dim] of one of the model's layers; m is less behind a sliding window."""
        kept = self.cache.layers[self.structure.cache_index(self.structure.kv_layers[layer])]
        return kept.keys, kept.values


class Pass:
    """One run of the backbone over packed rows. Subclasses say what attention does.

    Attributes:
        num_rows: rows of every linear's input (T), of which the first ``bidir_rows`` use the adapter "bidir".
        residual_rows: rows outside of attention, fewer than T where that ``doubles``; they use the adapter "causal".
        answer_rows: rows after the last layer's trimming; they all use the adapter "causal".
        chunk: (first, end) of the rows, among all, that an MLP's own modules get now (``row_chunks``), or None: all.
        packed: whether the rows are those of all streams and segments, without padding.
        idle: whether a training step has no rows for the adapter "bidir", since all prompts are one token long. It then
            takes part with nothing: processes wait for each other's gradients, and another has some.
        doubles: whether attention is given the prompt rows twice, the rest of the model once.
        adapter: the adapter that serves all rows, where that isn't the active one ("causal"); else None.
        shared: trained tensors that several layers read. Layers recomputed in the backward pass get them as arguments:
            each one's gradient then ends there, and what the tensors were made from gets one gradient per step, which
            reentrant checkpointing under DistributedDataParallel needs.
        mask: a tensor handed through the backbone as its attention mask. Its identity proves to attention that this
            pass is the one it is called for, and a 4-D mask makes transformers build none of its own. Of bool: FSDP2
            casts floating-point inputs of a layer to its dtype of mixed precision, by a copy.
    """

    packed = idle = doubles = False
    adapter: str | None = None
    shared: tuple[torch.Tensor, ...] = ()
    trims = False
    bidir_rows = num_rows = residual_rows = answer_rows = 0
    chunk: tuple[int, int] | None = None

    def __init__(self, structure: Structure, device):
        self.structure = structure
        self.mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.pending: torch.Tensor | None = None  # of an MLP: its first chunks, until its own call has run the last

    def attend(self, module, query, key, value, scaling, softcap, sinks):
        """The attention of one layer, [batch, heads, rows, head_dim] -> [batch, rows, heads, head_dim]."""
        raise NotImplementedError

    def double(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor that attention is called with; if it has rows, those of the prompt twice, bidirectional first."""
        raise NotImplementedError

    def undouble(self, x: torch.Tensor) -> torch.Tensor:
        """The output of such an attention without the first of the prompt rows."""
        raise NotImplementedError

    def repeats(self, module: nn.Module) -> bool:
        """Whether the input of ``module`` has the same prompt rows for both streams."""
        return self.doubles and id(module) in self.structure.direct

    def owns(self, mask: torch.Tensor | None) -> bool:
        """Whether ``mask`` is this pass's own, or the view of it that reentrant checkpointing detaches."""
        if mask is self.mask:
            return True
        return mask is not None and mask.shape == self.mask.shape and mask.data_ptr() == self.mask.data_ptr()

    def split(self, x: torch.Tensor) -> tuple[int, int] | None:
        """(dim, n) where rows [0, n) of ``x`` along dim belong to the adapter "bidir", or None if no row does."""
        bidir_rows = self.bidir_rows
        if not bidir_rows and not self.idle:
            return None
        # [1, rows, features] or token ids [1, rows]; some families flatten to [rows, features] before a linear
        flat = (x.ndim == 2 and x.is_floating_point()) or x.shape[0] != 1
        dim = 0 if flat else 1
        rows = x.shape[dim]
        if self.chunk is not None and rows == self.chunk[1] - self.chunk[0]:
            n = 0 if self.doubles else min(max(bidir_rows - self.chunk[0], 0), rows)
            return (dim, n) if n else None
        if rows == self.num_rows:
            return dim, bidir_rows
        if rows in (self.answer_rows, self.residual_rows):
            return None
        raise RuntimeError(
            f"an adapted module got {rows} rows, expected all {self.num_rows} or the {self.answer_rows} answer rows: "
            "modules that see a selection of the tokens (experts, for example), or heads in front of the tokens (norms "
            "of queries and keys in some families), can't have two adapters"
        )

    @contextmanager
    def active(self):
        """Inside, this is the current pass and attention is ours. May be entered again within itself."""
        adapted = [] if self.adapter is None else self.structure.adapted
        # PEFT's public set_adapter also switches requires_grad, which must not change in the middle of a pass.
        with _switching(
            (state, "current", self),
            *((c, "_attn_implementation", ATTENTION_NAME) for c in self.structure.configs),
            *((m, "_active_adapter", [self.adapter]) for m in adapted),
        ):
            yield self

    @contextmanager
    def checkpointing(self):
        """Inside, layers recomputed in the backward pass find this pass again, long after it has ended."""
        if not torch.is_grad_enabled():
            yield self
            return
        trimmed = self.structure.trim.layer if self.trims else None
        # The trimmed layer's hooks would not run again in a recomputation, so it keeps its activations. Its flag is the
        # user's, who may change it before an interrupted pass is ended.
        functions = [
            (m, name, _run if m is trimmed else self._resumed(getattr(m, name)))
            for m, name in self.structure.checkpointed
        ]
        with _switching(*functions):
            yield self

    def _resumed(self, checkpoint):
        def checkpointed(run, *args, **kwargs):
            def run_in_pass(*inner, **named):
                shared, self.shared = self.shared, inner[:count]
                try:
                    with one_at_a_time, self.active():
                        return run(*inner[count:], **named)
                finally:
                    self.shared = shared

            count = len(self.shared)
            return checkpoint(run_in_pass, *self.shared, *args, **kwargs)

        return checkpointed


def _run(function, *args):
    # in the place of a checkpoint function
    return function(*args)


def attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function that transformers calls during a pass."""
    p = current()
    if p is None or not p.owns(attention_mask):
        raise RuntimeError(
            f"{type(module).__name__}: attention of a Bitune pass was called outside of it, or with another mask; "
            "this model family rewrites the attention mask and can't be used"
        )
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 in training with Bitune, got {dropout}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return p.attend(module, query, key, value, scaling, kwargs.get("softcap"), kwargs.get("s_aux")), None
