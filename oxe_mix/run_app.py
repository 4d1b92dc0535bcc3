"""How each command of ours runs and ends: a mistake of the user's, and a file that the system refuses, is
one line and exit 2; a bug of ours keeps its traceback.
"""

from __future__ import annotations

import io
import logging
import re
import signal
import sys
from typing import Any

import typer

from oxe_mix.errors import UserError
from oxe_mix.interrupt import end_at_once

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer has no public name for it


def run_app(commands: typer.Typer) -> None:
    """Run what the command line asks for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know the letters of a folder's name
            stream.reconfigure(errors="backslashreplace")
    _set_up_logging()
    signal.signal(signal.SIGINT, end_at_once)
    try:
        _refuse_empty(sys.argv[1:])
        sys.exit(commands(standalone_mode=False))
    except _UsageError as error:
        sys.exit(_complain_of_usage(error))
    except UserError as error:
        from oxe_mix.text import complain

        logging.getLogger(__name__).info("where it was found", exc_info=True)
        complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        from oxe_mix.text import complain

        logging.getLogger(__name__).info("where it was found", exc_info=True)
        complain(f"{error.filename}: {error.strerror}")
        sys.exit(2)


def _complain_of_usage(error: Any) -> int:
    """A line as for every other mistake, and where to look. A group that is given nothing shows its help."""
    from oxe_mix.text import complain

    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    command = error.ctx.command_path if error.ctx else "oxe-mix"
    help_is = f"{command} --help lists what there is"
    if "--verbose" in sys.argv and "--verbose" in str(error):
        help_is = "--verbose stands before the command: oxe-mix --verbose ..."
    complain(f"{error.format_message()} ({help_is})")
    return 2


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
