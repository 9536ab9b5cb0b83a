"""
Feature extractors: networks that map images to the features and class probabilities that metrics compare.

Each takes uint8 images `(batch, 3, height, width)`. Two values of a metric can be compared only if they were measured
with the same extractor.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.files import digest, write_safetensors
from diffusers_cfg.randomness import seed_of, seeded_generator

logger = logging.getLogger(__name__)

SMALL, INCEPTION, DINOV2 = "small", "inception", "dinov2"
DINOV2_MODEL = "facebook/dinov2-large"


class FeatureExtractor(nn.Module):
    """
    A network with what metrics need to know of it.

    Attributes:
        name (`str`): the name of the network, with a digest of the weights if it is trained here.
        resize (`str`): how it resizes images of another size than its own.
        num_features (`int`): dimension of its features.
        num_classes (`int`): number of its classes; 0 if it has none.
        id2label (`dict[int, str]`, *optional*): the names of its classes, if they have names.
        accuracy (`float`, *optional*): its accuracy on real images that it was not trained on, where known.
    """

    name: str
    resize: str
    num_features: int
    num_classes: int
    id2label: dict[int, str] | None = None
    accuracy: float | None = None

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Extract features.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8.

        Returns:
            Features `(batch, num_features)` and logits `(batch, num_classes)`, or `None` without classes.
        """
        raise NotImplementedError


class SmallClassifier(FeatureExtractor):
    """
    A classifier of the data's own classes: convolutions down to 4×4, their mean as 64 features, and a linear layer.

    Args:
        resolution (`int`): of the images.
        id2label (`dict[int, str]`): the classes.
    """

    num_features = 64
    resize = "none"

    def __init__(self, resolution: int, id2label: dict[int, str]):
        super().__init__()
        self.id2label, self.num_classes = id2label, len(id2label)
        layers, channels = [*convolution(3, 16)], 16
        while resolution > 4:
            layers += convolution(channels, self.num_features, stride=2)
            channels, resolution = self.num_features, resolution // 2
        layers += convolution(channels, self.num_features)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.num_features, len(id2label))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(to_float(images))
        return features, self.head(features)


def convolution(channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """Return the layers of a 3×3 convolution with batch norm and ReLU."""
    return [
        nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def small_classifier(dataset: Dataset, data_name: str, id2label: dict[int, str], folder: Path) -> SmallClassifier:
    """
    Load the classifier of a dataset from a folder, or train it and save it there. Training takes a minute or two on
    two CPU cores. The weights do not depend on torch's global random state, which is left as it is.

    Args:
        dataset (`Dataset`): uint8 images, with their labels in `class_labels`; -1 is unlabelled.
        data_name (`str`): identifies the data, see `diffusers_cfg.data.datasets.fingerprint`.
        id2label (`dict[int, str]`): the classes.
        folder (`Path`): holds `classifier-DATA_NAME.safetensors`.
    """
    resolution = dataset.__getitems__([0]).images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("classifier", "weights"))
        classifier = SmallClassifier(resolution, id2label)
    path = folder / f"classifier-{data_name}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            classifier.accuracy = float(file.metadata()["accuracy"])
    else:
        classifier.accuracy = train_classifier(classifier, dataset)
        write_safetensors(classifier.state_dict(), {"accuracy": str(classifier.accuracy)}, path)
    classifier.name = f"{SMALL}-{digest(classifier.state_dict())}"
    return classifier.eval().requires_grad_(False)


def train_classifier(classifier: SmallClassifier, dataset: Dataset, steps: int = 750, batch_size: int = 128) -> float:
    """Train on four fifths of the labelled images, on the CPU. Return the accuracy on up to 10,000 of the others."""
    labelled = (dataset.class_labels >= 0).nonzero().flatten()
    labelled = labelled[torch.randperm(len(labelled), generator=seeded_generator("cpu", "classifier", "split"))]
    held_out, seen = labelled[: min(len(labelled) // 5, 10_000)], labelled[len(labelled) // 5 :]
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    order = seeded_generator("cpu", "classifier", "order")
    classifier.train()
    for _ in tqdm(range(steps), "Training the classifier of the data", leave=False):
        batch = dataset.__getitems__(seen[torch.randint(len(seen), (batch_size,), generator=order)].tolist())
        # Smoothed labels keep the features from shrinking to a point for each class.
        loss = F.cross_entropy(classifier(batch.images_rgb)[1], batch.class_labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        batches = (dataset.__getitems__(indices.tolist()) for indices in held_out.split(500))
        right = sum((classifier(b.images_rgb)[1].argmax(1) == b.class_labels).sum().item() for b in batches)
    accuracy = right / len(held_out)
    logger.info("The classifier of the data has an accuracy of %.1f %% on %d images", 100 * accuracy, len(held_out))
    return accuracy


class Inception(FeatureExtractor):
    """
    The network of the FID and the inception score, with the weights of TensorFlow's 2015 Inception and its bilinear
    resize, as ported by torch-fidelity. The features are the 2048 of pool3; the logits are without their bias.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be downloaded.
    """

    name = INCEPTION
    resize = "bilinear to 299×299, as TensorFlow 1 does"
    num_features = 2048
    num_classes = 1008

    def __init__(self):
        super().__init__()
        try:  # an optional dependency
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # torchvision raises the latter if it does not fit torch
            raise UserError(
                f"--feature_extractor {INCEPTION} needs torch-fidelity and torchvision ({error}): pip install "
                f"torch-fidelity torchvision. Or use {SMALL}, which needs neither."
            ) from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:
            raise UserError(
                f"--feature_extractor {INCEPTION}: its weights cannot be downloaded ({error}). Or use {SMALL}, which "
                "needs no download."
            ) from error

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(images)


class HubNetwork(FeatureExtractor):
    """
    A network of transformers with its image processor, from the Hub or a folder.

    Args:
        auto_class (`type`): one of transformers' `AutoModel` classes.
        name_or_path (`str`): a repository or a folder.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, auto_class: type, name_or_path: str):
        super().__init__()
        try:
            self.processor = AutoImageProcessor.from_pretrained(name_or_path)
            self.network = auto_class.from_pretrained(name_or_path, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--feature_extractor {name_or_path} is none of {SMALL}, {INCEPTION} and {DINOV2}, nor an image "
                f"classifier of the Hub or a folder that loads: {error}"
            ) from error

    def preprocess(self, images: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Return the network's input for uint8 images; `settings` override the processor's."""
        batch = self.processor(images.cpu(), input_data_format="channels_first", return_tensors="pt", **settings)
        return batch["pixel_values"].to(self.network.device)


class Dinov2(HubNetwork):
    """
    Features for the FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675): the class token of DINOv2 ViT-L/14 at 224×224. It
    has no classes, so there is no inception score.
    """

    name = DINOV2
    resize = "bicubic to 224×224"
    num_classes = 0

    def __init__(self):
        super().__init__(AutoModel, DINOV2_MODEL)
        self.num_features = self.network.config.hidden_size

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        pixels = self.preprocess(images, size={"height": 224, "width": 224}, do_center_crop=False)
        return self.network(pixels).last_hidden_state[:, 0], None


class HubClassifier(HubNetwork):
    """
    An image classifier of transformers. The features are the input of its last linear layer.

    Raises:
        UserError: it cannot be loaded, or does not end in a linear layer.
    """

    def __init__(self, name_or_path: str):
        super().__init__(AutoModelForImageClassification, name_or_path)
        self.name = name_or_path
        self.resize = f"as its {type(self.processor).__name__} does"
        self.id2label = {int(class_id): label for class_id, label in self.network.config.id2label.items()}
        self.num_classes = len(self.id2label)
        heads = [
            layer
            for layer in self.network.modules()
            if isinstance(layer, nn.Linear) and layer.out_features == self.num_classes
        ]
        if not heads:
            raise UserError(
                f"--feature_extractor {name_or_path} does not end in a linear layer, whose input would be the "
                "features: choose another."
            )
        self.num_features = heads[-1].in_features
        heads[-1].register_forward_pre_hook(self._keep)

    def _keep(self, _layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.features = inputs[0]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network(self.preprocess(images)).logits
        return self.features.flatten(1), logits


def pretrained_extractor(name: str) -> FeatureExtractor:
    """Load "inception", "dinov2" or an image classifier of transformers by its name. Raises UserError if it fails."""
    extractor = {INCEPTION: Inception, DINOV2: Dinov2}.get(name, lambda: HubClassifier(name))()
    return extractor.eval().requires_grad_(False)
