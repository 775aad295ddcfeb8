"""Bitune (arXiv 2405.14862) at the speed of the hardware: one pass instead of three.

Importing this package needs torch only; transformers and peft load with the model classes.
"""

from ._version import __version__
from .config import BituneConfig
from .mixing import MixingCoefficients
from .ops import bitune_attention, bitune_prefill, mix_kv
from .plan import SegmentPlan

_MODELING = ("BituneChat", "BituneModel", "get_bitune_model", "load_official_checkpoint")

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
    if name in _MODELING:
        from . import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
