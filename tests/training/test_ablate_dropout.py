"""Test the ablation of p_uncond: it trains and evaluates missing models, and writes the table."""

import json
import re
import shutil
from functools import partial

import pytest

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError, read_yaml
from diffusers_cfg.evaluation import features
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.method_settings import CFGConfig
from tests.support.commands import check_refused, load_command
from tests.support.runs import TINY, reset_accelerate

ablate_dropout = load_command("studies/ablate_dropout")


@pytest.fixture
def argv(tmp_path) -> list[str]:
    flags = ["--output_dir", str(tmp_path / "out"), "--num_samples", "20", "--num_inference_steps", "2"]
    return [*flags, "--conditioning_dropout_probs", "0.1", "0.5", "--guidance_scales", "0", "1", *TINY]


def test_settings_of_training_and_evaluation(argv, tmp_path):
    args, train_argv = ablate_dropout.parse_args(argv)
    train_config, evaluation_config = ablate_dropout.configs_of(0.1, args, train_argv)
    assert (train_config.conditioning_dropout_prob, train_config.max_train_steps) == (0.1, 4)
    assert train_config.num_inference_steps == CFGConfig().num_inference_steps  # the flag applies to the evaluation
    assert train_config.resume_from_checkpoint is None
    assert train_config.output_dir == evaluation_config.model == str(tmp_path / "out" / "p=0.1")
    assert (evaluation_config.num_samples, evaluation_config.num_inference_steps) == (20, 2)
    assert evaluation_config.scheduler == "UniPCMultistepScheduler"
    (tmp_path / "out" / "p=0.1" / "checkpoint-2").mkdir(parents=True)
    assert ablate_dropout.configs_of(0.1, args, train_argv)[0].resume_from_checkpoint == "latest"


def test_settings_are_checked_before_training(argv, tmp_path):
    with pytest.raises(UserError, match=r"conditioning_dropout_prob must lie in \[0, 1\), but is 1.5"):
        ablate_dropout.main([*argv, "--conditioning_dropout_probs", "0.1", "1.5"])
    with pytest.raises(UserError, match="learning_rate must be a positive number"):
        ablate_dropout.main([*argv, "--learning_rate", "0"])
    with pytest.raises(UserError, match=r"num_samples must lie in \[20, 100000000\], but is 16"):
        ablate_dropout.main([*argv, "--num_samples", "16"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--conditioning_dropout_probs", "2"], r"conditioning_dropout_prob must lie in \[0, 1\), but is 2.0"),
        (["--conditioning_dropout_probs", "nan"], r"conditioning_dropout_prob must lie in \[0, 1\), but is nan"),
        (["--conditioning_dropout_probs", "0.1", "0.1"], r"must not repeat a value: \[0.1, 0.1\]"),
        (["--conditioning_dropout_probs", "0.1", "0"], r"--guidance_scales \[1.0\] need a null class"),
        (["--conditioning_dropout_prob", "0.3"], "--conditioning_dropout_prob is not a flag of this command. Pass"),
        (["--push_to_hub", "--hub_token", "hf_secret"], "--push_to_hub is not a flag of this command"),
        (["--dry_run=true"], "--dry_run is not a flag of this command"),
        (["--resume_from_checkpoint", "latest"], "Runs are resumed automatically"),
        (["--overwrite_output_dir"], "--overwrite_output_dir is not a flag of this command"),
        (["--scheduler", "Nonsense"], "--scheduler Nonsense is not supported"),
        (["--scheduler", "DDIMScheduler", "--num_inference_steps", "3"], "DDIMScheduler cannot take 3 steps"),
        (["--num_inference_steps", "0"], r"num_inference_steps must lie in \[1, 100000\], but is 0"),
        (["--guidance_scales", "nan"], "guidance_scales must be finite"),
        (["--guidance_scales", "1e300"], "guidance_scale must be finite"),
        (["--output_dir", "/dev/null"], "/dev/null is not one. Pass a folder"),
        (["--block_out_channels", "0"], "block_out_channels"),
    ],
)
def test_invalid_flags_raise_before_the_first_run(argv, tmp_path, monkeypatch, flags, message):
    check_refused(ablate_dropout.main, [*argv, *flags], message, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_probabilities_that_print_alike_do_not_share_a_folder(argv):
    args, train_argv = ablate_dropout.parse_args(argv)
    folders = {ablate_dropout.configs_of(p, args, train_argv)[0].output_dir for p in (0.1234567, 0.1234568)}
    assert len(folders) == 2


@pytest.mark.slow
def test_ablation_skips_trained_models_and_writes_the_table(argv, trained_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    # The quick classifier must not enter the user's cache.
    config_class = partial(EvaluationConfig, statistics_dir=tmp_path / "cache")
    monkeypatch.setitem(ablate_dropout.main.__globals__, "EvaluationConfig", config_class)
    reset_accelerate()
    first = tmp_path / "out" / "p=0.2"
    shutil.copytree(trained_model, first)  # an existing model is not trained again
    before = (first / "run.json").stat().st_mtime_ns
    ablate_dropout.main([*argv, "--conditioning_dropout_probs", "0.2", "0.5"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.endswith(f"{table}\n")
    columns = [f"{name}, p = {p}" for name in ("Fréchet distance", "classifier score") for p in ("0.2", "0.5")]
    assert table.startswith(f"| w | {' | '.join(columns)} |\n")
    assert re.findall(r"^\| (\S+) \|", table, flags=re.MULTILINE) == ["w", "---", "0", "1", "real"]
    assert (tmp_path / "out" / "curves.png").is_file()
    assert (first / "run.json").stat().st_mtime_ns == before
    trained = read_yaml(tmp_path / "out" / "p=0.5" / "train_config.yaml", CFGConfig)
    assert (trained["conditioning_dropout_prob"], trained["max_train_steps"]) == (0.5, 4)
    for p in ("0.2", "0.5"):
        record = json.loads((tmp_path / "out" / f"p={p}" / "evaluation" / "metrics.json").read_text())
        assert [row["network_evaluations"] for row in record["results"]] == [2, 4]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert CFGPipeline.from_pretrained(tmp_path / "out" / "p=0.5").config.conditioning_dropout_prob == 0.5
