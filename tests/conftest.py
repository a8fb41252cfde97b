"""One thread per process: ranks are forked, and OpenMP's threads do not survive a fork."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
