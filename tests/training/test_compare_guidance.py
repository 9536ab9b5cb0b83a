"""Test the comparison of rules of guidance: the study, the shares of two classifiers, and rejected settings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import ViTForImageClassification

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.datasets import stack_images
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import features, guidance_comparison, sample_sets
from diffusers_cfg.evaluation.features import classifier_split
from diffusers_cfg.evaluation.guidance_comparison import Judges, agreement, wilson_interval
from diffusers_cfg.evaluation.sample_sets import Shard
from diffusers_cfg.evaluation.settings import GUIDANCE, EvaluationConfig
from diffusers_cfg.evaluation.statistics import Summarizer
from diffusers_cfg.evaluation.sweep import run_sweep, sample_set
from diffusers_cfg.randomness import seeded_generator
from diffusers_cfg.settings import DataConfig
from tests.support.commands import load_command
from tests.support.extractors import VIT, save_extractor
from tests.support.latents import make_vae
from tests.support.models import make_classifier, make_pipeline, make_unet, save_classified_digits

compare_guidance = load_command("studies/compare_guidance")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_classified_digits(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def fast(monkeypatch):
    """Train the feature extractor for a few steps, use few subsets, and draw no figure for each sweep."""
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr("diffusers_cfg.evaluation.measure.KERNEL_SUBSETS", 2)
    monkeypatch.setattr("diffusers_cfg.evaluation.reports.plot_curves", lambda *_: None)


def flags(model: Path, tmp_path: Path, *argv: str) -> list[str]:
    common = ["--model", str(model), "--num_samples", "20", "--num_inference_steps", "2", *argv]
    return [*common, "--statistics_dir", str(tmp_path / "statistics")]


def argv_of(model: Path, tmp_path: Path, *argv: str) -> list[str]:
    return ["--output_dir", str(tmp_path / "out"), "--guidance_scales", "0", "1", *flags(model, tmp_path, *argv)]


def compare(model: Path, tmp_path: Path, *argv: str) -> dict:
    compare_guidance.main(argv_of(model, tmp_path, *argv))
    return json.loads((tmp_path / "out" / "guidance.json").read_text())


@pytest.mark.slow
def test_study_end_to_end(model, tmp_path, monkeypatch, capsys, fast):
    out = tmp_path / "out"
    record = compare(model, tmp_path)
    assert {path.name for path in out.iterdir()} == {*GUIDANCE, "guidance.json", "table.md", "tradeoff.png"}
    rows = {(row["guidance"], row["guidance_scale"]): row for row in record["rows"]}
    assert list(rows) == [(rule, w) for rule in GUIDANCE for w in (0, 1)]
    assert {key: (row["network_evaluations"], row["gradients"]) for key, row in rows.items()} == {
        ("classifier_free", 0): (2, 0),
        ("classifier_free", 1): (4, 0),
        ("classifier", 0): (2, 2),
        ("classifier", 1): (2, 2),
        ("conditional_classifier", 0): (2, 0),
        ("conditional_classifier", 1): (2, 2),
        ("both", 0): (2, 0),
        ("both", 1): (4, 2),
    }
    # Seeds are equal: at w = 0 three of the rules are the conditional model.
    plain, *same = (rows[rule, 0] for rule in ("classifier_free", "conditional_classifier", "both"))
    names = ("frechet_distance", "recall", "guide_accuracy", "guide_only")
    assert all(row[name] == plain[name] for row in same for name in names)
    assert rows["classifier", 0]["frechet_distance"] != plain["frechet_distance"]
    # A sweep of one rule gives the same metrics.
    argv = flags(model, tmp_path, "--guidance", "both", "--guidance_scales", "1", "--output_dir", str(tmp_path / "own"))
    (own,) = run_sweep(parse_config(EvaluationConfig, argv), Accelerator(cpu=True))["results"]
    assert own == {name: rows["both", 1][name] for name in own}
    # Each row has the shares of its own samples.
    for (rule, w), row in rows.items():
        with np.load(out / rule / "samples" / f"w={w:g}" / "shard-00000.npz") as file:
            assert row["seconds"] == pytest.approx(100 * file["seconds"])
            images, labels = file["arr_0"], torch.from_numpy(file["arr_1"])
        x = torch.from_numpy(images[..., :1]).movedim(-1, 1) / 127.5 - 1
        logits = make_classifier(10)(x, torch.tensor(-1.0))
        assert row["guide_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
        assert row["guide_only"] <= min(row["guide_accuracy"], 1 - row["class_accuracy"]) + 1e-6
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(f"{table}\n")
    header, _, first, *_ = table.splitlines()
    assert header == (
        "| rule | w | Fréchet distance | classifier score | class accuracy | precision | recall | guide accuracy | "
        "guide only | evaluations | gradients | s / 100 images |"
    )
    low, high = plain["guide_only_interval"]
    assert f" | {plain['guide_only']:.4f} ({low:.4f} … {high:.4f}) | 2 | 0 | {plain['seconds']:.3g} |" in first
    assert "| real |  |" in table
    assert Image.open(out / "tradeoff.png").width == 1300

    # If the command is run again, it draws the samples that are missing.
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*.npz")}
    assert len(shards) == 8
    missing = out / "both" / "samples" / "w=1" / "shard-00000.npz"
    missing.unlink()
    again = compare_guidance.configs_of(*compare_guidance.parse_args(argv_of(model, tmp_path)))
    assert run_sweep(again[-1], Accelerator(cpu=True))["results"][1] == own
    assert [path for path in shards if path.stat().st_mtime_ns != shards[path]] == [missing]


def test_each_row_has_the_shares_of_its_rule_and_scale(tmp_path, monkeypatch):
    keys = [(rule, w) for rule in GUIDANCE for w in (0.0, 1.0)]
    shares = {("real", None): {"guide_only": "real"}, **{key: {"guide_only": key} for key in keys}}
    monkeypatch.setattr(guidance_comparison, "classified", lambda *_: shares)
    flags = ["--model", "m", "--output_dir", str(tmp_path)]
    configs = [parse_config(EvaluationConfig, [*flags, "--guidance", rule]) for rule in GUIDANCE]
    results = [{"guidance_scale": w} for w in (0.0, 1.0)]
    records = [{"results": results, "best": {"recall": 0.0}, "floor": {"recall": 0.5}} for _ in configs]
    record = guidance_comparison.compare(configs, records, Accelerator(cpu=True))
    assert [row["guide_only"] for row in record["rows"]] == keys
    assert record["floor"] == {"recall": 0.5, "guide_only": "real"}


@pytest.mark.slow
def test_study_with_an_extractor_without_the_classes(model, tmp_path, fast):
    extractor = save_extractor(ViTForImageClassification(VIT), tmp_path / "vit")
    record = compare(model, tmp_path, "--feature_extractor", extractor, "--guidance_scales", "1")
    assert not any("guide" in name for row in [record["floor"], *record["rows"]] for name in row if name != "guidance")
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.splitlines()[0].endswith("| precision | recall | evaluations | gradients | s / 100 images |")
    assert "guide only" not in table
    assert Image.open(tmp_path / "out" / "tradeoff.png").width == 700


def test_extractor_without_the_classes_has_no_shares(model, tmp_path, monkeypatch):
    """Letters are classes that the digits lack."""
    extractor: Any = Extractor()
    extractor.id2label = dict(enumerate("abcdefghij"))
    summarizer = Summarizer(extractor, Digits().id2label, torch.device("cpu"))
    statistics = SimpleNamespace(summarizer=summarizer)
    monkeypatch.setattr(guidance_comparison, "RealStatistics", lambda *_: statistics)
    config = EvaluationConfig(model=str(model), num_samples=20, guidance_scales=[1.0], output_dir=str(tmp_path))
    assert guidance_comparison.classified([config], Accelerator(cpu=True)) == {}


class Extractor(torch.nn.Module):
    """A stand-in for a feature extractor whose class is in the last pixel. It numbers the digits from nine to zero."""

    id2label = {9 - class_id: name for class_id, name in Digits().id2label.items()}

    def forward(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, torch.nn.functional.one_hot(9 - images[:, 0, -1, -1].long(), 10).float()


class Guide(torch.nn.Module):
    """A stand-in for a guiding classifier whose class is in the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.calls = torch.device("cpu"), []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls.append((sample, timestep))
        return torch.nn.functional.one_hot(((sample[:, 0, 0, 0] + 1) * 127.5).round().long(), 10).float()


def make_judges(pipeline: CFGPipeline) -> Judges:
    """Return stand-ins for the guiding classifier of a pipeline and for the feature extractor."""
    extractor: Any = Extractor()
    judges = Judges(pipeline, Summarizer(extractor, Digits().id2label, torch.device("cpu")), 0)
    judges.pipeline = SimpleNamespace(classifier=Guide(), image_shape=pipeline.image_shape, encode=pipeline.encode)
    return judges


@pytest.fixture
def judges() -> Judges:
    return make_judges(make_pipeline())


def images_of(guide: list[int], independent: list[int]) -> torch.Tensor:
    """Return images that the two stand-ins take for these classes."""
    images = torch.zeros(len(guide), 3, 8, 8, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.tensor(guide)[:, None]
    images[:, :, -1, -1] = torch.tensor(independent)[:, None]
    return images


# The classes of images according to the guide, to the extractor, and as requested: two images of six that the guide
# alone accepts, of four that it accepts
GUIDED, INDEPENDENT, REQUESTED = [1, 2, 3, 4, 5, 6], [1, 2, 0, 0, 0, 9], [1, 2, 3, 4, 0, 9]


def test_counts_of_images_that_the_guide_alone_accepts(judges):
    counts = judges.count(images_of(GUIDED, INDEPENDENT), torch.tensor(REQUESTED), list(range(6)))
    assert counts.tolist() == [6, 4, 2]
    assert agreement(counts)["guide_accuracy"] == pytest.approx(4 / 6)
    assert agreement(counts)["guide_only"] == pytest.approx(2 / 6)
    ((sample, timestep),) = judges.pipeline.classifier.calls
    assert (sample.shape, timestep.tolist()) == ((6, 1, 8, 8), [-1.0] * 6)


def test_processes_share_the_images(judges, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_sets, "SHARD_SIZE", 4)
    monkeypatch.setattr("diffusers_cfg.evaluation.guidance_comparison.BATCH_SIZE", 3)
    config = EvaluationConfig(model="m", num_samples=20, output_dir=str(tmp_path))
    samples = sample_set(config, 1.0)
    images, labels = images_of((GUIDED * 4)[:20], (INDEPENDENT * 4)[:20]), torch.tensor((REQUESTED * 4)[:20])
    for shard in samples.shards:
        rows = list(shard)
        samples.save(shard, Shard(images[rows].movedim(1, -1).numpy(), labels[rows].numpy(), 2.0))
    dataset = stack_images(Digits(), DataConfig(resolution=8), 1, show_progress=False)
    monkeypatch.setattr(dataset, "images", (dataset.images % 10).clone())
    own, seen, encode = [], [], judges.pipeline.encode
    judges.pipeline.encode = lambda x, generators: seen.extend(g.initial_seed() for g in generators) or encode(x)
    for rank in range(2):
        device = torch.device("cpu")
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, device=device, reduce=lambda t, **_: t)
        own.append([judges.count_samples(config, 1.0, accelerator), judges.count_real(dataset, accelerator)])
    found = [sum(counts).tolist() for counts in zip(*own, strict=True)]
    # The noise of a latent depends on the index of the image in the set.
    assert {seeded_generator("cpu", 0, "encode", index).initial_seed() for index in range(20)} <= set(seen)
    assert found[0] == judges.count(images, labels, list(range(20))).tolist()
    assert found[0] == [20, 14, 6]
    assert found[1][0] == len(classifier_split(dataset.class_labels)[0]) == 359


def test_images_of_a_model_with_a_vae_are_encoded():
    """Its classifier takes latents, which do not depend on the batch."""
    judges = make_judges(make_pipeline(make_unet(sample_size=4, in_channels=2, out_channels=2), vae=make_vae()))
    images = torch.randint(256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = images.repeat(1, 3, 1, 1)
    judges.pipeline.classifier.forward = lambda sample, _: found.append(sample) or torch.zeros(len(sample), 10)
    found: list[torch.Tensor] = []
    images[:, :, -1, -1] = 0
    judges.count(images, torch.tensor([0, 1]), [3, 4])
    judges.count(images[1:], torch.tensor([1]), [4])
    x = images[:, :1] / 127.5 - 1
    latents = judges.pipeline.encode(x, [seeded_generator("cpu", 0, "encode", index) for index in (3, 4)])
    torch.testing.assert_close(found[0], latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[0][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 2000, (0.0, 0.0019)), (10, 100, (0.0552, 0.1744)), (100, 100, (0.9630, 1.0))],
)
def test_wilson_interval(count, total, expected):
    assert wilson_interval(count, total) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guidance", "both"], "--guidance is not a flag of this command. It compares all rules"),
        (["--guider=ClassifierFreeGuidance"], "--guider is not a flag of this command"),
        (["--guide_model", "weak"], "--guide_model is not a flag of this command"),
        (["--guidance_rescale", "0.5"], "--guidance_rescale is not a flag of this command"),
        (["--guidance_scales", "1", "1"], "guidance_scales must not repeat a value"),
        (["--num_inference_steps", "0"], "num_inference_steps must lie in"),
        (["--guidance_interval", "5", "0.2"], r"0 ≤ σ_lo < σ_hi"),
        (["--output_dir", "/dev/null"], "/dev/null is not one. Pass a folder"),
    ],
)
def test_invalid_settings_raise_before_the_first_sweep(model, tmp_path, monkeypatch, argv, message):
    refuse(model, tmp_path, monkeypatch, message, *argv)


def refuse(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, *argv: str) -> None:
    """Assert that the study refuses a model or flags before it draws or writes anything."""

    def never(*_):
        raise AssertionError("a sweep was started")

    monkeypatch.setattr("diffusers_cfg.evaluation.sweep.run_sweep", never)
    with pytest.raises(UserError, match=message):
        compare_guidance.main(["--model", str(model), "--output_dir", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": None}, "--guidance classifier needs a classifier, but .*model has none"),
        ({"num_class_embeds": None}, "needs classes, but the network of .*model has none"),
        ({"conditioning_dropout_prob": 0.0}, "need a null class"),
    ],
)
def test_model_that_some_rule_does_not_fit_raises_before_the_first_sweep(tmp_path, monkeypatch, settings, message):
    refuse(save_classified_digits(tmp_path / "model", **settings), tmp_path, monkeypatch, message)
