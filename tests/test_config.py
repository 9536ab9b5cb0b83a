import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.settings import CFGConfig

SCRIPT = Path(__file__).parents[2] / "training" / "train_cfg.py"


def test_defaults_are_the_digits_where_no_data_is_named():
    config = parse_config(CFGConfig, [])
    assert (config.resolution, config.block_out_channels) == (8, [32, 64])
    assert parse_config(CFGConfig, ["--train_batch_size", "32"]).train_batch_size == 32
    assert parse_config(CFGConfig, ["--dataset_name", "someone/something"]).resolution == 64


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "dataset_name: someone/something\nlearning_rate: 3e-4\nrandom_flip: true\nblock_out_channels: [8, 16]\n"
    )
    config = parse_config(CFGConfig, ["--config", str(path), "--learning_rate", "0.5"])
    assert (config.dataset_name, config.learning_rate) == ("someone/something", 0.5)
    assert (config.random_flip, config.block_out_channels) == (True, [8, 16])
    # YAML 1.1 takes 3e-4 for a string
    assert parse_config(CFGConfig, ["--config", str(path)]).learning_rate == 3e-4


def test_saved_settings_are_read_back(tmp_path):
    config = parse_config(CFGConfig, ["--resolution", "16", "--no_use_ema", "--validation_guidance_scales", "0", "2.5"])
    config.save(tmp_path / "train_config.yaml")
    assert CFGConfig.load(tmp_path / "train_config.yaml") == config
    assert parse_config(CFGConfig, ["--config", str(tmp_path / "train_config.yaml")]) == config


def test_a_file_for_the_network_may_lie_beside_the_settings(tmp_path, monkeypatch):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "network.json").write_text("{}")
    (tmp_path / "recipe" / "run.yaml").write_text("dataset_name: a\nmodel_config_name_or_path: network.json\n")
    monkeypatch.chdir(tmp_path)
    config = parse_config(CFGConfig, ["--config", "recipe/run.yaml"])
    assert config.model_config_name_or_path == str(tmp_path / "recipe" / "network.json")
    config.save(tmp_path / "train_config.yaml")
    monkeypatch.chdir("/")
    assert parse_config(CFGConfig, ["--config", str(tmp_path / "train_config.yaml")]) == config

    (tmp_path / "run.yaml").write_text("dataset_name: a\nmodel_config_name_or_path: someone/something\n")
    assert parse_config(CFGConfig, ["--config", str(tmp_path / "run.yaml")]).model_config_name_or_path == "someone/something"


@pytest.mark.parametrize("source", ["model_config_name_or_path", "pretrained_model_name_or_path"])
def test_what_the_network_is_is_not_said_twice(tmp_path, source):
    path, network = tmp_path / "run.yaml", [f"--{source}", "network"]
    for argv in (["--dropout", "0.0"], ["--dropout=0.0"], ["--layers-per-block", "1"]):
        name = argv[0].lstrip("-").split("=")[0].replace("-", "_")
        with pytest.raises(UserError, match=f"^{name}: the network is that of --{source} network. Leave"):
            parse_config(CFGConfig, [*network, *argv])
        path.write_text(f"{source}: network\n")
        with pytest.raises(UserError, match=f"^{name}: the network"):
            parse_config(CFGConfig, ["--config", str(path), *argv])
    path.write_text(f"{source}: network\ndropout: 0.1\nblock_out_channels: [8]\n")
    with pytest.raises(UserError, match="^block_out_channels, dropout: the network"):
        parse_config(CFGConfig, ["--config", str(path)])
    # A flag overrides the file of settings, with all that it says of the network
    path.write_text("dropout: 0.1\n")
    config = parse_config(CFGConfig, ["--config", str(path), *network])
    config.save(path)
    assert getattr(parse_config(CFGConfig, ["--config", str(path)]), source) == "network"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_settings_are_valid(path):
    assert isinstance(parse_config(CFGConfig, ["--config", str(path)]), CFGConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditioning_dropout_prob": 1.0}, r"conditioning_dropout_prob.*\[0, 1\).*1.0"),
        ({"conditioning_dropout_prob": -0.1}, "conditioning_dropout_prob.*-0.1"),
        ({"resolution": 20}, r"resolution 20 cannot be halved 3 times.*multiple of 8 \(such as 16\)"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"train_batch_size": 0}, "train_batch_size.*0"),
        ({"learning_rate": math.nan}, "learning_rate.*nan"),
        ({"learning_rate": 0.0}, "learning_rate.*0.0"),
        ({"max_train_steps": 0}, "max_train_steps.*0"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit.*0"),
        ({"validation_guidance_scales": [math.nan]}, "validation_guidance_scales.*nan"),
        ({"block_out_channels": 32}, "block_out_channels must be a list.*32"),
        ({"log_snr_min": 5.0, "log_snr_max": 0.0}, "log_snr_min=5.0"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "not both"),
        ({"streaming": True}, "--streaming needs a data set.*--train_data_dir"),
        ({"streaming": True, "dataset_name": "a", "eval_steps": 5}, r"--eval_steps.*evaluate_cfg\.py"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1"),
        ({"cache_latents": True}, "--cache_latents needs an autoencoder.*--pretrained_vae_model_name_or_path"),
        (
            {"cache_latents": True, "streaming": True, "dataset_name": "a", "pretrained_vae_model_name_or_path": "b"},
            "--cache_latents keeps the whole data set.*--streaming",
        ),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        CFGConfig(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [("resolutoin: 3\n", "unknown settings.*resolutoin"), ("- 3\n", "holds a list"), (None, "does not exist")],
)
def test_wrong_files_are_named(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_config(CFGConfig, ["--config", str(path)])


@pytest.mark.parametrize("argv", [["--resoluton", "8"], ["--resolution", "big"], ["--lr_scheduler", "magic"], ["8"]])
def test_unknown_flags_and_values_end_the_program(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(argv)
    assert argv[-1] in capsys.readouterr().err


def test_one_decay_or_several():
    assert parse_config(CFGConfig, ["--ema_max_decay", "0.999"]).ema_max_decay == [0.999]
    assert parse_config(CFGConfig, ["--ema_max_decay", "0.999", "0.99"]).ema_max_decay == [0.999, 0.99]
    assert CFGConfig(ema_max_decay=0.9).ema_max_decay == [0.9]  # as one writes it in a file
    for wrong in ([], [1.0], [0.9, 0.9]):
        with pytest.raises(UserError, match="ema_max_decay must be"):
            CFGConfig(ema_max_decay=wrong)


def test_the_command_line_is_frozen():
    """Flags that others have in their scripts. One may be added; renaming or removing one breaks a user."""
    flags = {field.name for field in dataclasses.fields(CFGConfig)}
    assert flags >= {
        "dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column", "cache_dir",
        "resolution", "center_crop", "random_flip", "model_config_name_or_path", "prediction_type", "output_dir",
        "overwrite_output_dir", "seed", "train_batch_size", "num_train_epochs", "max_train_steps",
        "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "lr_scheduler", "lr_warmup_steps",
        "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "use_ema", "ema_max_decay",
        "ema_inv_gamma", "ema_power", "mixed_precision", "allow_tf32", "report_to", "logging_dir",
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "dataloader_num_workers",
        "enable_xformers_memory_efficient_attention", "validation_steps", "conditioning_dropout_prob", "dry_run",
        "ddp_timeout", "streaming", "shuffle_buffer_size", "cache_latents",
    }  # fmt: skip


@pytest.mark.slow
def test_help_and_errors_come_before_torch():
    """What takes seconds to import is not imported. (A bound on the seconds would measure the machine.)"""
    probe = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); from config import parse_config\n"
        "try:\n    parse_config(CFGConfig, [{flag}])\n"
        "except (ValueError, SystemExit) as end:\n    print(repr(end))\n"
        "print({{'torch', 'diffusers', 'accelerate', 'datasets'}} & set(sys.modules))"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": ""}
    for flag, said in (("'--help'", "--conditioning_dropout_prob"), ("'--train_batch_size', '0'", "train_batch_size")):
        script = probe.format(flag=flag)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert said in result.stdout
        assert result.stdout.endswith("set()\n"), result.stdout

    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    assert "--conditioning_dropout_prob" in result.stdout
