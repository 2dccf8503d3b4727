"""One configuration for a training script: a frozen dataclass, filled from a TOML file and `--key value`.

    python -m Training.train_student --config Training/configs/student-brain-t1.toml --data DIR --steps 100

The command line wins over the file, the file over the defaults. Unknown keys, wrong types and missing values end in
one sentence that names the key, before anything is read. Only flat keys; every key's meaning stands in its dataclass
and in `--help`.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its name outside the standard library
    import tomli as tomllib

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A key or value that a script cannot use, as one sentence."""


def option(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """A dataclass field with a line of help; without default the user must give it."""
    return dataclasses.field(default=default, metadata={"help": help})


def load(
    cls: type[Config],
    argv: Sequence[str],
    description: str,
    under: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ignore: Callable[[str], bool] | None = None,
) -> Config:
    """The configuration from the command line, with `--config FILE.toml` under it.

    Args:
        cls: a frozen dataclass.
        argv: arguments without the program's name.
        description: printed by `--help`.
        under: from the keys that were given, values for keys that were not.
        ignore: keys of the file (not of the command line) that belong to another script.

    Raises:
        ConfigError: a key is unknown, missing or has the wrong type; the file is unreadable.
        SystemExit: `--help` was asked for.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{description.strip()}\n\n{help_text(cls)}")
        raise SystemExit(0)
    given = _read_arguments(argv)
    merged: dict[str, Any] = {}
    if "config" in given:
        found = read_toml(Path(given.pop("config")))
        merged.update({k: v for k, v in found.items() if not (ignore and ignore(k))})
    merged.update(given)
    return build(cls, {**under(merged), **merged} if under else merged)


def build(cls: type[Config], values: dict[str, Any]) -> Config:
    """A configuration from keys and values; text is turned into the field's type.

    Raises:
        ConfigError: see `load`.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"a key must be one of {', '.join(sorted(fields))}; got {unknown[0]!r}")
    hints = typing.get_type_hints(cls)
    converted = {key: _convert(key, value, hints[key]) for key, value in values.items()}
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in converted]
    if missing:
        raise ConfigError(f"{missing[0]} must be given ({fields[missing[0]].metadata.get('help', '')}), got nothing")
    try:
        return cls(**converted)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, for a checkpoint or a model card."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def help_text(cls: type) -> str:
    """One line a key: name, type, default, meaning."""
    hints = typing.get_type_hints(cls)
    lines = ["keys (in the TOML file as `key = value`, on the command line as `--key value`):"]
    for f in dataclasses.fields(cls):
        default = "required" if f.default is dataclasses.MISSING else f"default {f.default!r}"
        lines.append(f"  {f.name:<18} {_name(hints[f.name]):<16} {f.metadata.get('help', '')} ({default})")
    return "\n".join(lines)


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file.

    Raises:
        ConfigError: no such file, not TOML, or a table inside.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config must be a readable TOML file, got {path} ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config must be valid TOML, got {path} ({error})") from None
    tables = [k for k, v in values.items() if isinstance(v, dict)]
    if tables:
        raise ConfigError(f"config must hold plain keys only, got a table [{tables[0]}] in {path}")
    return values


def _read_arguments(argv: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or len(key) < 3:
            raise ConfigError(f"arguments must come as --key value, got {key!r}")
        name, equals, value = key[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name} must be followed by a value, got none")
            value = rest.pop(0)
        given[name.replace("-", "_")] = value
    return given


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("pathlib.", "")


def _convert(key: str, value: Any, hint: Any) -> Any:
    wrong = ConfigError(f"{key} must be of type {_name(hint)}, got {value!r}")
    kind = typing.get_origin(hint)
    if kind in (types.UnionType, typing.Union):  # "X | None"
        if value is None or value == "none":
            return None
        (hint,) = [a for a in typing.get_args(hint) if a is not type(None)]
        kind = typing.get_origin(hint)
    try:
        if kind is tuple:
            items = value.split(",") if isinstance(value, str) else value
            inner = typing.get_args(hint)
            if not isinstance(items, (list, tuple)) or (inner[-1] is not Ellipsis and len(items) != len(inner)):
                raise wrong
            return tuple(_convert(key, v, inner[0]) for v in items)
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[value.lower()]
        if hint is Path and isinstance(value, (str, Path)):
            return Path(value).expanduser()
        if hint is str and isinstance(value, str):
            return value
        if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            if hint is int and isinstance(value, float):
                raise wrong
            return hint(value)
    except (KeyError, ValueError, AttributeError):
        raise wrong from None
    raise wrong
