"""Test the graph, the page's files and the command."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.evaluation.sampling import make_scheduler
from diffusers_cfg.export import graph, page
from diffusers_cfg.export.export import export_model, sampling_steps
from diffusers_cfg.export.settings import ExportConfig
from tests.support.commands import load_command
from tests.support.models import ddgan, make_classifier, make_pipeline, make_unet

ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def export(*argv: str) -> None:
    """Run export.py."""
    load_command("export").main([*argv])


def small(**settings) -> CFGPipeline:
    """Return a pipeline of one level with random weights and a solver, saved with 4 steps."""
    unet = make_unet(**ONE_LEVEL, **settings)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    scheduler = make_scheduler("DPMSolverMultistepScheduler", LogSNRScheduler(prediction_type="v_prediction"))
    return make_pipeline(unet, scheduler, num_inference_steps=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """Return the folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    small().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two passes", "one pass", "fourier", "guide"])
def test_the_graph_equals_the_pipeline(kind):
    settings = {"one pass": {"max_guidance_scale": 3.0}, "fourier": {"fourier_frequencies": [3.0, 6.0]}}
    pipeline = small(**settings.get(kind, {}))
    if kind == "guide":
        pipeline.guide_unet = small().unet
        torch.nn.init.normal_(pipeline.guide_unet.conv_in.weight)
    if kind == "one pass":  # which starts without guidance
        torch.nn.init.normal_(pipeline.unet.guidance_embedding.linear_2.weight)
    exported = graph.export_graph(pipeline, 5)
    assert graph.check_graph(exported, pipeline, 5, seed=7) < 1e-5
    session = onnxruntime.InferenceSession(exported)
    z, t, class_labels, _ = graph.inputs_of(pipeline, 5, seed=8)

    def predict(w: float) -> np.ndarray:
        inputs = {"z": z, "t": t, "class_labels": class_labels, "w": torch.full((5,), w)}
        return np.asarray(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    assert np.abs(predict(2.0) - predict(0.0)).max() > 1e-3  # so that the comparison is one of guidance
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    with pytest.raises(UserError, match=r"differs from the pipeline by .* Nothing was written"):
        graph.check_graph(exported, pipeline, 5, seed=7)


@pytest.mark.slow
def test_a_program_samples_from_the_exported_files(saved, tmp_path, capsys):
    """The program has numpy and onnxruntime, and reads model.onnx and sampling.json only."""
    export("--model", saved, "--format", "onnx", "--output_dir", str(tmp_path), "--batch_size", "3")
    assert "differs from the pipeline by at most" in capsys.readouterr().out
    sampling = json.loads((tmp_path / "sampling.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    noise = np.random.default_rng(0).standard_normal((3, *sampling["shape"])).astype(np.float32)
    labels, w = np.array([0, 2, 3]), np.array([2.5, 0, -1], np.float32)
    assert sampling["classes"] == ["zero", "one", "two"]
    assert sorted(sampling["schedules"], key=int) == ["2", "4", "8", "16"]
    schedule, known = sampling["schedules"][str(sampling["steps"])], [noise]
    rows = zip(schedule["combinations"], schedule["timesteps"], schedule["from_prediction"], strict=False)
    for row, t, (a, b) in rows:
        z = sum(c * x for c, x in zip(row, known, strict=True)).astype(np.float32)
        inputs = {"z": z, "t": np.array(t, np.float32), "class_labels": labels, "w": w}
        x = a * z + b * session.run(None, inputs)[0]
        known.append(x.clip(-schedule["clip"], schedule["clip"]))
    found = sum(c * x for c, x in zip(schedule["combinations"][-1], known, strict=True))

    pipeline = CFGPipeline.from_pretrained(saved)
    call = {"latents": torch.from_numpy(noise), "guidance_scale": w.tolist(), "output_type": "latent"}
    assert np.abs(found - pipeline([0, 2, -1], **call).images.numpy()).max() < 1e-4
    with pytest.raises(UserError, match=r"model\.onnx and .*sampling\.json would be overwritten"):
        export("--model", saved, "--format", "onnx", "--output_dir", str(tmp_path))


@pytest.mark.slow
def test_a_failed_check_leaves_no_file(saved, tmp_path, monkeypatch):
    original = graph.export_graph

    def damaged(pipeline: CFGPipeline, batch_size: int) -> bytes:
        exported = original(pipeline, batch_size)
        torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
        return exported

    monkeypatch.setattr(graph, "export_graph", damaged)
    with pytest.raises(UserError, match="differs from the pipeline"):
        export("--model", saved, "--output_dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_operation_without_onnx_is_reported(monkeypatch):
    def fail(*_, **__) -> None:
        raise torch.onnx.OnnxExporterError("\nNo conversion for aten.sinc.\nA long report follows.")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(
        UserError, match=r"cannot export the network of this model to ONNX: No conversion for aten.sinc.$"
    ):
        graph.export_graph(small(), 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "/nowhere/model"], "--model /nowhere/model cannot be loaded"),
        (["--batch_size", "0"], "batch_size must lie in"),
        (["--num_inference_steps", "4", "4"], "must not repeat"),
        (["--num_inference_steps", "300"], "num_inference_steps must lie in"),
        (["--format", "onnx", "--onnxruntime_web", "dist"], "--onnxruntime_web is embedded in a page"),
        (["--onnxruntime_web", "/nowhere"], r"--onnxruntime_web /nowhere has no .*npm pack onnxruntime-web@"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "is not supported"),
        (["--scheduler", "LogSNRScheduler"], "draws noise between steps"),
        (["--scheduler", "DDIMScheduler", "--num_inference_steps", "7"], "DDIMScheduler cannot take 7 steps"),
        (["--output_dir", "/dev/null/x"], "cannot be a folder"),
    ],
)
def test_wrong_settings_are_refused(saved, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        export("--model", saved, "--output_dir", str(tmp_path), *argv)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(saved, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"index\.html would be overwritten. Delete it"):
        export("--model", saved, "--output_dir", str(tmp_path))
    assert (tmp_path / "index.html").read_text() == "mine"


def test_missing_packages_are_named(saved, monkeypatch):
    monkeypatch.setattr("diffusers_cfg.export.settings.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'onnxruntime and onnxscript not installed.*"diffusers-cfg\[export\]"'):
        export("--model", saved)


def unsupported() -> dict[str, tuple[CFGPipeline, str]]:
    """Return pipelines that cannot be exported, with the reason."""
    unconditional = make_pipeline(make_unet(num_class_embeds=None), classifier=make_classifier())
    return {
        "GAN": (ddgan(), "denoising diffusion GAN cannot be exported"),
        "classifier": (unconditional, "unconditional network cannot be exported"),
        "guider": (make_pipeline(guider=ClassifierFreeGuidance()), "ClassifierFreeGuidance cannot be exported"),
    }


@pytest.mark.parametrize("kind", ["GAN", "classifier", "guider"])
def test_models_that_are_no_graph_are_refused(kind):
    pipeline, message = unsupported()[kind]
    with pytest.raises(UserError, match=message):
        graph.check_exportable(pipeline)


def test_large_models_are_refused(pipeline):
    graph.check_exportable(pipeline)
    with pytest.raises(UserError, match=r"The weights have 0 MiB, and at most 0 MiB"):
        graph.check_exportable(pipeline, max_bytes=1000)


def test_a_page_of_latents_is_refused(tmp_path):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=1, sample_size=8)
    make_pipeline(vae=vae).save_pretrained(tmp_path / "latent")
    with pytest.raises(UserError, match="model of latents cannot be exported as a page.*--format onnx"):
        export("--model", str(tmp_path / "latent"), "--output_dir", str(tmp_path / "out"))


def test_a_student_keeps_its_number_of_steps():
    student = make_pipeline(make_unet(max_guidance_scale=3.0), LogSNRScheduler(), num_inference_steps=8)
    config = parse_config(ExportConfig, ["--model", "student"])
    assert sampling_steps(config, student) == [8, 4, 16, 32]
    student.scheduler = make_scheduler("DDIMScheduler", student.scheduler)
    assert sampling_steps(config, student) == [8]
    assert graph.guidance_range(student) == (0.0, 3.0)


def test_the_runtime_is_pinned_and_verified(tmp_path):
    for file in page.runtime_files(None).values():
        assert f"onnxruntime-web@{page.VERSION}/dist/" in file["url"]
        assert file["integrity"].startswith("sha384-")
    for file, _ in page.RUNTIME.values():
        (tmp_path / file).write_text("other")
    with pytest.raises(UserError, match="is damaged, or of another version"):
        page.runtime_files(str(tmp_path))


def test_class_names_cannot_end_the_script():
    text = page.make_page({"classes": ["</script><b>", "ü"]})
    assert "</script><b>" not in text
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == {"classes": ["</script><b>", "ü"]}


def test_the_command_names_the_file_and_its_size(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph, "export_graph", lambda *_: b"graph")
    monkeypatch.setattr(graph, "check_graph", lambda *_: 1e-6)
    config = parse_config(ExportConfig, ["--model", saved, "--output_dir", str(tmp_path)])
    (path,) = export_model(config)
    data = json.loads(path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert data["name"] == "tiny"
    assert data["guidance"] == {"min": -1, "max": 4, "start": 1}
    assert list(data["schedules"]) == ["2", "4", "8", "16"]
    assert "differs from the pipeline by at most 1e-06" in capsys.readouterr().out
