"""What tests and benchmarks share: one table of cases and one rule for how exact a backend must be."""

from .cases import CASES, DTYPES, Case, assert_prefilled, leaves
from .error_budget import (
    assert_backend_within_budget,
    assert_within_budget,
    default_device,
    low_precision,
    oracle,
    run_case,
    runnable_backends,
)

__all__ = [
    "CASES",
    "DTYPES",
    "Case",
    "assert_backend_within_budget",
    "assert_prefilled",
    "assert_within_budget",
    "default_device",
    "leaves",
    "low_precision",
    "oracle",
    "run_case",
    "runnable_backends",
]
