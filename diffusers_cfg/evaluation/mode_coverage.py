"""Count the modes that samples reach: how evenly a generator covers its data (stacked MNIST, Metz et al. 2017,
arXiv 1611.02163).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from diffusers_cfg.config import CACHE_DIR
from diffusers_cfg.data.datasets import CachedImages, LazyImages, StreamedImages, fingerprint, training_dataset
from diffusers_cfg.data.images import UNLABELLED, LabelledImages
from diffusers_cfg.data.naming import local_name
from diffusers_cfg.evaluation.features import SmallClassifier, small_classifier
from diffusers_cfg.evaluation.mode_reports import save_stacks
from diffusers_cfg.evaluation.sample_sets import SampleSet, claimed
from diffusers_cfg.evaluation.sampling import draw_sets, load_pipeline, sampling_settings, with_model_defaults
from diffusers_cfg.evaluation.settings import SamplingConfig
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.model_files import RUN
from diffusers_cfg.randomness import seeded_generator
from diffusers_cfg.settings import TrainConfig

# Number of simulated sets of perfect samples
REPETITIONS = 100
# Number of stacks that are classified at a time
BATCH_SIZE = 1000


def divergence_from_uniform(counts: torch.Tensor) -> float:
    """Return KL(q‖uniform) in nats of the frequencies q of modes, from how often each was reached, `(modes,)`."""
    q = counts.double() / counts.sum()
    return torch.special.xlogy(q, q * len(q)).sum().item()


def coverage(modes: torch.Tensor, num_modes: int) -> dict[str, Any]:
    """Return `modes`, how many modes samples reach, and `kl`, from the mode of each sample, int64 `(samples,)`."""
    counts = modes.bincount(minlength=num_modes)
    return {"modes": int((counts > 0).sum()), "kl": divergence_from_uniform(counts)}


def perfect_coverage(probabilities: torch.Tensor, num_samples: int) -> dict[str, Any]:
    """
    Return the mean coverage of independent samples of the data. No model is expected to be better, since few samples
    miss modes, and have unequal frequencies, by chance.

    Args:
        probabilities (`torch.Tensor` of shape `(modes,)`): the probability of each mode in the data.
        num_samples (`int`): the number of samples.
    """
    generator = seeded_generator("cpu", "perfect samples")
    sets = [
        coverage(torch.multinomial(probabilities, num_samples, True, generator=generator), len(probabilities))
        for _ in range(REPETITIONS)
    ]
    return {name: sum(one[name] for one in sets) / REPETITIONS for name in sets[0]}


class StackedModes(NamedTuple):
    """
    The modes of stacked images: a class for each channel.

    Attributes:
        classifier (`SmallClassifier`): a classifier of single images, which tells the mode of a sample.
        probabilities (`torch.Tensor` of shape `(modes,)`): the probability of each mode in the data, float64.
        stacks (`Dataset`): the stacks of the data.
        name (`str`): the name of the data.
    """

    classifier: SmallClassifier
    probabilities: torch.Tensor
    stacks: CachedImages | LazyImages
    name: str

    @classmethod
    def of(
        cls, config: TrainConfig, single: LabelledImages, stacks: LabelledImages, accelerator: Accelerator
    ) -> "StackedModes":
        """
        Return the modes of stacked images. The classifier is trained once and kept in the cache.

        Args:
            config (`TrainConfig`): the settings of the data.
            single (`LabelledImages`): the images that are stacked, with their labels.
            stacks (`LabelledImages`): the stacked images.
            accelerator (`Accelerator`): the processes.
        """
        with accelerator.main_process_first():
            dataset = training_dataset(single, config, 1, accelerator.is_main_process)
            stacked = training_dataset(stacks, config, 3, accelerator.is_main_process)
            assert not isinstance(dataset, StreamedImages)  # `DataConfig` refuses --streaming with --stack.
            assert not isinstance(stacked, StreamedImages)
            classifier = small_classifier(dataset, fingerprint(dataset), single.id2label, CACHE_DIR)
        labels = dataset.class_labels[dataset.class_labels != UNLABELLED]
        p = labels.bincount(minlength=len(single.id2label)).double() / len(labels)
        probabilities = torch.einsum("i,j,k->ijk", p, p, p).flatten()
        return cls(classifier.to(accelerator.device), probabilities, stacked, local_name(config))

    def coverage(self, images: torch.Tensor) -> dict[str, Any]:
        """Return the coverage of uint8 images, `(images, 3, height, width)`."""
        return coverage(self.modes_of(images), len(self.probabilities))

    def modes_of(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mode of each image, int64 `(images,)`."""
        num_classes, found = self.classifier.num_classes, []
        device = next(self.classifier.parameters()).device
        for stacks in images.split(BATCH_SIZE):
            single = stacks.flatten(0, 1)[:, None].expand(-1, 3, -1, -1).to(device)
            classes = self.classifier(single)[1].argmax(1).cpu().unflatten(0, (-1, 3))
            found.append((classes * torch.tensor([num_classes**2, num_classes, 1])).sum(1))
        return torch.cat(found)


def draw_stacks(config: TrainConfig, num_samples: int, accelerator: Accelerator) -> None:
    """
    Draw samples of the null class with the model of a run into its folder `modes`. Existing ones are reused.

    Args:
        config (`TrainConfig`): the settings of the run, whose seed is also that of the samples.
        num_samples (`int`): the number of samples.
        accelerator (`Accelerator`): the processes that share the work.
    """
    sampling = SamplingConfig(model=config.output_dir, seed=config.seed)
    pipeline = load_pipeline(sampling, accelerator.device)
    sampling, samples = with_model_defaults(sampling, pipeline), sample_set(config, num_samples)
    with claimed(samples.folder, sampling_settings(sampling, pipeline), accelerator):
        draw_sets(sampling, accelerator, pipeline, {0.0: samples}, torch.full((num_samples,), UNLABELLED))


def sample_set(config: TrainConfig, num_samples: int) -> SampleSet:
    """Return the samples of a run."""
    return SampleSet(Path(config.output_dir) / "modes", num_samples)


def compare_stacks(
    configs: list[DDGANConfig], modes: StackedModes, num_samples: int, output_dir: Path
) -> dict[str, Any]:
    """
    Measure the samples of all runs, and write a picture of some of them, stacked.png.

    Args:
        configs (`list[DDGANConfig]`): the settings of the runs.
        modes (`StackedModes`): the modes of the data.
        num_samples (`int`): the number of samples of each run.
        output_dir (`Path`): the folder of the picture.

    Returns:
        `dict[str, Any]`: `runs`, the coverage of each run; `references`, that of the data and of perfect samples; and
        facts about the data.
    """
    real = modes.stacks.__getitems__([*range(min(num_samples, len(modes.stacks)))]).images
    rows, runs = {"data": real}, []
    for config in configs:
        samples = sample_set(config, num_samples)
        images = torch.cat([torch.from_numpy(samples.load(shard).images) for shard in samples.shards]).movedim(-1, 1)
        seconds = json.loads((Path(config.output_dir) / RUN).read_text(encoding="utf-8"))["seconds"]
        run = {"num_timesteps": config.num_timesteps, "seed": config.seed}
        runs.append({**run, **modes.coverage(images), "seconds": seconds})
        rows.setdefault(f"T = {config.num_timesteps}", images)  # of the first seed
    save_stacks(rows, output_dir / "stacked.png")
    return {
        "dataset": modes.name,
        "num_samples": num_samples,
        "num_modes": len(modes.probabilities),
        "num_real": len(real),
        "kl_of_data": divergence_from_uniform(modes.probabilities),
        "classifier_accuracy": modes.classifier.accuracy,
        "runs": runs,
        "references": {
            "data": modes.coverage(real),
            "perfect": perfect_coverage(modes.probabilities, num_samples),
        },
    }
