"""Ask a trained checkpoint for actions: pictures and an instruction in, JSON in robot units out. The same as
`oxe-mix act`.
"""

from __future__ import annotations

import typer

from oxe_mix.cli_acting import act
from oxe_mix.run_app import run_app


def main() -> None:
    """The command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(act)
    run_app(app)


if __name__ == "__main__":
    main()
