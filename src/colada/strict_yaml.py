"""YAML by the rules of its newer version, without what surprises: recipes, and settings on a command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colada.errors import ColadaError, reason
from colada.files import DEEPEST, MOST_JSON, read_text

MOST_YAML = 2**20
"""Characters of YAML: its parser reads some 100,000 a second."""
_MOST_VALUES = 10**5  # With what aliases stand for.
_YAML_TAG = "tag:yaml.org,2002:"
_DIGITS, _EXPONENT = "[0-9](?:_?[0-9])*", "(?:[eE][-+]?[0-9]+)"
# Plain scalars that are no strings: the type, the pattern, its first characters. The first that fits counts.
_YAML_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("leading-zero", rf"[-+]?0_?{_DIGITS}(?:\.(?:{_DIGITS})?)?{_EXPONENT}?", list("-+0")),
    ("int", rf"[-+]?{_DIGITS}", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS}){_EXPONENT}?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


def _yaml(where: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ColadaError(f'{where}: YAML needs PyYAML: pip install "colada-lm[train]"') from None
    return yaml


def _resolve_scalars(kind: Any) -> Any:
    """Let a loader or dumper of PyYAML take plain scalars for the types of ``_YAML_SCALARS``."""
    for name, pattern, first in _YAML_SCALARS:
        kind.add_implicit_resolver(_YAML_TAG + name, re.compile(rf"^(?:{pattern})$"), first)
    return kind


def parse_yaml(text: str, where: str) -> Any:
    """Return what a YAML text holds, by the rules of YAML 1.2 where those of 1.1 surprise.

    ``1e-4`` is a number; ``1:30``, ``yes`` and ``2020-01-01`` are strings; ``010`` is refused, as it is 8 in
    the one version and 10 in the other. There are no merge keys.

    Raises:
        ColadaError: naming ``where`` and the line, if it is no YAML, spells a key twice, has a key that is
            no string, or a tag other than those of JSON's types; without PyYAML.
    """
    if len(text) > MOST_YAML:
        raise ColadaError(f"{where} has {len(text)} characters, expected at most {MOST_YAML} of YAML")
    yaml = _yaml(where)
    resolvers: dict[str, list[Any]] = {}  # None of YAML 1.1's.
    loader = _resolve_scalars(type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": resolvers}))
    try:
        node = yaml.compose(text.removeprefix("\ufeff"), loader)
        return None if node is None else _yaml_value(node, itertools.count(1), DEEPEST)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ColadaError(f"{where} is not valid YAML: {reason(error)}") from None


def _yaml_value(node: Any, numbers: Iterator[int], deeper: int) -> Any:
    """Return what a node of PyYAML stands for.

    Args:
        numbers: counts values, which aliases can multiply.
        deeper: how many more lists or objects may be within one another.
    """
    yaml = _yaml("")

    def refused(problem: str, node: Any = node) -> Any:
        return yaml.constructor.ConstructorError(None, None, f"found {problem}", node.start_mark)

    if next(numbers) > _MOST_VALUES:
        raise refused(f"more than {_MOST_VALUES} values")
    match node.id, node.tag.removeprefix(_YAML_TAG), node.value:
        case "mapping" | "sequence", "map" | "seq", _ if deeper == 0:
            raise refused(f"more than {DEEPEST} lists or objects within one another")
        case "mapping", "map", pairs:
            values = {}
            for key, value in pairs:
                if key.tag != f"{_YAML_TAG}str":
                    raise refused("a key that is no string; quote it", key)
                if key.value in values:
                    raise refused(f"the key {key.value!r} twice", key)
                values[key.value] = _yaml_value(value, numbers, deeper - 1)
            return values
        case "sequence", "seq", parts:
            return [_yaml_value(part, numbers, deeper - 1) for part in parts]
        case "scalar", "str", text:
            return text
        case "scalar", "null", _:
            return None
        case "scalar", "bool", text if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "scalar", "int", text:
            return int(text)
        case "scalar", "float", text:  # float() knows inf and nan by other names than YAML.
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        case "scalar", "leading-zero", text:
            raise refused(f"{text}, which begins with 0: leave that out, or quote it")
        case kind, tag, _:
            raise refused(f"a {kind} with the tag {tag}, expected what JSON has too")


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds; see :func:`parse_yaml` and :func:`read_text`."""
    return parse_yaml(read_text(path, "a YAML file", MOST_JSON), str(path))


def dump_yaml(value: Any, flow: bool = False) -> str:
    """Return a value as YAML that :func:`parse_yaml`, and a parser of YAML 1.1, read as that value.

    Args:
        flow: on one line, with brackets; else in lines.

    Raises:
        ColadaError: without PyYAML.
    """
    yaml = _yaml("a recipe")
    dumper = _resolve_scalars(
        type("Dumper", (yaml.SafeDumper,), {})
    )  # Quotes what either takes for no string.
    text: str = yaml.dump(value, Dumper=dumper, sort_keys=False, default_flow_style=flow, width=10**6)
    return text
