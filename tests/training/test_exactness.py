"""The figures and tables of the exactness study, in small; the numbers have tests with the mixture."""

from accelerate import Accelerator

from diffusers_cfg.evaluation import exactness, features
from tests.support.commands import load_command


def test_the_figures_of_exactness(trained_model, tmp_path, monkeypatch):
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


def test_the_parts_are_put_together(tmp_path, monkeypatch, capsys):
    for name in ("mixture_figure", "convergence", "stochastic", "network_error", "rules"):
        monkeypatch.setattr(exactness, name, lambda *_, name=name, **settings: f"## {name} {settings or ''}".strip())
    main = load_command("studies/exactness").main
    main(["--output_dir", str(tmp_path / "a")])
    main(["--output_dir", str(tmp_path / "b"), "--model", "m", "--num_samples", "9"])
    without = "## mixture_figure\n\n## convergence\n\n## stochastic\n\n## network_error\n"
    assert (tmp_path / "a" / "tables.md").read_text() == without
    settings = {"model": "m", "guide_model": None, "guidance_scale": 2.0, "num_samples": 9}
    settings |= {"num_inference_steps": 20, "seed": 0}
    assert (tmp_path / "b" / "tables.md").read_text() == f"{without}\n## rules {settings}\n"
    assert "## stochastic" in capsys.readouterr().out
