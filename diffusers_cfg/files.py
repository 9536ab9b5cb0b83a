"""Write files atomically, delete them without following links, and hash their contents."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` after the block, or is deleted if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError for errors of the disk inside the block. safetensors raises its own, such as for a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link but not its target. Do nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write tensors and metadata to a safetensors file atomically."""
    with atomic_write(path) as unfinished, disk_errors():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the SHA-256 hash of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return a short hash of tensors: of their bytes, in the order of their names, in hexadecimal."""
    total = hashlib.blake2b(digest_size=4)
    for _, tensor in sorted(tensors.items()):
        total.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)  # as bytes: NumPy has no bfloat16
    return total.hexdigest()
