"""Data that is read as it is used, and workers that die."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import data
import datasets
import loop
import objectives
import pytest
import torch
from checkpoint import checkpoints
from config import TrainConfig, UserError
from data import StreamedImages, load_labelled_images, training_dataset
from evaluate_cfg import load_data
from PIL import Image
from preemption import Preempted, Preemption
from streaming import Position, shuffled_blocks
from test_faults import start
from test_train import TINY, TRAINING, WEIGHTS, assert_same_tensors, launch, train
from torch.utils.data import DataLoader

from diffusers_cfg import CFGPipeline

CLASSES = ["ant", "bee"]
# Blocks that no batch and no epoch is a multiple of
STREAM = [
    "--streaming",
    "--shuffle_buffer_size",
    "5",
    "--resolution",
    "8",
    "--attention_resolutions",
    "0",
    "--train_batch_size",
    "4",
]


def picture(number: int) -> bytes:
    """A grey PNG whose first pixel is a number."""
    file = io.BytesIO()
    Image.new("L", (8, 8), number).save(file, "PNG")
    return file.getvalue()


def save_shards(folder: Path, *sizes: int, labels=lambda number: number % 2, feature=None, broken=()) -> str:
    """A Parquet file for each size, of pictures that are numbered through."""
    folder.mkdir()
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=CLASSES)}
    for shard in range(len(sizes)):
        numbers = range(sum(sizes[:shard]), sum(sizes[: shard + 1]))
        rows = {
            "image": [{"bytes": b"not a picture" if n in broken else picture(n), "path": f"{n}.png"} for n in numbers],
            "label": [labels(number) for number in numbers],
        }
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        dataset.to_parquet(folder / f"train-{shard:05d}-of-{len(sizes):05d}.parquet")
    return str(folder)


def stream(source: str, rank: int = 0, world_size: int = 1, num_workers: int = 0, **settings) -> StreamedImages:
    config = TrainConfig(
        **{
            "dataset_name": source, "streaming": True, "resolution": 8, "train_batch_size": 4,
            "shuffle_buffer_size": 5, "dataloader_num_workers": num_workers, "max_unreadable_fraction": 0.5, **settings,
        }
    )  # fmt: skip
    images = training_dataset(load_labelled_images(config), config, 1, show_progress=False)
    images.divide(rank, world_size)
    return images


def numbers(images: StreamedImages, batches: int) -> list[int]:
    """The numbers of the pictures in the next batches, which are then used."""
    loader = DataLoader(
        images, batch_size=None, num_workers=images.config.dataloader_num_workers, collate_fn=data.keep_batch
    )
    taken = []
    for batch in islice(loader, batches):
        assert (batch.images[:, 0, 0, 0] % 2 == batch.class_labels).all()
        taken += batch.images[:, 0, 0, 0].tolist()
        images.used(batch)
    return taken


# ----- the order -----


class Letters:
    """Shards of different sizes, whose rows are named by shard and row."""

    sizes = [7, 1, 0, 12]
    num_shards = len(sizes)

    def rows(self, shard, first):
        yield from [(shard, row) for row in range(first, self.sizes[shard])]


def take(stream: int, num_streams: int, position: Position, count: int, block_size: int = 5) -> list:
    blocks = shuffled_blocks(Letters(), block_size, 0, stream, num_streams, position)
    rows = (
        (row, start._replace(done=done))
        for start, block in blocks
        for done, row in enumerate(block[start.done :], start.done + 1)
    )
    return list(islice(rows, count))


@pytest.mark.parametrize("num_streams", [1, 2, 3, 6])
def test_the_streams_share_each_epoch(num_streams):
    everything = sorted((shard, row) for shard, size in enumerate(Letters.sizes) for row in range(size))
    epochs = [[], []]
    for number in range(num_streams):
        for row, position in take(number, num_streams, Position(), 60):
            if position.epoch < 2:
                epochs[position.epoch].append(row)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    assert epochs[0] != everything


def test_the_order_of_the_shards_is_new_each_epoch():
    orders = [[], [], [], []]
    for (shard, _), position in take(0, 1, Position(), 80, block_size=1):
        if shard not in orders[position.epoch]:
            orders[position.epoch].append(shard)
    assert all(sorted(order) == [0, 1, 3] for order in orders)
    assert len(set(map(tuple, orders))) > 1


@pytest.mark.parametrize(("number", "num_streams"), [(0, 1), (1, 2), (4, 6)])
def test_a_stream_goes_on_from_any_row(number, num_streams):
    rows = take(number, num_streams, Position(), 50)
    for i, (_, position) in enumerate(rows):
        assert take(number, num_streams, position, 50 - i - 1) == rows[i + 1 :]


def test_a_stream_without_rows_is_refused():
    with pytest.raises(UserError, match="no images for stream 26 of 30.*--dataloader_num_workers"):
        take(25, 30, Position(), 1)


# ----- batches -----


def test_a_stream_gives_every_image_once_an_epoch(tmp_path):
    taken = numbers(stream(save_shards(tmp_path / "data", 9, 4, 7)), 10)
    assert sorted(taken[:20]) == sorted(taken[20:]) == list(range(20))
    assert taken[:20] != taken[20:]


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (16, 16), (32,)])
def test_processes_and_workers_have_parts_of_their_own(tmp_path, caplog, sizes):
    source = save_shards(tmp_path / "data", *sizes)
    by_process = torch.tensor([numbers(stream(source, rank, 2, num_workers=2), 4) for rank in range(2)])
    assert (f"{len(sizes)} shards for 4 streams" in caplog.text) == (len(sizes) < 4)
    assert by_process.flatten().sort().values.tolist() == list(range(32))
    # The same streams, all in one process
    in_turn = by_process.view(2, 4, 4).transpose(0, 1).flatten().tolist()
    assert numbers(stream(source, num_workers=4), 8) == in_turn


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_place_is_found_again(tmp_path, num_workers, rank):
    source = save_shards(tmp_path / "data", 9, 4, 7)
    processes = [stream(source, number, 2, num_workers) for number in range(2)]
    before = [numbers(images, 3) for images in processes]
    state = json.loads(json.dumps(processes[0].state_dict([images.reached for images in processes])))
    resumed = stream(source, rank, 2, num_workers)
    resumed.load_state_dict(state)
    assert before[rank] + numbers(resumed, 9) == numbers(stream(source, rank, 2, num_workers), 12)
    assert resumed.state_dict([])["batches"] == 24


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path):
    source = save_shards(tmp_path / "data", 9, 4, broken=[2, 11])
    images = stream(source)
    batches = list(islice(images, 6))
    names = {name for batch in batches for name in batch.unreadable}
    assert names == {"row 2 of shard 0 (2.png)", "row 2 of shard 1 (11.png)"}
    seen = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()
    assert sorted(set(seen)) == sorted(set(range(13)) - {2, 11})
    assert images.probe.images[:, 0, 0, 0].tolist() != []


def test_a_stream_without_a_readable_image_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIN_SEEN", 30)
    images = stream(save_shards(tmp_path / "data", 6))
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="5 of 5 images cannot be read"):
        stream(save_shards(tmp_path / "data", 6, broken=range(6)))
    with pytest.raises(UserError, match=r"None of 30 images in a row could be read: row \d of shard 0"):
        next(iter(images))


def test_labels_that_are_missing(tmp_path):
    source = save_shards(tmp_path / "data", 8, labels=lambda number: [0, 1, -1, None][number % 4])
    batch = next(iter(stream(source, train_batch_size=8)))
    by_number = dict(zip(batch.images[:, 0, 0, 0].tolist(), batch.class_labels.tolist(), strict=True))
    assert [by_number[number] for number in range(4)] == [0, 1, -1, -1]


# ----- sources -----


def save_tars(folder: Path) -> str:
    (folder / "train").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / "train" / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * 6, shard * 6 + 6):
                for kind, content in (("png", picture(number)), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder)


def save_class_folders(folder: Path) -> str:
    for number in range(12):
        path = folder / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return str(folder)


WEBDATASET_CARD = """---
dataset_info:
  features:
  - {name: png, dtype: image}
  - {name: cls, dtype: {class_label: {names: {'0': ant, '1': bee}}}}
---
"""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "webdataset", "imagefolder"])
def test_what_can_be_read(tmp_path, kind, streaming):
    settings = {"cache_dir": str(tmp_path / "cache")}
    if kind == "parquet":
        settings["dataset_name"] = save_shards(tmp_path / "data", 6, 6)
    elif kind == "webdataset":
        settings |= {"dataset_name": save_tars(tmp_path / "data"), "image_column": "png", "label_column": "cls"}
        (tmp_path / "data" / "README.md").write_text(WEBDATASET_CARD)
    else:
        settings |= {"dataset_name": None, "train_data_dir": save_class_folders(tmp_path / "data")}
    if streaming:
        images = stream(settings.pop("dataset_name"), **settings)
        assert sorted(numbers(images, 3)) == list(range(12))
        images = images.images
    else:
        images = load_labelled_images(TrainConfig(resolution=8, **settings))
        assert len(images) == 12
    assert (images.channels, images.id2label) == (1, {0: "ant", 1: "bee"})


def test_the_length_is_that_of_the_card(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    assert data.num_images(stream(source)) is None
    (tmp_path / "data" / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - {name: train, num_bytes: 1, num_examples: 12}\n---\n"
    )
    assert data.num_images(stream(source)) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "species"}, r"no column 'species'.*\['image', 'label'\]"),
        ({"image_column": "label"}, r"holds ClassLabel, not images.*\['image'\]"),
        ({"dataset_split": "test"}, "cannot be loaded.*test"),
        ({"dataset_name": "/nowhere/at/all"}, "'/nowhere/at/all' cannot be loaded"),
    ],
)
def test_what_cannot_be_streamed_is_named(tmp_path, settings, message):
    source = save_shards(tmp_path / "data", 6)
    with pytest.raises(UserError, match=message):
        stream(settings.pop("dataset_name", source), **settings)


def test_classes_that_are_not_known_beforehand(tmp_path):
    for source, columns in (
        (save_tars(tmp_path / "tars"), {"image_column": "png", "label_column": "cls"}),
        (save_shards(tmp_path / "plain", 6, feature=datasets.Value("int64")), {}),
    ):
        with pytest.raises(UserError, match="holds plain values: leave out --streaming.*ClassLabel.*README"):
            stream(source, **columns)
    with pytest.raises(UserError, match="at least two classes"):
        stream(save_shards(tmp_path / "one", 6, labels=lambda n: 0, feature=datasets.ClassLabel(names=["ant"])))
    with pytest.raises(UserError, match="row 3 of shard 0 .* is 7, but there are 2 names"):
        stream(save_damaged_labels(tmp_path / "seven"))


def save_damaged_labels(folder: Path) -> str:
    """As a writer leaves them that does not check them."""
    import pyarrow.parquet as pq

    source = save_shards(folder, 6)
    path = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    labels = table["label"].to_pylist()
    labels[3] = 7
    pq.write_table(table.set_column(1, table.schema.field("label"), [labels]), path)
    return source


def test_what_is_on_the_disk_already(tmp_path):
    dataset = datasets.load_dataset(save_shards(tmp_path / "data", 6), cache_dir=str(tmp_path / "cache"))
    dataset.save_to_disk(tmp_path / "all")
    with pytest.raises(UserError, match="written by save_to_disk"):
        stream(str(tmp_path / "all"))


def test_sorted_data_is_pointed_out(tmp_path, caplog):
    source = save_shards(tmp_path / "data", 20, labels=lambda number: number // 10)
    stream(source, shuffle_buffer_size=20)
    assert caplog.text == ""
    stream(source)
    assert "first 5 images are all of one class" in caplog.text
    assert "--shuffle_buffer_size" in caplog.text


# ----- runs -----


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, num_workers):
    """It is stopped in the middle of a block, in the first epoch and in a later one."""
    source = save_shards(tmp_path / "data", 5, 2, 4)
    flags = [
        *STREAM, "--dataset_name", source, "--dataloader_num_workers", num_workers, "--max_train_steps", "7",
        "--checkpointing_steps", "1",
    ]  # fmt: skip
    train(tmp_path / "whole", *flags)
    assert "num_images" not in json.loads((tmp_path / "whole" / "run.json").read_text())
    for step in (1, 4):
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        train(resumed, *flags, "--resume_from_checkpoint", "latest")
        assert_same_end(tmp_path / "whole", resumed, batches=7, streams=max(1, int(num_workers)))


def assert_same_end(first: Path, second: Path, batches: int, streams: int) -> None:
    for file in (f"unet/{WEIGHTS}", f"unet_ema/{WEIGHTS}", "optimizer.safetensors"):
        assert_same_tensors(first / "checkpoint-7" / file, second / "checkpoint-7" / file)
    place, same = (json.loads((run / "checkpoint-7" / "state.json").read_text())["stream"] for run in (first, second))
    assert place == same
    assert (place["batches"], len(place["positions"])) == (batches, streams)


@pytest.mark.parametrize("moment", ["step", "look"])
def test_a_run_that_is_asked_to_stop_knows_its_place(tmp_path, monkeypatch, moment):
    """In a step that is no checkpoint's, or in the look that follows it."""
    flags = [
        *STREAM, "--dataset_name", save_shards(tmp_path / "data", 5, 2, 4), "--checkpointing_steps", "0",
        "--validation_steps", "3",
    ]  # fmt: skip
    preemption, squared_error, calls = Preemption(), objectives.squared_error, []

    def stop_in_step(*args):
        calls.append(1)
        preemption.requested = len(calls) == 3
        return squared_error(*args)

    def stop_in_look(*args):
        raise Preempted

    with monkeypatch.context() as patch:
        if moment == "step":
            patch.setattr(objectives, "squared_error", stop_in_step)
        else:
            patch.setattr(loop, "sample_grid", stop_in_look)
        with pytest.raises(Preempted):
            start(tmp_path / "out", preemption, *flags)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    start(tmp_path / "out", Preemption(), *flags, "--resume_from_checkpoint", "latest")
    start(tmp_path / "whole", Preemption(), *flags)
    assert_same_tensors(tmp_path / "out" / "unet" / WEIGHTS, tmp_path / "whole" / "unet" / WEIGHTS)


def test_a_run_is_asked_for_its_length(tmp_path, monkeypatch):
    source = save_shards(tmp_path / "data", 6)
    config = ["--dataset_name", source, *STREAM]
    with pytest.raises(UserError, match="does not say how many images it has, so --max_train_steps is needed"):
        train_without_length(monkeypatch, tmp_path / "out", *config)
    assert not (tmp_path / "out").exists()
    (Path(source) / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - {name: train, num_bytes: 1, num_examples: 6}\n---\n"
    )
    train_without_length(monkeypatch, tmp_path / "out", *config, "--num_train_epochs", "2")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["steps"], record["num_images"]) == (3, 6)


def train_without_length(monkeypatch, output_dir: Path, *argv: str) -> None:
    at = TINY.index("--max_train_steps")
    with monkeypatch.context() as patch:
        patch.setattr("test_train.TINY", [*TINY[:at], *TINY[at + 2 :]])
        train(output_dir, *argv)


def test_a_streamed_model_is_measured_against_all_of_its_data(tmp_path):
    source = save_shards(tmp_path / "data", 5, 2, 4)
    train(tmp_path / "out", *STREAM, "--dataset_name", source, "--cache_dir", str(tmp_path / "cache"))
    dataset, id2label, _ = load_data(str(tmp_path / "out"), {}, CFGPipeline.from_pretrained(tmp_path / "out"), False)
    assert (len(dataset), id2label) == (11, {0: "ant", 1: "bee"})


def test_a_checkpoint_of_other_streams_or_data(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    flags = [*STREAM, "--dataset_name", source]
    train(tmp_path / "out", *flags, "--dataloader_num_workers", "2")
    resume = [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "5"]
    with pytest.raises(UserError, match="places of 2 streams.*1 processes with --dataloader_num_workers 0"):
        train(tmp_path / "out", *resume)
    shutil.rmtree(source)
    save_shards(Path(source), 6, 6, 6)
    with pytest.raises(UserError, match="has 3 shards, but had 2"):
        train(tmp_path / "out", *resume, "--dataloader_num_workers", "2")


def test_too_many_unreadable_images_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PROBE_SIZE", 1)
    monkeypatch.setattr("loop.MIN_SEEN", 10)
    source = save_shards(tmp_path / "data", 40, broken=range(0, 40, 5))
    flags = [*STREAM, "--dataset_name", source, "--max_train_steps", "10"]
    with pytest.raises(UserError, match=r"\d of \d\d images cannot be read, more than --max_unreadable_fraction 0.1"):
        train(tmp_path / "out", *flags, "--max_unreadable_fraction", "0.1")
    train(tmp_path / "more", *flags, "--max_unreadable_fraction", "0.5")


@pytest.mark.slow
def test_two_processes_go_on_too(tmp_path):
    source = save_shards(tmp_path / "data", 5, 2, 4)
    flags = [*TINY, *STREAM, "--dataset_name", source, "--dataloader_num_workers", "2", "--checkpointing_steps", "3"]
    whole = launch(*flags, "--max_train_steps", "7", "--output_dir", "whole", cwd=tmp_path, processes=2)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = launch(
        *flags, "--max_train_steps", "7", "--output_dir", "resumed", "--resume_from_checkpoint", "latest",
        cwd=tmp_path, processes=2,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "resumed", batches=14, streams=4)


# ----- workers that die -----


def deadly(number: int, how: int):
    """A decoder that one picture is the end of."""
    works = data.to_array

    def decode(image, *args):
        array = works(image, *args)
        if array.flat[0] == number and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), how)
        return array

    return decode


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_worker_that_dies_is_reported_with_its_image(tmp_path, monkeypatch, streaming, how):
    monkeypatch.setattr(data, "MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(data, "to_array", deadly(7, how))
    flags = [*(STREAM if streaming else STREAM[1:]), "--cache_dir", str(tmp_path / "cache")]
    source = save_class_folders(tmp_path / "data")
    message = rf"worker \(pid.*{source}/bee/7\.png.*--dataloader_num_workers.*--resume_from_checkpoint latest"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", "--train_data_dir", source, *flags, "--dataloader_num_workers", "2")


@pytest.mark.slow
def test_a_worker_that_dies_ends_all_processes(tmp_path):
    source = save_shards(tmp_path / "data", 8, 8)
    script = tmp_path / "script.py"
    script.write_text(
        f"import runpy, signal, sys\nsys.path[:0] = [{str(TRAINING)!r}, {str(Path(__file__).parent)!r}]\n"
        "import data, test_streaming\n"
        "data.to_array = test_streaming.deadly(13, signal.SIGSEGV)\n"
        f"runpy.run_path({str(TRAINING / 'train_cfg.py')!r}, run_name='__main__')\n"
    )
    flags = [*TINY, *STREAM, "--dataset_name", source, "--dataloader_num_workers", "1", "--max_train_steps", "1000"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script, *flags, "--output_dir", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode not in (0, None)
    assert "train_cfg.py: error: DataLoader worker" in result.stderr
    assert "13.png" in result.stderr
