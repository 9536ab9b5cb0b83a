"""
Extract the features and class probabilities that metrics compare, with one of several networks.

Each extractor takes uint8 images `(batch, 3, height, width)`. Two values of a metric are comparable only if they were
measured with the same extractor.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.files import digest, read_safetensors, write_safetensors
from diffusers_cfg.randomness import seed_of, seeded_generator

logger = logging.getLogger(__name__)

SMALL, INCEPTION, DINOV2 = "small", "inception", "dinov2"
DINOV2_MODEL = "facebook/dinov2-large"


class FeatureExtractor(nn.Module):
    """
    A network that maps images to features, and its properties that metrics need.

    Attributes:
        name (`str`): the name of the network, with a digest of its weights if this package trained it.
        resize (`str`): how images are resized to its input size, for captions.
        num_features (`int`): the dimension of its features.
        num_classes (`int`): the number of its classes, 0 if it has none.
        num_spatial_features (`int`): the dimension of its features for the sFID, 0 if it has none.
        spatial_features (`torch.Tensor` of shape `(batch, num_spatial_features)`, *optional*): those of the images of
            the last call.
        id2label (`dict[int, str]`, *optional*): the names of its classes.
        accuracy (`float`, *optional*): its accuracy on held-out real images, if known.
    """

    name: str
    resize: str
    num_features: int
    num_classes: int
    num_spatial_features: int = 0
    spatial_features: torch.Tensor | None = None
    id2label: dict[int, str] | None = None
    accuracy: float | None = None

    def record(self) -> dict[str, Any]:
        """Return the properties of the network, for JSON."""
        return {name: getattr(self, name) for name in ("name", "resize", "num_features", "accuracy")}

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Extract features and class logits.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8.

        Returns:
            Features `(batch, num_features)`, and logits `(batch, num_classes)` or `None` if there are no classes.
        """
        raise NotImplementedError


class SmallClassifier(FeatureExtractor):
    """
    A classifier of the dataset's own classes: convolutions down to 4×4, whose mean gives 64 features, and a linear
    layer.

    Args:
        resolution (`int`): the height and width of the images.
        id2label (`dict[int, str]`): the names of the classes.
    """

    num_features = 64
    resize = "none"

    def __init__(self, resolution: int, id2label: dict[int, str]) -> None:
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
    Load the classifier of a dataset from a folder, or train it and save it there. Training takes one to two minutes on
    two CPU cores. It neither reads nor changes torch's global random state.

    Args:
        dataset (`Dataset`): uint8 images, with their labels in `class_labels`; -1 is unlabelled.
        data_name (`str`): the fingerprint of the data, see `diffusers_cfg.data.datasets.fingerprint`.
        id2label (`dict[int, str]`): the names of the classes.
        folder (`Path`): the folder of `classifier-DATA_NAME.safetensors`.
    """
    resolution = dataset.__getitems__([0]).images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("classifier", "weights"))
        classifier = SmallClassifier(resolution, id2label)
    path = folder / f"classifier-{data_name}.safetensors"
    if not load_classifier(classifier, path):
        logger.info("Training the classifier of the dataset, once: it is kept in %s", folder)
        classifier.accuracy = train_classifier(classifier, dataset)
        write_safetensors(classifier.state_dict(), {"accuracy": str(classifier.accuracy)}, path)
    classifier.name = f"{SMALL}-{digest(classifier.state_dict())}"
    return classifier.eval().requires_grad_(False)


def load_classifier(classifier: SmallClassifier, path: Path) -> bool:
    """Load the weights and the accuracy of a classifier. Return False if there are none, with a warning if damaged."""
    if not path.is_file():
        return False
    try:
        weights, metadata = read_safetensors(path)
        accuracy = float(metadata["accuracy"])
        classifier.load_state_dict(weights)
    except Exception as error:  # a damaged file raises exceptions of many types
        logger.warning("%s is damaged, so the classifier is trained again: %s", path, error)
        return False
    classifier.accuracy = accuracy
    return True


def classifier_split(class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the images that the classifier of a dataset is not trained on, and of those that it is."""
    labelled = (class_labels >= 0).nonzero().flatten()
    labelled = labelled[torch.randperm(len(labelled), generator=seeded_generator("cpu", "classifier", "split"))]
    return labelled[: min(len(labelled) // 5, 10_000)], labelled[len(labelled) // 5 :]


def train_classifier(classifier: SmallClassifier, dataset: Dataset, steps: int = 750, batch_size: int = 128) -> float:
    """Train on 80 % of the labelled images, on the CPU. Return the accuracy on the rest, at most 10,000 images."""
    held_out, train = classifier_split(dataset.class_labels)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    order = seeded_generator("cpu", "classifier", "order")
    classifier.train()
    for _ in tqdm(range(steps), "Training the classifier of the dataset", leave=False, disable=None):
        batch = dataset.__getitems__(train[torch.randint(len(train), (batch_size,), generator=order)].tolist())
        # Label smoothing keeps the features of a class from collapsing to a point.
        loss = F.cross_entropy(classifier(batch.images_rgb)[1], batch.class_labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        batches = (dataset.__getitems__(indices.tolist()) for indices in held_out.split(500))
        correct = sum((classifier(b.images_rgb)[1].argmax(1) == b.class_labels).sum().item() for b in batches)
    accuracy = correct / len(held_out)
    logger.info(
        "The classifier of the dataset has an accuracy of %.1f %% on %d held-out images", 100 * accuracy, len(held_out)
    )
    return accuracy


class Inception(FeatureExtractor):
    """
    The network of the FID and the inception score: TensorFlow's 2015 Inception with its bilinear resize, as ported by
    torch-fidelity. The features are the 2048 of pool3; the logits have no bias.

    The spatial features are those of ADM's evaluator for the sFID (Nash et al. 2021, arXiv 2103.03841): the first 7
    channels of TensorFlow's `mixed_6/conv`, which torch-fidelity calls `Mixed_6d.branch1x1`, at 17×17 positions. Their
    order is TensorFlow's, channels last, in which ADM's reference statistics are stored.

    Raises:
        UserError: if torch-fidelity is not installed, or the weights cannot be downloaded.
    """

    name = INCEPTION
    resize = "bilinear to 299×299, as in TensorFlow 1"
    num_features = 2048
    num_classes = 1008
    num_spatial_features = 17 * 17 * 7

    def __init__(self) -> None:
        super().__init__()
        try:  # an optional dependency
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if it does not match torch
            raise UserError(
                f"--feature_extractor {INCEPTION} needs torch-fidelity and torchvision ({error}). Run pip install "
                f"torch-fidelity torchvision, or use --feature_extractor {SMALL}."
            ) from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:
            raise UserError(
                f"The weights of --feature_extractor {INCEPTION} cannot be downloaded ({error}). Check the connection, "
                f"or use --feature_extractor {SMALL}, which needs no download."
            ) from error

        self.network.Mixed_6d.branch1x1.register_forward_hook(self._store_spatial_features)

    def _store_spatial_features(self, _layer: nn.Module, _inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.spatial_features = output[:, :7].movedim(1, -1).flatten(1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(images)


class HubNetwork(FeatureExtractor):
    """
    A transformers model with its image processor, from the Hub or a folder.

    Args:
        auto_class (`type`): one of transformers' `AutoModel` classes.
        name_or_path (`str`): a Hub repository or a folder.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(self, auto_class: type, name_or_path: str) -> None:
        super().__init__()
        try:
            self.processor = AutoImageProcessor.from_pretrained(name_or_path)
            self.network = auto_class.from_pretrained(name_or_path, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--feature_extractor {name_or_path} cannot be loaded ({error}). Use {SMALL}, {INCEPTION}, {DINOV2} "
                "or an image classifier on the Hub or in a folder."
            ) from error

    def preprocess(self, images: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Convert uint8 images to the network's input. `settings` override the processor's own."""
        batch = self.processor(images.cpu(), input_data_format="channels_first", return_tensors="pt", **settings)
        return batch["pixel_values"].to(self.network.device)


class Dinov2(HubNetwork):
    """
    The features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675): the class token of DINOv2 ViT-L/14 at 224×224.
    There are no classes, and therefore no inception score.
    """

    name = DINOV2
    resize = "bicubic to 224×224"
    num_classes = 0

    def __init__(self) -> None:
        super().__init__(AutoModel, DINOV2_MODEL)
        self.num_features = self.network.config.hidden_size

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        pixels = self.preprocess(images, size={"height": 224, "width": 224}, do_center_crop=False)
        return self.network(pixels).last_hidden_state[:, 0], None


class HubClassifier(HubNetwork):
    """
    A transformers image classifier. The features are the input of its last linear layer.

    Raises:
        UserError: if the model cannot be loaded, or has no linear layer with an output for each class.
    """

    def __init__(self, name_or_path: str) -> None:
        super().__init__(AutoModelForImageClassification, name_or_path)
        self.name = name_or_path
        self.resize = f"by its {type(self.processor).__name__}"
        self.id2label = {int(class_id): label for class_id, label in self.network.config.id2label.items()}
        self.num_classes = len(self.id2label)
        heads = [
            layer
            for layer in self.network.modules()
            if isinstance(layer, nn.Linear) and layer.out_features == self.num_classes
        ]
        if not heads:
            raise UserError(
                f"--feature_extractor {name_or_path} does not end in a linear layer, whose input is used as features. "
                "Choose a different classifier."
            )
        self.num_features = heads[-1].in_features
        heads[-1].register_forward_pre_hook(self._store_features)

    def _store_features(self, _layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.features = inputs[0]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network(self.preprocess(images)).logits
        return self.features.flatten(1), logits


def pretrained_extractor(name: str) -> FeatureExtractor:
    """Load "inception", "dinov2" or a transformers image classifier by name. Raise `UserError` if this fails."""
    extractor = {INCEPTION: Inception, DINOV2: Dinov2}.get(name, lambda: HubClassifier(name))()
    return extractor.eval().requires_grad_(False)
