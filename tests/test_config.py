"""Test that flags and YAML files become settings, and that errors name the wrong value."""

import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest

from diffusers_cfg.config import Config, UserError, flag, parse_config, run_command
from diffusers_cfg.engine.preemption import Preempted
from diffusers_cfg.method_settings import CFGConfig, ClassifierConfig, DDGANConfig
from tests.support.runs import ROOT, TRAINING


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


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("overwrite_output_dir", ["--overwrite_output_dir"]),
        ("resume_from_checkpoint", ["--resume_from_checkpoint", "latest"]),
        ("dry_run", ["--dry_run"]),
    ],
)
def test_saved_settings_repeat_no_command(tmp_path, name, flags):
    """A run that starts from the file of another one neither deletes nor resumes anything unless it is told to."""
    config = parse_config(CFGConfig, ["--resolution", "16", *flags])
    config.save(tmp_path / "train_config.yaml")
    again = parse_config(CFGConfig, ["--config", str(tmp_path / "train_config.yaml")])
    assert not getattr(again, name)
    assert again == dataclasses.replace(config, **{name: getattr(CFGConfig(), name)})


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
    config_class, flags = CFGConfig, []
    if "num_timesteps:" in path.read_text(encoding="utf-8"):
        config_class = DDGANConfig
    elif path.stem.endswith("-classifier"):
        config_class, flags = ClassifierConfig, ["--pretrained_model_name_or_path", "mnist-model"]
    assert isinstance(parse_config(config_class, ["--config", str(path), *flags]), config_class)


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
        ({"tracker_project_name": "../a"}, "tracker_project_name must be the name of a folder"),
        ({"attention_resolutions": [-1]}, "attention_resolutions must be at least 0"),
        ({"log_snr_min": -100.0}, r"log_snr_min must lie in \[-60, 60\]"),
        ({"log_snr_max": 61.0}, r"log_snr_max must lie in \[-10, 60\]"),
        ({"log_snr_min": -60.0, "log_snr_max": -30.0}, r"log_snr_max must lie in \[-10, 60\]"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate:\n", "learning_rate must be a number, but is None"),
        ("learning_rate: [1]\n", r"learning_rate must be a number, but is \[1\]"),
        ("learning_rate: true\n", "learning_rate must be a number, but is True"),
        ("seed: 1.5\n", "seed must be an integer, but is 1.5"),
        ("max_train_steps: true\n", "max_train_steps must be an integer, but is True"),
        ("use_ema: 2\n", "use_ema must be true or false, but is 2"),
        ("lr_scheduler: cosin\n", "lr_scheduler must be one of 'constant', .*'cosin'"),
        ("prediction_type: eps\n", "prediction_type must be one of .*'eps'"),
        ("hub_strategy: every\n", "hub_strategy must be one of 'end', 'checkpoint', but is 'every'"),
        ("attention_resolutions: [eight]\n", "attention_resolutions must be an integer, but is 'eight'"),
        ("block_out_channels: []\n", "block_out_channels must be a list with at least one element"),
        ("block_out_channels: [[8]]\n", r"block_out_channels must be an integer, but is \[8\]"),
        ("validation_guidance_scales: []\n", "validation_guidance_scales must be a list with at least one"),
        ("train_data_dir: [a]\n", r"train_data_dir must be a string, but is \['a'\]"),
        ("license: 2020-01-01\n", "license must be a string, but is datetime.date"),
        ("logging_dir:\n", "logging_dir must be a string, but is None"),
        ("train_batch_size: 0\n", "train_batch_size must be at least 1, but is 0"),
        ("class_names: 10\n", "class_names must be a string, but is 10. Put it in quotes"),
        ("train_batch_size: .inf\n", "train_batch_size must be an integer, but is inf"),
        ("seed: 1\nuse_ema: true\nseed: 2\n", "contains seed more than once"),
        ("1: 2\nseed: 1\n", r"unknown settings: \['1'\]"),
    ],
)
def test_wrong_values_in_a_file_raise_and_name_the_file(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"run.yaml.*{message}"):
        parse_config(CFGConfig, ["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("attention_resolutions: ['8']\n", "attention_resolutions", [8]),
        ("validation_guidance_scales: [1e-1, 2]\n", "validation_guidance_scales", [0.1, 2.0]),
        ("max_train_steps: 10.0\n", "max_train_steps", 10),
        ("ema_max_decay: ['0.99']\n", "ema_max_decay", [0.99]),
        ("resolution: 16.0\n", "resolution", 16),
        ("", "seed", 0),
        ("\ufeffseed: 3\n", "seed", 3),
        ("output_dir: ~/model\n", "output_dir", "HOME/model"),
        ("train_data_dir: ~/data\n", "train_data_dir", "HOME/data"),
        ("output_dir: a~/model\n", "output_dir", "a~/model"),
    ],
)
def test_values_in_a_file_are_converted(tmp_path, monkeypatch, text, name, value):
    monkeypatch.setenv("HOME", "HOME")
    (tmp_path / "run.yaml").write_text(text)
    assert getattr(parse_config(CFGConfig, ["--config", str(tmp_path / "run.yaml")]), name) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no_use_ema", "--ema_power", "1"], "ema_power: no effect without --use_ema"),
        (["--no_use_ema", "--ema_max_decay=0.9"], "ema_max_decay: no effect without --use_ema"),
        (["--num_eval_samples", "100"], "num_eval_samples: no effect without --eval_steps. Leave it out, or set"),
        (["--feature_extractor", "small", "--eval_steps", "0"], "feature_extractor: no effect without --eval_steps"),
        (["--hub_model_id", "me/model"], "hub_model_id: no effect without --push_to_hub"),
        (["--hub_strategy", "checkpoint", "--hub_private_repo"], "hub_private_repo, hub_strategy: no effect"),
        (["--shuffle_buffer_size", "9"], "shuffle_buffer_size: no effect without --streaming"),
        (["--num_train_epochs", "3"], "num_train_epochs: no effect with max_train_steps 1500"),  # of the digits
        (["--num_train_epochs", "3", "--max_train_steps", "9"], "num_train_epochs: no effect with max_train_steps 9"),
        (["--pretrained_model_name_or_path", "m", "--log_snr_min", "-9"], "log_snr_min: the network comes from"),
        (["--pretrained_model_name_or_path", "m", "--prediction_type", "sample"], "prediction_type: the network comes"),
    ],
)
def test_flags_without_an_effect_raise(argv, message):
    with pytest.raises(UserError, match=message):
        parse_config(CFGConfig, argv)


@pytest.mark.parametrize(
    "argv", [[], ["--no_use_ema"], ["--pretrained_model_name_or_path", "m"], ["--model_config_name_or_path", "m"]]
)
def test_saved_settings_are_valid_and_complete(tmp_path, argv):
    """Settings that a model replaces are not saved, since they would be wrong."""
    config = parse_config(CFGConfig, argv)
    config.save(tmp_path / "run.yaml")
    assert parse_config(CFGConfig, ["--config", str(tmp_path / "run.yaml")]).public() == config.public()
    assert ("prediction_type" in config.public()) == ("--pretrained_model_name_or_path" not in argv)


def raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("seed is wrong."), 1, "command.py: error: seed is wrong."),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            1,
            "error: [Errno 28] No space left on device: 'a/b'",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "error: [Errno 13] Permission denied: 'a'"),
        (Preempted(), 85, "Stopped and saved."),
        (KeyboardInterrupt(), 130, "command.py: interrupted."),
    ],
)
def test_commands_end_with_one_line(monkeypatch, capsys, error, code, message):
    monkeypatch.setattr("sys.argv", ["training/command.py"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        run_command(raises(error))
    assert exit.value.code == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    # A second Ctrl-C ends the process at once.
    assert signal.getsignal(signal.SIGINT) == (signal.SIG_DFL if code == 130 else handler)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_commands_bound_the_spinning_of_threads_unless_the_user_sets_it(monkeypatch, variables, expected):
    before = {name: os.environ[name] for name in os.environ.keys() - {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    monkeypatch.setattr(os, "environ", before | variables)
    seen = {}
    run_command(lambda: seen.update(os.environ))
    assert seen == before | expected


CLOSED = """
import sys
from diffusers_cfg.config import run_command, say
run_command(lambda: {call}("a line\\n" * 100_000))
"""


@pytest.mark.parametrize(
    ("call", "output", "code"),
    [
        ("print", "| true", 141),
        ("say", "| true", 0),  # a result that is saved, whether its message is read or not
        ("print", ">&-", 0),
        ("say", ">&-", 0),
        ("say", "> /dev/full", 0),
        ("print", "> /dev/full", 1),
    ],
)
def test_closed_or_full_output(call, output, code):
    command = f"{sys.executable} -c '{CLOSED.format(call=call)}' {output}"
    script = f"set -o pipefail; {command}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.mark.parametrize("argv", [["--config=~/run.yaml"], ["--resume_from_checkpoint=~/run.yaml", "--seed", "7"]])
def test_home_folder_in_a_flag(tmp_path, monkeypatch, argv):
    """bash does not expand the ~ of `--flag=~/path`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("seed: 7\n")
    config = parse_config(CFGConfig, argv)
    assert config.seed == 7
    assert config.resume_from_checkpoint in (None, str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(("path", "message"), [("", "is not a file"), (".", "is not a file"), ("no", "does not exist")])
def test_config_that_is_no_file_raises(path, message):
    """An empty path comes from a variable that is not set."""
    with pytest.raises(UserError, match=f"--config .* {message}. Pass an existing YAML file"):
        parse_config(CFGConfig, ["--config", path])
