"""Keys and values of prompts, in memory that stays where it is from one answer to the next."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, StaticCache

from train_llava.cuda_graph import lengths_of

_STEP = 64  # a cache's length is a multiple of it: instructions of other lengths still fit


@dataclass(slots=True)
class _Kept:
    """A cache and the prompt that it holds."""

    cache: StaticCache
    prompt: list[int]


class PromptCache:
    """The cache of the last prompt that came alone: the next one need not compute what is the same in it."""

    def __init__(self, config: PreTrainedConfig, image_id: int, *, keep: bool) -> None:
        """`keep` false: each prompt gets a cache of its own, as it must while weights change."""
        self._config, self._image_id, self._keep = config, image_id, keep
        self._kept: _Kept | None = None

    def keeps(self, num_prompts: int) -> bool:
        """Whether so many prompts at once are kept for the next answer."""
        return self._keep and num_prompts == 1

    def take(self, prompts: list[list[int]], own: int, later: int) -> tuple[StaticCache, int]:
        """A cache to fill, and how many tokens of the prompt it holds already. What it holds is forgotten
        until `filled`: a pass that fails leaves it half written.

        Args:
            own: the last so many tokens of a prompt are computed, whatever is held.
            later: tokens that come behind the prompt.
        """
        kept, longest = None, max(map(len, prompts)) + later
        if self.keeps(len(prompts)):
            kept, self._kept = self._kept, None
        if kept is None or kept.cache.get_max_length() < longest:
            kept = _Kept(StaticCache(self._config, -(-longest // _STEP) * _STEP), [])
        held = min(_shared_text(kept.prompt, prompts[0], self._image_id), len(prompts[0]) - own)
        for length in lengths_of(kept.cache):
            length.fill_(held)
        return kept.cache, held

    def filled(self, prompts: list[list[int]], cache: StaticCache) -> None:
        """The pass over the prompts came to its end."""
        if self.keeps(len(prompts)):
            self._kept = _Kept(cache, prompts[0])


def _shared_text(held: list[int], prompt: list[int], image_id: int) -> int:
    """Tokens that two prompts begin with alike, up to the first frame: its token stands for any picture."""
    for i, (old, new) in enumerate(zip(held, prompt, strict=False)):
        if old != new or new == image_id:
            return i
    return min(len(held), len(prompt))
