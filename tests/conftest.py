"""Settings of every test process."""

import os

# Tests run in parallel processes: more threads than cores would make each of them wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. Read when their modules are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
