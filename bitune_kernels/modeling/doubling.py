"""Attention that is given the prompt's rows twice, while the rest of the model has them once.

The single-stream variant with a second adapter on what makes queries, keys and values needs two sets of these from the
same rows. What comes out of the bidirectional half is dropped again in front of the first module behind attention: the
attention function has mixed it into the other half.
"""

from __future__ import annotations

import torch

from .adapters import outermost
from .passes import Pass, current
from .structure import Structure


class DoublingHooks:
    """Attached to every attention module for the life of a Bitune model of that variant."""

    def __init__(self, structure: Structure):
        self.handles = []
        for projections in structure.projections:
            leave = outermost(projections.exit, structure.adapted)
            self.handles += [
                projections.attention.register_forward_pre_hook(self.enter, with_kwargs=True),
                # before the hooks that trim the last layer and split the rows among the adapters
                leave.register_forward_pre_hook(self.leave, prepend=True),
            ]

    @staticmethod
    def _pass() -> Pass | None:
        p = current()
        return p if p is not None and p.doubles else None

    def enter(self, attention, args, kwargs):
        p = self._pass()
        if p is None:
            return None

        def twice(x):
            if isinstance(x, (tuple, list)):  # cosines and sines
                return type(x)(map(twice, x))
            return p.double(x) if isinstance(x, torch.Tensor) and not p.owns(x) else x

        return tuple(map(twice, args)), {name: twice(x) for name, x in kwargs.items()}

    def leave(self, module, args):
        p = self._pass()
        return None if p is None else (p.undouble(args[0]), *args[1:])
