"""Markdown that foreign text cannot break: names, instructions and notes come from data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

# What means something inside a line; an underscore only where no word goes on around it.
_INLINE = re.compile(r"[\\`*\[\]<>&~$]|(?<![^\W_])_|_(?![^\W_])")
# What means something at a block's beginning: headings, lists, rules.
_OPENING = re.compile(r"^(\d+(?=[.)](?: |$))|(?=[#+\-=]))")


def plain(text: str) -> str:
    """Any text as one line that reads as it is: escaped, without control characters."""
    escaped = _INLINE.sub(lambda found: f"\\{found[0]}", one_line(text))
    return _OPENING.sub(r"\1\\", escaped) or "(empty)"


def code(text: str) -> str:
    """Any text as code inside a line."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}" if line else "(empty)"


def block(language: str, lines: Iterable[str]) -> str:
    """Lines of code, each of which begins with no backtick."""
    return "\n".join([f"```{language}", *lines, "```"])


def items(lines: Iterable[str], level: int = 0) -> str:
    """A list of lines of Markdown; below an item of another one where `level` is 1."""
    return "\n".join(f"{'  ' * level}- {line}" for line in lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of cells of Markdown; the first `left` columns are text, the others numbers."""
    rules = [":---" if i < left else "---:" for i in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (lines[0], rules, *lines[1:]))


def front_matter(values: Mapping[str, Any]) -> str:
    """The block of YAML at a model card's head."""
    text = yaml.safe_dump(dict(values), sort_keys=False, width=1000)
    return f"---\n{text}---"


def one_line(text: str) -> str:
    """Any text without line breaks and control characters."""
    kept = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return " ".join(kept.split())
