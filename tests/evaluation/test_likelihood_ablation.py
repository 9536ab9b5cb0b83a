"""Test the tables of the ablation of variational diffusion models against numbers made up by hand."""

import re

import pytest
import torch

from diffusers_cfg.evaluation.likelihood import ImageTerms
from diffusers_cfg.evaluation.likelihood_ablation import (
    TITLE,
    Measurement,
    bits_of,
    likelihood_table,
    paired_difference,
    plot_bounds,
    quality_table,
)
from diffusers_cfg.evaluation.likelihood_run import TermSet, term_folder
from diffusers_cfg.evaluation.loss_variance import LEAST
from diffusers_cfg.evaluation.reports import metric_names
from diffusers_cfg.evaluation.settings import LikelihoodConfig


def made_up(variant: str, seed: int, offset: float, learned: bool = True) -> Measurement:
    """Return a measurement of four held-out and two training images, with bounds 1, 2, 3 and 4 plus an offset."""
    images = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + offset
    parts = {"prior": images * 0.1, "reconstruction": images * 0.2, "diffusion": images * 0.7}
    training = torch.tensor([2.0, 2.5], dtype=torch.float64) + offset
    variance = {"linear": 6.0, "cosine": 24.0, **({"learned": 1.5} if learned else {}), LEAST: 1.0}
    row = {"guidance_scale": 1.0, "frechet_distance": 5.0 + seed, "frechet_distance_error": 0.5, "class_accuracy": 0.9}
    record = {"results": [{**row, "guidance_scale": 0.0}, row], "floor": {"frechet_distance": 0.1}}
    record |= {"metric_names": metric_names("small"), "guidance": {}, "class_labels": "balanced", "seed": 0}
    record |= {"feature_extractor": {"name": "small", "resize": "none", "num_features": 64, "accuracy": 0.99}}
    record |= {"num_samples": 20, "num_real": 100, "num_neighbours": 20, "num_held_out": 20}
    terms = {"conditional": images, "null": images + 0.5, "training": training, **parts}
    return Measurement(variant, seed, terms, (-13.0, 5.0), variance, {"DDIM, 2 steps": record})


def rows_of(table: str) -> list[dict[str, str]]:
    """Return the rows of a Markdown table as dictionaries."""
    header, _, *rows = (re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in table.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_one_seed_has_standard_errors_over_images():
    measurements = [made_up("learned", 0, 0.0), made_up("fixed", 0, 1.0, learned=False)]
    bounds, caption, variances, _ = likelihood_table(measurements, times_per_image=8).split("\n\n")
    learned, fixed = rows_of(bounds)
    assert learned == {
        "variant": "learned",
        "seeds": "1",
        TITLE: "2.500 ± 0.645",  # std 1.291 / √4
        "minus learned": "",
        "prior": "0.250",
        "reconstruction": "0.500",
        "diffusion": "1.750",
        "bits/dim of p(x)": "3.000 ± 0.645",
        "test − train": "0.250",
        "γ₀": "-13.00",
        "γ₁": "5.00",
    }
    assert fixed["minus learned"] == "+1.000 ± 0.000"  # the images differ by the same number, so there is no error
    assert "4 held-out images at 8 times each" in caption
    learned, fixed = rows_of(variances)
    assert (learned["learned"], learned["linear / learned"], learned[LEAST]) == ("1.50", "4.00", "1.00")
    assert (fixed["linear"], fixed["learned"], fixed["linear / learned"]) == ("6.00", "", "")


def test_several_seeds_have_a_spread_over_seeds():
    measurements = [made_up("learned", 0, 0.0), made_up("learned", 1, 1.0), made_up("fixed", 1, 1.5)]
    learned, fixed = rows_of(likelihood_table(measurements, times_per_image=8).split("\n\n")[0])
    assert (learned["seeds"], learned[TITLE]) == ("2", "3.000 ± 0.707")  # std of 2.5 and 3.5
    assert fixed["minus learned"] == "+0.500 ± 0.000"  # against the same seed
    learned, fixed, real = rows_of(quality_table(measurements).split("\n\n")[0])
    assert (learned["sampler"], learned["Fréchet distance, w = 1"]) == ("DDIM, 2 steps", "5.500 ± 0.707")
    assert fixed["Fréchet distance, w = 0"] == "6.000 ± 0.980"  # a 95 % interval
    assert fixed["class accuracy, w = 1"] == "0.900"
    assert (real["variant"], real["Fréchet distance, w = 1"]) == ("real", "0.100")


def test_paired_difference_has_a_smaller_error_than_its_terms():
    one, other = made_up("a", 0, 0.0), made_up("b", 0, 0.0)
    shifted = other.terms["conditional"] + torch.tensor([0.1, 0.3, 0.1, 0.3])
    other = other._replace(terms={**other.terms, "conditional": shifted})
    difference, error = paired_difference([other], [one]) or (0, 0)
    assert difference == pytest.approx(0.2)
    assert error == pytest.approx(0.1155 / 2, rel=1e-3)
    assert paired_difference([other._replace(seed=1)], [one]) is None


def test_variants_without_samples_or_a_null_class_have_empty_cells(tmp_path):
    one = made_up("learned", 0, 0.0)
    terms = {name: values for name, values in one.terms.items() if name != "null"}
    measurements = [one, made_up("train_cfg", 0, 0.5)._replace(terms=terms, samples={})]
    _, cfg = rows_of(likelihood_table(measurements, times_per_image=8).split("\n\n")[0])
    assert cfg["bits/dim of p(x)"] == ""
    samples = rows_of(quality_table(measurements).split("\n\n")[0])
    assert [row["variant"] for row in samples] == ["learned", "real"]
    plot_bounds(measurements, tmp_path / "bounds.png")
    assert (tmp_path / "bounds.png").is_file()
    assert one.record()["bits_per_dim"]["conditional"] == {"mean": 2.5, "error": pytest.approx(0.6455, rel=1e-3)}


def test_parts_of_partly_labelled_images_add_up(tmp_path):
    """The bound of p(x|c) and its parts are of the labelled images."""
    error = torch.rand(4, 2, 2, dtype=torch.float64)
    error[2, :, 0] = torch.nan
    prior, reconstruction = torch.rand(2, 4, dtype=torch.float64)
    terms = ImageTerms(prior, reconstruction, error.mean(1), error[..., 1], error)
    folder = TermSet(term_folder(tmp_path, 0), 4)
    folder.save(folder.shards[0], terms)
    config = LikelihoodConfig(model="model", output_dir=str(tmp_path), times_per_image=2)
    bits = bits_of(config, {"num_images": 4, "results": [{"null": {}}], "image_shape": [1, 2, 2]})
    parts = bits["prior"] + bits["reconstruction"] + bits["diffusion"]
    torch.testing.assert_close(parts, bits["conditional"])
    assert (len(parts), len(bits["null"])) == (3, 4)
