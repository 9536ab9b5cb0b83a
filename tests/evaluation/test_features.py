"""Test the feature extractors: the small classifier, networks from the Hub, and Inception."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import Dinov2Model, ResNetConfig, ResNetForImageClassification, ViTForImageClassification

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import features as feature_extractors
from diffusers_cfg.evaluation.features import Dinov2, Inception, SmallClassifier, pretrained_extractor, small_classifier
from tests.support.extractors import (
    CLASSES,
    DINOV2,
    LABELS,
    VIT,
    mock_torch_fidelity,
    save_extractor,
    use_tiny_inception,
)

RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic", **LABELS)


def images(n: int = 4, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_small_classifier_learns_the_digits(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_extractors.train_classifier, "__defaults__", (250, 64))  # a tenth of the work
    id2label = {i: str(i) for i in range(10)}
    classifier = small_classifier(digits, "digits", id2label, tmp_path)
    assert (classifier.accuracy or 0) > 0.98
    assert not classifier.training
    features, logits = classifier(digits.images[:50].expand(-1, 3, -1, -1))
    assert features.shape == (50, classifier.num_features)
    assert (logits.argmax(1) == digits.class_labels[:50]).double().mean() > 0.95
    # The second call loads the classifier from the folder.
    with safe_open(tmp_path / "classifier-digits.safetensors", "pt") as file:
        assert float(file.metadata()["accuracy"]) == classifier.accuracy
    again = small_classifier(digits, "digits", id2label, tmp_path)
    assert (again.name, again.accuracy) == (classifier.name, classifier.accuracy)
    assert torch.equal(again(digits.images[:9].expand(-1, 3, -1, -1))[0], features[:9])


def test_classifier_training_is_deterministic_and_keeps_the_global_random_state(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(feature_extractors.train_classifier, "__defaults__", (5, 16))
    before = torch.get_rng_state()
    first = small_classifier(digits, "digits", {i: str(i) for i in range(10)}, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = small_classifier(digits, "digits", {i: str(i) for i in range(10)}, tmp_path / "b")
    assert first.name == second.name


@pytest.mark.parametrize("resolution", [4, 8, 28, 64])
def test_small_classifier_accepts_any_resolution(resolution):
    features, logits = SmallClassifier(resolution, CLASSES).eval()(images(2, resolution))
    assert features.shape == (2, 64)
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "num_features", "head"),
    [
        (lambda: ViTForImageClassification(VIT), 16, lambda network: network.classifier),
        (lambda: ResNetForImageClassification(RESNET), 24, lambda network: network.classifier[-1]),
    ],
)
def test_transformers_classifier_features_feed_its_last_layer(make, num_features, head, tmp_path):
    extractor = pretrained_extractor(save_extractor(make(), tmp_path / "model"))
    features, logits = extractor(images(5, 64))
    assert (extractor.num_features, extractor.id2label) == (num_features, CLASSES)
    assert features.shape == (5, num_features)
    torch.testing.assert_close(head(extractor.network)(features), logits)
    assert "ViTImageProcessor" in extractor.resize


def test_dinov2_features_are_the_class_token(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_extractors, "DINOV2_MODEL", save_extractor(Dinov2Model(DINOV2), tmp_path / "model"))
    extractor = pretrained_extractor("dinov2")
    assert isinstance(extractor, Dinov2)
    features, logits = extractor(images(2))
    assert features.shape == (2, 16)
    assert logits is None
    pixels = extractor.preprocess(images(2), size={"height": 224, "width": 224}, do_center_crop=False)
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels.min() >= -1


def test_unknown_extractor_raises(tmp_path):
    with pytest.raises(
        UserError, match="--feature_extractor /nowhere/at/all cannot be loaded .*Use small, inception, dinov2 or"
    ):
        pretrained_extractor("/nowhere/at/all")


def test_inception_without_torch_fidelity_raises(monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install torch-fidelity torchvision, or use --feature_extractor small"):
        pretrained_extractor("inception")


def test_inception_gives_the_features_of_the_fid_and_the_sfid(monkeypatch):
    use_tiny_inception(monkeypatch)
    extractor = pretrained_extractor("inception")
    features, logits = extractor(images())
    assert (features.shape, logits.shape) == ((4, 16), (4, 5))
    pixels = F.adaptive_avg_pool2d(images().float() / 255, 2)
    assert isinstance(extractor, Inception)
    expected = (
        extractor.network.Mixed_6d.branch1x1(pixels).permute(0, 2, 3, 1)[..., :7].reshape(4, -1)
    )  # in TensorFlow's order
    assert extractor.spatial_features is not None
    assert torch.equal(extractor.spatial_features, expected)


def test_inception_of_torch_fidelity(monkeypatch):
    """Run torch-fidelity's network with random weights in place of the download."""
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if it does not match torch
        pytest.skip(f"needs torch-fidelity and torchvision ({error})")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    extractor = pretrained_extractor("inception")
    assert isinstance(extractor, Inception)
    blocks = []
    extractor.network.Mixed_6d.register_forward_hook(lambda _layer, _inputs, output: blocks.append(output))
    features, logits = extractor(images(2, 32))
    assert (features.shape, logits.shape) == ((2, extractor.num_features), (2, extractor.num_classes))
    # The block starts with the output of its 1×1 convolution, after normalization and ReLU.
    assert blocks[0].shape == (2, 768, 17, 17)
    expected = blocks[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert expected.shape == (2, extractor.num_spatial_features)
    assert extractor.spatial_features is not None
    assert torch.equal(extractor.spatial_features, expected)


def test_failed_inception_download_raises(monkeypatch):
    def network(name, features_list):
        raise OSError("no route to host")

    mock_torch_fidelity(monkeypatch, network)
    with pytest.raises(
        UserError, match="weights of --feature_extractor inception cannot be downloaded \\(no route to host\\)"
    ):
        pretrained_extractor("inception")
