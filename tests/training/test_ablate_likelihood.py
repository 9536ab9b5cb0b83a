"""Test the ablation of variational diffusion models: its settings, refused flags, and a tiny run."""

import json
from functools import partial

import pytest

from diffusers_cfg.config import parse_config, read_yaml
from diffusers_cfg.evaluation import features
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.method_settings import CFGConfig, VDMConfig
from tests.support.commands import check_refused, load_command
from tests.support.runs import SETTINGS, SMALLEST, reset_accelerate

ablate_likelihood = load_command("studies/ablate_likelihood")


@pytest.fixture
def argv(tmp_path) -> list[str]:
    flags = ["--output_dir", str(tmp_path / "out"), "--num_samples", "20", "--num_images", "20"]
    return [*flags, "--times_per_image", "2", *SETTINGS, *SMALLEST]


def configs_of(argv: list[str]) -> dict[str, CFGConfig]:
    """Return the training settings of each run by its folder."""
    args, train_argv = ablate_likelihood.parse_args(argv)
    runs = ablate_likelihood.configs_of(args, parse_config(VDMConfig, train_argv))
    return {config.output_dir.removeprefix(args.output_dir): config for _, config in runs}


def test_variants_differ_in_one_setting(argv, tmp_path):
    configs = configs_of([*argv, "--learning_rate", "3e-4"])
    assert [*configs] == [f"/seed=0/{variant}" for variant in ablate_likelihood.VARIANTS]
    learned = configs["/seed=0/learned"].public()
    for folder, config in configs.items():
        if not folder.endswith("train_cfg"):
            changed = {name for name, value in config.public().items() if value != learned[name]} - {"output_dir"}
            assert changed == ablate_likelihood.VARIANTS[folder.split("/")[-1]].keys(), folder
    cfg = configs["/seed=0/train_cfg"]
    assert type(cfg) is CFGConfig
    assert cfg.model_config_name_or_path == str(tmp_path / "out" / "network")
    shared = {name for name, value in cfg.public().items() if learned.get(name) == value}
    assert {"learning_rate", "adam_beta2", "prediction_type", "train_val_split", "max_train_steps"} <= shared
    assert (cfg.log_snr_max, cfg.num_inference_steps) == (20.0, CFGConfig().num_inference_steps)


def test_started_runs_are_resumed(argv, tmp_path):
    (tmp_path / "out" / "seed=2" / "fixed" / "checkpoint-2").mkdir(parents=True)
    configs = configs_of([*argv, "--variants", "fixed", "learned", "--seeds", "1", "2"])
    resumed = {folder: config.resume_from_checkpoint for folder, config in configs.items()}
    assert resumed == {
        "/seed=1/fixed": None,
        "/seed=2/fixed": "latest",
        "/seed=1/learned": None,
        "/seed=2/learned": None,
    }
    assert [config.seed for config in configs.values()] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants", "learned", "wrong"], "--variants wrong: unknown. Choose from learned, linear, fixed"),
        (["--variants", "fixed", "fixed"], "--variants must not repeat a value"),
        (["--seeds", "0", "0"], r"--seeds must not repeat a value: \[0, 0\]"),
        (["--seeds", "-1"], "seed must lie in"),
        (["--noise_schedule", "fixed"], "--noise_schedule is not a flag of this command. Pass --variants"),
        (["--loss_weighting=simple"], "--loss_weighting is not a flag of this command"),
        (["--seed", "1"], "--seed is not a flag of this command. Pass --seeds"),
        (["--dry_run=true"], "--dry_run is not a flag of this command"),
        (["--push_to_hub", "--hub_token", "hf_secret"], "--push_to_hub is not a flag of this command"),
        (["--resume_from_checkpoint", "latest"], "Runs are resumed automatically"),
        (["--train_val_split", "0"], "--train_val_split is 0, but likelihoods are compared on held-out images"),
        (["--diffusion_steps", "10"], "--loss_weighting sigmoid is defined in continuous time"),
        (["--times_per_image", "0"], "times_per_image must"),
        (["--num_images", "0"], "num_images must"),
        (["--num_samples", "16"], r"num_samples must lie in \[20, 100000000\], but is 16"),
        (["--guidance_scales", "1e300"], "guidance_scale must be finite"),
        (["--conditioning_dropout_prob", "0"], r"--guidance_scales \[1.0\] need a null class"),
        (["--output_dir", "/dev/null"], "/dev/null is not one. Pass a folder"),
    ],
)
def test_invalid_flags_raise_before_the_first_run(argv, tmp_path, monkeypatch, flags, message):
    check_refused(ablate_likelihood.main, [*argv, *flags], message, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ablation_trains_what_is_missing_and_writes_the_tables(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    # The quick classifier must not enter the user's cache.
    config_class = partial(EvaluationConfig, statistics_dir=tmp_path / "cache")
    monkeypatch.setitem(ablate_likelihood.main.__globals__, "EvaluationConfig", config_class)
    monkeypatch.setitem(ablate_likelihood.main.__globals__, "SAMPLERS", {"DDIMScheduler": 2, "LogSNRScheduler": 2})
    out, calls = tmp_path / "out", []
    monkeypatch.setattr("diffusers_cfg.methods.vdm.minimise_variance", lambda *_: calls.append(1))
    reset_accelerate()
    ablate_likelihood.main([*argv, "--variants", "by_the_bound"])
    assert calls == []
    runs = {variant: out / "seed=0" / variant for variant in ("learned", "by_the_bound", "train_cfg")}
    finished, before = runs["by_the_bound"] / "run.json", (runs["by_the_bound"] / "run.json").stat().st_mtime_ns
    assert not (out / "quality.md").exists()  # its samples are not compared
    ablate_likelihood.main([*argv, "--variants", *runs])
    assert finished.stat().st_mtime_ns == before
    assert len(calls) == 4  # in each step of the variant learned
    text = (out / "table.md").read_text()
    end = f"The tables, the figure and the models are in {out}.\n"
    assert capsys.readouterr().out.endswith(f"{text}\n{(out / 'quality.md').read_text()}\n{end}")
    models = json.loads((out / "ablation.json").read_text())["models"]
    assert [model["variant"] for model in models] == [*runs, "train_cfg, own process"]
    assert [(round(model["gamma_0"], 1), round(model["gamma_1"], 1)) for model in models[2:]] == [(-13.3, 5), (-20, 20)]
    for model in models:
        bounds = {name: bound["mean"] for name, bound in model["bits_per_dim"].items()}
        parts = bounds["prior"] + bounds["reconstruction"] + bounds["diffusion"]
        assert parts == pytest.approx(bounds["conditional"], rel=1e-6)
        assert f"| {model['variant']} | 1 | {bounds['conditional']:.3f} ± " in text
    assert {name: len(results) for name, results in models[0]["samples"].items()} == {
        "DDIMScheduler, 2 steps": 2,
        "LogSNRScheduler, 2 steps": 2,
    }
    assert models[1]["samples"] == models[3]["samples"] == {}
    assert (out / "bits_per_dim.png").is_file()
    network = json.loads((runs["train_cfg"] / "unet" / "config.json").read_text())
    assert len(network["fourier_frequencies"]) == 6  # the network of the others
    assert read_yaml(runs["train_cfg"] / "train_config.yaml", CFGConfig)["adam_beta2"] == 0.99
