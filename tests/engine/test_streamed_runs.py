"""Test runs on streamed data: exact resume, the length of a run, and dead workers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets, sources
from diffusers_cfg.engine import batches
from diffusers_cfg.engine.preemption import Preempted, Preemption
from diffusers_cfg.evaluation.sweep import load_data
from diffusers_cfg.methods import cfg
from diffusers_cfg.model_files import checkpoints
from tests.support import runs
from tests.support.images import SPLITS_CARD, save_class_folders, save_shards
from tests.support.runs import TINY, WEIGHTS, assert_same_tensors, launch, start, train
from tests.support.workers import error_in_process, killing_decoder

ROOT = Path(__file__).parents[2]
# Neither a batch nor an epoch is a multiple of a shuffled block.
STREAM = ["--streaming", "--shuffle_buffer_size", "5", "--resolution", "8", "--train_batch_size", "4"]
STREAM += ["--attention_resolutions", "0"]


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_resume_of_a_stream_is_bit_exact(tmp_path, num_workers):
    """The run resumes within a block, in the first epoch and in a later one."""
    flags = [*STREAM, "--dataset_name", save_shards(tmp_path / "data", 5, 2, 4), "--max_train_steps", "7"]
    flags += ["--dataloader_num_workers", num_workers, "--checkpointing_steps", "1"]
    train(tmp_path / "whole", *flags)
    assert "num_images" not in json.loads((tmp_path / "whole" / "run.json").read_text())
    for step in (1, 4):
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        train(resumed, *flags, "--resume_from_checkpoint", "latest")
        assert_same_end(tmp_path / "whole", resumed, num_batches=7, num_streams=max(1, int(num_workers)))


def assert_same_end(first: Path, second: Path, num_batches: int, num_streams: int) -> None:
    """Compare the last checkpoints of two runs of 7 steps bit for bit."""
    for file in (f"unet/{WEIGHTS}", f"unet_ema/{WEIGHTS}", "optimizer-unet.safetensors"):
        assert_same_tensors(first / "checkpoint-7" / file, second / "checkpoint-7" / file)
    state, same = (json.loads((run / "checkpoint-7" / "state.json").read_text())["stream"] for run in (first, second))
    assert state == same
    assert (state["batches"], len(state["positions"])) == (num_batches, num_streams)


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_preempted_run_saves_its_position(tmp_path, monkeypatch, moment):
    """The run stops in a step without a periodic checkpoint, or in the validation after the step."""
    flags = [*STREAM, "--dataset_name", save_shards(tmp_path / "data", 5, 2, 4), "--checkpointing_steps", "0"]
    flags += ["--validation_steps", "3"]
    preemption, squared_error, calls = Preemption(), cfg.squared_error, []

    def stop_in_step(*args):
        calls.append(1)
        preemption.requested = len(calls) == 3
        return squared_error(*args)

    def stop_in_validation(*args, **kwargs):
        raise Preempted

    with monkeypatch.context() as patch:
        if moment == "step":
            patch.setattr("diffusers_cfg.methods.cfg.squared_error", stop_in_step)
        else:
            patch.setattr("diffusers_cfg.methods.guided.sample_grid", stop_in_validation)
        with pytest.raises(Preempted):
            start(tmp_path / "out", preemption, *flags)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    start(tmp_path / "out", Preemption(), *flags, "--resume_from_checkpoint", "latest")
    start(tmp_path / "whole", Preemption(), *flags)
    assert_same_tensors(tmp_path / "out" / "unet" / WEIGHTS, tmp_path / "whole" / "unet" / WEIGHTS)


def test_stream_of_unknown_length_needs_max_train_steps(tmp_path, monkeypatch):
    at = TINY.index("--max_train_steps")
    monkeypatch.setattr(runs, "TINY", [*TINY[:at], *TINY[at + 2 :]])
    source = save_shards(tmp_path / "data", 6)
    flags = ["--dataset_name", source, *STREAM]
    with pytest.raises(UserError, match="does not report its number of images.*--max_train_steps"):
        train(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    (Path(source) / "README.md").write_text(SPLITS_CARD.format(num_examples=6))
    train(tmp_path / "out", *flags, "--num_train_epochs", "2")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["steps"], record["num_images"]) == (3, 6)


def test_checkpoint_describes_the_stream(tmp_path):
    train(tmp_path / "out", *STREAM, "--dataset_name", save_shards(tmp_path / "data", 6, 6))
    described = json.loads((tmp_path / "out" / "checkpoint-4" / "state.json").read_text())["data"]
    assert described == {"class_names": ["ant", "bee"], "num_images": None, "fingerprint": None, "num_shards": 2}


def test_streamed_model_is_evaluated_against_the_whole_dataset(tmp_path):
    source = save_shards(tmp_path / "data", 5, 2, 4)
    train(tmp_path / "out", *STREAM, "--dataset_name", source, "--cache_dir", str(tmp_path / "cache"))
    dataset, id2label, _ = load_data(str(tmp_path / "out"), {}, CFGPipeline.from_pretrained(tmp_path / "out"), False)
    assert (datasets.num_images(dataset), id2label) == (11, {0: "ant", 1: "bee"})


def test_resume_with_different_streams_or_shards_raises(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    flags = [*STREAM, "--dataset_name", source]
    train(tmp_path / "out", *flags, "--dataloader_num_workers", "2")
    resume = [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "5"]
    with pytest.raises(UserError, match="positions of 2 streams.*1 processes with --dataloader_num_workers 0"):
        train(tmp_path / "out", *resume)
    shutil.rmtree(source)
    save_shards(Path(source), 6, 6, 6)
    with pytest.raises(UserError, match="has 3 shards, but had 2"):
        train(tmp_path / "out", *resume, "--dataloader_num_workers", "2")


def test_too_many_unreadable_images_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SIZE", 1)
    monkeypatch.setattr(batches, "MIN_SEEN", 10)
    source = save_shards(tmp_path / "data", 40, broken=range(0, 40, 5))
    flags = [*STREAM, "--dataset_name", source, "--max_train_steps", "10"]
    with pytest.raises(UserError, match=r"\d of \d\d images cannot be read, more than --max_unreadable_fraction 0.1"):
        train(tmp_path / "out", *flags, "--max_unreadable_fraction", "0.1")
    train(tmp_path / "more", *flags, "--max_unreadable_fraction", "0.5")


@pytest.mark.slow
def test_resume_of_a_stream_on_two_processes_is_bit_exact(tmp_path):
    flags = [*TINY, *STREAM, "--dataset_name", save_shards(tmp_path / "data", 5, 2, 4), "--max_train_steps", "7"]
    flags += ["--dataloader_num_workers", "2", "--checkpointing_steps", "3"]
    whole = launch(*flags, "--output_dir", "whole", cwd=tmp_path, processes=2)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    flags += ["--output_dir", "resumed", "--resume_from_checkpoint", "latest"]
    resumed = launch(*flags, cwd=tmp_path, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "resumed", num_batches=14, num_streams=4)


def train_on_fatal_image(output_dir: Path, how: int, *flags: str) -> None:
    """Train with workers that get the signal `how` when they decode the image 7."""
    datasets.MAX_CACHED_BYTES, datasets.to_array = 0, killing_decoder(7, how)
    train(output_dir, *flags)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("streaming", [False, True])
def test_dead_worker_is_reported_with_its_image(tmp_path, monkeypatch, streaming, how):
    """The worker dies in its first batch. In a later one, a broken connection could be reported instead."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # The fork server does not inherit the path from pytest.
    source = save_class_folders(tmp_path / "data")
    flags = [*(STREAM if streaming else STREAM[3:]), "--train_data_dir", source, "--train_batch_size", "12"]
    flags += ["--cache_dir", str(tmp_path / "cache"), "--dataloader_num_workers", "2", "--max_train_steps", "100"]
    error = error_in_process(train_on_fatal_image, tmp_path / "out", how, *flags, start_method="forkserver")
    message = rf"worker \(pid.*{source}/bee/7\.png.*--dataloader_num_workers.*--resume_from_checkpoint latest"
    assert re.search(message, error), error


@pytest.mark.slow
def test_dead_worker_ends_all_processes(tmp_path):
    command = ROOT / "training" / "train_cfg.py"
    script = tmp_path / "script.py"
    script.write_text(
        "import runpy, signal, sys\n"
        "from diffusers_cfg.data import datasets\nfrom tests.support.workers import killing_decoder\n"
        "datasets.to_array = killing_decoder(13, signal.SIGSEGV)\n"
        f"sys.argv[0] = {str(command)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = [*TINY, *STREAM, "--dataset_name", save_shards(tmp_path / "data", 8, 8), "--dataloader_num_workers", "1"]
    flags += ["--max_train_steps", "1000", "--output_dir", "out"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script, *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode not in (0, None)
    assert "train_cfg.py: error: DataLoader worker" in result.stderr
    assert "13.png" in result.stderr


def test_error_in_a_worker_is_reported_without_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SIZE", 1)
    monkeypatch.setattr(datasets, "MIN_SEEN", 10)
    source = save_shards(tmp_path / "data", 40, broken=range(5, 40))
    flags = [*STREAM, "--dataset_name", source, "--max_train_steps", "20", "--dataloader_num_workers", "1"]
    # Raised in a worker, before the engine has counted enough unreadable images.
    with pytest.raises(UserError, match=r"^10 images in a row cannot be read, starting with row \d+ of shard 0"):
        train(tmp_path / "out", *flags, "--max_unreadable_fraction", "1")
