"""A configuration as YAML text: the names and values in it, and the line of each. Knows no setting."""

import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from arrow_quant_v2.errors import ConfigurationError

LARGEST_FILE = 1_000_000
LONGEST_NAME = 80

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = LONGEST_NAME


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a YAML file says, and how to name each of its settings in a message."""

    settings: dict[str, object] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def text_of(path: str | os.PathLike[str]) -> str:
    """What a file of at most 1 MB says.

    Raises:
        ConfigurationError: it cannot be read, is larger, or is no UTF-8 text.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > LARGEST_FILE:
        raise ConfigurationError(f"{path}: larger than {LARGEST_FILE} bytes, which no configuration is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}, line {line}: not UTF-8 text") from error


def written(text: str, name: str) -> Written:
    """Parse YAML of one mapping; names are taken literally, so `on:` is no boolean and `<<:` merges nothing."""
    try:
        loader = yaml.SafeLoader(text)
        pairs = _pairs(loader.get_single_node(), name)
        settings = {key: _value(loader, value, _at(name, mark)) for key, (mark, value) in pairs.items()}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigurationError(f"{_at(name, mark)}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigurationError(f"{name}, line {line}: not valid YAML: {error.reason}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{name}: nested too deeply for a configuration") from error
    labels = {key: f"{key[:LONGEST_NAME]} ({_at(name, mark)})" for key, (mark, _) in pairs.items()}
    return Written(settings=settings, labels=labels)


def _value(loader: yaml.SafeLoader, node: yaml.Node, place: str) -> object:
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:  # a 13th month, a number of 5000 digits
        raise ConfigurationError(f"{place}: not valid YAML: {error}") from error


def _pairs(root: yaml.Node | None, name: str) -> dict[str, tuple[yaml.Mark, yaml.Node]]:
    """Setting to (place, value) of a YAML mapping; `profile` is short for `deployment_profile`."""
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else "a list or a single value"
        raise ConfigurationError(f"{name}, line 1: a configuration is a mapping of settings, not {found}")
    pairs: dict[str, tuple[yaml.Mark, yaml.Node]] = {}
    for key, value in root.value:
        setting = "deployment_profile" if key.value == "profile" else key.value
        if not isinstance(setting, str):
            raise ConfigurationError(f"{_at(name, key.start_mark)}: the name of a setting is text, not a collection")
        if setting in pairs:
            raise ConfigurationError(f"{_at(name, key.start_mark)}: {_repr.repr(setting)} is given twice")
        pairs[setting] = key.start_mark, value
    return pairs


def _at(name: str, mark: yaml.Mark | None) -> str:
    return name if mark is None else f"{name}, line {mark.line + 1}"
