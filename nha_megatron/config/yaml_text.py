"""The YAML that configurations are written in: plain data only, without the surprises of YAML 1.1.

Against PyYAML's safe loader, duplicate keys are refused, and numbers are those of YAML 1.2: 3e-4 is a number and not a text, 010 is no
octal 8, and 1:30 is no 90. What has an exponent and no fraction is a whole number.
"""

import re
from typing import Any

import yaml

from .errors import ConfigError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_EXPONENT = r"[eE][-+]?[0-9]+"
_NUMBERS = {
    _INT: re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"),
    _FLOAT: re.compile(
        rf"(?:[-+]?(?:\.[0-9]+(?:{_EXPONENT})?|[0-9][0-9_]*(?:\.[0-9_]*(?:{_EXPONENT})?|{_EXPONENT}))"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise ConfigError(f"key {key.value!r} stands twice, in lines {seen[key.value]} and {line}; remove one")
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """1e5 and 2.5e4 are whole numbers, as a user means who writes steps so; 4.0 is none."""
    value: float = loader.construct_yaml_float(node)
    return int(value) if "e" in node.value.lower() and value.is_integer() and abs(value) <= 2**53 else value


_Loader.add_constructor(_FLOAT, _number)

_MAX_CHARACTERS = 2**20
_MAX_VALUES = 100_000
_MAX_DEPTH = 500


def _bracket_depth(text: str) -> int:
    """How deep brackets are nested; PyYAML takes a second for each ten thousand."""
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _require_bounded(node: yaml.Node) -> None:
    """Raises ConfigError when aliases would multiply to more values than any configuration has."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            return 1  # an alias within itself: finite as an object, and refused by the field that gets it
        open_nodes.add(id(node))
        children = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(size(child) for child in children)
        open_nodes.remove(id(node))
        sizes[id(node)] = total
        return total

    if size(node) > _MAX_VALUES:
        raise ConfigError(f"its aliases (*name) stand for {size(node):.0e} values, more than {_MAX_VALUES:,}; write less")


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would read as numbers."""


def _replace_numbers(resolver: Any) -> None:
    kept = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in _NUMBERS]
        for first, entries in resolver.yaml_implicit_resolvers.items()
    }
    resolver.yaml_implicit_resolvers = kept
    for tag, pattern in _NUMBERS.items():
        resolver.add_implicit_resolver(tag, pattern, list("-+.0123456789"))


_replace_numbers(_Loader)
_replace_numbers(_Dumper)


def read_yaml(text: str) -> Any:
    """Plain data of a YAML text. Raises `ConfigError` with one message when it cannot be read."""
    try:
        if len(text) > _MAX_CHARACTERS:
            raise ConfigError(f"{len(text):,} characters are no configuration; at most {_MAX_CHARACTERS:,} are read")
        if _bracket_depth(text) > _MAX_DEPTH:
            raise ConfigError(f"not valid YAML: brackets are nested more than {_MAX_DEPTH} deep")
        loader = _Loader(text)  # a subclass of the safe loader: builds plain data, runs nothing
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_bounded(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"not valid YAML{where}: {what}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; brackets nested a thousand deep
        raise ConfigError(f"not valid YAML: {error}") from None


def read_value(text: str) -> Any:
    """The value of an override, as `read_yaml`; but `#` begins no comment: nobody writes one on a command line, and half a path is none."""
    value = read_yaml(text)
    if "#" not in text:
        return value
    node = yaml.compose(text, Loader=_Loader)
    rest = text if node is None else text[node.end_mark.index :]
    if not rest.strip():
        return value
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        return text.strip()
    raise ConfigError(f"{rest.strip()!r} would be a comment; remove it")


def write_yaml(data: Any) -> str:
    """YAML text that `read_yaml` reads back to the same plain data, keys in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)
