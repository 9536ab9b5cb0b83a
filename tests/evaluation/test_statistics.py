"""Test feature statistics: accumulation, caching, validation, and the metrics computed from them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.utils.data import Dataset

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import CachedImages
from diffusers_cfg.evaluation import features, measure, statistics
from diffusers_cfg.evaluation.measure import measure_floor
from diffusers_cfg.evaluation.statistics import Gaussian, RealStatistics, Reference, Summary, stratified_order
from tests.support.runs import assert_same_tensors

DIGIT_NAMES = {i: str(i) for i in range(10)}


def real_statistics(dataset: Dataset, folder: Path, num_samples: int = 200) -> RealStatistics:
    return RealStatistics(Accelerator(cpu=True), dataset, DIGIT_NAMES, "small", num_samples, folder)


def features_of(n: int, d: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, logits = torch.randn(n, d, generator=generator), torch.randn(n, classes, generator=generator)
    return features, logits, torch.arange(n) % classes


def summary_of(order: torch.Tensor, batch_size: int, n: int = 100) -> Summary:
    features, logits, labels = features_of(n)
    summary = Summary(n, 6, 3)
    for rows in order.split(batch_size):
        summary.add(rows, features[rows], logits[rows], labels[rows])
    return summary


def test_summary_does_not_depend_on_order_and_batches():
    one, two = summary_of(torch.arange(100), 100), summary_of(torch.arange(100).flip(0), 7)
    for name in one.sums:
        torch.testing.assert_close(one.sums[name], two.sums[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(one.features, two.features)
    features, logits, labels = features_of(100)
    mean, covariance = one.moments()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, features.double().T.cov())
    torch.testing.assert_close(one.moments(torch.arange(10) != 0)[1], features[10:].double().T.cov())
    right = (logits.argmax(1) == labels).double()
    torch.testing.assert_close(one.sums["right"].sum(), right.sum())
    assert one.sums["asked"].sum(0).tolist() == [34, 33, 33]


def test_summary_size_is_bounded_and_metrics_still_work(monkeypatch):
    """Only the features of the first 10,000 samples (20 in this test) are stored, even of the paper's 50,000."""
    for module in (statistics, measure):
        monkeypatch.setattr(module, "MAX_NEIGHBOURS", 20)
    summary, (features, _, _) = summary_of(torch.arange(1000), 100, n=1000), features_of(1000)
    assert torch.equal(summary.features, features[:20])
    assert sum(value.numel() for value in summary.sums.values()) == 10 * (1 + 6 + 36 + 1 + 3 + 1 + 3 + 3)
    moments = summary.moments()
    reference = Reference(Gaussian.from_moments(moments), None, features[500:520])
    assert measure.measure(summary, reference, {0: "a", 1: "b", 2: "c"})["recall"] > 0
    summary.add(torch.tensor([3]), features[3:4], None, torch.tensor([-1]))
    with pytest.raises(AssertionError, match="has 1001 of 1000 images"):
        measure.measure(summary, reference)


def test_non_finite_features_raise():
    features, logits, labels = features_of(100)
    features[3] = torch.nan
    features[5, 2] = torch.inf
    with pytest.raises(UserError, match="values that are not finite for 2 of 100 images"):
        Summary(100, 6, 3).add(torch.arange(100), features, logits, labels)


def test_every_prefix_of_the_order_has_the_class_proportions():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels)
    assert order.sort().values.tolist() == list(range(100))
    for length in (10, 20, 50):
        counts = labels[order[:length]].bincount(minlength=3)
        assert (counts - torch.tensor([0.6, 0.3, 0.1]) * length).abs().max() < 1
    assert order[:60].tolist() != sorted(order[:60].tolist())


@pytest.fixture(scope="module")
def real_400(digits, tmp_path_factory) -> RealStatistics:
    return real_statistics(digits, tmp_path_factory.mktemp("real_400"), num_samples=400)


@pytest.fixture(scope="module")
def floor(real_400) -> dict:
    return measure_floor(real_400)


def measured(real: RealStatistics, images: torch.Tensor, class_labels: torch.Tensor) -> dict:
    summary = real.summarizer.new_summary(len(images))
    real.summarizer.add(summary, torch.arange(len(images)), images.expand(-1, 3, -1, -1), class_labels)
    return measure.measure(summary, real.reference, real.extractor.id2label)


def test_real_images_score_like_the_floor_and_noise_scores_worse(digits, real_400, floor):
    chosen = stratified_order(digits.class_labels)[:400]
    row = measured(real_400, digits.images[chosen], digits.class_labels[chosen])
    # These 400 images are part of the reference.
    assert row["frechet_distance"] < floor["frechet_distance"]
    assert row["precision"] == pytest.approx(floor["precision"], abs=1e-12)

    noise = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse = measured(real_400, noise, digits.class_labels[chosen])
    assert worse["frechet_distance"] > 10 * row["frechet_distance"]
    assert worse["kernel_distance"] > row["kernel_distance"]
    assert worse["coverage"] < 0.1 * row["coverage"]
    assert worse["class_accuracy"] < 0.2
    assert row["class_accuracy"] > 0.5
    assert set(row["accuracy_by_class"]) == set(DIGIT_NAMES.values())
    assert row["class_accuracy"] == pytest.approx(np.mean(list(row["accuracy_by_class"].values())), abs=0.02)


def test_reference_contains_all_real_images(digits, real_400):
    features, _ = real_400.extractor(digits.images.expand(-1, 3, -1, -1))
    mean, covariance = real_400.reference.features.moments
    torch.testing.assert_close(mean, features.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance, features.double().T.cov(), rtol=1e-5, atol=1e-6)


def test_missing_classes_lower_recall_but_not_precision(digits, real_400, floor):
    few = (digits.class_labels < 5).nonzero().flatten()[:400]
    row = measured(real_400, digits.images[few], digits.class_labels[few])
    assert row["precision"] > floor["precision"] - 0.05
    assert row["recall"] < 0.7 * floor["recall"]
    assert row["coverage"] < 0.7 * floor["coverage"]


def test_statistics_are_cached(digits, tmp_path, monkeypatch):
    first = real_statistics(digits, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 2

    def again(*_):
        raise AssertionError("the statistics were computed again")

    monkeypatch.setattr(RealStatistics, "_summarize", again)
    monkeypatch.setattr(features, "train_classifier", again)
    second = real_statistics(digits, tmp_path)
    assert measure_floor(second) == measure_floor(first)
    assert torch.equal(second.reference.features.moments[1], first.reference.features.moments[1])
    assert torch.equal(second.neighbours, first.neighbours)
    with pytest.raises(AssertionError, match="computed again"):
        real_statistics(digits, tmp_path, num_samples=300)  # a different held-out set


@pytest.fixture(scope="module")
def cache(digits, tmp_path_factory) -> dict[str, Path]:
    """Return the cached files of the digits, and those of mirrored digits."""
    folder = tmp_path_factory.mktemp("cache")
    real_statistics(digits, folder)
    own = {path.name.split("-")[0]: path for path in folder.iterdir()}
    real_statistics(CachedImages(digits.images.flip(-1), digits.class_labels), folder)
    (other,) = set(folder.glob("statistics-*")) - {own["statistics"]}
    return {**own, "other": other}


def with_other_tensors(path: Path) -> bytes:
    """Return the content of a file, with the same metadata and other tensors."""
    with safe_open(path, "pt") as file:
        return safetensors.torch.save({"x": torch.zeros(1)}, file.metadata())


DAMAGES: dict[str, Callable[[dict[str, Path], Path], bytes]] = {
    "truncated": lambda _, path: path.read_bytes()[:-100],
    "empty": lambda *_: b"",
    "noise": lambda *_: b"x" * 1000,
    "other tensors": lambda _, path: with_other_tensors(path),
    "no metadata": lambda *_: safetensors.torch.save({}),
    "other data": lambda cache, _: cache["other"].read_bytes(),
}


@pytest.mark.parametrize("kind", ["statistics", "classifier"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_computed_again(digits, cache, tmp_path, caplog, kind, damage):
    for path in cache.values():
        shutil.copy(path, tmp_path)
    path = tmp_path / cache[kind].name
    path.write_bytes(DAMAGES[damage](cache, path))
    real_statistics(digits, tmp_path)
    assert f"{path.name} " in caplog.text
    assert " again: " in caplog.text
    assert_same_tensors(path, cache[kind])


def test_unlabelled_images_are_skipped(digits, tmp_path):
    labels = digits.class_labels.clone()
    labels[::2] = -1
    assert real_statistics(CachedImages(digits.images, labels), tmp_path).num_real == len(labels[1::2])


def test_too_few_images_raise_or_warn(digits, statistics_dir, caplog):
    with pytest.raises(UserError, match="19 samples are too few for the metrics. Use at least 20"):
        real_statistics(digits, statistics_dir, num_samples=19)
    with pytest.raises(UserError, match="39 labelled images are too few"):
        real_statistics(CachedImages(digits.images[:39], digits.class_labels[:39]), statistics_dir)
    real_statistics(digits, statistics_dir, num_samples=64)
    assert "There are only 64 samples for the 64 features of small-" in caplog.text
    caplog.clear()
    real_statistics(digits, statistics_dir, num_samples=65)
    assert "full rank" not in caplog.text
