"""Test the output folder: what a run refuses, locks, deletes and leaves behind."""

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from safetensors import SafetensorError

from diffusers_cfg import files
from diffusers_cfg.config import UserError
from diffusers_cfg.engine.log import Log
from diffusers_cfg.engine.output import (
    Unfinished,
    check_inputs,
    check_output_dir,
    delete_run,
    saved_together,
)
from diffusers_cfg.engine.record import describe_demo
from diffusers_cfg.files import locked, remove
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.guided import GuidedMethod
from diffusers_cfg.settings import TrainConfig
from tests.support import runs
from tests.support.runs import ONE_LEVEL, WEIGHTS, distill


def train(output_dir: Path, *argv: str) -> None:
    runs.train(output_dir, *ONE_LEVEL, *argv)


def make_tree(root: Path, *paths: str) -> None:
    """Create files, folders (`name/`) and links (`name -> target`) below a folder."""
    for path in paths:
        name, _, target = path.partition(" -> ")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / name).symlink_to(root / target)
        elif name.endswith("/"):
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).write_text(name)


def tree(root: Path) -> set[str]:
    """Return the paths of all files and links below a folder, and of empty folders."""
    found = [path for path in root.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]
    return {path.relative_to(root).as_posix() for path in found}


@pytest.mark.parametrize(
    ("existing", "output_dir", "message"),
    [
        ([], "out", None),
        ([], "a/b/c", None),
        (["out/"], "out", None),
        (["out/.lock"], "out", None),  # of a run that has ended before it wrote anything
        (["out/notes.txt"], "out", "out is not empty. Resume with --resume_from_checkpoint latest"),
        (["out"], "out", "out cannot be a folder, because .*out is not one"),
        (["file"], "file/out", "cannot be a folder, because .*file is not one"),
        (["out -> nowhere"], "out", "cannot be a folder, because .*out is not one"),
        (["real/", "out -> real"], "out", None),
        ([], "x" * 300, "cannot be written: .*File name too long"),
        ([], "a\0b", "cannot be written: embedded null"),
        ([], "/proc/out", "'/proc/out' cannot be written"),
    ],
)
def test_output_dir_is_checked_before_any_work(tmp_path, existing, output_dir, message):
    make_tree(tmp_path, *existing)
    config = TrainConfig(output_dir=str(tmp_path / output_dir))
    before = tree(tmp_path)
    if message is None:
        check_output_dir(config)
    else:
        with pytest.raises(UserError, match=message):
            check_output_dir(config)
    assert tree(tmp_path) == before


def test_read_only_folder_raises(tmp_path, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"cannot be written: \[Errno 30\] Read-only file system.*Pass a different"):
        train(tmp_path / "out", "--dry_run")


@pytest.mark.parametrize(
    ("output_dir", "settings", "message"),
    [
        ("model", {"pretrained_model_name_or_path": "model"}, "is or contains .*model, which the run reads"),
        ("model", {"pretrained_model_name_or_path": "link"}, "is or contains .*link, which the run reads"),
        ("link", {"pretrained_model_name_or_path": "model"}, "is or contains .*model, which the run reads"),
        ("model/../model", {"pretrained_model_name_or_path": "model"}, "is or contains"),
        (".", {"pretrained_model_name_or_path": "model"}, "is or contains"),
        ("model", {"pretrained_vae_model_name_or_path": "model/vae"}, "is or contains"),
        ("model", {"model_config_name_or_path": "model/unet.json"}, "is or contains"),
        ("photos", {"train_data_dir": "photos"}, "is or contains .*photos, which the run reads"),
        (
            "photos/model",
            {"train_data_dir": "photos"},
            "lies in the data folder .*photos, where its images",
        ),
        ("photos/a/model", {"dataset_name": "photos"}, "lies in the data folder"),
        ("photos", {"dataset_name": "photos"}, "is or contains"),
        ("model/student", {"pretrained_model_name_or_path": "model"}, None),
        ("photos-model", {"train_data_dir": "photos"}, None),
        ("photos", {"dataset_name": "someone/photos"}, None),  # on the Hub
    ],
)
def test_output_dir_is_not_what_the_run_reads(tmp_path, monkeypatch, output_dir, settings, message):
    make_tree(tmp_path, "model/vae/config.json", "model/unet.json", "link -> model", "photos/a/1.png")
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(output_dir=output_dir, overwrite_output_dir=True, **{"resolution": 8, **settings})
    if message is None:
        check_inputs(config)
    else:
        with pytest.raises(UserError, match=message):
            check_inputs(config)


def test_teacher_is_not_overwritten(trained_model, tmp_path):
    with pytest.raises(UserError, match="is or contains .*, which the run reads"):
        distill(trained_model, trained_model, "--overwrite_output_dir")
    assert (trained_model / "unet" / WEIGHTS).is_file()


RUN = [
    "train_config.yaml", "run.json", "model_index.json", "pipeline_cfg.py", "unet/config.json", "scheduler/config.json",
    "samples/step-4.png", "checkpoint-4/state.json", "tmp-checkpoint-6/state.json", "old-checkpoint-6/state.json",
    "tmp-model/run.json", "posthoc_ema/step-4.safetensors", "logs/diffusers-cfg/events", "evaluation/metrics.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("others", "flags", "left"),
    [
        ([], {}, []),
        (["thesis.tex", "data/1.png"], {}, ["thesis.tex", "data/1.png"]),
        # Names that only look like those of a run
        (["checkpoint-best/w", "tmp-notes", "unet.md"], {}, ["checkpoint-best/w", "tmp-notes", "unet.md"]),
        # In folders of a run
        (["samples/mine.png", "logs/mine/e"], {}, ["samples/mine.png", "logs/mine/e"]),
        (["data/1.png"], {"logging_dir": "data"}, ["data/1.png", "logs/diffusers-cfg/events"]),
        # Links, but not their targets
        (["vae -> kept", "kept/w"], {}, ["kept/w"]),
        (["checkpoint-8 -> kept", "kept/w"], {}, ["kept/w"]),
        (["mine -> kept", "kept/w"], {}, ["mine", "kept/w"]),
    ],
)
def test_overwriting_deletes_only_what_runs_write(tmp_path, others, flags, left):
    make_tree(tmp_path, *RUN, *others)
    delete_run(TrainConfig(output_dir=str(tmp_path), **flags))
    assert tree(tmp_path) == set(left)


@pytest.mark.parametrize("name", ["samples", "logs"])
def test_overwriting_unlinks_a_linked_folder(tmp_path, name):
    make_tree(tmp_path, "out/train_config.yaml", "kept/step-1.png", "kept/diffusers-cfg/events")
    (tmp_path / "out" / name).symlink_to(tmp_path / "kept")
    delete_run(TrainConfig(output_dir=str(tmp_path / "out")))
    assert tree(tmp_path) == {"out", "kept/step-1.png", "kept/diffusers-cfg/events"}


def test_overwriting_a_folder_without_a_run_deletes_nothing(tmp_path):
    make_tree(tmp_path, "unet/thesis.tex", "samples/step-1.png", "vae/w")
    before = tree(tmp_path)
    delete_run(TrainConfig(output_dir=str(tmp_path)))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["tmp-checkpoint-2", "checkpoint-2"])
def test_checkpoint_is_not_written_through_a_link(tmp_path, name):
    make_tree(tmp_path, "kept/w", f"out/{name} -> kept")
    train(tmp_path / "out", "--overwrite_output_dir", "--max_train_steps", "2")
    assert tree(tmp_path / "kept") == {"w"}
    assert not (tmp_path / "out" / "checkpoint-2").is_symlink()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "missing"])
def test_remove(tmp_path, kind):
    make_tree(tmp_path, "file", "folder/f", "kept/f", "link -> kept", "dangling -> nowhere")
    remove(tmp_path / kind)
    assert not os.path.lexists(tmp_path / kind)
    assert (tmp_path / "kept" / "f").is_file()


def hold(output_dir: Path, held: Event) -> None:
    with locked(output_dir, "--output_dir"):
        held.set()
        time.sleep(100)


def test_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    context = multiprocessing.get_context("fork")
    first = context.Process(target=hold, args=(tmp_path / "out", held := context.Event()))
    first.start()
    try:
        assert held.wait(60)
        message = f"out is in use by process {first.pid} on .*. Wait until it has ended"
        for flags in ([], ["--dry_run"], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
            with pytest.raises(UserError, match=message):
                train(tmp_path / "out", *flags)
        with pytest.raises(UserError, match=message), locked(tmp_path / "out", "--output_dir"):
            pass
        assert tree(tmp_path) == {"out/.lock"}
    finally:
        first.kill()  # as the out-of-memory killer does
        first.join()
    with locked(tmp_path / "out", "--output_dir"):
        assert f"process {os.getpid()} on " in (tmp_path / "out" / ".lock").read_text()


@pytest.mark.parametrize("is_windows", [False, True])
def test_folder_that_cannot_be_locked_is_used_with_a_warning(is_windows, tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if is_windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "lockf", unsupported)
    with locked(tmp_path, "--output_dir"):
        reason = "import of fcntl halted" if is_windows else "No locks available"
        assert re.search(rf"cannot be locked \(.*{reason}.*\). Do not let a second process write to it", caplog.text)


def fails(error: Exception) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("new")
        raise error

    return save


@pytest.mark.parametrize(
    ("error", "existing", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left"),
            [],
            "not be saved: .*No space left. There is no checkpoint",
        ),
        (SafetensorError("I/O error"), ["checkpoint-2/a", "checkpoint-10/a"], "error. .*checkpoint-10 is safe.*latest"),
        (OSError(errno.EDQUOT, "Quota"), ["unet/config.json", "model_index.json"], "Quota"),
        (OSError(errno.EIO, "Input/output error"), ["tmp-model/old"], "Input/output error"),
    ],
)
def test_failed_save_changes_nothing_and_says_what_is_safe(tmp_path, error, existing, message):
    make_tree(tmp_path, *existing)
    before = tree(tmp_path) - {"tmp-model/old"}
    with pytest.raises(Unfinished, match=message), saved_together(tmp_path) as folder:
        fails(error)(folder)
    assert tree(tmp_path) == before


def test_interrupted_save_leaves_no_files(tmp_path):
    def interrupted(folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), saved_together(tmp_path) as folder:
        interrupted(folder)
    assert tree(tmp_path) == set()


def test_saved_model_replaces_the_previous_one_with_its_index_last(tmp_path, monkeypatch):
    make_tree(tmp_path, "unet/config.json", "unet/old", "model_index.json", "notes.txt")
    renamed, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (renamed.append(target.name), rename(path, target)))
    with saved_together(tmp_path) as folder:
        make_tree(folder, "model_index.json", "run.json", "unet/config.json", "unet/new")
    assert tree(tmp_path) == {"model_index.json", "run.json", "unet/config.json", "unet/new", "notes.txt"}
    assert renamed[-1] == "model_index.json"


def test_full_disk_at_the_end_can_be_resumed(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(GuidedMethod, "save", lambda self, folder: fails(OSError(errno.ENOSPC, "No space left"))(folder))
        with pytest.raises(Unfinished, match=r"The training has finished, but .*checkpoint-4 is safe.*latest"):
            train(tmp_path / "out")
    assert not (tmp_path / "out" / "unet").exists()
    train(tmp_path / "out", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / "unet" / WEIGHTS).is_file()
    printed = capsys.readouterr().out
    assert "Saved the pipeline" in printed
    assert printed.endswith(f"\npython training/demo.py --model {tmp_path / 'out'}\n")


def test_the_command_of_the_demo_can_be_pasted_into_a_shell():
    assert describe_demo("my model").endswith("\npython training/demo.py --model 'my model'")


def test_disk_error_during_the_run_says_what_is_safe(tmp_path, monkeypatch):
    def broken(self, step, *_):
        if step == 3:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Log, "log_step", broken)
    with pytest.raises(Unfinished, match=r"Stopped at step 3: .*Input/output error. .*checkpoint-2 is safe"):
        train(tmp_path / "out")


def test_full_disk_does_not_damage_the_settings_of_a_resumed_run(trained_model, tmp_path, monkeypatch):
    out = Path(shutil.copytree(trained_model, tmp_path / "out"))
    before = (out / "train_config.yaml").read_text()

    def half(self, path: Path) -> None:
        path.write_text("data")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CFGConfig, "save", half)
    with pytest.raises(UserError, match="out cannot be written: .*No space left on device"):
        runs.train(out, "--resume_from_checkpoint", "latest", "--conditioning_dropout_prob", "0.2")
    assert (out / "train_config.yaml").read_text() == before
