"""Rules for everything that is written into a target: which names are safe, and what failures mean."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE
from oxe_mix.rlds import SAFE_NAME

_OURS = (".partial", BUSY_FILE)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# A file where a folder has to be, or the other way round.
_IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)


class TargetError(UserError):
    """The target cannot be written; going on with other files would not help."""


def safe(name: str) -> str:
    """A name below a target, as it is. Raises: UserError when a part of it could lead elsewhere."""
    for part in name.split("/"):
        if not SAFE_NAME.fullmatch(part) and not part.startswith(_OURS):
            raise UserError(
                f"{name!r}: {part!r} is no name for a file; only letters, digits, '-', '_' and '.'"
            )
    return name


@contextmanager
def writing(root: str) -> Iterator[None]:
    """Say what it means for the user when a target cannot be written. Raises: TargetError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TargetError(
                f"{root}: the disk is full; free some space and run again: what is whole is kept"
            ) from error
        if error.errno in _CLOSED:
            raise TargetError(
                f"{root}: cannot write here ({error.strerror}); choose another --out"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise TargetError(
                f"{root}: a name here would be too long for the disk; choose another --out"
            ) from error
        if error.errno in _IN_THE_WAY:
            place = error.filename2 or error.filename or root
            raise TargetError(
                f"{place}: something is in the way here ({error.strerror}); "
                "move it elsewhere, or choose another --out"
            ) from error
        raise
