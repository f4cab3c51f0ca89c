"""Options of a command, which are a dataclass, read from a YAML file.

Every mistake in the file is an error that names the file, the key and the expected type.
"""

import dataclasses
import json
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastperturb.config import suggestion


def load(path: Path, options_class: type) -> Any:
    """Return an instance of `options_class` with the values of a YAML file."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    return from_mapping({} if content is None else content, options_class, str(path))


def plain(options: Any) -> dict[str, Any]:
    """Return a dataclass of options as JSON holds it; `from_mapping` turns it back."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return values


def did_you_mean(name: str, choices: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the closest choice, and all choices."""
    return f"{suggestion(name, choices)}. Choices: {', '.join(choices)}"


def from_mapping(content: Any, options_class: type, where: str) -> Any:
    """Return an instance of `options_class` with values as YAML or JSON hold them.

    where: the file, or the key in it, that errors begin with.
    """
    import tyro

    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping of options, got {content!r}")
    fields = {field.name: field for field in dataclasses.fields(options_class) if field.init}
    hints = get_type_hints(options_class)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ValueError(f"{where}: unknown option {key!r}{did_you_mean(name, fields)}")
        if name in values:
            raise ValueError(f"{where}: option {key!r} is given twice; remove one of them")
        values[name] = _value(value, hints[name], f"{where}: {key}")
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:  # flags may set them, and only the whole can be validated
        return _unvalidated(options_class, values | dict.fromkeys(missing, tyro.MISSING))
    try:
        return options_class(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _unvalidated(options_class: type, values: dict[str, Any]) -> Any:
    """Return an instance with these values and the others' defaults, as none is made to be used."""
    options: Any = object.__new__(options_class)
    for field in dataclasses.fields(options_class):
        if field.name in values:
            value = values[field.name]
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        object.__setattr__(options, field.name, value)
    return options


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return `value`, as YAML read it, in the type `hint` of the option."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return _value(value, choice, where)
            except ValueError:
                continue
    elif origin is Literal:
        # The type too: True equals 1, and must not pass for it.
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin in (tuple, list) and isinstance(value, list):
        repeats = origin is list or arguments[-1] is Ellipsis
        hints = [arguments[0]] * len(value) if repeats else arguments
        if len(hints) == len(value):
            return origin(
                _value(item, item_hint, f"{where}[{index}]")
                for index, (item, item_hint) in enumerate(zip(value, hints, strict=True))
            )
    elif origin in (dict, Mapping) and isinstance(value, dict):
        key_hint, item_hint = arguments
        return {
            _value(key, key_hint, where): _value(item, item_hint, f"{where}: {key}")
            for key, item in value.items()
        }
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(value, hint, where)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and _is_number(value):
        return float(value)
    elif hint is type(value) or (hint is type(None) and value is None):
        return value
    raise ValueError(f"{where}: expected {_describe(hint)}, got {value!r}")


def _is_number(value: Any) -> bool:
    # YAML 1.1 reads 1e-3, which has no point, as text.
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return type(value) in (int, float)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
