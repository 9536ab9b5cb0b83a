"""Simulate DataLoader workers that die."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_array


def killing_decoder(number: int, how: int) -> Callable[..., np.ndarray]:
    """Return a replacement for `to_array` that sends signal `how` to its worker if the first pixel is `number`."""

    def decode(image: Image.Image, *args) -> np.ndarray:
        array = to_array(image, *args)
        if array.flat[0] == number and get_worker_info() is not None:
            os.kill(os.getpid(), how)
        return array

    return decode


def error_in_process(function: Callable[..., None], *args, start_method: str) -> str:
    """
    Run a function in a new process, and return the text of its UserError.

    torch reports dead workers from a signal handler, which can interrupt the main process anywhere and leave resources
    half closed. In a new process, this does not affect other tests.
    """
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(["tests.support.runs"])  # imported once for all processes
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report_error, args=(sender, function, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(120) else "No answer within two minutes."
    finally:
        process.kill()
        process.join()


def report_error(sender: Connection, function: Callable[..., None], *args) -> None:
    """Run a function and send the text of its UserError."""
    multiprocessing.set_start_method("fork", force=True)  # so that workers inherit what the function has replaced
    try:
        function(*args)
    except UserError as error:
        sender.send(str(error))
    else:
        sender.send("No error.")
