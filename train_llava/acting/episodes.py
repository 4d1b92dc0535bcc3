"""Episodes of a converted folder by their ids, which are as long as it takes to say which."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from convert.reader import ConversationReader

_EPISODE = 4  # parts of NAME/SPLIT/SHARD/EPISODE


def find_episode(reader: ConversationReader, wanted: str | None) -> range:
    """The samples of an episode, in order; none where there is no such one.

    Args:
        wanted: NAME/SPLIT/SHARD/EPISODE, or the beginning or a sample of one: the first that fits. None: the
            reader's first.
    """
    parts = wanted.strip("/").split("/") if wanted else []
    found = reader.ranges.get(parts[0], range(0)) if parts else range(len(reader))
    for depth in range(2, _EPISODE + 1):
        head = "/".join(parts[:depth])
        fits = (own for name, own in stretches(reader, found, depth) if depth > len(parts) or name == head)
        found = next(fits, range(0))
    return found


def stretches(
    reader: ConversationReader, samples: range, depth: int = _EPISODE
) -> Iterator[tuple[str, range]]:
    """Samples that follow each other and whose ids begin alike, with that beginning.

    Args:
        depth: parts of NAME/SPLIT/SHARD/EPISODE/STEP that are compared.
    """

    def head(index: int) -> str:
        return "/".join(reader[index].id.split("/")[:depth])

    start = samples.start
    while start < samples.stop:
        own, reach = head(start), 1
        # A big folder has more samples than can be read: go in doubling strides, then halve the last one.
        while start + reach < samples.stop and head(start + reach) == own:
            reach *= 2
        rest = range(start + reach // 2, min(start + reach, samples.stop))
        end = rest.start + bisect_left(rest, True, key=lambda index: head(index) != own)
        yield own, range(start, end)
        start = end
