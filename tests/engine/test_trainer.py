"""The training script, driven through its command line."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from diffusers_cfg.methods import cfg
import pytest
import torch
from diffusers_cfg.engine.checkpoint import checkpoints
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.settings import CFGConfig
from diffusers_cfg.data.datasets import stack_images
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.methods.networks import build_unet
from PIL import Image
from randomness import Draws, GlobalBatchSampler
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline, UNet2DCFGModel

TRAINING = Path(__file__).parents[2] / "training"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The digits, a network of 20 thousand parameters, seconds.
NETWORK = ["--block_out_channels", "8", "16"]
SETTINGS = [
    "--train_batch_size", "8", "--max_train_steps", "4", "--lr_warmup_steps", "1",
    "--learning_rate", "1e-3", "--checkpointing_steps", "2", "--validation_steps", "0", "--num_inference_steps", "2",
    "--validation_guidance_scales", "0", "1", "--logging_steps", "1", "--report_to", "none",
    "--checkpoints_total_limit", "9",
]  # fmt: skip
TINY = [*NETWORK, *SETTINGS]

# What is logged of time, which no two runs share
TIMES = {"images_per_second", "data_wait"}


def train(output_dir: Path, *argv: str) -> CFGConfig:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    tiny = SETTINGS if "--pretrained_model_name_or_path" in argv else TINY
    config = parse_config(CFGConfig, [*tiny, "--output_dir", str(output_dir), *argv])
    train_cfg(config)
    return config


def assert_same_tensors(first: Path, second: Path, **tolerance: float) -> None:
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def scalars(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "logs" / "diffusers-cfg")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_leaves_a_pipeline_that_loads(tmp_path, capsys):
    config = train(tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-2", "checkpoint-4", "model_index.json", "pipeline_cfg.py", "run.json", "samples", "scheduler",
        "train_config.yaml", "unet",
    ]  # fmt: skip
    assert CFGConfig.load(out / "train_config.yaml") == config
    assert [path.name for path in (out / "samples").iterdir()] == ["step-4.png"]
    width, height = Image.open(out / "samples" / "step-4.png").size
    assert width > 2 * 64
    assert height > 10 * 64
    said = capsys.readouterr().out
    assert f'DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)' in said

    pipeline = CFGPipeline.from_pretrained(out)
    assert pipeline.id2label[3] == "three"
    assert pipeline.config.conditioning_dropout_prob == 0.1
    assert len(pipeline(["three", 7], [0.0, 2.5], num_inference_steps=2).images) == 2
    # What is sampled is the average.
    assert_same_tensors(out / "unet" / WEIGHTS, out / "checkpoint-4" / "unet_ema" / WEIGHTS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_algorithm_1(tmp_path, monkeypatch, prediction_type):
    """What the network is shown in the first step, and what it is compared with, term by term."""
    shown, compared = [], []
    forward, error = UNet2DCFGModel.forward, cfg.squared_error

    def spy_on_forward(self, z, t, class_labels, **kwargs):
        shown.append((z, t, class_labels))
        return forward(self, z, t, class_labels=class_labels, **kwargs)

    def spy_on_error(pred, target):
        compared.append((pred.detach(), target))
        return error(pred, target)

    monkeypatch.setattr(UNet2DCFGModel, "forward", spy_on_forward)
    monkeypatch.setattr(cfg, "squared_error", spy_on_error)
    config = train(
        tmp_path, "--max_train_steps", "1", "--conditioning_dropout_prob", "0.5", "--prediction_type", prediction_type
    )
    (z, t, c), (pred, target) = shown[0], compared[0]

    data = stack_images(Digits(), config, 1, show_progress=False)
    (indices,) = GlobalBatchSampler(len(data), 8, config.seed, range(1))
    x = data.images[indices].double() / 127.5 - 1
    draws = Draws.of_step(config.seed, 0, (8, 1, 8, 8), torch.device("cpu"))
    b = math.atan(math.exp(-10))
    angle = ((math.pi / 2 - 2 * b) * draws.u.double() + b).view(-1, 1, 1, 1)  # a u + b
    alpha, sigma, noise = torch.cos(angle), torch.sin(angle), draws.noise.double()
    torch.testing.assert_close(z.double(), alpha * x + sigma * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t, 1000 * draws.u - 1)
    assert c.tolist() == torch.where(draws.dropout < 0.5, 10, data.class_labels[indices]).tolist()
    assert 0 < (c == 10).sum() < 8
    expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x}[prediction_type]
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)
    assert pred.shape == x.shape


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_every_parameter_moves_and_the_null_row_too(tmp_path, accumulation):
    config = train(
        tmp_path, "--no_use_ema", "--conditioning_dropout_prob", "0.5", "--train_batch_size", "64",
        "--gradient_accumulation_steps", accumulation,
    )  # fmt: skip
    before = dict(build_unet(config, None, channels=1, num_classes=10).named_parameters())
    after = load_file(tmp_path / "unet" / WEIGHTS)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    rows = (before["class_embedding.weight"] != after["class_embedding.weight"]).any(dim=1)
    assert rows.tolist() == [True] * 11


def test_without_dropout_the_null_row_stays(tmp_path):
    config = train(tmp_path, "--no_use_ema", "--conditioning_dropout_prob", "0", "--train_batch_size", "64")
    before = build_unet(config, None, channels=1, num_classes=10).class_embedding.weight
    after = load_file(tmp_path / "unet" / WEIGHTS)["class_embedding.weight"]
    assert (before != after).any(dim=1).tolist() == [True] * 10 + [False]


@pytest.mark.parametrize(
    ("argv", "num_files"),
    [
        (["--dropout", "0.2"], 7),
        (["--gradient_accumulation_steps", "2", "--random_flip"], 7),
        (["--no_use_ema"], 5),
        (["--ema_max_decay", "0.9", "0.2"], 10),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, argv, num_files):
    argv = [*argv, "--report_to", "tensorboard"]
    train(tmp_path / "whole", *argv)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(tmp_path / "resumed", *argv, "--resume_from_checkpoint", "latest")

    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) == num_files
    for file in files:
        assert_same_tensors(tmp_path / "whole" / file, tmp_path / "resumed" / file)
    states = [json.loads((tmp_path / run / "checkpoint-4" / "state.json").read_text()) for run in ("whole", "resumed")]
    assert states[0]["lr_scheduler"] == states[1]["lr_scheduler"]
    grids = [(tmp_path / run / "samples" / "step-4.png").read_bytes() for run in ("whole", "resumed")]
    assert grids[0] == grids[1]
    logged = {(tag, *point) for tag, points in scalars(tmp_path / "whole").items() for point in points if point[0] > 2}
    again = {(tag, *point) for tag, points in scalars(tmp_path / "resumed").items() for point in points}
    assert {entry for entry in logged if entry[0] not in TIMES} == {entry for entry in again if entry[0] not in TIMES}
    assert {("loss", 3), ("loss", 4), ("grad_norm", 4), ("label_gain", 4)} <= {entry[:2] for entry in again}


def test_each_decay_has_its_average(tmp_path):
    train(tmp_path, "--ema_max_decay", "0.9", "0.2", "--ema_power", "9", "--checkpointing_steps", "1")
    steps = [load_file(tmp_path / f"checkpoint-{step}" / "unet" / WEIGHTS) for step in (1, 2, 3, 4)]
    for file, decay in ((WEIGHTS, 0.9), ("diffusion_pytorch_model.ema2.safetensors", 0.2)):
        average = steps[0]  # the average of one step has a decay of 0
        for weights in steps[1:]:
            average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
        saved = load_file(tmp_path / "unet" / file)
        for name in saved:
            torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-7)
    pipelines = [CFGPipeline.from_pretrained(tmp_path, variant=variant) for variant in (None, "ema2")]
    assert not torch.equal(*(pipeline.unet.conv_in.weight for pipeline in pipelines))
    with pytest.raises(ValueError, match="variant=ema3"):
        CFGPipeline.from_pretrained(tmp_path, variant="ema3")


def test_accumulated_batches_are_one_batch(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "parts", "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    assert_same_tensors(
        tmp_path / "whole" / "unet" / WEIGHTS, tmp_path / "parts" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-6
    )


def test_gradient_checkpointing_changes_no_weight(tmp_path, monkeypatch):
    flags, recomputed = ["--attention_resolutions", "4", "--dropout", "0.2"], []
    train(tmp_path / "kept", *flags)
    works = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: (recomputed.append(1), works(*a, **k))[1])
    train(tmp_path / "recomputed", *flags, "--gradient_checkpointing")
    assert recomputed
    assert_same_tensors(tmp_path / "kept" / "unet" / WEIGHTS, tmp_path / "recomputed" / "unet" / WEIGHTS)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path):
    """torch 2.13 compiles this very network to one with a wrong gradient, if its layouts are optimised."""
    train(tmp_path / "plain")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    train(tmp_path / "compiled", "--compile")
    assert counters["unique_graphs"] > before
    assert_same_tensors(
        tmp_path / "plain" / "unet" / WEIGHTS, tmp_path / "compiled" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-4
    )
    for part in ("unet", "unet_ema"):
        folders = [tmp_path / run / "checkpoint-4" / part / WEIGHTS for run in ("plain", "compiled")]
        assert_same_tensors(*folders, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_train(tmp_path, prediction_type):
    train(tmp_path, "--prediction_type", prediction_type)
    assert CFGPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type == prediction_type


def test_a_latent_model_trains(tmp_path):
    import diffusers

    diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    train(tmp_path / "out", "--pretrained_vae_model_name_or_path", str(tmp_path / "vae"))
    pipeline = CFGPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.sample_size) == (2, 4)
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline(0, num_inference_steps=2).images[0].size == (8, 8)


def test_the_oldest_checkpoints_go(tmp_path):
    train(tmp_path, "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_tensorboard_gets_losses_and_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--report_to", "tensorboard")
    losses = scalars(tmp_path)["loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert all(value > 0 for _, value in losses)
    events = EventAccumulator(str(tmp_path / "logs" / "train_cfg")).Reload()
    assert [event.step for event in events.Images("samples")] == [4]


# ----- bad input -----


def test_a_folder_with_another_run_is_not_touched(tmp_path):
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is not empty.*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        train(tmp_path)
    # Nor where something else is wrong
    with pytest.raises(UserError, match="train_batch_size"):
        train(tmp_path, "--overwrite_output_dir", "--train_batch_size", "9999")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    train(tmp_path, "--overwrite_output_dir", "--max_train_steps", "3")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_overwriting_leaves_what_is_not_of_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    train(tmp_path, "--overwrite_output_dir")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_that_does_not_exist(tmp_path):
    train(tmp_path, "--overwrite_output_dir")
    with pytest.raises(UserError, match="checkpoint-77 does not exist.*checkpoint-2, checkpoint-4"):
        train(tmp_path, "--resume_from_checkpoint", "checkpoint-77")


def test_a_checkpoint_of_another_network(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="checkpoint-4 does not hold the weights of this model"):
        train(tmp_path, "--resume_from_checkpoint", "latest", "--block_out_channels", "8", "8")


def test_a_step_stays_as_large_as_it_was(tmp_path, caplog):
    train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    resume = ["--resume_from_checkpoint", "latest"]
    config = train(tmp_path / "parts", *resume, "--train_batch_size", "2", "--gradient_accumulation_steps", "3")
    assert config.gradient_accumulation_steps == 4
    assert "--gradient_accumulation_steps is 4 and not 3, so that a step stays one of 8 images" in caplog.text
    assert_same_tensors(
        tmp_path / "whole" / "unet" / WEIGHTS, tmp_path / "parts" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-6
    )
    with pytest.raises(UserError, match="steps of 8 images, which 1 processes cannot share in batches of 3"):
        train(tmp_path / "parts", *resume, "--train_batch_size", "3")


def test_other_settings_are_pointed_out(tmp_path, caplog):
    train(tmp_path)
    train(tmp_path, "--resume_from_checkpoint", "latest", "--seed", "5", "--max_train_steps", "5")
    assert "seed 0 -> 5" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_batch_size", "2000"], "1797 images, but a step takes 2000"),
        (["--train_batch_size", "1000", "--gradient_accumulation_steps", "2"], "1797 images, but a step takes 2000"),
        (["--resolution", "9"], "resolution 9 cannot be halved 1 times"),
        (["--train_data_dir", "/nowhere", "--resolution", "8"], "/nowhere is not a folder"),
        (["--report_to", "wandb"], "wandb.*not installed"),
        (["--enable_xformers_memory_efficient_attention"], "xformers_memory_efficient_attention needs a GPU and xform"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_written(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed", "megatron_lm", "parallelism_config"])
def test_a_network_in_pieces_is_refused(tmp_path, monkeypatch, kind):
    """On a CPU accelerate would not even look at what `accelerate launch` was told, and train as if it had not been."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    with pytest.raises(UserError, match=f"told --use_{kind}.* Use DDP, .*configs/accelerate/ddp.yaml"):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite in the last 10 steps.*learning_rate"):
        train(tmp_path, "--learning_rate", "1e30", "--max_train_steps", "20", "--lr_warmup_steps", "0")


# ----- as a user runs it -----


def launch(
    *argv: str, cwd: Path, processes: int = 1, fails: bool = False, script: Path = TRAINING / "train_cfg.py"
) -> subprocess.CompletedProcess:
    """`accelerate launch` in a process of its own. (Two processes on a CPU need torchrun, or --multi_gpu.)"""
    launcher = ["accelerate.commands.launch", "--num_processes", "1"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), *argv],
        cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0 or fails, result.stderr
    return result


@pytest.mark.slow
def test_the_command_line_from_end_to_end(tmp_path):
    result = launch(*TINY, "--output_dir", "out", cwd=tmp_path)
    assert 'DiffusionPipeline.from_pretrained("out", trust_remote_code=True)' in result.stdout
    script = (
        "from diffusers import DiffusionPipeline\n"
        'pipe = DiffusionPipeline.from_pretrained("out", trust_remote_code=True)\n'
        'pipe(class_labels=["three"], guidance_scale=1.0, num_inference_steps=2).images[0].save("three.png")'
    )
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    assert Image.open(tmp_path / "three.png").size == (8, 8)

    evaluated = subprocess.run(
        [sys.executable, str(TRAINING / "evaluate_cfg.py"), "--model", "out", "--num_samples", "20",
         "--num_inference_steps", "2", "--guidance_scales", "0", "1", "--statistics_dir", "statistics"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert [row["guidance_scale"] for row in record["results"]] == [0, 1]
    assert record["feature_extractor"]["accuracy"] > 0.95

    again = launch(*TINY, "--output_dir", "out", cwd=tmp_path, fails=True)
    assert again.returncode != 0
    assert "train_cfg.py: error: --output_dir out is not empty" in again.stderr


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path):
    launch(*TINY, "--output_dir", "one", cwd=tmp_path)
    two = launch(*TINY, "--output_dir", "two", "--train_batch_size", "4", cwd=tmp_path, processes=2)
    assert "4 steps of 8 images (0.0 epochs) on 2 × cpu" in two.stderr
    assert_same_tensors(tmp_path / "one" / "unet" / WEIGHTS, tmp_path / "two" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-6)
    sizes = {Image.open(tmp_path / name / "samples" / "step-4.png").size for name in ("one", "two")}
    assert len(sizes) == 1


@pytest.mark.slow
def test_the_trajectory_is_the_one_that_was_written_down(tmp_path):
    """So that a change that is meant to change nothing can be seen to."""
    launch(*TINY, "--max_train_steps", "20", "--report_to", "tensorboard", "--output_dir", "out", cwd=tmp_path)
    expected = json.loads((Path(__file__).parent / "reference_trajectory.json").read_text())
    logged = scalars(tmp_path / "out")
    for tag, values in expected.items():
        assert [value for _, value in logged[tag]] == pytest.approx(values, rel=1e-4), tag


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Class folders of 60 images, an epoch of seven steps and a half."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(60):
        path = folder / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(Digits().images[index]).save(path)
    return folder


@pytest.mark.slow
def test_two_processes_with_workers_go_on_in_the_middle_of_an_epoch(tmp_path, photos):
    """Bit for bit, what is logged too; and on one process to rounding."""
    script = (  # small data is kept in memory, without workers
        f"import sys; sys.path.insert(0, {str(TRAINING)!r})\nimport data\ndata.MAX_CACHED_BYTES = 0\n"
        "from config import parse_config\nfrom train_cfg import train_cfg\ntrain_cfg(parse_config())"
    )
    (tmp_path / "lazily.py").write_text(script)
    flags = [
        *TINY, "--train_data_dir", str(photos), "--resolution", "8", "--train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2", "--checkpointing_steps", "10",
        "--max_train_steps", "30", "--random_flip", "--report_to", "tensorboard",
    ]  # fmt: skip

    def run(name: str, processes: int = 2) -> subprocess.CompletedProcess:
        if name != "whole":
            shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / name / "checkpoint-10")
        argv = [*flags, "--output_dir", name, "--resume_from_checkpoint", "latest"]
        return launch(*argv, cwd=tmp_path, processes=processes, script=tmp_path / "lazily.py")

    run("whole")
    assert "Resumed from resumed/checkpoint-10" in run("resumed").stderr
    for file in [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]:
        if "checkpoint-10" not in file.parts:
            assert_same_tensors(tmp_path / "whole" / file, tmp_path / "resumed" / file)
    losses = [dict(scalars(tmp_path / name)["loss"]) for name in ("whole", "resumed")]
    assert losses[1] == {step: loss for step, loss in losses[0].items() if step > 10}

    said = run("alone", processes=1).stderr
    assert "--gradient_accumulation_steps is 4 and not 2, so that a step stays one of 8 images" in said
    assert "Going on with 1 processes instead of 2: with the same images and noise" in said
    first, second = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("whole", "alone"))
    # The softmax does not see a bias of the keys: its gradient is all rounding, of which Adam makes steps.
    seen = [name for name in first if not name.endswith("to_k.bias")]
    assert max((first[name] - second[name]).abs().max().item() for name in seen) < 1e-5
    alone = dict(scalars(tmp_path / "alone")["loss"])
    assert all(abs(alone[step] - loss) < 1e-5 for step, loss in losses[1].items())


def launch_machines(name: str, *scripts: list[str], cwd: Path) -> list[tuple[int, str]]:
    """
    Two processes by a shipped launch configuration, on as many machines as there are scripts, all played by this one.
    Exit code and stderr of each machine.
    """
    flags = ["--config_file", str(CONFIGS / "accelerate" / name), "--num_processes", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        flags += ["--main_process_port", str(free.getsockname()[1]), "--main_process_ip", "127.0.0.1"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *flags, "--machine_rank", str(rank),
             str(TRAINING / "train_cfg.py"), *TINY, "--train_batch_size", "4", *script],
            cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank, script in enumerate(scripts)
    ]  # fmt: skip
    said = [run.communicate(timeout=600)[1] for run in runs]
    return [(run.returncode, text) for run, text in zip(runs, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "machines"), [("ddp.yaml", 1), ("ddp_two_machines.yaml", 2)])
def test_the_shipped_launch_configurations(tmp_path, name, machines):
    ends = launch_machines(name, *[["--output_dir", "two"]] * machines, cwd=tmp_path)
    assert [code for code, _ in ends] == [0] * machines, ends
    assert "4 steps of 8 images (0.0 epochs) on 2 × cpu" in ends[0][1]
    train(tmp_path / "one")
    assert_same_tensors(tmp_path / "one" / "unet" / WEIGHTS, tmp_path / "two" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_machines_that_do_not_share_their_checkpoints(tmp_path):
    train(tmp_path / "here")
    flags = ["--max_train_steps", "6", "--resume_from_checkpoint", "latest", "--output_dir"]
    ends = launch_machines("ddp_two_machines.yaml", [*flags, "here"], [*flags, "there"], cwd=tmp_path)
    for code, said in ends:
        assert code != 0
        assert "would go on from different steps, [4, 0]: --output_dir" in said
    assert not (tmp_path / "there").exists()
