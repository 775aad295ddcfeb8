"""The synthetic language of ``quality.py``: skills that a base model is pretrained on, and tasks that it is tuned for.

A text is ``ASK x1 .. x8 OPERATION : answer END`` (LOOK has an argument behind it), one token each but the answer; the
prompt ends with the colon. What is to be done with the items is said behind them, so a causal model reads them before
it knows. The operation of a task does not occur in the pretraining text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

ITEMS = 8  # between ASK and the operation
PAD, ASK, COLON, END = range(4)
SYMBOLS = range(4, 20)
OPERATIONS = ("SORT", "COPY", "REV", "LOOK", "UNQ", "BACK")
VOCAB = SYMBOLS.stop + len(OPERATIONS)


class Batch(NamedTuple):
    """Samples, padded on the right.

    Attributes:
        ids: int64 [batch, seq].
        mask: int64 [batch, seq], 1 at real tokens.
        labels: int64 [batch, seq], the answer with its END, and -100 elsewhere.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def at(self, samples: torch.Tensor | slice) -> Batch:
        return Batch(*(x[samples] for x in self))


def _distinct(n: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """[n, count] symbols that differ within each row."""
    return torch.rand(n, len(SYMBOLS), generator=generator).argsort(1)[:, :count] + SYMBOLS.start


def _any(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(SYMBOLS.start, SYMBOLS.stop, (n, ITEMS), generator=generator)


def _sort(n: int, generator: torch.Generator):
    x = _any(n, generator)
    return x, None, x.sort(1).values


def _copy(n: int, generator: torch.Generator):
    x = _any(n, generator)
    return x, None, x


def _reverse(n: int, generator: torch.Generator):
    x = _any(n, generator)
    return x, None, x.flip(1)


def _look_up(n: int, generator: torch.Generator):
    """Four edges a b in any order, and one of the a, whose b is the answer."""
    x = _distinct(n, ITEMS, generator)
    edge = torch.randint(ITEMS // 2, (n, 1), generator=generator)
    return x, x.gather(1, 2 * edge), x.gather(1, 2 * edge + 1)


def _unique(n: int, generator: torch.Generator):
    """The one symbol that occurs once; the others occur two, two and three times."""
    symbols = _distinct(n, 4, generator)
    items = symbols.repeat_interleave(torch.tensor([1, 2, 2, 3]), dim=1)
    return items.gather(1, torch.rand(n, ITEMS, generator=generator).argsort(1)), None, symbols[:, :1]


# Operation -> (n, generator) -> items [n, 8], an argument [n, 1] or None, answers [n, length].
SAMPLERS: dict[str, Callable] = {
    "SORT": _sort,
    "COPY": _copy,
    "REV": _reverse,
    "LOOK": _look_up,
    "UNQ": _unique,
    "BACK": _reverse,
}
SKILLS = ("SORT", "COPY", "REV", "LOOK")  # of the pretraining text


class Task(NamedTuple):
    """What a model is tuned for.

    Attributes:
        operation: asked for in every example.
        examples: how many there are; None: every batch is new.
        steps: updates.
    """

    operation: str
    examples: int | None
    steps: int


# unique: the items have to be compared with each other, for which a causal prompt knows too little. renamed: the base
# can do it already, under another name, and few examples are there to say so: what the base computes has to survive.
TASKS = {"unique": Task("UNQ", None, 200), "renamed": Task("BACK", 32, 60)}


def samples(operation: str, n: int, generator: torch.Generator) -> Batch:
    """``n`` samples of one operation, all of one length."""
    items, argument, answer = SAMPLERS[operation](n, generator)

    def column(token: int) -> torch.Tensor:
        return torch.full((n, 1), token)

    name = column(SYMBOLS.stop + OPERATIONS.index(operation))
    prompt = torch.cat([column(ASK), items, name, *([] if argument is None else [argument]), column(COLON)], dim=1)
    answer = torch.cat([answer, column(END)], dim=1)
    ids = torch.cat([prompt, answer], dim=1)
    return Batch(ids, torch.ones_like(ids), torch.cat([torch.full_like(prompt, -100), answer], dim=1))


def joined(batches: list[Batch]) -> Batch:
    """One batch of several, padded to the longest."""
    width = max(b.ids.shape[1] for b in batches)
    columns = zip(*batches, strict=True)
    return Batch(
        *(
            torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in column])
            for column, fill in zip(columns, (PAD, 0, -100), strict=True)
        )
    )
