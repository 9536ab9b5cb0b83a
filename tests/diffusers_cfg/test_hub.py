"""Test publishing and loading with the real Hub client against a local stand-in for the Hub."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_cfg.repository
from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.hub import allowed_files, example_images, publish, rounding_tolerance, verify_published
from diffusers_cfg.repository import PublishError, prepare_repository
from tests.diffusers_cfg.test_save_and_load import WITHOUT_THE_PACKAGE
from tests.support.draws import assert_same_draws
from tests.support.hub_client import HubClient
from tests.support.hub_server import Fault
from tests.support.models import ddgan, generators, make_pipeline, make_unet


@pytest.fixture
def client(hub, tmp_path, monkeypatch) -> HubClient:
    return HubClient(monkeypatch, hub, str(tmp_path / "hf"))


@pytest.fixture
def model(tmp_path) -> Path:
    """Return the output folder of a run, with files that must not be uploaded."""
    folder = tmp_path / "model"
    make_pipeline(conditioning_dropout_prob=0.1, num_inference_steps=4).save_pretrained(folder)
    run = {"dataset": "scribbles", "steps": 7, "seconds": 300, "license": "mit", "config": {"learning_rate": 0.001}}
    (folder / "run.json").write_text(json.dumps(run))
    evaluation = {
        "num_samples": 10,
        "feature_extractor": {"name": "small-0123"},
        "metric_names": {"class_accuracy": "class accuracy"},
        "best": {"class_accuracy": 2.0},
        "results": [{"guidance_scale": w, "class_accuracy": 0.9, "network_evaluations": 10} for w in (0.0, 2.0)],
    }
    (folder / "evaluation" / "samples").mkdir(parents=True)
    (folder / "evaluation" / "samples" / "shard-00000.npz").write_text("private")
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    (folder / "evaluation" / "metrics.md").write_text("| w | class accuracy |\n")
    (folder / "evaluation" / "likelihood.md").write_text("| T | p(x|c) |\n")
    (folder / "evaluation" / "likelihood").mkdir()
    (folder / "evaluation" / "likelihood" / "settings.json").write_text("private")
    (folder / "noise_schedule.safetensors").write_text("private")
    for name in ("grid.png", "curves.png", "noise_schedule.png", "loss_variance.png", "bits_per_dim.png"):
        Image.new("RGB", (4, 4)).save(folder / "evaluation" / name)
    (folder / "samples").mkdir()
    for step, colour in ((900, "red"), (1000, "blue")):
        Image.new("RGB", (4, 4), colour).save(folder / "samples" / f"step-{step}.png")
    (folder / "train_config.yaml").write_text(f"output_dir: {folder}\nhub_token: hf_secret\n")
    secrets = ("checkpoint-1/optimizer.safetensors", "posthoc_ema/step-1.safetensors", "logs/events")
    for secret in (*secrets, "unet/__pycache__/x.pyc", "unet/weights.bin"):
        (folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (folder / secret).write_text("private")
    return folder


PICTURES = [f"samples/class-{class_id}.png" for class_id in range(3)]
PUBLISHED = [
    ".gitattributes",
    "README.md",
    "evaluation/bits_per_dim.png",
    "evaluation/curves.png",
    "evaluation/grid.png",
    "evaluation/likelihood.md",
    "evaluation/loss_variance.png",
    "evaluation/metrics.json",
    "evaluation/metrics.md",
    "evaluation/noise_schedule.png",
    "model_index.json",
    "pipeline_cfg.py",
    "run.json",
    "samples.png",
    *PICTURES,
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_log_snr.py",
    "train_config.yaml",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/unet_2d_cfg.py",
]


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generators(0, 1), output_type="pt").images


def assert_same_model(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_same_draws(actual, expected, make_pipeline(), guidance_scale=2.5, num_inference_steps=4)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3


@pytest.mark.slow
def test_publish_and_load_with_and_without_remote_code(hub, client, model, tmp_path, monkeypatch):
    publish(model, "me/scribbles")
    assert sorted(hub.files("me/scribbles")) == PUBLISHED
    assert [commit.message for commit in hub.repositories["me/scribbles"].commits[1:]] == ["Upload CFGPipeline"]
    assert hub.files("me/scribbles")["samples.png"] == (model / "samples" / "step-1000.png").read_bytes()
    for name, data in hub.files("me/scribbles").items():
        assert b"hf_secret" not in data, name
        assert str(tmp_path).encode() not in data, name
    expected = draw(make_pipeline())

    # Plain diffusers, in a process that cannot import this package
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, "me/scribbles", "one.pt", "copy"],
        cwd=tmp_path,
        env=hub.environment(str(tmp_path / "hf")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert_same_model(torch.load(tmp_path / "one.pt"), expected)

    # This package
    client.log_in(None)
    client.use_cache(str(tmp_path / "other cache"))
    hub.requests.clear()
    with monkeypatch.context() as patch:
        patch.setattr(diffusers.utils.dynamic_modules_utils, "DIFFUSERS_DISABLE_REMOTE_CODE", True)
        pipe = CFGPipeline.from_pretrained("me/scribbles")
    assert not any(request.endswith(".py") for request in hub.requests)
    assert type(pipe) is CFGPipeline
    assert type(pipe.unet).__module__ == "diffusers_cfg.unet_2d_cfg"
    assert_same_model(draw(pipe), expected)
    unet = UNet2DModel.from_pretrained("me/scribbles", subfolder="unet")
    name = "class_embedding.weight"
    assert torch.equal(unet.state_dict()[name], pipe.unet.state_dict()[name])

    # Offline
    huggingface_hub.snapshot_download("me/scribbles", local_dir=tmp_path / "downloaded")
    hub.faults.append(Fault(".", 500, times=1000))
    client.go_offline()
    assert_same_model(draw(CFGPipeline.from_pretrained("me/scribbles")), expected)
    # Plain diffusers looks up custom code on the Hub even offline, so it needs a local folder.
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "downloaded", trust_remote_code=True)
    assert_same_model(draw(pipe), expected)


@pytest.mark.slow
def test_modified_pipeline_can_be_pushed_again(hub, client, model):
    """The author's text in the card survives a push. A pipeline from the Hub keeps the facts of its training run."""
    publish(model, "me/scribbles", verify=False)
    files = dict(hub.files("me/scribbles"))
    card = files["README.md"].decode().replace("license: mit", "license: mit\nlanguage: en")
    files["README.md"] = f"{card}\n## My notes\n\nDo not feed it cats.\n".encode()
    hub.commit("me/scribbles", "edit the card", files)

    pipe = CFGPipeline.from_pretrained("me/scribbles")
    pipe.unet.conv_out.bias.data += 0.1
    assert "/commit/" in pipe.push_to_hub("me/scribbles", commit_message="Brighter")
    pipe.push_to_hub("other-scribbles", private=True)

    assert [commit.message for commit in hub.repositories["me/scribbles"].commits[-2:]] == ["edit the card", "Brighter"]
    again = hub.files("me/scribbles")["README.md"].decode()
    assert "Do not feed it cats." in again
    assert again.count("## Use") == 1
    assert yaml.safe_load(again.split("---")[1])["language"] == "en"
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files("me/scribbles")[weights] != files[weights]
    assert hub.repositories["me/other-scribbles"].private
    assert sorted(hub.files("me/other-scribbles")) == PUBLISHED
    assert "| dataset | scribbles |" in hub.files("me/other-scribbles")["README.md"].decode()


@pytest.mark.slow
def test_revisions_variants_dtypes_and_private_repositories(hub, client, model, tmp_path):
    publish(model, "me/scribbles", private=True, verify=False)
    first = hub.repositories["me/scribbles"].branches["main"]
    pipe = CFGPipeline.from_pretrained("me/scribbles")
    before = draw(pipe)
    pipe.unet.conv_out.bias.data += 0.1
    pipe.push_to_hub("me/scribbles")
    pipe.unet.conv_out.bias.data += 0.1
    pipe.push_to_hub("me/scribbles", variant="ema9999")
    latest = draw(pipe)

    new = draw(CFGPipeline.from_pretrained("me/scribbles"))
    assert differ(new, before)
    assert differ(new, latest)
    for cls, trust in ((CFGPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        assert_same_model(draw(cls.from_pretrained("me/scribbles", revision=first, **trust)), before)
        assert_same_model(draw(cls.from_pretrained("me/scribbles", variant="ema9999", **trust)), latest)
    ema = CFGPipeline.from_pretrained("me/scribbles", variant="ema9999", revision="main")
    assert_same_model(draw(ema), latest)
    assert CFGPipeline.from_pretrained("me/scribbles", dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    names = set(hub.files("me/scribbles"))
    assert {"unet/diffusion_pytorch_model.ema9999.safetensors", "unet/diffusion_pytorch_model.safetensors"} < names

    with pytest.raises(OSError, match="nowhere"):
        CFGPipeline.from_pretrained("me/scribbles", revision="nowhere")
    with pytest.raises(OSError, match="me/nothing"):
        CFGPipeline.from_pretrained("me/nothing")
    client.log_in(None)
    client.use_cache(str(tmp_path / "other cache"))
    with pytest.raises(OSError, match="me/scribbles is neither a folder here nor .* can be read without a token"):
        CFGPipeline.from_pretrained("me/scribbles")


def test_transient_errors_are_retried_and_lasting_errors_reported(hub, client, model, monkeypatch):
    pauses = []
    monkeypatch.setattr(diffusers_cfg.repository.time, "sleep", pauses.append)
    hub.faults += [
        Fault("POST .*/commit/", 500),
        Fault("POST .*/commit/", 429, headers={"Retry-After": "7"}),
        Fault("PUT /lfs/", 0),
        Fault("POST /api/repos/create", 503),
    ]
    assert "/commit/" in publish(model, "me/scribbles", verify=False)
    assert 7 in pauses
    assert sorted(hub.files("me/scribbles")) == [name for name in PUBLISHED if name not in PICTURES]
    assert all(fault.times == 0 for fault in hub.faults)

    hub.faults[:] = [Fault("POST .*/commit/", 500, times=1000)]
    with pytest.raises(PublishError, match="me/other could not be published"):
        publish(model, "me/other", verify=False)
    assert set(hub.files("me/other")) == {".gitattributes"}
    assert (model / "model_index.json").is_file()


def test_repository_with_other_contents_is_not_overwritten(hub, client, model):
    hub.create("me/bert", {"pytorch_model.bin": b"precious", "config.json": b"{}"})
    hub.create("me/empty", {"README.md": b"# Soon\n"})
    message = r"me/bert exists and does not contain a CFGPipeline \(.gitattributes, config.json, pytorch_model.bin"
    with pytest.raises(PublishError, match=message):
        publish(model, "me/bert", verify=False)
    assert len(hub.repositories["me/bert"].commits) == 1
    publish(model, "me/bert", overwrite=True, verify=False)
    publish(model, "me/empty", verify=False)
    assert hub.files("me/bert")["pytorch_model.bin"] == b"precious"
    assert hub.files("me/empty")["README.md"].endswith(b"# Soon\n")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "No token for the Hub was found. Log in with `hf auth login`, or pass a token with write access.$"),
        ("wrong", "The Hub does not accept the token. Log in with `hf auth login`, or pass a token"),
        ("hf reader", "The Hub token has spaces or other characters that no token has. Copy it again.$"),
        ("hf_reader", "token can only read"),
    ],
)
def test_missing_invalid_or_read_only_token_is_refused(hub, client, model, token, message):
    client.log_in(token)
    with pytest.raises(PublishError, match=message):
        publish(model, "me/scribbles")
    assert hub.repositories == {}


def test_hub_that_cannot_be_reached_is_not_blamed_on_the_token(hub, client, model):
    client.log_in("hf_writer")
    hub.faults.append(Fault("whoami", 0, times=9))
    with pytest.raises(PublishError, match="^The Hub cannot be reached: .* Check the network, and try again.$"):
        publish(model, "me/scribbles")


def test_token_can_be_passed(hub, client, model):
    client.log_in(None)
    publish(model, "me/scribbles", private=True, token="hf_writer")
    assert hub.repositories["me/scribbles"].private


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    ("token", "writable", "repo_id", "message"),
    [
        ("hf_writer", [], "me/new", None),
        ("hf_writer", [], "our-lab/new", None),
        (
            "hf_writer",
            [],
            "readers/new",
            "may not create readers/new: it can write to me, Our-Lab. Give it write access",
        ),
        ("hf_writer", [], "someone-else/new", "may not create someone-else/new"),
        ("hf_writer", [], "me/scribbles", None),
        ("hf_fine", [], "me/new", "may not create me/new: it can write to nothing"),
        ("hf_fine", ["me"], "new", None),
        ("hf_fine", ["me"], "our-lab/new", "may not create our-lab/new: it can write to me"),
        ("hf_fine", ["me/scribbles"], "me/new", "may not create me/new: it can write to me/scribbles"),
        ("hf_fine", ["me/scribbles"], "me/scribbles", None),
        ("hf_fine", ["me/other"], "me/scribbles", "The token may not write to me/scribbles. Give it write access"),
    ],
)
def test_rights_are_checked_before_training(hub, client, token, writable, repo_id, message, create):
    client.log_in(token)
    hub.writable[:] = writable
    hub.create("me/scribbles")
    if message is None:
        assert prepare_repository(repo_id, None, None, False, create).endswith(repo_id)
        assert repo_id in hub.repositories or not create or repo_id == "new"
    else:
        with pytest.raises(PublishError, match=message):
            prepare_repository(repo_id, None, None, False, create)
        assert hub.repositories.keys() == {"me/scribbles"}


def test_pull_request_needs_no_write_access(hub, client):
    hub.create("someone-else/scribbles")
    client.log_in("hf_fine")
    prepare_repository("someone-else/scribbles", None, None, False, create_pr=True)


def test_rights_that_the_token_does_not_show_are_checked_by_creating(hub, client, model):
    hub.faults.append(Fault("POST /api/repos/create", 403))
    with pytest.raises(PublishError, match="The token may not write to me/scribbles"):
        publish(model, "me/scribbles")


@pytest.mark.parametrize("content", [b"[]", b"{", b'"x"', b'{"_class_name": []}'])
def test_damaged_index_is_not_overwritten(hub, client, content):
    hub.create("me/other", {"model_index.json": content})
    with pytest.raises(PublishError, match="me/other exists and does not contain a CFGPipeline"):
        prepare_repository("me/other", None, None, False)


@pytest.mark.parametrize("token", ["hf_sec ret", "hf_secret\n", "hf_secrét", "hf_sec\tret"])
def test_token_that_cannot_be_sent_is_not_printed(hub, client, model, token, capfd, caplog):
    with pytest.raises(PublishError, match="has spaces or other characters that no token has. Copy it again") as raised:
        publish(model, "me/scribbles", token=token)
    everything = "".join([*capfd.readouterr(), caplog.text, str(raised.value), str(raised.value.__cause__)])
    assert "hf_sec" not in everything
    assert hub.requests == []


def test_pictures_and_check_of_a_generator_take_its_own_steps(hub, client, tmp_path, monkeypatch):
    gan, forward, calls = ddgan(), UNet2DCFGModel.forward, []
    gan.save_pretrained(tmp_path / "gan")
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DCFGModel, "forward", lambda *args, **kwargs: calls.append(args) or forward(*args, **kwargs))
        publish(tmp_path / "gan", "me/gan")
    files = hub.files("me/gan")
    assert [(len(sample), t.item()) for _, sample, t in calls] == [(1, 1), (1, 0)] * (8 + 1)  # 8 pictures and the check
    assert {name for name in files if name.startswith("sched")} == {"scheduler/scheduler_config.json"}
    assert {f"samples/class-{class_id}.png" for class_id in range(8)} < files.keys()
    assert b"denoising diffusion GAN" in files["README.md"]
    published: Any = CFGPipeline.from_pretrained("me/gan")
    published.set_progress_bar_config(disable=True)
    images: Any = [pipe([3, 7], generator=generators(0, 1), output_type="pt").images for pipe in (published, gan)]
    assert_same_draws(images[0], images[1], gan, guidance_scale=0.0, num_inference_steps=2)


def test_generator_without_labels_is_pictured_by_the_null_class(hub, client, tmp_path):
    unet = make_unet(num_class_embeds=2, latent_dim=6)
    gan = make_pipeline(unet, ddgan().scheduler, id2label={}, conditioning_dropout_prob=1.0)
    gan.save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"method": {"classes_without_images": [0]}}))
    publish(tmp_path, "me/stacks")
    files = hub.files("me/stacks")
    assert [name for name in files if name.startswith("samples/")] == ["samples/null-class.png"]
    picture = np.array(Image.open(io.BytesIO(files["samples/null-class.png"])), dtype=int)
    (expected,) = gan(-1, generator=generators(0)[0]).images
    assert abs(picture - np.array(expected, dtype=int)).max() <= 1  # of 256 levels, by rounding
    assert abs(picture - np.array(gan(0, generator=generators(0)[0]).images[0], dtype=int)).max() > 1


def test_verification_detects_missing_weights(hub, client, model, monkeypatch):
    create_commit = HfApi.create_commit

    def without_weights(self, repo_id, operations, **settings):
        operations = [operation for operation in operations if not operation.path_in_repo.endswith(".safetensors")]
        return create_commit(self, repo_id, operations, **settings)

    monkeypatch.setattr(HfApi, "create_commit", without_weights)
    message = "me/scribbles was published, but could not generate an image: .*unet has no weights"
    with pytest.raises(PublishError, match=message):
        publish(model, "me/scribbles")


def test_verification_detects_different_weights(hub, client, model):
    publish(model, "me/scribbles", verify=False)
    revision = hub.repositories["me/scribbles"].branches["main"]
    example = (1, example_images(model)[1])
    verify_published(example, model, "me/scribbles", revision)
    pipe = CFGPipeline.from_pretrained(model)
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.half().float()
    pipe.save_pretrained(model)
    with pytest.raises(PublishError, match=r"does not generate the same image.*differ by up to \d"):
        verify_published((1, example_images(model)[1]), model, "me/scribbles", revision)


@pytest.mark.parametrize("scheduler_class", [LogSNRScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize("w", [0.0, 4.0])
def test_tolerance_separates_rounding_from_different_weights(scheduler_class, w):
    """Perturb the weights by ε, as a different order of the sums would, and round them to 16 bits."""
    pipes = {name: make_pipeline(scheduler=scheduler_class.from_config(LogSNRScheduler().config)) for name in "abc"}
    assert_separates(pipes, w, 16)


@pytest.mark.parametrize("num_timesteps", [1, 8])
def test_tolerance_separates_rounding_from_different_weights_of_a_generator(num_timesteps):
    assert_separates({name: ddgan("--num_timesteps", str(num_timesteps)) for name in "abc"}, 0.0, num_timesteps)


def assert_separates(pipes: dict[str, CFGPipeline], w: float, num_inference_steps: int) -> None:
    """Assert that the tolerance is above the effect of rounding, and below that of other weights."""
    generator = torch.Generator().manual_seed(1)
    for parameter in pipes["b"].unet.parameters():
        parameter.data *= 1 + torch.finfo(torch.float32).eps * torch.randn(parameter.shape, generator=generator)
    for parameter in pipes["c"].unet.parameters():
        parameter.data = parameter.data.half().float()
    images = {}
    for name, pipe in pipes.items():
        call = {"num_inference_steps": num_inference_steps, "generator": generators(0), "output_type": "pt"}
        images[name] = pipe(0, w, **call).images
        assert isinstance(images[name], torch.Tensor)
    differences = {name: (images[name] - images["a"]).abs().max().item() for name in "bc"}
    tolerance = rounding_tolerance(pipes["a"], w, num_inference_steps)
    assert differences["b"] < tolerance < differences["c"]


def test_untrusted_repository_cannot_run_code(hub, client, model):
    publish(model, "me/scribbles", verify=False)
    files = dict(hub.files("me/scribbles"))
    weights = files.pop("unet/diffusion_pytorch_model.safetensors")
    hub.create("evil/pickle", {**files, "unet/diffusion_pytorch_model.bin": weights})
    index = json.loads(files["model_index.json"])
    for name, change in {
        "evil/module": {"unet": ["os", "system"]},
        "evil/path": {"scheduler": ["../../evil", "Scheduler"]},
    }.items():
        hub.create(name, {**hub.files("me/scribbles"), "model_index.json": json.dumps({**index, **change}).encode()})
    hub.requests.clear()
    for repo_id, settings, message in (
        ("evil/pickle", {}, "safetensors"),
        ("evil/module", {}, "uses system from os as its unet"),
        ("evil/path", {}, r"uses Scheduler from \.\./\.\./evil"),
        ("me/scribbles", {"custom_pipeline": "someone/code"}, "does not run remote code"),
        ("me/scribbles", {"use_safetensors": False}, "use_safetensors=False is not supported"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            CFGPipeline.from_pretrained(repo_id, **settings)
    folder = Path(CFGPipeline.download("me/scribbles"))
    assert list(folder.rglob("*.py")) == []
    assert not any(request.endswith((".py", ".bin")) for request in hub.requests if "resolve" in request)


def test_weights_are_written_as_safetensors_only(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False"):
        make_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


def test_folder_without_a_pipeline_is_not_published(tmp_path):
    with pytest.raises(PublishError, match="has no model_index.json"):
        publish(tmp_path, "me/nothing")
    (tmp_path / "file").touch()
    for name, problem in (("file", "is a file"), ("nowhere", "does not exist")):
        with pytest.raises(PublishError, match=f"{name} {problem}. Pass the output folder"):
            publish(tmp_path / name, "me/nothing")


def test_only_allowed_files_are_uploaded(model):
    written = {".gitattributes", "README.md", "samples.png", "train_config.yaml", *PICTURES}
    assert sorted(str(path.relative_to(model)) for path in allowed_files(model)) == [
        name for name in PUBLISHED if name not in written
    ]


def test_published_settings_are_those_of_the_record(hub, client, model):
    publish(model, "me/scribbles", verify=False)
    assert yaml.safe_load(hub.files("me/scribbles")["train_config.yaml"]) == {"learning_rate": 0.001}
    CFGPipeline.from_pretrained("me/scribbles").push_to_hub("me/again")
    assert hub.files("me/again")["train_config.yaml"] == hub.files("me/scribbles")["train_config.yaml"]


def test_pictures_are_what_the_button_of_the_hub_draws(hub, client, model):
    """The button "Use this model" prints `pipe(TEXT)` with the first text of the card's widget."""
    publish(model, "me/scribbles")
    files = hub.files("me/scribbles")
    widget = yaml.safe_load(files["README.md"].decode().split("---")[1])["widget"]
    assert [entry["text"] for entry in widget[:3]] == ["zero", "one", "two"]
    pipe = CFGPipeline.from_pretrained("me/scribbles")
    pipe.set_progress_bar_config(disable=True)
    for entry in widget[:3]:
        drawn = pipe(entry["text"], generator=torch.Generator().manual_seed(0)).images[0]
        published = Image.open(io.BytesIO(files[entry["output"]["url"]]))
        assert np.abs(np.array(drawn, dtype=int) - np.array(published, dtype=int)).max() <= 1


def test_model_that_cannot_generate_is_not_published(hub, client, model):
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    nan = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
    save_file(nan, model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(PublishError, match="model was not published, because it could not generate an image: .*finite"):
        publish(model, "me/scribbles")
    assert set(hub.files("me/scribbles")) == {".gitattributes"}


def test_files_of_variants_and_diffusers_schedulers_are_allowed(tmp_path):
    pipeline = make_pipeline(make_unet())
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert sorted(str(path.relative_to(tmp_path)) for path in allowed_files(tmp_path)) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
