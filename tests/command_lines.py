"""Command lines that pages and messages show, read as the command itself reads them."""

from __future__ import annotations

from typing import Any

import typer

from oxe_mix.cli import app


def parse(words: list[str]) -> None:
    """Read what follows `oxe-mix`, and run nothing. Raises: click's UsageError."""
    command: Any = typer.main.get_command(app)
    parent = None
    while hasattr(command, "resolve_command"):
        parent = typer.Context(command, parent, info_name=command.name)
        _, command, words = command.resolve_command(parent, words)
    command.make_context(command.name, words, parent)
