"""One thread a process: tests' tensors are small, and threads that wait for a busy core waste it."""

import os

# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
