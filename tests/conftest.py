"""Settings of every test process."""

import os

# Tests run in parallel processes: more threads than cores would make each of them wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
