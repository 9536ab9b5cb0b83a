"""Test the feature extractors: the small classifier, networks from the Hub, and Inception."""

import sys
import types

import pytest
import torch
from safetensors import safe_open
from transformers import Dinov2Model, ResNetConfig, ResNetForImageClassification, ViTForImageClassification

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import features as feature_extractors
from diffusers_cfg.evaluation.features import Dinov2, SmallClassifier, pretrained_extractor, small_classifier
from tests.support.extractors import CLASSES, DINOV2, LABELS, VIT, save_extractor

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


def mock_torch_fidelity(monkeypatch, network) -> None:
    package = types.ModuleType("torch_fidelity")
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = network
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inception_without_torch_fidelity_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity torchvision, or use --feature_extractor small"):
        pretrained_extractor("inception")


def test_inception_requests_the_features_of_the_fid(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])

        def forward(self, x):
            assert x.dtype == torch.uint8
            return torch.ones(len(x), 2048), torch.zeros(len(x), 1008)

    mock_torch_fidelity(monkeypatch, Network)
    features, logits = pretrained_extractor("inception")(images())
    assert (features.shape, logits.shape) == ((4, 2048), (4, 1008))


def test_failed_inception_download_raises(monkeypatch):
    def network(name, features_list):
        raise OSError("no route to host")

    mock_torch_fidelity(monkeypatch, network)
    with pytest.raises(
        UserError, match="weights of --feature_extractor inception cannot be downloaded \\(no route to host\\)"
    ):
        pretrained_extractor("inception")
