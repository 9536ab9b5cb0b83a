"""DataLoader workers that die."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_array


def deadly(number: int, how: int) -> Callable[..., np.ndarray]:
    """Return a `to_array` that sends a signal to its worker if the image's first pixel has a value."""

    def decode(image: Image.Image, *args) -> np.ndarray:
        array = to_array(image, *args)
        if array.flat[0] == number and get_worker_info() is not None:
            os.kill(os.getpid(), how)
        return array

    return decode


def error_in_process(function: Callable[..., None], *args, start_method: str) -> str:
    """
    Run a function in a process of its own, and return the text of its UserError.

    Workers die there, since torch raises its error about them from a signal handler, anywhere in the main process:
    what it was closing just then is left half closed, and the next test would see that.
    """
    context = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report_error, args=(sender, function, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(120) else "No answer in two minutes."
    finally:
        process.kill()
        process.join()


def report_error(sender: Connection, function: Callable[..., None], *args) -> None:
    """Run a function, and send the text of its UserError."""
    try:
        function(*args)
    except UserError as error:
        sender.send(str(error))
    else:
        sender.send("No error.")
