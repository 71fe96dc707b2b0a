"""One thread for each process: many tests start several, and waiting OpenMP threads of one starve the others."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
