"""Test denoising diffusion GANs of stacked images, which have no labels, and the shipped settings."""

import json

import pytest
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.images import StackedImages
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation.class_labels import parse_class_labels
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.sweep import load_data
from diffusers_cfg.hub import example_images
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN, Discriminator, build_pipeline
from diffusers_cfg.methods.networks import build_unet
from tests.support.runs import TRAINING, scalars, train_ddgan


@pytest.fixture(scope="module")
def stacked_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacked") / "model"
    train_ddgan(folder, "--stack", "3", "--validation_steps", "2", "--report_to", "tensorboard")
    return folder


def test_the_null_class_alone_is_trained(stacked_model):
    pipeline, run = CFGPipeline.from_pretrained(stacked_model), json.loads((stacked_model / "run.json").read_text())
    assert (pipeline.unet.num_classes, pipeline.id2label) == (1, {})
    assert pipeline.config.conditioning_dropout_prob == run["method"]["conditioning_dropout_prob"] == 1.0
    assert run["method"]["classes_without_images"] == [0]
    assert (run["num_images"], run["data"]["stack"]) == (120_000, 3)
    logged = scalars(stacked_model)
    assert {value for _, value in logged["discriminator/dropout_rate"]} == {1.0}
    assert "label_gain" not in logged
    assert (stacked_model / "samples" / "step-4.png").is_file()


def test_the_class_that_never_occurs_is_not_trained(stacked_model):
    config = parse_config(DDGANConfig, ["--config", str(stacked_model / "train_config.yaml")])
    new = build_pipeline(config, StackedImages(Digits(), 8, True))
    trained, started = (
        pipeline.unet.get_parameter("class_embedding.weight")
        for pipeline in (CFGPipeline.from_pretrained(stacked_model), new)
    )
    assert torch.equal(trained[0], started[0])
    assert not torch.equal(trained[1], started[1])


def test_the_example_draws_the_null_class(stacked_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = CFGPipeline.from_pretrained(stacked_model)
    config = parse_config(DDGANConfig, ["--config", str(stacked_model / "train_config.yaml")])
    exec(DenoisingDiffusionGAN(config, pipeline, [-1]).example(), {"pipe": pipeline})
    assert (tmp_path / "sample.png").is_file()


def test_commands_draw_the_null_class(stacked_model):
    assert parse_class_labels(None, CFGPipeline.from_pretrained(stacked_model)) == [-1]
    assert {label: image.shape for label, image in example_images(stacked_model).items()} == {-1: (1, 3, 8, 8)}


def test_evaluation_of_classes_is_refused(stacked_model):
    config = EvaluationConfig(model=str(stacked_model))
    with pytest.raises(UserError, match=r"--stack 3 on images without classes.* with studies/modes\.py"):
        load_data(config.model, config.given_data, CFGPipeline.from_pretrained(stacked_model), False)


def test_label_dropout_has_no_effect():
    with pytest.raises(UserError, match="conditioning_dropout_prob: no effect with --stack"):
        parse_config(DDGANConfig, ["--stack", "3", "--conditioning_dropout_prob", "0.2"])


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10-ddgan", 10), ("stacked-mnist", 1)])
def test_networks_of_the_recipes_can_be_built(name, num_classes):
    """The sizes are those of the authors' CIFAR-10 model."""
    config = parse_config(DDGANConfig, ["--config", str(TRAINING / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        unet = build_unet(config, None, 3, num_classes=num_classes, latent_dim=config.latent_dim)
        discriminator = Discriminator(3, 32, num_classes, config.num_timesteps, config.discriminator_channels)
    assert unet.config.block_out_channels == [128, 256, 256, 256]
    assert [hasattr(block, "attentions") for block in unet.down_blocks] == [False, True, False, False]
    assert [block.skip.out_channels for block in discriminator.blocks] == [128, 256, 512, 512]
    # Everything else is that of the authors' command by default.
    defaults = DDGANConfig().public()
    changed = {key for key, value in config.public().items() if value != defaults[key]}
    training = {"learning_rate", "learning_rate_discriminator", "r1_gamma", "lazy_reg", "ema_max_decay", "adam_beta1"}
    assert not changed & {*training, "adam_beta2", "lr_scheduler", "latent_dim", "num_timesteps"}
