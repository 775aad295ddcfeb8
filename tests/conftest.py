"""Settings of every test process."""

import gc
import os
from dataclasses import replace
from importlib.util import find_spec

# Tests run in parallel processes: more threads than cores would make each of them wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. Read when their modules are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

    if find_spec("triton") is not None:
        from triton.runtime import interpreter

        # A third of its time goes into checks of integer overflow: tests/test_kernel_bugs.py switches them on.
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)


def pytest_collection_finish():
    # What the imports have made stays: without this every gc.collect(), of memory measurements and torch.compile, walks
    # through it again, a quarter of a second each time.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    # Minutes each: begun first, so that no process waits for them at the end.
    long = ("test_wheel_with_cuda", "test_the_tiles_of_the_table_compile")
    items.sort(key=lambda item: not item.name.startswith(long))
