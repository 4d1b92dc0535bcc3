"""The one error type for what a user can cause and mend."""


class UserError(ValueError):
    """Something the user gave is wrong: the message says where, what, and how to mend it. Commands exit 2 on
    it.
    """


def did_you_mean(name: str, known: list[str]) -> str:
    """`; did you mean X?` for the closest known name, else the list of the known ones."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
