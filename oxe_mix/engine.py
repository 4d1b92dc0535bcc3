"""Where the Beam graphs run. Known apart from Beam itself, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass

from oxe_mix.errors import UserError

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Engine:
    """`local`, or any Beam runner by its name with Beam's own options."""

    runner: str = LOCAL
    workers: int | None = None  # processes of the local runner; None: as many as the data is worth
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.runner == LOCAL and self.flags:
            raise UserError(
                f"{' '.join(self.flags)}: options for Beam need a --runner; the local one has none"
            )
