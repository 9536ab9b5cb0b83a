"""Test that flags and YAML files become settings, and that errors name the wrong value."""

import dataclasses
import math
from typing import Any, Literal

import pytest

from diffusers_cfg.config import Config, UserError, flag, parse_config
from diffusers_cfg.settings import CFGConfig
from tests.support.runs import TRAINING


def test_digits_are_the_default_dataset():
    config = parse_config(CFGConfig, [])
    assert (config.resolution, config.block_out_channels) == (8, [32, 64])
    assert parse_config(CFGConfig, ["--train_batch_size", "32"]).train_batch_size == 32
    assert parse_config(CFGConfig, ["--dataset_name", "someone/something"]).resolution == 64


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "dataset_name: someone/something\nlearning_rate: 3e-4\nrandom_flip: true\nblock_out_channels: [8, 16]\n"
    )
    config = parse_config(CFGConfig, ["--config", str(path), "--learning_rate", "0.5"])
    assert (config.dataset_name, config.learning_rate) == ("someone/something", 0.5)
    assert (config.random_flip, config.block_out_channels) == (True, [8, 16])
    # In YAML 1.1, 3e-4 is a string.
    assert parse_config(CFGConfig, ["--config", str(path)]).learning_rate == 3e-4


def test_saved_settings_load(tmp_path):
    config = parse_config(CFGConfig, ["--resolution", "16", "--no_use_ema", "--validation_guidance_scales", "0", "2.5"])
    config.save(tmp_path / "train_config.yaml")
    assert CFGConfig.load(tmp_path / "train_config.yaml") == config
    assert parse_config(CFGConfig, ["--config", str(tmp_path / "train_config.yaml")]) == config


def test_network_config_path_is_relative_to_the_settings_file(tmp_path, monkeypatch):
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
    assert (
        parse_config(CFGConfig, ["--config", str(tmp_path / "run.yaml")]).model_config_name_or_path
        == "someone/something"
    )


@pytest.mark.parametrize("source", ["model_config_name_or_path", "pretrained_model_name_or_path"])
def test_network_settings_conflict_with_a_pretrained_network(tmp_path, source):
    path, network = tmp_path / "run.yaml", [f"--{source}", "network"]
    for argv in (["--dropout", "0.0"], ["--dropout=0.0"], ["--layers-per-block", "1"]):
        name = argv[0].lstrip("-").split("=")[0].replace("-", "_")
        with pytest.raises(UserError, match=f"^{name}: the network comes from --{source} network. Leave"):
            parse_config(CFGConfig, [*network, *argv])
        path.write_text(f"{source}: network\n")
        with pytest.raises(UserError, match=f"^{name}: the network"):
            parse_config(CFGConfig, ["--config", str(path), *argv])
    path.write_text(f"{source}: network\ndropout: 0.1\nblock_out_channels: [8]\n")
    with pytest.raises(UserError, match="^block_out_channels, dropout: the network"):
        parse_config(CFGConfig, ["--config", str(path)])
    # A pretrained network passed as a flag overrides all network settings in the file.
    path.write_text("dropout: 0.1\n")
    config = parse_config(CFGConfig, ["--config", str(path), *network])
    config.save(path)
    assert getattr(parse_config(CFGConfig, ["--config", str(path)]), source) == "network"


@pytest.mark.parametrize("path", sorted((TRAINING / "configs").glob("*.yaml")), ids=lambda path: path.name)
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
        ({"streaming": True}, "--streaming needs a dataset.*--train_data_dir"),
        ({"streaming": True, "dataset_name": "a", "eval_steps": 5}, r"--eval_steps.*evaluate_cfg\.py"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1"),
        ({"num_eval_samples": 19}, "num_eval_samples must be at least 20"),
        ({"logging_dir": ".."}, r"logging_dir must be the name of a folder in --output_dir, but is '\.\.'"),
        ({"logging_dir": "*"}, "logging_dir must be the name of a folder"),
        ({"logging_dir": "/tmp/logs"}, "logging_dir must be the name of a folder"),
        ({"logging_dir": "a/b"}, "logging_dir must be the name of a folder"),
        ({"logging_dir": ""}, "logging_dir must not be empty. Leave out --logging_dir, or pass a value"),
        ({"seed": 2**70}, "seed must lie in"),
        ({"block_out_channels": [0]}, "block_out_channels must be at least 1"),
        ({"max_unreadable_fraction": 7}, r"max_unreadable_fraction must lie in \[0, 1\]"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of 'no', 'fp16', 'bf16', but is 'fp8'"),
        ({"cache_latents": True}, "--cache_latents needs an autoencoder.*--pretrained_vae_model_name_or_path"),
        (
            {"cache_latents": True, "streaming": True, "dataset_name": "a", "pretrained_vae_model_name_or_path": "b"},
            "--cache_latents caches the whole dataset.*--streaming",
        ),
    ],
)
def test_wrong_settings_raise(settings, message):
    with pytest.raises(UserError, match=message):
        CFGConfig(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [("resolutoin: 3\n", "unknown settings.*resolutoin"), ("- 3\n", "contains a list"), (None, "does not exist")],
)
def test_wrong_files_raise(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_config(CFGConfig, ["--config", str(path)])


@pytest.mark.parametrize("argv", [["--resoluton", "8"], ["--resolution", "big"], ["--lr_scheduler", "magic"], ["8"]])
def test_unknown_flags_and_values_exit_with_usage(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(CFGConfig, argv)
    assert argv[-1] in capsys.readouterr().err


def test_ema_max_decay_accepts_one_value_or_several():
    assert parse_config(CFGConfig, ["--ema_max_decay", "0.999"]).ema_max_decay == [0.999]
    assert parse_config(CFGConfig, ["--ema_max_decay", "0.999", "0.99"]).ema_max_decay == [0.999, 0.99]
    in_file: dict[str, Any] = {"ema_max_decay": 0.9}
    assert CFGConfig(**in_file).ema_max_decay == [0.9]
    for wrong in ([], [1.0], [0.9, 0.9]):
        with pytest.raises(UserError, match="ema_max_decay must "):
            CFGConfig(ema_max_decay=wrong)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Config):
    """Settings of every type."""

    number: int = flag(1, "A number.", at_least=0)
    share: float = flag(0.5, "A share.", above=0, below=1)
    yes: bool = flag(False, "A choice of two.")
    choice: Literal["a", "b"] = flag("a", "A choice.")
    text: str | None = flag(None, "A text.")
    pair: list[float] | None = flag(None, "A pair.", length=2)
    secret: str | None = flag(None, "A token.", secret=True)
    required: str = flag(help="A required text.")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"number": 4.0}, 4),
        ({"number": "4"}, 4),
        ({"share": "3e-1"}, 0.3),
        ({"yes": "false"}, False),
        ({"yes": "no"}, False),
        ({"pair": ["1e-1", 2]}, [0.1, 2.0]),
        ({"text": None}, None),
    ],
)
def test_values_are_converted_to_the_annotated_type(values, expected):
    ((name, _),) = values.items()
    value = getattr(Toy(required="x", **values), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": 1.5}, "number must be an integer, but is 1.5"),
        ({"number": True}, "number must be an integer, but is True"),
        ({"number": "four"}, "number must be an integer, but is 'four'"),
        ({"number": None}, "number must be an integer, but is None"),
        ({"number": -1}, "number must be at least 0, but is -1"),
        ({"share": "much"}, "share must be a number, but is 'much'"),
        ({"share": [0.5]}, r"share must be a number, but is \[0.5\]"),
        ({"share": math.inf}, "share must .*, but is inf"),
        ({"share": 0.0}, "share must .*, but is 0.0"),
        ({"yes": "perhaps"}, "yes must be true or false, but is 'perhaps'"),
        ({"yes": 3}, "yes must be true or false, but is 3"),
        ({"choice": "c"}, "choice must be one of 'a', 'b', but is 'c'"),
        ({"text": 123}, "text must be a string, but is 123"),
        ({"pair": [1.0]}, r"pair must have 2 values, but has 1: \[1.0\]"),
        ({"pair": []}, r"pair must be a list with at least one element, but is \[\]"),
        ({"pair": 1.0}, "pair must be a list with at least one element, but is 1.0"),
        ({"required": None}, "required must be a string, but is None"),
    ],
)
def test_values_of_a_wrong_type_raise(values, message):
    with pytest.raises(UserError, match=message):
        Toy(**{"required": "x", **values})


def test_unquoted_no_in_yaml_is_mixed_precision_no(tmp_path):
    (tmp_path / "run.yaml").write_text("mixed_precision: no\n")
    assert parse_config(CFGConfig, ["--config", str(tmp_path / "run.yaml")]).mixed_precision == "no"


def test_settings_are_immutable():
    config = parse_config(Toy, ["--required", "x"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.number = 3


def test_required_setting_may_come_from_the_file(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(Toy, ["--number", "3"])
    assert "the following arguments are required: --required" in capsys.readouterr().err
    (tmp_path / "toy.yaml").write_text("required: x\n")
    assert parse_config(Toy, ["--config", str(tmp_path / "toy.yaml")]).required == "x"


def test_secrets_are_not_saved(tmp_path):
    config = Toy(required="x", secret="hf_secret")
    config.save(tmp_path / "toy.yaml")
    assert "hf_secret" not in (tmp_path / "toy.yaml").read_text() + repr(config) + str(config.public())


@pytest.mark.parametrize(
    "text", ["a: [1\n", "\tnumber: 1\n", "number: 1\n---\nnumber: 2\n", "!!python/object:os.system {}\n"]
)
def test_file_that_is_not_yaml_raises(tmp_path, text):
    (tmp_path / "toy.yaml").write_text(text)
    with pytest.raises(UserError, match=r"toy.yaml is not valid YAML: "):
        parse_config(Toy, ["--config", str(tmp_path / "toy.yaml")])


def test_binary_file_raises(tmp_path):
    (tmp_path / "toy.yaml").write_bytes(b"\xff\xfe\x00n")
    with pytest.raises(UserError, match=r"toy.yaml is not valid YAML: "):
        parse_config(Toy, ["--config", str(tmp_path / "toy.yaml")])
