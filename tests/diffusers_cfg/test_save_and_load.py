"""Test that a saved folder loads with plain diffusers, which runs its code, and with this package, which does not."""

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import AdaptiveProjectedGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.hub import allowed_files
from tests.support.draws import assert_same_draws
from tests.support.models import generators, make_pipeline, make_unet

# Run in a process that cannot import the package. Editable installs are found through import hooks, so changing the
# path is not enough and the import is made to fail. Arguments for each model: its source, the file for its images, and
# the folder to save it to.
WITHOUT_THE_PACKAGE = """
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
    raise AssertionError("the package can be imported")

from diffusers import DiffusionPipeline

for source, target, copy in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipe.save_pretrained(copy)
    pipe = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
    assert type(pipe.unet).__name__ == "UNet2DCFGModel", type(pipe.unet)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipe(["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generator, output_type="pt").images
    torch.save(images, target)
"""


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(["two", 1], [0.0, 2.5], num_inference_steps=4, generator=generators(0, 1), output_type="pt").images


def assert_same_model(actual: torch.Tensor, expected: torch.Tensor, pipeline) -> None:
    assert_same_draws(actual, expected, pipeline, guidance_scale=2.5, num_inference_steps=4)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_saved_folder_contains_and_names_the_code(folder):
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
def test_plain_diffusers_loads_without_the_package(pipeline, folder, tmp_path):
    plain = draw(pipeline)
    pipeline.guide_unet = weaker_unet()
    pipeline.save_pretrained(tmp_path / "guided model")
    arguments = [str(folder), "plain.pt", "plain copy", str(tmp_path / "guided model"), "guided.pt", "guided copy"]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert_same_model(torch.load(tmp_path / "plain.pt"), plain, pipeline)
    assert_same_model(torch.load(tmp_path / "guided.pt"), draw(pipeline), pipeline)
    for path in folder.rglob("*.py"):
        assert (tmp_path / "plain copy" / path.relative_to(folder)).read_text() == path.read_text()


def test_plain_diffusers_requires_trust_remote_code(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)


def test_package_loads_its_own_classes(pipeline, folder):
    loaded = CFGPipeline.from_pretrained(folder)
    assert type(loaded) is CFGPipeline
    assert type(loaded.unet) is UNet2DCFGModel
    assert type(loaded.scheduler) is LogSNRScheduler
    assert loaded.id2label == {0: "zero", 1: "one", 2: "two"}
    assert_same_model(draw(loaded), draw(pipeline), pipeline)


def test_package_runs_no_code_from_the_folder(pipeline, folder, monkeypatch):
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('code from the folder was run')")
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "DIFFUSERS_DISABLE_REMOTE_CODE", True)
    assert_same_model(draw(CFGPipeline.from_pretrained(folder)), draw(pipeline), pipeline)


def test_package_runs_no_code_even_with_trust_remote_code(pipeline, folder):
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('code from the folder was run')")
    assert_same_model(draw(CFGPipeline.from_pretrained(folder, trust_remote_code=True)), draw(pipeline), pipeline)
    # diffusers first looks for a component's module in the component's folder, under its name in the index
    (folder / "unet" / "diffusers_cfg.unet_2d_cfg.py").write_text("raise SystemExit('code from the folder was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        CFGPipeline.from_pretrained(folder, trust_remote_code=True)


def test_package_imports_its_component_modules(folder, monkeypatch):
    """The package imports lazily, so a component's module may not be in `sys.modules` yet."""
    for name in CFGPipeline.component_classes:
        monkeypatch.delitem(sys.modules, f"diffusers_cfg.{name}")
    loaded = CFGPipeline.from_pretrained(folder)
    assert type(loaded.unet).__module__ == "diffusers_cfg.unet_2d_cfg"
    assert draw(loaded).shape == (2, 1, 8, 8)


def test_load_config_matches_diffusers(folder):
    """The arguments and return values are those of `DiffusionPipeline.load_config`."""
    index = CFGPipeline.load_config(folder)
    assert isinstance(index, dict)
    assert index["_class_name"] == "CFGPipeline"
    assert index["unet"] == ["diffusers_cfg.unet_2d_cfg", "UNet2DCFGModel"]
    assert CFGPipeline.load_config(folder / "model_index.json") == index
    assert CFGPipeline.load_config(folder, return_unused_kwargs=True, other=1) == (index, {"other": 1})
    assert CFGPipeline.load_config(folder, True, True) == (index, {}, None)


def test_loaded_pipeline_can_be_saved_and_loaded_again(pipeline, folder, tmp_path):
    once = CFGPipeline.from_pretrained(folder)
    once.save_pretrained(tmp_path / "again")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == files
    assert_same_model(draw(CFGPipeline.from_pretrained(again)), draw(pipeline), pipeline)


def weaker_unet() -> UNet2DCFGModel:
    torch.manual_seed(7)
    return UNet2DCFGModel.from_config(make_unet().config, block_out_channels=(8, 8)).eval()


def test_guide_unet_assigned_later_is_saved(pipeline, tmp_path):
    plain = draw(pipeline)
    pipeline.guide_unet = weaker_unet()
    images = draw(pipeline)
    assert differ(images, plain)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "guide_unet" / "unet_2d_cfg.py").read_text() == UNet2DCFGModel.remote_code
    assert_same_model(draw(CFGPipeline.from_pretrained(tmp_path)), images, pipeline)
    assert_same_model(draw(CFGPipeline.from_pretrained(tmp_path, guide_unet=None)), plain, pipeline)
    pipeline.guide_unet = None
    pipeline.save_pretrained(tmp_path / "without")
    assert json.loads((tmp_path / "without" / "model_index.json").read_text())["guide_unet"] == [None, None]
    assert_same_model(draw(CFGPipeline.from_pretrained(tmp_path / "without")), plain, pipeline)


def test_guide_unet_assigned_later_is_a_component(pipeline, tmp_path):
    pipeline.guide_unet = weaker_unet()
    assert pipeline.components["guide_unet"] is pipeline.guide_unet
    pipeline.to(torch.float64)
    assert pipeline.guide_unet.dtype == torch.float64
    assert json.loads(pipeline.to_json_string())["guide_unet"] == ["unet_2d_cfg", "UNet2DCFGModel"]
    assert '"guide_unet"' in repr(pipeline)
    pipeline.save_config(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["guide_unet"] == ["unet_2d_cfg", "UNet2DCFGModel"]


def test_guider_is_saved(pipeline, tmp_path):
    pipeline.guider = AdaptiveProjectedGuidance(2.0, use_original_formulation=True, eta=0.5)
    pipeline.save_pretrained(tmp_path)
    loaded = CFGPipeline.from_pretrained(tmp_path)
    assert (loaded.guider.guidance_scale, loaded.guider.eta) == (2.0, 0.5)
    images = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(1, num_inference_steps=4, generator=generators(0), output_type="pt").images)
    assert_same_draws(images[0], images[1], pipeline, guidance_scale=2.0, num_inference_steps=4)
    with pytest.raises(ValueError, match=r"guidance_scale cannot.*AdaptiveProjectedGuidance.*pipe.guider = None"):
        loaded(1, guidance_scale=2.0)


def test_published_files_include_guide_unet_and_guider(pipeline, tmp_path):
    pipeline.guide_unet = weaker_unet()
    pipeline.save_pretrained(tmp_path)
    pipeline.guide_unet, pipeline.guider = None, AdaptiveProjectedGuidance(2.0)
    pipeline.guider.save_pretrained(tmp_path / "guider")
    names = {str(path.relative_to(tmp_path)) for path in allowed_files(tmp_path)}
    assert names == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"guide_unet/diffusion_pytorch_model.safetensors", "guider/guider_config.json"} <= names


def test_remote_code_saves_its_own_source(folder, tmp_path):
    """The code of both folders has the same path in the cache. The pipeline loaded first must save its own version."""
    code = folder / "unet" / "unet_2d_cfg.py"
    own_text = code.read_text()
    first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    code.write_text(own_text + "\n# another version\n")
    second = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / "unet" / "unet_2d_cfg.py").read_text() == own_text
    assert (tmp_path / "second" / "unet" / "unet_2d_cfg.py").read_text() == own_text + "\n# another version\n"


def test_two_versions_coexist_in_one_process(pipeline, folder):
    code = folder / "unet" / "unet_2d_cfg.py"
    first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    changed = code.read_text().replace("class_labels == -1", "class_labels >= -1")  # always null
    assert changed != code.read_text()
    code.write_text(changed)
    second = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    before = draw(first)
    assert_same_model(before, draw(pipeline), pipeline)
    assert differ(draw(second), draw(pipeline))
    assert torch.equal(draw(first), before)


def test_conditioning_dropout_prob_is_saved(tmp_path):
    make_pipeline(conditioning_dropout_prob=0.25).save_pretrained(tmp_path)
    assert CFGPipeline.from_pretrained(tmp_path).config.conditioning_dropout_prob == 0.25


def test_compiled_network_is_saved_uncompiled(pipeline, tmp_path):
    images = draw(pipeline)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.save_pretrained(tmp_path)
    assert_same_model(draw(CFGPipeline.from_pretrained(tmp_path)), images, CFGPipeline.from_pretrained(tmp_path))


def test_diffusers_scheduler_keeps_its_class(pipeline, tmp_path):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    loaded = CFGPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert_same_model(draw(loaded), draw(pipeline), pipeline)
    back = LogSNRScheduler.from_config(loaded.scheduler.config)
    assert back.config.log_snr_min == -20


def test_latent_model_is_saved(tmp_path):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=0.5, sample_size=8
    )
    pipeline = make_pipeline(make_unet(in_channels=2, out_channels=2), LogSNRScheduler(clip_sample=False), vae=vae)
    pipeline.save_pretrained(tmp_path)
    assert_same_model(draw(CFGPipeline.from_pretrained(tmp_path)), draw(pipeline), pipeline)


def test_components_can_be_passed(pipeline, folder):
    unet = make_unet()
    assert CFGPipeline.from_pretrained(folder, unet=unet).unet is unet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": ["os", "system"]}, "uses system from os as its unet"),
        ({"unet": ["../unet_2d_cfg", "UNet2DCFGModel"]}, "uses UNet2DCFGModel from ../unet_2d_cfg"),
        ({"unet": ["unet_2d_cfg", "Path"]}, "uses Path from unet_2d_cfg"),
        ({"unet": ["hub", "CFGPipeline"]}, "uses CFGPipeline from hub"),
        ({"scheduler": ["evil", "Scheduler"]}, "uses Scheduler from evil as its scheduler"),
        ({"_class_name": ["pipeline_cfg", "OtherPipeline"]}, "describes a OtherPipeline"),
        ({"_class_name": "DiTPipeline"}, "describes a DiTPipeline"),
    ],
)
def test_index_with_unknown_classes_is_refused(folder, change, message):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(folder)


@pytest.mark.parametrize("remote_code", [False, True])
def test_pickles_are_not_saved(folder, tmp_path, remote_code):
    """They would not load again."""
    loader = DiffusionPipeline if remote_code else CFGPipeline
    loaded = loader.from_pretrained(folder, **({"trust_remote_code": True} if remote_code else {}))
    with pytest.raises(ValueError, match="safe_serialization=False is not supported"):
        loaded.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    assert not (tmp_path / "pickles").exists()
