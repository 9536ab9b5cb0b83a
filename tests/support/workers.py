"""DataLoader workers that die."""

import os
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from diffusers_cfg.data.decoding import to_array


def deadly(number: int, how: int) -> Callable[..., np.ndarray]:
    """Return a `to_array` that sends a signal to its worker if the image's first pixel has a value."""

    def decode(image: Image.Image, *args) -> np.ndarray:
        array = to_array(image, *args)
        if array.flat[0] == number and get_worker_info() is not None:
            os.kill(os.getpid(), how)
        return array

    return decode
