"""Declare the settings of the network, the optimizer, the run and the Hub, which are those of all methods."""

from dataclasses import dataclass
from typing import Literal

from diffusers_cfg.config import Config, fixed, free, recorded

# The standard errors of metrics need two images in each of ten blocks (`BLOCKS` in evaluation/statistics.py).
MIN_SAMPLES = 20
# The default fits images of many resolutions, so not each of its values has to fit.
ATTENTION_RESOLUTIONS = [16, 8]
OPTIMIZER_HELP = (
    "muon: Muon for the weights of linear and convolutional layers (arXiv 2502.16982) and AdamW for all others; or "
    "adamw for all."
)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(Config):
    """Settings of the optimizer, its learning rate and the EMA weights."""

    group = "optimization"

    train_batch_size: int = free(16, "Number of images in a batch of one process.", at_least=1)
    gradient_accumulation_steps: int = free(
        1, "Number of batches per process that are accumulated in one optimizer step.", at_least=1
    )
    num_train_epochs: int = recorded(100, "Length of the run in epochs, without --max_train_steps.", at_least=1)
    max_train_steps: int | None = recorded(None, "Length of the run in optimizer steps.", at_least=1)
    optimizer: Literal["adamw", "muon"] = fixed("adamw", OPTIMIZER_HELP)
    learning_rate: float = recorded(1e-4, "Peak learning rate.", above=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = recorded("cosine", "Schedule of the learning rate over the run.")
    lr_warmup_steps: int = recorded(500, "Number of optimizer steps of linear warmup.", at_least=0)
    adam_beta1: float = recorded(
        0.9, "β1 of AdamW, the decay rate of the first moment; that of Muon is 0.95.", at_least=0, below=1
    )
    adam_beta2: float = recorded(0.999, "β2 of AdamW, the decay rate of the second moment.", at_least=0, below=1)
    adam_weight_decay: float = recorded(0.0, "Weight decay of AdamW and Muon.", at_least=0)
    adam_epsilon: float = recorded(1e-8, "ε of AdamW, added to the denominator.", above=0)
    max_grad_norm: float = recorded(
        1.0, "Maximum norm of the gradient; larger gradients are scaled down to it.", above=0
    )
    use_ema: bool = fixed(True, "Keep an exponential moving average (EMA) of the weights, which is sampled and saved.")
    ema_max_decay: list[float] = fixed(
        [0.9999],
        "Maximum decay of the EMA; several values keep several EMAs, of which the first is sampled.",
        at_least=0,
        below=1,
        scalar=True,
    )
    ema_inv_gamma: float = recorded(
        1.0, "γ of the EMA warmup: the decay at step n is 1 - (1 + n / γ)^-power, up to the maximum.", above=0
    )
    ema_power: float = recorded(0.75, "Power of the EMA warmup, see --ema_inv_gamma.", above=0)
    posthoc_ema_steps: int = fixed(
        0,
        "Number of steps between snapshots of two averages of the weights, from which reconstruct_ema.py makes one of "
        "any length; 0 keeps none.",
        at_least=0,
    )
    max_nonfinite_steps: int = free(
        10, "Number of consecutive steps with a non-finite loss or gradient after which the run stops.", at_least=1
    )
    gradient_checkpointing: bool = free(False, "Save memory by recomputing activations in the backward pass.")
    compile: bool = recorded(False, "Compile the network with torch.compile; the first step then takes minutes.")
    enable_xformers_memory_efficient_attention: bool = recorded(False, "Use the attention of xformers (GPU only).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = recorded(
        None, "Precision of the forward pass; by default that of `accelerate config`, and always fp32 on a CPU."
    )
    allow_tf32: bool = recorded(False, "Allow TF32 matrix multiplications on Ampere and newer GPUs.")

    @property
    def ema_decays(self) -> list[float]:
        """The maximum decay of each EMA; an empty list without `use_ema`."""
        return self.ema_max_decay if self.use_ema else []


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Settings of the output folder, checkpoints, validation and logging."""

    group = "run"

    output_dir: str = free("cfg-model", "Folder for checkpoints, samples, logs and the trained pipeline.")
    dry_run: bool = free(
        False, "Check the settings, the data and the disk, and print the plan without training.", once=True
    )
    overwrite_output_dir: bool = free(
        False, "Delete the run in --output_dir and start again, unless a checkpoint is resumed.", once=True
    )
    seed: int = fixed(
        0,
        "Seed of the weights, the data order, the noise, the dropped labels and the samples.",
        at_least=0,
        at_most=2**63 - 1,
    )
    checkpointing_steps: int = free(500, "Number of steps between checkpoints; 0 disables them.", at_least=0)
    checkpoints_total_limit: int | None = free(
        None, "Number of checkpoints to keep; the oldest are deleted.", at_least=1
    )
    resume_from_checkpoint: str | None = free(
        None, 'Checkpoint to resume from: a checkpoint-STEP folder, or "latest".', once=True
    )
    validation_steps: int = free(
        1000, "Number of steps between grids of samples; 0 draws one at the end only.", at_least=0
    )
    eval_steps: int = free(
        0, "Number of steps between evaluations at each w of the validation grid; 0 disables them.", at_least=0
    )
    num_eval_samples: int = free(500, "Number of samples in an evaluation, for each w.", at_least=MIN_SAMPLES)
    feature_extractor: str = free("small", "Feature extractor of the evaluations, see evaluate_cfg.py --help.")
    logging_steps: int = free(10, "Number of steps between logged values.", at_least=1)
    report_to: str = free(
        "tensorboard", "Trackers of Accelerate, separated by commas: tensorboard, wandb, trackio, …, all or none."
    )
    tracker_project_name: str = free("diffusers-cfg", "Name of the project in the trackers.")
    run_name: str | None = free(None, "Name of the run in the trackers; by default that of --output_dir.")
    logging_dir: str = free("logs", "Name of the folder in --output_dir that trackers write to.")
    ddp_timeout: int = free(
        1800, "Seconds that a process waits for the other processes before the run fails.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Settings of the network and its autoencoder."""

    group = "model"

    model_config_name_or_path: str | None = recorded(
        None,
        "Config of a UNet2DModel, replacing the next four flags; channels and classes come from the data.",
        relative=True,
    )
    block_out_channels: list[int] = fixed(
        [128, 256, 256, 256], "Number of channels of each UNet level; each level halves the resolution.", at_least=1
    )
    layers_per_block: int = fixed(2, "Number of residual blocks in each UNet level.", at_least=1)
    attention_resolutions: list[int] = fixed(
        ATTENTION_RESOLUTIONS,
        "Resolutions in pixels of the UNet levels with self-attention; 0 disables it.",
        at_least=0,
    )
    dropout: float = fixed(0.0, "Dropout probability inside the residual blocks.", at_least=0, below=1)
    pretrained_model_name_or_path: str | None = recorded(
        None, "Pipeline on the Hub or in a folder whose network, noise process and autoencoder the run starts from."
    )
    pretrained_vae_model_name_or_path: str | None = recorded(
        None, "AutoencoderKL or AutoencoderDC on the Hub or in a folder; the network is trained on its latents."
    )
    cache_latents: bool = recorded(
        False, "Encode every image once before the first step and cache the latents on disk."
    )


@dataclass(frozen=True, kw_only=True)
class HubConfig(Config):
    """Settings of publishing on the Hugging Face Hub."""

    group = "Hub"

    push_to_hub: bool = free(False, "Push the trained model to the Hub.")
    hub_model_id: str | None = free(
        None, "Repository on the Hub, NAME or NAMESPACE/NAME; by default the name of --output_dir."
    )
    hub_private_repo: bool = free(False, "Create the repository as private.")
    hub_token: str | None = free(
        None, "Hub token with write access; by default that of `hf auth login`. It is never saved.", secret=True
    )
    hub_strategy: Literal["end", "checkpoint"] = free(
        "end", "Push at the end, or also at every checkpoint in the background."
    )
    overwrite_hub_repo: bool = free(False, "Push even if the repository contains something other than a pipeline.")
    license: str | None = free(None, "License of the model, such as apache-2.0, for the model card.")
