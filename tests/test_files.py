"""Files that are whole or absent, and hashes of their contents."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cfg import files
from diffusers_cfg.files import atomic_write, checksum, digest, fsync, write_safetensors


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
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


def test_a_file_stays_as_it_is_if_writing_fails(tmp_path):
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


def test_tensors_in_any_layout_are_written_with_metadata(tmp_path, monkeypatch):
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


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(real(descriptor)))
    (tmp_path / "file").write_text("x")
    fsync(tmp_path / "file")
    fsync(tmp_path)
    assert len(synced) == 2


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1_000_000)
    assert checksum(tmp_path / "file") == hashlib.sha256(b"x" * 1_000_000).hexdigest()


def test_the_digest_is_of_values_in_the_order_of_their_names():
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(3)
    name = digest({"a": a, "b": b})
    assert len(name) == 8
    assert digest({"b": b, "a": a.clone()}) == digest({"a": a.t().contiguous().t(), "b": b}) == name
    assert digest({"a": b, "b": a}) != name
    assert digest({"a": a + 1, "b": b}) != name
    # The same name as that of the bytes in memory, for every type
    for tensor in (a.half(), a.bool(), a.long(), torch.zeros(0)):
        expected = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=4).hexdigest()
        assert digest({"a": tensor}) == expected
    assert digest({"a": a.bfloat16()}) != digest({"a": (a + 1).bfloat16()})
