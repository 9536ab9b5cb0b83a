"""Check that a model can be guided by a rule of guidance, and say what the rule costs."""

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.settings import GUIDANCE, SamplingConfig


def check_guidance(config: SamplingConfig, pipeline: CFGPipeline) -> None:
    """Raise `UserError` if a model cannot be guided by the rule of the settings."""
    rule = f"--guidance {config.guidance}"
    if config.guidance != "classifier" and is_unconditional(pipeline):
        raise UserError(f"{rule} needs classes, but the network of {config.model} has none. Use --guidance classifier.")
    if config.guidance == "classifier_free":
        return
    if pipeline.unet.max_guidance_scale is not None:
        raise UserError(
            f"{rule} needs a second pass, but {config.model} was trained to guide in one. Use a model that guides in "
            "two."
        )
    if pipeline.unet.latent_dim is not None:
        raise UserError(
            f"{rule} needs a diffusion model, but {config.model} is a denoising diffusion GAN, whose output is no "
            "prediction that a gradient could change. Use --guidance classifier_free."
        )
    if pipeline.classifier is None:
        raise UserError(
            f"{rule} needs a classifier, but {config.model} has none. Train one with train_classifier.py "
            f"--pretrained_model_name_or_path {config.model}."
        )


def is_unconditional(pipeline: CFGPipeline) -> bool:
    """Return whether the network takes no classes, so that only a classifier can guide it."""
    return pipeline.unet.config.num_class_embeds is None


def passes_per_step(config: SamplingConfig, w: float) -> int:
    """Return the number of passes per step at scale w: of the network, which takes two if guided, and a classifier."""
    scales = GUIDANCE[config.guidance](w)
    return (1 if scales["guidance_scale"] in (0, -1) else 2) + (scales.get("classifier_guidance_scale", 0) != 0)
