"""Parse flags and YAML files into frozen dataclasses, and validate every setting.

This module imports nothing heavy, so that `--help` and flag errors do not wait for torch.
"""

import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import types
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Self,
    TextIO,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

# As a shell reports processes that SIGINT (2) or SIGPIPE (13) has ended.
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 128 + 2, 128 + 13
CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "diffusers-cfg"


class CommandError(Exception):
    """An error that ends a command with its text on stderr and with `exit_code`."""

    exit_code = 1


class UserError(CommandError, ValueError):
    """An error in the user's input. The message names the value and says what to do."""


def flag(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """
    Declare a setting: a flag on the command line and a name in a YAML file.

    Args:
        default: the default; without one the flag is required.
        help (`str`): the help text.
        at_least, at_most, above, below: bounds on the value, or on each element of a list.
        length (`int`): number of elements of a list.
        scalar (`bool`): whether a single value is accepted instead of a list.
        secret (`bool`): whether the value is left out of saved settings and of `repr`.
        once (`bool`): whether the value is left out of saved settings, because it is meant for one command.
        relative (`bool`): whether the value may be a path relative to the YAML file that contains it.
        on_resume (`str`): how a resumed run treats a changed value, set by `fixed`, `recorded` and `free`.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not metadata.get("secret", False))


def fixed(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declare a setting that a resumed run cannot change."""
    return flag(default, help, on_resume="fixed", **metadata)


def recorded(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declare a setting that a resumed run may change. The change is logged and kept in the history of the run."""
    return flag(default, help, on_resume="recorded", **metadata)


def free(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declare a setting that a resumed run may change, because it does not affect the weights."""
    return flag(default, help, on_resume="free", **metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """
    The settings of a command. A subclass declares them with `flag`, `fixed`, `recorded` or `free`.

    Attributes:
        description (`str`): the first line of `--help`.
        group (`str`): the heading in `--help` of the flags that the class declares.

    Raises:
        UserError: if a value has the wrong type, is out of range or is not one of the choices.
    """

    description: ClassVar[str] = ""
    group: ClassVar[str] = "settings"

    def __post_init__(self) -> None:
        annotations = get_type_hints(type(self))
        for setting in fields(self):
            value = checked(setting, getattr(self, setting.name), annotations[setting.name])
            object.__setattr__(self, setting.name, value)
        self.check()

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return defaults that depend on other settings. The YAML file and the flags override them."""
        return {}

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Check combinations of the settings that were passed as flags or in the YAML file. Raise UserError."""

    def public(self) -> dict[str, Any]:
        """Return the settings by name, without secrets and without those of one command only."""
        left_out = {s.name for s in fields(self) if s.metadata.get("secret") or s.metadata.get("once")}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def save(self, path: Path) -> None:
        """Write the settings to a YAML file that `--config` accepts."""
        path.write_text(yaml.safe_dump(self.public(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings written by `save`."""
        return cls(**read_yaml(path, cls))


BOOLEANS = {"true": True, "false": False, "yes": True, "no": False}


def checked(setting: dataclasses.Field, value: Any, annotation: Any) -> Any:
    """Return the value of a setting, converted to its type. Raise UserError if the value is wrong."""
    value = convert(setting.name, value, annotation, setting.metadata)
    check_range(setting.name, value, setting.metadata)
    if value == "":
        raise UserError(f"{setting.name} must not be empty. Leave out --{setting.name}, or pass a value.")
    return value


def convert(name: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """
    Convert a value to the type of its annotation: "3e-4" (a string in YAML 1.1) to a float, 10.0 to an int.

    Raises:
        UserError: if the value has a different type or is not one of the choices.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else convert(name, value, kind, metadata)
    if origin is Literal:
        if value is False and "no" in arguments:  # YAML parses `no` as False.
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
            value = os.fspath(value)
            # A shell leaves the ~ of --output_dir=~/model to the command. A class may be called ~.
            return os.path.expanduser(value) if "/" in value else value
        if annotation is bool and (isinstance(value, bool) or str(value).lower() in BOOLEANS):
            return value if isinstance(value, bool) else BOOLEANS[str(value).lower()]
        if annotation is float and (number or isinstance(value, str)):
            return float(value)
        if annotation is int and (number or isinstance(value, str)) and float(value).is_integer():
            return int(value)
    except (ValueError, OverflowError):
        pass
    kind = {str: "a string", bool: "true or false", float: "a number", int: "an integer"}[annotation]
    shown = type(value).__name__ if metadata.get("secret") else repr(value)
    hint = " Put it in quotes." if annotation is str and number else ""
    raise UserError(f"{name} must be {kind}, but is {shown}.{hint}")


def check_range(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise UserError if a number, or an element of a list, is not finite or is out of bounds."""
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
    """Return the bounds of a setting as text."""
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


def read_yaml(path: Path, cls: type[Config], ignored: Collection[str] = ()) -> dict[str, Any]:
    """
    Return the settings in a YAML file by name.

    Args:
        path (`Path`): the file.
        cls (`type`): the dataclass of the settings.
        ignored (`Collection[str]`): names that the file may contain, and that are left out unless they are settings.

    Raises:
        UserError: if the file is missing, is not a YAML mapping, repeats a setting, or names an unknown setting or a
            wrong value.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"--config {path} {problem}. Pass an existing YAML file.")
    try:
        text = path.read_text(encoding="utf-8")
        settings, node = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {without_tokens(str(error))}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must contain settings as `name: value`, but contains a {type(settings).__name__}.")
    names = Counter(key.value for key, _ in node.value) if isinstance(node, yaml.MappingNode) else Counter()
    if repeated := [name for name, times in names.items() if times > 1]:
        raise UserError(f"{path} contains {', '.join(repeated)} more than once. Keep one value of each.")
    known, annotations = {setting.name: setting for setting in fields(cls)}, get_type_hints(cls)
    settings = {name: value for name, value in settings.items() if name in known or name not in ignored}
    unknown = sorted(str(name) for name in settings if name not in known)
    if unknown:
        raise UserError(f"{path} contains unknown settings: {unknown}. --help lists all settings.")
    for name, value in settings.items():
        if known[name].metadata.get("relative") and value is not None and (path.parent / str(value)).exists():
            settings[name] = value = str((path.parent / str(value)).resolve())
        try:
            settings[name] = checked(known[name], value, annotations[name])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return settings


def default_of(setting: dataclasses.Field) -> Any:
    """Return the default of a setting, or `MISSING`."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def parser_field(setting: dataclasses.Field) -> Any:
    """Return a field for the parser, with the default and the help text of a setting and without other metadata."""
    metadata = {"help": setting.metadata["help"]}
    if setting.default_factory is not MISSING:
        return field(default_factory=setting.default_factory, metadata=metadata)
    # A required setting gets a default, because the YAML file may contain it. `parse_config` checks it later.
    return field(default=None if setting.default is MISSING else setting.default, metadata=metadata)


def without_tokens(message: str) -> str:
    """Return a message with each Hub token in it cut off."""
    return re.sub(r"\bhf_\w+", "hf_…", message)


class CommandParser(ArgumentParser):
    """A parser whose errors contain no Hub token."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit."""
        super().error(without_tokens(message))


C = TypeVar("C", bound=Config)


def make_parser(cls: type[Config]) -> ArgumentParser:
    """Return a parser with a flag for each setting, grouped by the class that declares it."""
    # Imported from its own module, which is half a second faster than from `transformers`.
    from transformers.hf_argparser import HfArgumentParser

    annotations, groups, grouped = get_type_hints(cls), [], set()
    for base in reversed(cls.__mro__[: cls.__mro__.index(Config)]):
        # A setting that a subclass declares again, with another default, stays in its first group.
        own = [setting for setting in fields(cls) if setting.name in inspect.get_annotations(base).keys() - grouped]
        grouped |= {setting.name for setting in own}
        declared = [(setting.name, annotations[setting.name], parser_field(setting)) for setting in own]
        if declared:
            group = dataclasses.make_dataclass(base.__name__, declared, kw_only=True)
            group._argument_group_name = base.group
            groups.append(group)

    class Parser(CommandParser, HfArgumentParser):
        pass

    parser = Parser(
        groups, description=cls.description, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        default=SUPPRESS,
        help="YAML file of settings, named like these flags; flags override it.",
    )
    return parser


def parse_config(cls: type[C], argv: list[str] | None = None) -> C:
    """
    Parse the settings of a command. Flags override the file of `--config`, which overrides the defaults.

    Args:
        cls (`type`): the dataclass of the command's settings.
        argv (`list[str]`, *optional*): the arguments; defaults to `sys.argv[1:]`.

    Raises:
        UserError: if a value is wrong. For an unknown flag, argparse prints the usage and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(cls)
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    in_file = {} if path is None else read_yaml(Path(path).expanduser(), cls)
    parser.set_defaults(**in_file)
    values = vars(parser.parse_args(argv))
    required = [setting.name for setting in fields(cls) if default_of(setting) is MISSING]
    if missing := [f"--{name}" for name in required if values[name] is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if derived := cls.derived_defaults(values):
        parser.set_defaults(**{**derived, **in_file})
        values = vars(parser.parse_args(argv))
    values.pop("config", None)
    flags = {arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    # A file that a run has saved holds all settings, also those that nobody has given.
    defaults = {setting.name: default_of(setting) for setting in fields(cls)}
    changed = {name for name, value in in_file.items() if value != defaults[name]}
    cls.check_given(values, flags, changed)
    return cls(**values)


def bound_spinning() -> None:
    """Let waiting threads of GNU OpenMP sleep sooner, unless the user has set how they wait, before torch is loaded."""
    # By default they spin for milliseconds, and keep other processes from running. Child processes inherit the bound.
    if os.environ.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}):
        os.environ["GOMP_SPINCOUNT"] = "3000"


def run_command(main: Callable[[], None]) -> None:
    """
    Run the main function of a command, which loads torch. An error in its input, of the disk or of the network, or
    Ctrl-C, ends it with one line on stderr and an exit code. A second Ctrl-C ends it at once.
    """
    bound_spinning()
    command = Path(sys.argv[0]).name
    try:
        main()
        print(end="", flush=True)
    except CommandError as error:
        say(f"{command}: error: {error}" if error.exit_code == 1 else str(error), sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # The reader of the output, such as `head`, has seen enough.
        discard(sys.stdout)
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        say(f"{command}: error: {error}", sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        say(f"{command}: interrupted.", sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a text to a stream, by default stdout. A closed pipe, a closed terminal or a full disk is not an error."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        discard(stream or sys.stdout)


def discard(stream: TextIO) -> None:
    """Discard what a stream has buffered and will get, so that Python does not fail to write it at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
