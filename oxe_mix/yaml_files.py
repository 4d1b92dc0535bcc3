"""YAML files of the user's: read once, and every complaint about them has a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from oxe_mix.errors import UserError

Loc = tuple[str | int, ...]


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is written twice; YAML's own way is to take the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """See yaml.composer. Raises: yaml.MarkedYAMLError at the second place."""
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = seen.setdefault((key.tag, key.value), key.start_mark)
            if first is not key.start_mark:
                problem = f"{key.value!r} is written twice, the first time on line {first.line + 1}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


def load_yaml(file: Path) -> Any:
    """Read a YAML file; the user's mistakes become one line with the place."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    try:
        # A SafeLoader: it makes plain values only.
        return yaml.load(text, _OnceLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error


def line_of(file: Path, loc: Loc) -> int:
    """The line of `loc` in a YAML file, or of the nearest thing above it that is there."""
    node = yaml.compose(file.read_text(encoding="utf-8"))
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
