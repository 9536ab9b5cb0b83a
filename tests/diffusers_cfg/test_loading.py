"""Test that folders and repositories that are not whole models are refused, with a message that says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.sampling import load_pipeline
from diffusers_cfg.evaluation.settings import SampleConfig
from diffusers_cfg.hub import publish
from diffusers_cfg.loading import load_autoencoder, load_guide_unet
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.networks import build_pipeline, load_model_config, load_vae
from diffusers_cfg.repository import PublishError
from tests.support.hub_client import HubClient
from tests.support.hub_server import Fault
from tests.support.latents import few_digits, make_vae
from tests.support.models import make_pipeline, make_unet
from tests.support.runs import WEIGHTS

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return a saved pipeline of latents. Tests copy it to change it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline = make_pipeline(
        make_unet(in_channels=2, out_channels=2, sample_size=4), vae=make_vae(), num_inference_steps=2
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def entry(name: str, key: str, value: object) -> Edit:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, key: value}))

    return edit


def tensors(name: str, change: Callable[[dict], dict]) -> Edit:
    return lambda folder: save_file(change(load_file(folder / name / WEIGHTS)), folder / name / WEIGHTS)


def removed(name: str) -> Edit:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def pickled(name: str) -> Edit:
    return lambda folder: (folder / name / WEIGHTS).rename(folder / name / "diffusion_pytorch_model.bin")


def truncated(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def index(key: str, value: object) -> Edit:
    return entry("model_index.json", key, value)


def without_some(weights: dict) -> dict:
    return {name: weights[name] for name in sorted(weights)[2:]}


DAMAGED = {
    "index is a list": (text("model_index.json", "[]"), "model_index.json in .*model must contain a JSON object"),
    "index is null": (text("model_index.json", "null"), "must contain a JSON object, but contains null"),
    "index is a string": (text("model_index.json", '"x"'), "must contain a JSON object"),
    "index is not JSON": (text("model_index.json", "{"), "model_index.json.* is not a valid JSON file"),
    "no class name": (index("_class_name", []), "names no pipeline in _class_name"),
    "null class name": (index("_class_name", None), "names no pipeline in _class_name"),
    "other class": (index("_class_name", "DiTPipeline"), "describes a DiTPipeline, not a CFGPipeline"),
    "other class of others": (index("_class_name", ["x", "Y"]), "describes a Y, not a CFGPipeline"),
    "number as class": (index("_class_name", 5), "describes a 5, not a CFGPipeline"),
    "one name": (index("unet", ["unet_2d_cfg"]), r'the module and the class of the unet, but contains \["unet_2d_cfg"'),
    "no names": (index("unet", []), r"the module and the class of the unet, but contains \[\]"),
    "string": (index("unet", "x"), "the module and the class of the unet"),
    "null": (index("unet", None), "the module and the class of the unet"),
    "no unet": (index("unet", [None, None]), "the module and the class of the unet"),
    "no scheduler": (index("scheduler", [None, None]), "the module and the class of the scheduler"),
    "numbers": (index("vae", [1, 2]), "the module and the class of the vae"),
    "stock unet": (
        index("unet", ["diffusers", "UNet2DModel"]),
        "has UNet2DModel of diffusers as its unet, not a kind of",
    ),
    "unet as scheduler": (index("scheduler", ["unet_2d_cfg", "UNet2DCFGModel"]), "not a kind of SchedulerMixin"),
    "unknown scheduler": (index("scheduler", ["diffusers", "Nope"]), "has Nope of diffusers as its scheduler"),
    "model as guider": (index("guider", ["diffusers", "UNet2DModel"]), "not a kind of BaseGuidance"),
    "other autoencoder in index": (index("vae", ["diffusers", "AutoencoderTiny"]), "has AutoencoderTiny of diffusers"),
    "list of names": (index("id2label", [1]), r"must contain no list as id2label, but contains \[1\]"),
    "text of names": (index("id2label", "abc"), "model cannot be loaded"),
    "extra code": (index("extra", ["os", "system"]), "uses system from os as its extra"),
    "no unet folder": (removed("unet"), "model/unet/config.json does not exist"),
    "no config": (removed("vae/config.json"), "model/vae/config.json does not exist"),
    "no scheduler config": (removed("scheduler"), "model/scheduler/scheduler_config.json does not exist"),
    "config is a list": (text("unet/config.json", "[]"), "unet/config.json must contain a JSON object"),
    "config is null": (text("vae/config.json", "null"), "vae/config.json must contain a JSON object"),
    "config is not JSON": (text("unet/config.json", "{"), "unet/config.json cannot be read as JSON"),
    "config is binary": (lambda f: (f / "unet/config.json").write_bytes(b"\xff"), "unet/config.json cannot be read"),
    "scheduler is a string": (text("scheduler/scheduler_config.json", '"x"'), "must contain a JSON object"),
    "negative classes": (entry("unet/config.json", "num_class_embeds", -5), "model/unet cannot be loaded"),
    "no weights": (removed(f"unet/{WEIGHTS}"), f"model/unet has no weights in {WEIGHTS}"),
    "pickled weights": (pickled("unet"), "only diffusion_pytorch_model.bin, which is not loaded because a pickle can"),
    "pickled autoencoder": (pickled("vae"), "model/vae has no weights .*only diffusion_pytorch_model.bin"),
    "empty file": (lambda f: (f / "vae" / WEIGHTS).write_bytes(b""), f"model/vae/{WEIGHTS}"),
    "truncated unet": (truncated(f"unet/{WEIGHTS}"), f"model/unet/{WEIGHTS}"),
    "truncated autoencoder": (truncated(f"vae/{WEIGHTS}"), f"model/vae/{WEIGHTS}"),
    "missing": (
        tensors("vae", without_some),
        r"model/vae are not .* 2 missing \(decoder.conv_in.bias, decoder.conv_in.w",
    ),
    "unexpected": (tensors("vae", lambda w: {**w, "x": torch.ones(1)}), r"model/vae .*Tensors: 1 unexpected \(x\)"),
    "renamed": (tensors("vae", lambda w: {f"m.{n}": w[n] for n in w}), r"\d+ missing .*, \d+ unexpected \(m.decoder"),
    "no tensors": (tensors("vae", lambda w: {}), r"model/vae are not those of its config.json. Tensors: \d+ missing"),
    "empty tensors": (tensors("vae", lambda w: {n: w[n][:0] for n in w}), "model/vae cannot be loaded.*expected shape"),
    "missing in the unet": (tensors("unet", without_some), r"model/unet are not .* 2 missing \(class_embedding.weight"),
    "unet of another kind": (
        entry("unet/config.json", "num_class_embeds", 11),
        "model/unet cannot be loaded.*expected sh",
    ),
    "other kind": (entry("vae/config.json", "_class_name", "VQModel"), "vae contains a VQModel. The supported"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_pipeline_is_refused(model, damage):
    edit, message = DAMAGED[damage]
    edit(model)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}") as raised:
        CFGPipeline.from_pretrained(model)
    assert str(model) in str(raised.value)
    assert "connect" not in str(raised.value)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "no tensors"])
def test_missing_weights_are_not_initialised(model, damage):
    edit, message = DAMAGED[damage]
    edit(model)
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(model, low_cpu_mem_usage=False)


def test_whole_pipeline_is_loaded_with_the_plain_autoencoder(model, tmp_path):
    """Also if its attention has the names of earlier versions of diffusers, as many autoencoders on the Hub do."""
    attention = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def with_old_names(weights: dict) -> dict:
        for new, old in attention.items():
            weights = {name.replace(new, old): weights[name] for name in weights}
        return weights

    tensors("vae", with_old_names)(model)
    assert any(".proj_attn." in name for name in load_file(model / "vae" / WEIGHTS))
    pipe = CFGPipeline.from_pretrained(model)
    assert type(pipe.vae) is AutoencoderKL
    expected = make_vae().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipe.vae.state_dict().items())
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]


def test_components_that_are_passed_need_no_files(model):
    shutil.rmtree(model / "vae")
    shutil.rmtree(model / "unet")
    unet, vae = make_unet(in_channels=2, out_channels=2, sample_size=4), make_vae()
    pipe = CFGPipeline.from_pretrained(model, unet=unet, vae=vae)
    assert (pipe.unet, pipe.vae) == (unet, vae)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "model has no variants. Leave out the variant 'fp16'"),
        (["ema0.99", "ema9"], "no weights of the variant 'fp16'. Its variants are ema0.99, ema9"),
        (["bf16-00001-of-00002"], "Its variants are bf16."),
    ],
)
def test_unknown_variant_is_refused(model, variants, message):
    for variant in variants:
        shutil.copy(model / "unet" / WEIGHTS, model / "unet" / WEIGHTS.replace(".", f".{variant}.", 1))
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(model, variant="fp16")


def unfinished(folder: Path) -> Path:
    """Make the output folder of a run that has not finished."""
    (folder / "model_index.json").unlink()
    for step in (100, 20):
        shutil.copytree(folder / "unet", folder / f"checkpoint-{step}" / "unet")
    return folder


PATHS = {
    "neither folder nor repository": (lambda _: "no-such", "no-such is neither a folder here nor a repository"),
    "no repository": (lambda _: "me/no-such", "me/no-such is neither a folder here nor a repository"),
    "relative path": (lambda _: "./x", r"The folder '\./x' does not exist"),
    "path": (lambda folder: folder / "x" / "y", "The folder '.*model/x/y' does not exist"),
    "three names": (lambda _: "a/b/c", "The folder 'a/b/c' does not exist"),
    "empty": (lambda _: "", "The folder '' does not exist"),
    "home": (lambda _: "~/model", "The folder '~/model' does not exist"),
    "null byte": (lambda _: "a\0", r"The folder 'a\\x00' does not exist"),
    "none": (lambda _: None, "but is None"),
    "number": (lambda _: 5, "but is 5"),
    "file": (lambda folder: folder / "model_index.json", "model_index.json is a file. Pass the folder"),
    "component": (lambda folder: folder / "unet", "unet is a part of a saved pipeline"),
    "parent": (lambda folder: folder.parent, "has no model_index.json, so it is not a saved pipeline"),
    "unfinished run": (
        unfinished,
        "run has not finished. Its newest checkpoint is checkpoint-100: run .*--resume_from",
    ),
    "checkpoint": (lambda folder: unfinished(folder) / "checkpoint-20", "checkpoint-20 has no model_index.json"),
}


@pytest.mark.parametrize("case", PATHS)
def test_path_without_a_pipeline_is_refused(model, hub, tmp_path, monkeypatch, case):
    HubClient(monkeypatch, hub, str(tmp_path / "hf"))
    path, message = PATHS[case]
    with pytest.raises((OSError, TypeError), match=message):
        CFGPipeline.from_pretrained(path(model))


def test_publishing_says_what_a_folder_is(model):
    with pytest.raises(PublishError, match="The folder .*nowhere does not exist"):
        publish(model / "nowhere", "me/model")
    with pytest.raises(PublishError, match="newest checkpoint is checkpoint-100"):
        publish(unfinished(model), "me/model")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model", "--model {} cannot be loaded: The folder '{}' does not exist"),
        ("guide_model", "--guide_model {} cannot be loaded: The folder '{}' does not exist"),
        (
            "pretrained_model_name_or_path",
            "--pretrained_model_name_or_path {} cannot be loaded: The folder '{}' does not",
        ),
        (
            "pretrained_vae_model_name_or_path",
            "--pretrained_vae_model_name_or_path {} cannot be loaded: The folder '{}'",
        ),
        ("model_config_name_or_path", "--model_config_name_or_path {} cannot be read: The folder '{}' does not exist"),
    ],
)
def test_flags_name_the_path_that_does_not_exist(saved, tmp_path, setting, message):
    path = str(tmp_path / "nowhere")
    settings: dict[str, Any] = {setting: path}

    def load() -> object:
        if setting in ("model", "guide_model"):
            return load_pipeline(SampleConfig(**{"model": str(saved), "output_dir": "x", **settings}), "cpu")
        return build_pipeline(CFGConfig(**settings), few_digits(2))

    with pytest.raises(UserError, match=message.format(path, path)):
        load()


AUTOENCODERS = {
    "other kind": (entry("config.json", "_class_name", "AutoencoderTiny"), "contains a AutoencoderTiny. The suppo"),
    "unet": (entry("config.json", "_class_name", "UNet2DCFGModel"), "contains a UNet2DCFGModel"),
    "no kind": (text("config.json", "{}"), "contains a None"),
    "config is a list": (text("config.json", "[]"), "config.json must contain a JSON object"),
    "no config": (
        removed("config.json"),
        "has no config.json, so it is not an autoencoder. Of a pipeline, pass the folder",
    ),
    "no weights": (removed(WEIGHTS), "has no weights in"),
    "pickle": (pickled("."), "only diffusion_pytorch_model.bin"),
    "missing": (tensors(".", without_some), "2 missing"),
    "other layers": (entry("config.json", "block_out_channels", [4, 8]), "cannot be loaded"),
    "damaged": (truncated(WEIGHTS), "cannot be loaded"),
}


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_damaged_autoencoder_is_refused(model, case):
    edit, message = AUTOENCODERS[case]
    edit(model / "vae")
    flag = "--pretrained_vae_model_name_or_path"
    with pytest.raises(UserError, match=f"(?s){flag} {model / 'vae'} cannot be loaded: .*{message}"):
        load_vae(CFGConfig(pretrained_vae_model_name_or_path=str(model / "vae")))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (removed("unet"), "unet/config.json does not exist"),
        (pickled("unet"), "unet has no weights .*only diffusion_pytorch_model.bin"),
        (text("unet/config.json", "[]"), "unet/config.json must contain a JSON object"),
        (truncated(f"unet/{WEIGHTS}"), "unet"),
    ],
)
def test_damaged_guide_model_is_refused(model, saved, edit, message):
    edit(model)
    with pytest.raises(UserError, match=f"--guide_model {model} cannot be loaded: .*{message}"):
        load_pipeline(SampleConfig(model=str(saved), guide_model=str(model), output_dir="x"), "cpu")


def test_guide_model_can_be_a_checkpoint(model):
    assert load_guide_unet(str(unfinished(model) / "checkpoint-20")).num_classes == 3


@pytest.mark.parametrize(("content", "message"), [("[1]", r"a JSON object, but contains \[1\]"), ("{", "as JSON")])
def test_model_config_of_a_folder_is_checked(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"--model_config_name_or_path {tmp_path} cannot be read: .*{message}"):
        load_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"dropout": 0.1}')
    assert load_model_config(str(tmp_path)) == load_model_config(str(tmp_path / "config.json")) == {"dropout": 0.1}


class TestDownloads:
    """Test repositories that cannot be read, against a local server in place of the Hub."""

    @pytest.fixture
    def client(self, hub, tmp_path, monkeypatch) -> HubClient:
        hub.create("me/private", {"model_index.json": b"{}"}, private=True)
        hub.create("me/public", {"config.json": b"{}"})
        return HubClient(monkeypatch, hub, str(tmp_path / "hf"))

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("me/private", {}, "can be read without a token. .* log in with `hf auth login`"),
            (
                "me/private",
                {"token": "wrong"},
                "me/private is not a folder here, and the Hub does not accept the token",
            ),
            ("me/public", {"revision": "v2"}, "me/public has no revision 'v2' on the Hub"),
            ("me/public", {}, "me/public has no model_index.json, so it is not a saved pipeline"),
            (
                "me/public",
                {"local_files_only": True},
                "nor a repository that was downloaded before, and local_files_only",
            ),
            ("me/public", {"token": "hf_se cret"}, "The Hub token has spaces or other characters that no token has"),
            ("me/public", {"token": "hf_secrét"}, "The Hub token has spaces or other characters that no token has"),
        ],
    )
    def test_unreadable_repository_is_explained(self, client, name, arguments, message):
        client.log_in(None)
        with pytest.raises(OSError, match=message) as raised:
            CFGPipeline.from_pretrained(name, **arguments)
        assert "secr" not in str(raised.value)

    def test_gated_offline_and_unreachable_are_told_apart(self, hub, client):
        hub.faults.append(Fault("api/models/me/public", 403, times=9, headers={"X-Error-Code": "GatedRepo"}))
        with pytest.raises(OSError, match="me/public is gated. Accept its terms at http"):
            CFGPipeline.from_pretrained("me/public")
        hub.faults[:] = [Fault(".", 500, times=99)]
        with pytest.raises(OSError, match="the Hub cannot be reached: Server error .500"):
            CFGPipeline.from_pretrained("me/public")
        client.monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
        client.monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(
            OSError, match="neither a folder here nor .* downloaded before, and the Hub cannot be reached"
        ):
            CFGPipeline.from_pretrained("me/public")
        client.go_offline()
        with pytest.raises(OSError, match="neither a folder here nor .* downloaded before, and HF_HUB_OFFLINE is set"):
            load_autoencoder("me/public")
