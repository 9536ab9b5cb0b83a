"""Turn flags and YAML files into frozen dataclasses, and check every setting in one place.

Nothing heavy is imported here, so that `--help` and a wrong flag are answered before torch is loaded.
"""

import dataclasses
import inspect
import math
import os
import sys
import types
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "diffusers-cfg"


class CommandError(Exception):
    """Ends a command with its text on stderr and with `exit_code`."""

    exit_code = 1


class UserError(CommandError, ValueError):
    """Something that the user asked for cannot be done. The message names the value and what to do."""


def flag(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """
    Declare a setting, which is a flag on the command line and a name in a YAML file.

    Args:
        default: its default; without one the flag is required.
        help (`str`): its help text.
        at_least, at_most, above, below: bounds on the value, or on each element of a list.
        length (`int`): number of elements of a list.
        scalar (`bool`): whether one value may stand for a list of one.
        secret (`bool`): whether the value is left out of everything that is written down.
        relative (`bool`): whether the value may be a path relative to the YAML file that holds it.
        on_resume (`str`): what a resumed run may do with it, see `fixed`, `recorded` and `free`.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not metadata.get("secret", False))


def fixed(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declare a setting whose change is refused when a run is resumed."""
    return flag(default, help, on_resume="fixed", **metadata)


def recorded(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declare a setting whose change is logged and kept in the run's history when a run is resumed."""
    return flag(default, help, on_resume="recorded", **metadata)


def free(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declare a setting that changes no weights, so that a resumed run may change it."""
    return flag(default, help, on_resume="free", **metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """
    The settings of a command. A subclass declares them by `flag`, `fixed`, `recorded` or `free`.

    Attributes:
        description (`str`): the first line of `--help`.
        group (`str`): the heading of the class's own flags there.

    Raises:
        UserError: a value has the wrong type, is out of range or is not one of the choices.
    """

    description: ClassVar[str] = ""
    group: ClassVar[str] = "settings"

    def __post_init__(self) -> None:
        annotations = get_type_hints(type(self))
        for setting in fields(self):
            value = convert(setting.name, getattr(self, setting.name), annotations[setting.name], setting.metadata)
            check_range(setting.name, value, setting.metadata)
            object.__setattr__(self, setting.name, value)
        self.check()

    def check(self) -> None:
        """Check the settings against each other. Raises UserError."""

    @classmethod
    def underlying(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return defaults that depend on the other settings. They rank below the YAML file's and the flags."""
        return {}

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Check which settings were given at all, as flags or in the YAML file. Raises UserError."""

    def public(self) -> dict[str, Any]:
        """Return the settings by name, without secrets."""
        secrets = {setting.name for setting in fields(self) if setting.metadata.get("secret")}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in secrets}

    def save(self, path: Path) -> None:
        """Write the settings as YAML, for `--config`."""
        path.write_text(yaml.safe_dump(self.public(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**read_yaml(path, cls))


BOOLEANS = {"true": True, "false": False, "yes": True, "no": False}


def convert(name: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """
    Return a value as its annotation has it: "3e-4" (a string in YAML 1.1) as a float, 10.0 as an int.

    Raises:
        UserError: it cannot be, or it is not one of the choices.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else convert(name, value, kind, metadata)
    if origin is Literal:
        if value is False and "no" in arguments:  # which YAML makes of it
            value = "no"
        if value not in arguments:
            raise UserError(f"{name} must be one of {', '.join(map(repr, arguments))}, but is {value!r}.")
        return value
    if origin is list:
        if metadata.get("scalar") and isinstance(value, (int, float, str)):
            value = [value]
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{name} must be a list with at least one element, but is {value!r}.")
        return [convert(name, element, arguments[0], metadata) for element in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if annotation is str and isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
        if annotation is bool and (isinstance(value, bool) or str(value).lower() in BOOLEANS):
            return value if isinstance(value, bool) else BOOLEANS[str(value).lower()]
        if annotation is float and (number or isinstance(value, str)):
            return float(value)
        if annotation is int and (number or isinstance(value, str)) and float(value).is_integer():
            return int(value)
    except (ValueError, OverflowError):
        pass
    kind = {str: "text", bool: "true or false", float: "a number", int: "a whole number"}[annotation]
    raise UserError(f"{name} must be {kind}, but is {value!r}.")


def check_range(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise UserError if a number, or an element of a list, is not finite or outside its bounds."""
    values = value if isinstance(value, list) else [value]
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    at_least, at_most = metadata.get("at_least", -math.inf), metadata.get("at_most", math.inf)
    above, below = metadata.get("above", -math.inf), metadata.get("below", math.inf)
    within = all(
        math.isfinite(v) and at_least <= v <= at_most and (above < v or above == -math.inf) and (v < below)
        for v in numbers
    )
    if not within:
        raise UserError(f"{name} must {range_text(metadata)}, but is {value}.")
    if metadata.get("length", len(values)) != len(values) and value is not None:
        raise UserError(f"{name} must have {metadata['length']} values, but has {len(values)}: {value}.")


def range_text(metadata: Mapping[str, Any]) -> str:
    """Return the bounds of a setting in words."""
    bounds = {name: metadata[name] for name in ("at_least", "above", "below", "at_most") if name in metadata}
    match bounds:
        case {"at_least": low, "below": high}:
            return f"lie in [{low}, {high})"
        case {"at_least": low, "at_most": high}:
            return f"lie in [{low}, {high}]"
        case {"at_least": low}:
            return f"be at least {low}"
        case {"above": 0}:
            return "be a positive number"
    return "be finite"


def read_yaml(path: Path, cls: type[Config]) -> dict[str, Any]:
    """
    Read the settings in a YAML file, by name.

    Raises:
        UserError: the file is missing, is not YAML, holds something else, or names an unknown setting.
    """
    if not path.is_file():
        raise UserError(f"--config {path} does not exist.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold settings as `name: value`, but holds a {type(settings).__name__}.")
    known = {setting.name: setting for setting in fields(cls)}
    unknown = sorted(str(name) for name in settings if name not in known)
    if unknown:
        raise UserError(f"{path} has unknown settings {unknown}; --help lists those that exist.")
    for name, value in settings.items():
        if known[name].metadata.get("relative") and value is not None and (path.parent / str(value)).exists():
            settings[name] = str((path.parent / str(value)).resolve())
    return settings


def is_required(setting: dataclasses.Field) -> bool:
    """Return whether a setting has no default."""
    return setting.default is MISSING and setting.default_factory is MISSING


C = TypeVar("C", bound=Config)


def make_parser(cls: type[Config]) -> ArgumentParser:
    """Return a parser with a flag for each setting, in groups by the class that declares it."""
    # From its module: importing it from `transformers` itself would take half a second longer.
    from transformers.hf_argparser import HfArgumentParser

    annotations, groups = get_type_hints(cls), []
    for base in reversed(cls.__mro__[: cls.__mro__.index(Config)]):
        own = [setting for setting in fields(cls) if setting.name in inspect.get_annotations(base)]
        # The parser passes a field's metadata on to argparse, which knows the help text only. What is required is
        # checked later, as the YAML file may have it.
        declared = [
            (
                setting.name,
                annotations[setting.name],
                field(
                    default=None if is_required(setting) else setting.default,
                    default_factory=setting.default_factory,
                    metadata={"help": setting.metadata["help"]},
                ),
            )
            for setting in own
        ]
        if declared:
            group = dataclasses.make_dataclass(base.__name__, declared, kw_only=True)
            group._argument_group_name = base.group
            groups.append(group)
    parser = HfArgumentParser(
        groups, description=cls.description, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        default=SUPPRESS,
        help="A YAML file of settings, by the names of these flags; flags override it.",
    )
    return parser


def parse_config(cls: type[C], argv: list[str] | None = None) -> C:
    """
    Return the settings of a command. Flags override the file of `--config`, which overrides the defaults.

    Args:
        cls (`type`): the dataclass of the command's settings.
        argv (`list[str]`, *optional*): the arguments; by default those of the process.

    Raises:
        UserError: a value is wrong. (For an unknown flag, argparse ends the process with its usage.)
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(cls)
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    in_file = read_yaml(Path(path), cls) if path else {}
    parser.set_defaults(**in_file)
    values = vars(parser.parse_args(argv))
    required = [setting.name for setting in fields(cls) if is_required(setting)]
    if missing := [f"--{name}" for name in required if values[name] is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if underlying := cls.underlying(values):
        parser.set_defaults(**{**underlying, **in_file})
        values = vars(parser.parse_args(argv))
    values.pop("config", None)
    flags = {arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    cls.check_given(values, flags, set(in_file))
    return cls(**values)


def run_command(main: Callable[[], None]) -> None:
    """Run the main function of a command. A `CommandError` becomes one line on stderr, with its exit code."""
    try:
        main()
    except CommandError as error:
        prefix = f"{Path(sys.argv[0]).name}: error: " if error.exit_code == 1 else ""
        print(f"{prefix}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
