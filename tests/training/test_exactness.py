"""Test the figures and tables of the exactness study on small settings. test_mixture.py tests the values."""

import pytest
from accelerate import Accelerator

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import exactness, features
from tests.support.commands import load_command


def test_experiments_write_figures_and_tables(trained_model, tmp_path, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    model, settings = str(trained_model), {"num_samples": 20, "num_inference_steps": 4}
    monkeypatch.setattr(exactness, "STEPS", (10, 20, 40))
    monkeypatch.setattr(exactness, "SOLVERS", {"UniPCMultistepScheduler": 2})
    pages = [
        exactness.mixture_figure(tmp_path, num_samples=300),
        exactness.convergence(tmp_path, num_samples=4),
        exactness.network_error(tmp_path),
        exactness.rules(tmp_path, Accelerator(cpu=True), tmp_path / "statistics", model, model, **settings),
    ]
    assert {path.name for path in tmp_path.glob("*.png")} == {"mixture.png", "convergence.png", "rules.png"}
    assert [page.count("| UniPCMultistepScheduler |") for page in pages] == [0, 3, 0, 0]
    assert "| w = 0 | " in pages[3]
    assert [line.split("|")[-2].strip() for line in pages[3].splitlines()[-10:]] == ["4", "8", "5", *["8"] * 7]


def test_command_writes_all_sections(tmp_path, monkeypatch, capsys):
    for name in ("mixture_figure", "convergence", "stochastic", "network_error", "rules"):
        monkeypatch.setattr(exactness, name, lambda *_, name=name, **settings: f"## {name} {settings or ''}".strip())
    main = load_command("studies/exactness").main
    main(["--output_dir", str(tmp_path / "a")])
    main(["--output_dir", str(tmp_path / "b"), "--model", "m", "--num_samples", "29"])
    without = "## mixture_figure\n\n## convergence\n\n## stochastic\n\n## network_error\n"
    assert (tmp_path / "a" / "tables.md").read_text() == without
    settings = {"model": "m", "guide_model": None, "guidance_scale": 2.0, "num_samples": 29}
    settings |= {"num_inference_steps": 20, "seed": 0}
    assert (tmp_path / "b" / "tables.md").read_text() == f"{without}\n## rules {settings}\n"
    assert "## stochastic" in capsys.readouterr().out


def test_too_few_samples_raise_before_the_first_experiment(tmp_path):
    main = load_command("studies/exactness").main
    with pytest.raises(UserError, match="--num_samples must be at least 20, but is 19"):
        main(["--output_dir", str(tmp_path / "out"), "--model", "m", "--num_samples", "19"])
    assert not (tmp_path / "out").exists()
