"""Test the figures and tables of the exactness study on small settings. test_mixture.py tests the values."""

import pytest
from accelerate import Accelerator

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import exact_classifier, exactness, features
from diffusers_cfg.evaluation.settings import EvaluationConfig
from tests.support.commands import load_command


@pytest.mark.slow
def test_experiments_write_figures_and_tables(trained_model, tmp_path, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    settings = {"guidance_scales": [2.0], "num_samples": 20, "num_inference_steps": 4}
    folders = {
        "model": str(trained_model),
        "guide_model": str(trained_model),
        "statistics_dir": tmp_path / "statistics",
    }
    config = EvaluationConfig(**settings, **folders)
    monkeypatch.setattr(exactness, "STEPS", (10, 20, 40))
    monkeypatch.setattr(exactness, "SOLVERS", {"UniPCMultistepScheduler": 2})
    pages = [
        exactness.mixture_figure(tmp_path, num_samples=300),
        exactness.convergence(tmp_path, num_samples=4),
        exactness.network_error(tmp_path),
        exactness.rules(tmp_path, Accelerator(cpu=True), config),
    ]
    assert {path.name for path in tmp_path.glob("*.png")} == {"mixture.png", "convergence.png", "rules.png"}
    assert [page.count("| UniPCMultistepScheduler |") for page in pages] == [0, 3, 0, 0]
    assert "| w = 0 | " in pages[3]
    assert [line.split("|")[-2].strip() for line in pages[3].splitlines()[-10:]] == ["4", "8", "5", *["8"] * 7]


def test_command_writes_all_sections(trained_model, tmp_path, monkeypatch, capsys):
    for name in ("mixture_figure", "convergence", "stochastic", "network_error"):
        monkeypatch.setattr(exactness, name, lambda *_, name=name: f"## {name}")
    monkeypatch.setattr(exact_classifier, "trained_classifier", lambda *_: "## trained_classifier")
    monkeypatch.setattr(exactness, "rules", lambda *args: f"## rules of {args[-1].num_samples} samples")
    main = load_command("studies/exactness").main
    main(["--output_dir", str(tmp_path / "a")])
    main(["--output_dir", str(tmp_path / "b"), "--model", str(trained_model), "--num_samples", "29"])
    without = "## mixture_figure\n\n## convergence\n\n## stochastic\n\n## network_error\n\n## trained_classifier\n"
    assert (tmp_path / "a" / "tables.md").read_text() == without
    assert (tmp_path / "b" / "tables.md").read_text() == f"{without}\n## rules of 29 samples\n"
    assert "## stochastic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guide_model", "m"], "--guide_model has an effect only with --model"),
        (["--seed", "3", "--num_samples", "30"], "--num_samples, --seed has an effect only with --model"),
        (["--model", "MODEL", "--num_samples", "19"], r"num_samples must lie in \[20, 100000000\], but is 19"),
        (["--model", "MODEL", "--num_inference_steps", "0"], r"num_inference_steps must lie in \[1, 100000\]"),
        (["--model", "MODEL", "--guidance_scale", "nan"], r"guidance_scales must be finite, but is \[nan\]"),
        (["--model", "MODEL", "--guidance_scale", "1e300"], "guidance_scale must be finite"),
        (["--model", "MODEL", "--seed", "-1"], "seed must be at least 0, but is -1"),
        (["--model", "/no/model"], "--model /no/model cannot be loaded"),
        (["--model", "MODEL", "--guide_model", "/no/model"], "--guide_model /no/model cannot be loaded"),
        (["--output_dir", "/proc/x"], "--output_dir '/proc/x' cannot be written"),
    ],
)
def test_invalid_settings_raise_before_the_first_experiment(trained_model, tmp_path, monkeypatch, argv, message):
    def never(*_):
        raise AssertionError("an experiment was started")

    monkeypatch.setattr(exactness, "mixture_figure", never)
    argv = [str(trained_model) if argument == "MODEL" else argument for argument in argv]
    with pytest.raises(UserError, match=message):
        load_command("studies/exactness").main(["--output_dir", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()
