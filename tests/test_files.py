"""Test atomic writes and hashes of files."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cfg import files
from diffusers_cfg.files import atomic_write, checksum, digest, fsync, write_safetensors


def test_atomic_write_replaces_the_file_after_the_block(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with atomic_write(path) as unfinished:
        unfinished.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_atomic_write_keeps_the_old_file_on_errors(tmp_path):
    def write(path):
        with atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("No space left on device")

    for content in (None, "first"):
        if content is not None:
            (tmp_path / "file.txt").write_text(content)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "file.txt")
        assert [file.read_text() for file in tmp_path.iterdir()] == ([] if content is None else [content])


def test_write_safetensors_accepts_any_layout(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_safetensors(tensors, {"key": "value"}, tmp_path / "file.safetensors")
    loaded = load_file(tmp_path / "file.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tensors, {}, tmp_path / "other.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


def test_fsync_accepts_files_and_folders(tmp_path, monkeypatch):
    calls, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(original(descriptor)))
    (tmp_path / "file").write_text("x")
    fsync(tmp_path / "file")
    fsync(tmp_path)
    assert len(calls) == 2


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1_000_000)
    assert checksum(tmp_path / "file") == hashlib.sha256(b"x" * 1_000_000).hexdigest()


def test_digest_depends_on_values_and_names_only():
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(3)
    original = digest({"a": a, "b": b})
    assert len(original) == 8
    assert digest({"b": b, "a": a.clone()}) == digest({"a": a.t().contiguous().t(), "b": b}) == original
    assert digest({"a": b, "b": a}) != original
    assert digest({"a": a + 1, "b": b}) != original
    # The hash of the bytes in memory, for every dtype
    for tensor in (a.half(), a.bool(), a.long(), torch.zeros(0)):
        expected = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=4).hexdigest()
        assert digest({"a": tensor}) == expected
    assert digest({"a": a.bfloat16()}) != digest({"a": (a + 1).bfloat16()})
