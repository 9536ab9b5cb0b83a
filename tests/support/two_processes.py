"""Record the trajectory of each method on the processes that torchrun starts, in one Python process per rank."""

import sys
from pathlib import Path

from tests.support.trajectories import METHODS, train_trajectory

for method in METHODS:
    train_trajectory(method, Path(sys.argv[1]) / method, "--train_batch_size", "4")
