"""How each command of ours runs and ends: a mistake of the user's is one line and exit 2, a bug of ours keeps
its traceback.
"""

from __future__ import annotations

import logging
import re
import signal
import sys

import typer

from oxe_mix.errors import UserError
from oxe_mix.interrupt import end_at_once


def run_app(commands: typer.Typer) -> None:
    """Run what the command line asks for."""
    _set_up_logging()
    signal.signal(signal.SIGINT, end_at_once)
    try:
        _refuse_empty(sys.argv[1:])
        commands()
    except UserError as error:
        from oxe_mix.text import complain

        logging.getLogger(__name__).info("where it was found", exc_info=True)
        complain(str(error))
        sys.exit(2)


def _refuse_empty(words: list[str]) -> None:
    """An empty word is a shell variable that was not set: `--out ""` would be the working folder."""
    for before, word in zip(["the command", *words], words, strict=False):
        if word == "--":
            return
        if not word or re.fullmatch(r"--[a-z-]+=", word):
            name = word.rstrip("=") or before
            raise UserError(f"{name}: followed by nothing; is a shell variable not set?")


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # gcsfs logs what it raises, with a traceback; we say it in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # Beam warns at import that its optional Google Cloud extras are not installed; no stage uses them.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
