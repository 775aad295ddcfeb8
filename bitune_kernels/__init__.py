"""Bitune (arXiv 2405.14862) at the speed of the hardware: one pass instead of three.

Importing this package loads nothing else, so that the command line prints its help at once. The operators need torch
alone; transformers and peft load with the model classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .config import BituneConfig
    from .mixing import MixingCoefficients
    from .modeling import BituneChat, BituneModel, get_bitune_model, load_official_checkpoint
    from .ops import bitune_attention, bitune_prefill, mix_kv
    from .plan import SegmentPlan

_MODULES = {
    "BituneChat": "modeling",
    "BituneConfig": "config",
    "BituneModel": "modeling",
    "MixingCoefficients": "mixing",
    "SegmentPlan": "plan",
    "bitune_attention": "ops",
    "bitune_prefill": "ops",
    "get_bitune_model": "modeling",
    "load_official_checkpoint": "modeling",
    "mix_kv": "ops",
}

__all__ = [
    "BituneChat",
    "BituneConfig",
    "BituneModel",
    "MixingCoefficients",
    "SegmentPlan",
    "__version__",
    "bitune_attention",
    "bitune_prefill",
    "get_bitune_model",
    "load_official_checkpoint",
    "mix_kv",
]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
