"""One configuration in three forms: a dataclass, a TOML file, a command line.

A stage's Config is a dataclass whose fields are sections (dataclasses themselves) or plain values; the string under a
field is its help, with the unit in square brackets. Order of precedence: defaults, `--config file.toml`, `--section.key`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import math
import textwrap
import tomllib
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


class HelpRequested(Exception):
    """`--help` was on the command line; its text is the argument."""


def parse(config_class: type[C], argv: list[str], *, command: str) -> tuple[C, frozenset[str]]:
    """Read a command line; returns the config and the dotted keys that were given (file or command line).

    Raises ValueError, naming the flag or file and the nearest known key, for anything it does not know; HelpRequested
    with the help text for --help or -h.
    """
    values: dict[str, tuple[Any, str]] = {}
    known = keys(config_class)
    arguments = list(argv)
    while arguments:
        flag = arguments.pop(0)
        if flag in ("-h", "--help"):
            raise HelpRequested(help_text(config_class, command))
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r}: expected --section.key=value; see nanotrain {command} --help")
        name, has_value, value = flag[2:].partition("=")
        if name != "config":
            _known(name, known, f"--{name}")
        if not has_value:
            if name in known and known[name] is bool and (not arguments or arguments[0].startswith("--")):
                value = "true"
            elif not arguments:
                raise ValueError(f"--{name}: a value is missing")
            else:
                value = arguments.pop(0)
        if name == "config":
            from_file = {k: (v, f"{value}: {k}") for k, v in read_toml(config_class, value).items()}
            values = from_file | values
        else:
            values[name] = (_convert(value, known[name], f"--{name}"), f"--{name}")
    return build(config_class, {k: v for k, (v, _) in values.items()}), frozenset(values)


def build(config_class: type[C], values: dict[str, Any]) -> C:
    """The config with the given dotted keys set and defaults elsewhere."""
    hints = get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            prefix = field.name + "."
            part = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
            section = getattr(config_class, field.name, None) or field.default_factory()
            arguments[field.name] = dataclasses.replace(section, **part)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return config_class(**arguments)


@cache
def keys(config_class: type) -> dict[str, Any]:
    """Dotted key -> type of its value, in the order of the dataclasses."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= {f"{field.name}.{k}": v for k, v in keys(kind).items()}
        else:
            found[field.name] = kind
    return found


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> value of a config."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{k}": v for k, v in flatten(value).items()}
        else:
            found[field.name] = value
    return found


def read_toml(config_class: type, path: str) -> dict[str, Any]:
    """Dotted key -> value of a TOML file. ValueError with file and key for what is unreadable, unknown or of a wrong type."""
    try:
        text = Path(path).read_bytes().decode()
        table = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {path}: not valid TOML: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{k}": v for k, v in value.items()}
        else:
            flat[name] = value
    known = keys(config_class)
    for name in flat:
        _known(name, known, f"{path}: {name}")
    return {k: _convert(v, known[k], f"{path}: {k}") for k, v in flat.items()}


def write_toml(config: Any) -> str:
    """The whole config as TOML; reading it gives the same config."""
    lines: list[str] = []
    tables: dict[str, list[str]] = {}
    for name, value in flatten(config).items():
        section, _, key = name.rpartition(".")
        target = tables.setdefault(section, []) if section else lines
        target.append(f"{key} = {_toml_value(value)}")
    for section, entries in tables.items():
        lines += ["", f"[{section}]", *entries]
    return "\n".join(lines).lstrip("\n") + "\n"


def at_least(section: Any, name: str, least: float, *keys: str) -> None:
    """Raise ValueError naming the flag where one of `keys` of the section called `name` is less, infinite or no number."""
    for key in keys:
        if not least <= getattr(section, key) < math.inf:
            raise ValueError(f"--{name}.{key} {getattr(section, key)}: must be at least {least}")


def help_text(config_class: type, command: str) -> str:
    """Every key with its type, default, unit and one line."""
    module = inspect.getmodule(config_class)
    summary = (module.__doc__ or "").strip()
    lines = [
        f"usage: nanotrain {command} [--config FILE] [--section.key=value ...]",
        "",
        summary,
        "",
        "  --config FILE",
        "      TOML file of the keys below.",
    ]
    _help_section(config_class(), "", lines)
    return "\n".join(lines)


def _help_section(config, prefix, lines):
    docs, hints = field_docs(type(config)), get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, default = hints[field.name], getattr(config, field.name)
        if dataclasses.is_dataclass(kind):
            title = (inspect.getdoc(kind) or "").splitlines()[0]
            lines += ["", f"{field.name}: {title}"]
            _help_section(default, f"{field.name}.", lines)
        else:
            lines.append(f"  --{prefix}{field.name} {_type_name(kind)} (default: {_plain(default)})")
            lines += textwrap.wrap(docs.get(field.name, ""), 110, initial_indent="      ", subsequent_indent="      ")


@cache
def field_docs(config_class: type) -> dict[str, str]:
    """Field -> the string that stands under it in the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    docs = {}
    for node, after in zip(body, body[1:], strict=False):
        is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        if isinstance(node, ast.AnnAssign) and is_doc:
            docs[node.target.id] = " ".join(after.value.value.split())
    return docs


def _known(name, known, where):
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1, 0.0)
    tail = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    raise ValueError(f"{where}: unknown key; did you mean --{(tail or near)[0]}?")


def _convert(value, kind, where):
    """`value`, a string of the command line or a TOML value, as `kind`."""
    try:
        return _as(value, kind)
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{where}: {value!r} is not {_type_name(kind)}") from None


def _as(value, kind):
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise ValueError
    if origin in (Union, types.UnionType):
        inner = next(k for k in get_args(kind) if k is not type(None))
        return None if value == "none" else _as(value, inner)
    if origin is tuple:
        items = [v for v in value.split(",") if v] if isinstance(value, str) else value
        return tuple(_as(v, get_args(kind)[0]) for v in items)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if value.lower() not in ("true", "1", "yes", "false", "0", "no"):
            raise ValueError
        return value.lower() in ("true", "1", "yes")
    if isinstance(value, bool):
        raise ValueError
    if kind is int:
        if isinstance(value, str):
            value = int(value.replace("_", "")) if value.replace("_", "").lstrip("+-").isdigit() else float(value)
        if value != int(value):
            raise ValueError
        return int(value)
    if kind is float:
        return float(value)
    if not isinstance(value, str):
        raise ValueError
    return value


def _type_name(kind):
    origin = get_origin(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if origin in (Union, types.UnionType):
        return _type_name(next(k for k in get_args(kind) if k is not type(None))) + " or none"
    if origin is tuple:
        return _type_name(get_args(kind)[0]) + ",..."
    return {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}[kind]


def _plain(value):
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return "empty" if value == "" else str(value).replace("\n", "\\n")


def _toml_value(value):
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # A JSON string is a TOML basic string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
