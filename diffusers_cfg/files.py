"""Check and lock folders, write files atomically, delete them without following links, and hash their contents."""

import hashlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_cfg.config import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


def check_writable(folder: Path, flag: str) -> None:
    """Raise UserError if files cannot be written to the folder of a flag, which need not exist. Write nothing."""
    try:
        folder.resolve()  # raises ValueError for a null character
        folders = folder.absolute(), *folder.absolute().parents
        existing = next(path for path in folders if path.exists() or path.is_symlink())
        if existing.is_dir():
            tempfile.TemporaryFile(dir=existing).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {str(folder)!r} cannot be written: {error}. Pass a different folder.") from error
    if not existing.is_dir():
        raise UserError(f"{flag} {folder} cannot be a folder, because {existing} is not one. Pass a folder.")


def refuse_data_folder(output_dir: Path, data: Mapping[str, Any]) -> None:
    """Raise UserError if an output folder lies in the folder of the data, whose readers would take it as data."""
    for source in (data.get("train_data_dir"), data.get("dataset_name")):
        if source and Path(source).is_dir() and output_dir.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--output_dir {output_dir} lies in the data folder {source}, where its images would be read as data. "
                "Choose a different folder."
            )


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """
    Lock the folder of a flag inside the block. The system releases the lock when the process ends, however it ends.

    Raises:
        UserError: if another process holds the lock. The message names the process and its host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
        lock(file, folder, flag)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_unlocked(folder: Path, flag: str) -> None:
    """Raise UserError if another process has locked the folder of a flag."""
    if (folder / LOCK_FILE).exists():
        with (folder / LOCK_FILE).open("r+") as file:
            lock(file, folder, flag)


def lock(file: IO[str], folder: Path, flag: str) -> None:
    """Lock a file, with a POSIX lock: it also works on NFS, and the workers that a process forks do not inherit it."""
    try:
        import fcntl  # Windows has none

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"{flag} {folder} is in use by {file.read() or 'another process'}. Wait until it has ended, stop it, or "
            "pass a different folder."
        ) from None
    except (ImportError, OSError) as error:
        logger.warning("%s cannot be locked (%s). Do not let a second process write to it.", folder, error)


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
    """Raise OSError for files that cannot be read or written in the block, for which safetensors has its own error."""
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


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG file atomically."""
    with atomic_write(path) as unfinished:
        image.save(unfinished, "PNG")


def write_safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write tensors and metadata to a safetensors file atomically."""
    with atomic_write(path) as unfinished, disk_errors():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the memory-mapped tensors of a safetensors file, and its metadata. Raise OSError if it is damaged."""
    with disk_errors(), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


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
