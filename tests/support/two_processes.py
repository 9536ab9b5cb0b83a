"""Follow the trajectory of each method on the processes that torchrun starts: one start of Python for all of them."""

import sys
from pathlib import Path

from tests.support.trajectories import METHODS, follow

for method in METHODS:
    follow(method, Path(sys.argv[1]) / method, "--train_batch_size", "4")
