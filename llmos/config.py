"""Configuration: frozen dataclasses filled from defaults, a TOML file, the environment and flags, in that order.

The only module that reads the environment. Unknown keys are refused, so that a misspelt option never goes unnoticed. A
field's docstring is the help text of its flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from llmos.docstrings import attribute_docstrings
from llmos.errors import ConfigError

T = TypeVar("T")

_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Certificates of one process. With all three set, services talk mutual TLS; with none, plain text."""

    ca_file: Path | None = None
    """PEM file of the authority that both sides trust."""
    cert_file: Path | None = None
    """PEM file with this process's certificate."""
    key_file: Path | None = None
    """PEM file with this process's private key."""

    def __post_init__(self) -> None:
        given = [self.ca_file, self.cert_file, self.key_file]
        if any(given) and self.ca_file is None:
            raise ConfigError("TLS needs the authority's certificate: set tls.ca_file (`llmos certs DIR` makes one).")
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("TLS needs cert_file and key_file together.")

    @property
    def enabled(self) -> bool:
        """Whether connections are encrypted."""
        return self.ca_file is not None


def environment() -> Mapping[str, str]:
    """The process's environment: the one place that other modules may take it from."""
    return os.environ


def load(
    cls: type[T],
    section: str,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> T:
    """Build `cls` from the TOML table `[section]`, `LLMOS_<SECTION>_<FIELD>` variables and `overrides`.

    `overrides` are flat: a nested field is `outer.inner`. Raises ConfigError on unknown keys and bad values.
    """
    flat = _flat_fields(cls)
    values: dict[str, object] = {}
    if file is not None:
        values.update(_from_file(file, section, flat))
    values.update(_from_environment(os.environ if environ is None else environ, section, flat))
    for key, value in (overrides or {}).items():
        if key not in flat:
            raise ConfigError(f"unknown option '{key}' for {section}; known: {', '.join(sorted(flat))}", param=key)
        values[key] = _convert(value, flat[key], key)
    return cast(T, _build(cls, values, ""))


def from_command_line(cls: type[T], section: str, prog: str, argv: Sequence[str] | None = None) -> T:
    """Build `cls` from flags over environment over file. Help and errors print and exit as argparse does."""
    parser = _parser(cls, section, prog)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    file = given.pop("config", None)
    try:
        return load(cls, section, file=file, overrides=given)
    except ConfigError as error:
        parser.exit(2, f"{prog}: {error.message}\n")


def _flat_fields(cls: type, prefix: str = "") -> dict[str, Any]:
    hints = get_type_hints(cls)
    flat: dict[str, Any] = {}
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            flat.update(_flat_fields(cast(type, hint), f"{prefix}{field.name}."))
        else:
            flat[f"{prefix}{field.name}"] = hint
    return flat


def _build(cls: type, values: Mapping[str, object], prefix: str) -> object:
    hints = get_type_hints(cls)
    arguments: dict[str, object] = {}
    for field in fields(cls):
        name = f"{prefix}{field.name}"
        hint = hints[field.name]
        if is_dataclass(hint):
            if any(key.startswith(f"{name}.") for key in values):
                arguments[field.name] = _build(cast(type, hint), values, f"{name}.")
        elif name in values:
            arguments[field.name] = values[name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"'{name}' must be set (--{_flag(name)})", param=name)
    return cls(**arguments)


def _from_file(file: Path, section: str, flat: Mapping[str, Any]) -> dict[str, object]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    return _flatten(document.get(section, {}), flat, "", f"{file} [{section}]")


def _flatten(table: object, flat: Mapping[str, Any], prefix: str, where: str) -> dict[str, object]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table")
    found: dict[str, object] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if name in flat:
            found[name] = _convert(value, flat[name], name)
        elif any(known.startswith(f"{name}.") for known in flat):
            found.update(_flatten(value, flat, f"{name}.", where))
        else:
            raise ConfigError(f"{where} has an unknown key '{name}'; known: {', '.join(sorted(flat))}", param=name)
    return found


def _from_environment(environ: Mapping[str, str], section: str, flat: Mapping[str, Any]) -> dict[str, object]:
    start = f"LLMOS_{section.upper()}_"
    names = {start + key.replace(".", "_").upper(): key for key in flat}
    found: dict[str, object] = {}
    for variable, text in environ.items():
        if not variable.startswith(start) or _from_service_links(variable, text):
            continue
        if variable not in names:
            raise ConfigError(f"unknown environment variable {variable}; known: {', '.join(sorted(names))}")
        found[names[variable]] = _convert(text, flat[names[variable]], variable)
    return found


def _from_service_links(variable: str, text: str) -> bool:
    """Whether Kubernetes set the variable: it describes a service `llmos-worker` as `LLMOS_WORKER_PORT=tcp://...`."""
    address = variable.endswith("_PORT") and text.startswith(("tcp://", "udp://", "sctp://"))
    return address or bool(_SERVICE_LINK.search(variable))


def _convert(value: object, hint: Any, name: str) -> object:
    """Bring `value` (TOML value or text) to the type `hint`."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None or value == "" else _convert(value, inner[0], name)
    if get_origin(hint) is tuple:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ConfigError(f"'{name}' must be a list", param=name)
        return tuple(_convert(part, get_args(hint)[0], name) for part in parts if part != "")
    try:
        return _scalar(value, hint)
    except (ValueError, TypeError, KeyError) as error:
        wanted = "one of " + ", ".join(map(str, get_args(hint))) if get_args(hint) else hint.__name__
        raise ConfigError(f"'{name}' must be {wanted}, not {value!r}", param=name) from error


def _scalar(value: object, hint: Any) -> object:
    if get_args(hint):
        return {option: option for option in get_args(hint)}[value]
    if hint is bool:
        return value if isinstance(value, bool) else _boolean(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        raise TypeError
    if hint is int and isinstance(value, float):
        raise TypeError
    if hint is str and not isinstance(value, str):
        raise TypeError
    converted = hint(value)
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(str(value))
    return converted


def _boolean(value: object) -> bool:
    text = str(value).lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(text)


def _flag(name: str) -> str:
    return name.replace("_", "-").replace(".", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(cls: type, section: str, prog: str) -> argparse.ArgumentParser:
    description = (sys.modules[cls.__module__].__doc__ or "").strip()
    parser = _Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file; the table [{section}] is read")
    _add_flags(parser, cls, section, "")
    return parser


def _add_flags(parser: argparse.ArgumentParser, cls: type, section: str, prefix: str) -> None:
    hints = get_type_hints(cls)
    help_texts = attribute_docstrings(cls)
    for field in fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            _add_flags(parser, cast(type, hint), section, f"{name}.")
            continue
        shown = "" if field.default in (dataclasses.MISSING, None, "", ()) else f" (default: {field.default})"
        variable = f"LLMOS_{section}_{name.replace('.', '_')}".upper()
        text = f"{help_texts.get(field.name, '')}{shown} [{variable}]".replace("%", "%%")
        metavar = "|".join(map(str, get_args(hint))) if get_origin(hint) is typing.Literal else _metavar(hint)
        parser.add_argument(f"--{_flag(name)}", dest=name, metavar=metavar, help=text)


def _metavar(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "A,B,.."
    if get_origin(hint) in (Union, types.UnionType):
        return _metavar(next(option for option in get_args(hint) if option is not type(None)))
    return {int: "N", float: "X", bool: "yes|no", Path: "PATH"}.get(hint, "TEXT")
