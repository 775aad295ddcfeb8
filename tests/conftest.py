"""Settings of every test process."""

import os

# Tests run in parallel processes: more threads than cores would make each of them wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU the Triton kernels run in its interpreter, which has to be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
