"""A saved folder loads by two doors: plain diffusers with remote code, and this package without."""

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from conftest import generators, make_pipeline, make_unet
from diffusers import DiffusionPipeline
from diffusers.guiders import AdaptiveProjectedGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.hub import allowed_files

# Run in a process of its own, in an environment where the package is not to be had: editable installs are found through
# hooks that no directory can hide, so the import itself is made to fail.
DOOR_ONE = """
import sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_cfg":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
try:
    import diffusers_cfg
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is there")

from diffusers import DiffusionPipeline

source, target, copy = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.save_pretrained(copy)
pipe = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
assert type(pipe.unet).__name__ == "UNet2DCFGModel", type(pipe.unet)
generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
images = pipe(["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generator, output_type="pt").images
torch.save(images, target)
"""


def run_python(*args: str, cwd, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generators(0, 1), output_type="pt").images


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_folder_holds_the_code_and_names_it(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_cfg", "CFGPipeline"]
    assert index["unet"] == ["unet_2d_cfg", "UNet2DCFGModel"]
    assert index["scheduler"] == ["scheduling_log_snr", "LogSNRScheduler"]
    assert index["id2label"] == {"0": "zero", "1": "one", "2": "two"}
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "model_index.json",
        "pipeline_cfg.py",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_log_snr.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/unet_2d_cfg.py",
    ]


@pytest.mark.slow
def test_door_one_without_the_package(pipeline, folder, tmp_path):
    result = run_python("-c", DOOR_ONE, str(folder), "images.pt", "copy", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), draw(pipeline))
    for path in folder.rglob("*.py"):
        assert (tmp_path / "copy" / path.relative_to(folder)).read_text() == path.read_text()


def test_door_one_asks_for_trust(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)


def test_door_two(pipeline, folder):
    loaded = CFGPipeline.from_pretrained(folder)
    assert type(loaded) is CFGPipeline
    assert type(loaded.unet) is UNet2DCFGModel
    assert type(loaded.scheduler) is LogSNRScheduler
    assert loaded.id2label == {0: "zero", 1: "one", 2: "two"}
    assert torch.equal(draw(loaded), draw(pipeline))


def test_door_two_runs_no_code_of_the_folder(pipeline, folder, monkeypatch):
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('the code of the folder was run')")
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "DIFFUSERS_DISABLE_REMOTE_CODE", True)
    assert torch.equal(draw(CFGPipeline.from_pretrained(folder)), draw(pipeline))


def test_what_was_loaded_can_be_saved_and_loaded(pipeline, folder, tmp_path):
    once = CFGPipeline.from_pretrained(folder)
    once.save_pretrained(tmp_path / "again")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == files
    assert torch.equal(draw(CFGPipeline.from_pretrained(again)), draw(pipeline))


def weaker_unet() -> UNet2DCFGModel:
    torch.manual_seed(7)
    return UNet2DCFGModel.from_config(make_unet().config, block_out_channels=(8, 8)).eval()


def test_a_guide_put_in_later_is_saved(pipeline, tmp_path):
    plain = draw(pipeline)
    pipeline.guide_unet = weaker_unet()
    images = draw(pipeline)
    assert not torch.equal(images, plain)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "guide_unet" / "unet_2d_cfg.py").read_text() == UNet2DCFGModel.remote_code
    assert torch.equal(draw(CFGPipeline.from_pretrained(tmp_path)), images)
    assert torch.equal(draw(CFGPipeline.from_pretrained(tmp_path, guide_unet=None)), plain)
    pipeline.guide_unet = None
    pipeline.save_pretrained(tmp_path / "without")
    assert torch.equal(draw(CFGPipeline.from_pretrained(tmp_path / "without")), plain)


@pytest.mark.slow
def test_door_one_with_a_guide(pipeline, tmp_path):
    pipeline.guide_unet = weaker_unet()
    pipeline.save_pretrained(tmp_path / "model")
    result = run_python("-c", DOOR_ONE, str(tmp_path / "model"), "images.pt", "copy", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), draw(pipeline))


def test_a_guider_is_saved(pipeline, tmp_path):
    pipeline.guider = AdaptiveProjectedGuidance(2.0, use_original_formulation=True, eta=0.5)
    pipeline.save_pretrained(tmp_path)
    loaded = CFGPipeline.from_pretrained(tmp_path)
    assert (loaded.guider.guidance_scale, loaded.guider.eta) == (2.0, 0.5)
    images = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(1, num_inference_steps=4, generator=generators(0), output_type="pt").images)
    assert torch.equal(*images)
    with pytest.raises(ValueError, match=r"guidance_scale cannot.*AdaptiveProjectedGuidance.*pipe.guider = None"):
        loaded(1, guidance_scale=2.0)


def test_what_is_published_includes_guide_and_guider(pipeline, tmp_path):
    pipeline.guide_unet = weaker_unet()
    pipeline.save_pretrained(tmp_path)
    pipeline.guide_unet, pipeline.guider = None, AdaptiveProjectedGuidance(2.0)
    pipeline.guider.save_pretrained(tmp_path / "guider")
    names = {str(path.relative_to(tmp_path)) for path in allowed_files(tmp_path)}
    assert names == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"guide_unet/diffusion_pytorch_model.safetensors", "guider/guider_config.json"} <= names


def test_remote_code_saves_its_own_text(folder, tmp_path):
    """Two folders share the path of their code in the cache; the one loaded first must not save the other's."""
    code = folder / "unet" / "unet_2d_cfg.py"
    own_text = code.read_text()
    first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    code.write_text(own_text + "\n# another version\n")
    second = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / "unet" / "unet_2d_cfg.py").read_text() == own_text
    assert (tmp_path / "second" / "unet" / "unet_2d_cfg.py").read_text() == own_text + "\n# another version\n"


def test_two_versions_in_one_process_do_not_disturb_each_other(pipeline, folder):
    code = folder / "unet" / "unet_2d_cfg.py"
    first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    changed = code.read_text().replace("class_labels == -1", "class_labels >= -1")  # null, always
    assert changed != code.read_text()
    code.write_text(changed)
    second = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(draw(first), draw(pipeline))
    assert not torch.equal(draw(second), draw(pipeline))
    assert torch.equal(draw(first), draw(pipeline))


def test_facts_of_the_training_survive(tmp_path):
    make_pipeline(conditioning_dropout_prob=0.25).save_pretrained(tmp_path)
    assert CFGPipeline.from_pretrained(tmp_path).config.conditioning_dropout_prob == 0.25


def test_a_compiled_network_is_saved_as_itself(pipeline, tmp_path):
    images = draw(pipeline)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(CFGPipeline.from_pretrained(tmp_path)), images)


def test_a_scheduler_of_diffusers_is_loaded_as_such(pipeline, tmp_path):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    loaded = CFGPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(draw(loaded), draw(pipeline))
    back = LogSNRScheduler.from_config(loaded.scheduler.config)
    assert back.config.log_snr_min == -20


def test_a_latent_model_survives(tmp_path):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=0.5, sample_size=8
    )
    pipeline = make_pipeline(make_unet(in_channels=2, out_channels=2), LogSNRScheduler(clip_sample=False), vae=vae)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(CFGPipeline.from_pretrained(tmp_path)), draw(pipeline))


def test_components_can_be_passed(pipeline, folder):
    unet = make_unet()
    assert CFGPipeline.from_pretrained(folder, unet=unet).unet is unet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": ["os", "system"]}, "wants system from os for its unet"),
        ({"unet": ["../unet_2d_cfg", "UNet2DCFGModel"]}, "wants UNet2DCFGModel from ../unet_2d_cfg"),
        ({"scheduler": ["evil", "Scheduler"]}, "wants Scheduler from evil for its scheduler"),
        ({"_class_name": ["pipeline_cfg", "OtherPipeline"]}, "describes a OtherPipeline"),
        ({"_class_name": "DiTPipeline"}, "describes a DiTPipeline"),
    ],
)
def test_a_strangers_index_is_refused(folder, change, message):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_importing_is_cheap(tmp_path):
    """What the package adds to the diffusers classes that it is made of."""
    script = (
        "import time, torch\n"
        "from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DModel\n"
        "from diffusers.image_processor import VaeImageProcessor\n"
        # of this process: the time on the clock is also that of whatever else runs
        "then = time.process_time()\nimport diffusers_cfg\nprint(time.process_time() - then)"
    )
    result = run_python("-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.3
