"""Publishing and loading, through the real client, against a stand-in for the Hub on loopback."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from conftest import generators, make_pipeline, make_unet
from hub_server import Fault
from PIL import Image
from test_save_and_load import DOOR_ONE

# The client reads its environment when it is imported, so everything that talks to the server runs in a process of its
# own, as a user's would.
PRELUDE = """
import sys, time
import torch
import diffusers_cfg.hub
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers_cfg import CFGPipeline
from diffusers_cfg.hub import PublishError, publish

time.sleep = lambda seconds: print("slept", seconds)

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generator, output_type="pt").images
"""


@pytest.fixture
def run(hub, tmp_path):
    """Run a script in an environment that knows the stand-in only."""

    def run_script(script: str, *argv: str, token: str | None = "hf_writer", fails: bool = False, **env: str) -> str:
        environment = {**hub.environment(str(tmp_path / "hf"), token), **env}
        script = PRELUDE + textwrap.dedent(script) if "DOOR ONE" not in script else DOOR_ONE
        result = subprocess.run(
            [sys.executable, "-c", script, *argv],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert (result.returncode != 0) == fails, result.stderr
        return result.stdout + result.stderr

    return run_script


@pytest.fixture
def model(tmp_path) -> Path:
    """The output folder of a run, with all that does not belong on the Hub."""
    folder = tmp_path / "model"
    make_pipeline(conditioning_dropout_prob=0.1).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"dataset": "scribbles", "steps": 7, "seconds": 300, "license": "mit"}))
    evaluation = {
        "num_samples": 10,
        "feature_extractor": {"name": "small-0123"},
        "metric_names": {"class_accuracy": "class accuracy"},
        "best": {"class_accuracy": 2.0},
        "results": [{"guidance_scale": w, "class_accuracy": 0.9, "network_evaluations": 10} for w in (0.0, 2.0)],
    }
    (folder / "evaluation" / "samples").mkdir(parents=True)
    (folder / "evaluation" / "samples" / "shard-00000.npz").write_text("not for others")
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    (folder / "evaluation" / "metrics.md").write_text("| w | class accuracy |\n")
    for name in ("grid.png", "curves.png"):
        Image.new("RGB", (4, 4)).save(folder / "evaluation" / name)
    (folder / "samples").mkdir()
    for step, colour in ((900, "red"), (1000, "blue")):
        Image.new("RGB", (4, 4), colour).save(folder / "samples" / f"step-{step}.png")
    (folder / "train_config.yaml").write_text(f"output_dir: {folder}\nhub_token: hf_secret\n")
    for secret in ("checkpoint-1/optimizer.safetensors", "logs/events", "unet/__pycache__/x.pyc", "unet/weights.bin"):
        (folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (folder / secret).write_text("not for others")
    return folder


PUBLISHED = [
    ".gitattributes", "README.md", "evaluation/curves.png", "evaluation/grid.png", "evaluation/metrics.json",
    "evaluation/metrics.md", "model_index.json", "pipeline_cfg.py", "run.json", "samples.png",
    "scheduler/scheduler_config.json", "scheduler/scheduling_log_snr.py", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors", "unet/unet_2d_cfg.py",
]  # fmt: skip


def draw_here() -> torch.Tensor:
    return make_pipeline()(
        ["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generators(0, 1), output_type="pt"
    ).images


@pytest.mark.slow
def test_publish_and_load_by_both_doors(hub, run, model, tmp_path):
    run("publish('model', 'me/scribbles')")
    assert sorted(hub.files("me/scribbles")) == PUBLISHED
    assert [commit.message for commit in hub.repositories["me/scribbles"].commits[1:]] == ["Upload CFGPipeline"]
    assert hub.files("me/scribbles")["samples.png"] == (model / "samples" / "step-1000.png").read_bytes()
    for name, data in hub.files("me/scribbles").items():
        assert b"hf_secret" not in data, name
        assert str(tmp_path).encode() not in data, name

    run("DOOR ONE", "me/scribbles", "one.pt", "copy", token=None)
    run(
        """
        pipe = CFGPipeline.from_pretrained("me/scribbles")
        assert type(pipe) is CFGPipeline and type(pipe.unet).__module__ == "diffusers_cfg.unet_2d_cfg"
        torch.save(draw(pipe), "two.pt")
        unet = UNet2DModel.from_pretrained("me/scribbles", subfolder="unet")
        assert torch.equal(unet.class_embedding.weight, pipe.unet.class_embedding.weight)
        """,
        token=None,
        DIFFUSERS_DISABLE_REMOTE_CODE="1",
    )
    assert torch.equal(torch.load(tmp_path / "one.pt"), draw_here())
    assert torch.equal(torch.load(tmp_path / "two.pt"), draw_here())

    # Without the Hub
    run("import huggingface_hub; huggingface_hub.snapshot_download('me/scribbles', local_dir='downloaded')")
    hub.faults.append(Fault(".", 500, times=1000))
    run("torch.save(draw(CFGPipeline.from_pretrained('me/scribbles')), 'off.pt')", token=None, HF_HUB_OFFLINE="1")
    # Plain diffusers asks the Hub about custom code even then; a folder of one's own is the way that works.
    run("DOOR ONE", "downloaded", "off one.pt", "off copy", token=None, HF_HUB_OFFLINE="1")
    for name in ("off.pt", "off one.pt"):
        assert torch.equal(torch.load(tmp_path / name), draw_here())


@pytest.mark.slow
def test_load_change_and_push_again(hub, run, model, tmp_path):
    """A person's words in the card stay, also through another's push; a pipeline from the Hub keeps its facts."""
    run("publish('model', 'me/scribbles', verify=False)")
    files = dict(hub.files("me/scribbles"))
    card = files["README.md"].decode().replace("license: mit", "license: mit\nlanguage: en")
    files["README.md"] = f"{card}\n## My notes\n\nDo not feed it cats.\n".encode()
    hub.commit("me/scribbles", "edit the card", files)
    run(
        """
        pipe = CFGPipeline.from_pretrained("me/scribbles")
        pipe.unet.conv_out.bias.data += 0.1
        url = pipe.push_to_hub("me/scribbles", commit_message="Brighter")
        assert "/commit/" in url
        pipe.push_to_hub("other-scribbles", private=True)
        """
    )
    assert [commit.message for commit in hub.repositories["me/scribbles"].commits[-2:]] == ["edit the card", "Brighter"]
    again = hub.files("me/scribbles")["README.md"].decode()
    assert "Do not feed it cats." in again
    assert again.count("## Use") == 1
    assert yaml.safe_load(again.split("---")[1])["language"] == "en"
    assert hub.files("me/scribbles")["unet/diffusion_pytorch_model.safetensors"] != files[
        "unet/diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert hub.repositories["me/other-scribbles"].private
    assert sorted(hub.files("me/other-scribbles")) == PUBLISHED
    assert "| data | scribbles |" in hub.files("me/other-scribbles")["README.md"].decode()


@pytest.mark.slow
def test_revisions_variants_dtypes_and_private_repositories(hub, run, model):
    run("publish('model', 'me/scribbles', private=True, verify=False)")
    first = hub.repositories["me/scribbles"].branches["main"]
    run(
        f"""
        pipe = CFGPipeline.from_pretrained("me/scribbles")
        before = draw(pipe)
        pipe.unet.conv_out.bias.data += 0.1
        pipe.push_to_hub("me/scribbles")
        pipe.unet.conv_out.bias.data += 0.1
        pipe.push_to_hub("me/scribbles", variant="ema9999")
        latest = pipe

        old = CFGPipeline.from_pretrained("me/scribbles", revision="{first}")
        new = CFGPipeline.from_pretrained("me/scribbles")
        ema = CFGPipeline.from_pretrained("me/scribbles", variant="ema9999", revision="main")
        assert torch.equal(draw(old), before)
        assert not torch.equal(draw(new), before)
        assert torch.equal(draw(ema), draw(latest)) and not torch.equal(draw(ema), draw(new))
        assert CFGPipeline.from_pretrained("me/scribbles", dtype=torch.bfloat16).unet.dtype == torch.bfloat16

        for load in (
            lambda: CFGPipeline.from_pretrained("me/scribbles", revision="nowhere"),
            lambda: CFGPipeline.from_pretrained("me/nothing"),
        ):
            try:
                load()
            except OSError as error:
                print("refused:", type(error).__name__)
        one = DiffusionPipeline.from_pretrained("me/scribbles", revision="{first}", trust_remote_code=True)
        two = DiffusionPipeline.from_pretrained("me/scribbles", variant="ema9999", trust_remote_code=True)
        assert torch.equal(draw(one), before) and torch.equal(draw(two), draw(latest))
        """
    )
    names = set(hub.files("me/scribbles"))
    assert {"unet/diffusion_pytorch_model.ema9999.safetensors", "unet/diffusion_pytorch_model.safetensors"} < names
    said = run(
        "CFGPipeline.from_pretrained('me/scribbles')", token=None, fails=True, HF_HOME=str(model / "other-cache")
    )
    assert "RepositoryNotFoundError: 401" in said


@pytest.mark.slow
def test_faults_are_survived_or_named(hub, run, model):
    hub.faults += [
        Fault("POST .*/commit/", 500),
        Fault("POST .*/commit/", 429, headers={"Retry-After": "7"}),
        Fault("PUT /lfs/", 0),
        Fault("POST /api/repos/create", 503),
    ]
    said = run("print(publish('model', 'me/scribbles', verify=False))")
    assert "/commit/" in said
    assert "slept 7" in said
    assert sorted(hub.files("me/scribbles")) == PUBLISHED
    assert all(fault.times == 0 for fault in hub.faults)

    hub.faults[:] = [Fault("POST .*/commit/", 500, times=1000)]
    said = run("publish('model', 'me/other', verify=False)", fails=True)
    assert "PublishError: me/other could not be published" in said
    assert set(hub.files("me/other")) == {".gitattributes"}
    assert (model / "model_index.json").is_file()


@pytest.mark.slow
def test_a_repository_that_is_something_else_is_not_overwritten(hub, run, model):
    hub.create("me/bert", {"pytorch_model.bin": b"precious", "config.json": b"{}"})
    hub.create("me/empty", {"README.md": b"# Soon\n"})
    said = run("publish('model', 'me/bert', verify=False)", fails=True)
    assert "me/bert exists and holds something else (.gitattributes, config.json, pytorch_model.bin" in said
    assert len(hub.repositories["me/bert"].commits) == 1
    run("publish('model', 'me/bert', overwrite=True, verify=False); publish('model', 'me/empty', verify=False)")
    assert hub.files("me/bert")["pytorch_model.bin"] == b"precious"
    assert hub.files("me/empty")["README.md"].endswith(b"# Soon\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "there is none"), ("wrong", "does not accept the token"), ("hf_reader", "token can only read")],
)
def test_a_token_that_will_not_do(hub, run, model, token, message):
    said = run("publish('model', 'me/scribbles')", token=token, fails=True)
    assert message in said
    assert hub.repositories == {}


@pytest.mark.slow
def test_a_namespace_that_is_not_yours(hub, run, model):
    hub.faults.append(Fault("POST /api/repos/create", 403))
    said = run("publish('model', 'someone-else/scribbles')", fails=True)
    assert "PublishError: someone-else/scribbles cannot be made or looked at" in said
    assert "403" in said


@pytest.mark.slow
def test_what_was_published_is_checked(hub, run, model):
    said = run(
        """
        create_commit = diffusers_cfg.hub.HfApi.create_commit

        def wrong_weights(self, repo_id, operations, **settings):
            operations = [op for op in operations if not op.path_in_repo.endswith(".safetensors")]
            return create_commit(self, repo_id, operations, **settings)

        diffusers_cfg.hub.HfApi.create_commit = wrong_weights
        publish("model", "me/scribbles")
        """,
        fails=True,
    )
    assert "me/scribbles was published, but an image could not be drawn from me/scribbles" in said


@pytest.mark.slow
def test_a_strangers_repository(hub, run, model):
    run("publish('model', 'me/scribbles', verify=False)")
    files = dict(hub.files("me/scribbles"))
    weights = files.pop("unet/diffusion_pytorch_model.safetensors")
    hub.create("evil/pickle", {**files, "unet/diffusion_pytorch_model.bin": weights})
    index = json.loads(files["model_index.json"])
    for name, change in {
        "evil/module": {"unet": ["os", "system"]},
        "evil/path": {"scheduler": ["../../evil", "Scheduler"]},
    }.items():
        hub.create(name, {**hub.files("me/scribbles"), "model_index.json": json.dumps({**index, **change}).encode()})
    run(
        """
        for repo_id, settings in {
            "evil/pickle": {}, "evil/module": {}, "evil/path": {},
            "me/scribbles": {"custom_pipeline": "someone/code"},
        }.items():
            try:
                CFGPipeline.from_pretrained(repo_id, **settings)
            except (ValueError, OSError) as error:
                print(repo_id, "refused:", str(error).splitlines()[0])
            else:
                raise AssertionError(repo_id)
        try:
            CFGPipeline.from_pretrained("me/scribbles", use_safetensors=False)
        except ValueError as error:
            assert "safetensors only" in str(error)
        """
    )
    assert not any(request.endswith(".py") for request in hub.requests if "resolve" in request)
    assert not any(request.endswith(".bin") for request in hub.requests if "resolve" in request)


def test_weights_are_written_as_safetensors_only(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False"):
        make_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_pipeline(tmp_path):
    from diffusers_cfg.hub import PublishError, publish

    with pytest.raises(PublishError, match="has no model_index.json"):
        publish(tmp_path, "me/nothing")


def test_only_what_is_allowed_is_uploaded(model):
    from diffusers_cfg.hub import allowed_files

    assert sorted(str(path.relative_to(model)) for path in allowed_files(model)) == [
        name for name in PUBLISHED if name not in (".gitattributes", "README.md", "samples.png")
    ]


def test_variants_and_stock_schedulers_are_allowed(tmp_path):
    import diffusers

    from diffusers_cfg.hub import allowed_files

    pipeline = make_pipeline(make_unet())
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert sorted(str(path.relative_to(tmp_path)) for path in allowed_files(tmp_path)) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
