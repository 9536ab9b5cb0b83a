"""Record the trajectory of each method on the processes that torchrun starts, in one Python process per rank."""

import sys
from pathlib import Path

from tests.support.trajectories import METHODS, follow

for method in METHODS:
    follow(method, Path(sys.argv[1]) / method, "--train_batch_size", "4")
