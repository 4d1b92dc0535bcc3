"""The 256 action tokens in tokenizer and model: added once, their rows begun, and proved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from convert.action_codec import action_tokens
from oxe_mix.errors import UserError
from train_llava.model import OneViewLlava
from train_llava.slots import add_slots, slot_ids

_ROWS_AT_ONCE = 8192  # of a table whose mean is taken: in float32 all of a 7B's would be 2 GB


@dataclass(frozen=True, slots=True)
class ActionTokens:
    """What became of the action tokens in a model."""

    ids: tuple[int, ...]  # in order of their bins
    num_new: int  # of them, those whose rows were begun here
    is_tied: bool
    num_slots: int = 0  # tokens beside them, for parallel decoding

    def __str__(self) -> str:
        """A line of a run's report."""
        rows = "in the checkpoint already, their rows kept"
        if self.num_new:
            which = "new rows" if self.num_new == len(self.ids) else f"{self.num_new} new rows"
            rows = f"{which} of input and output embedding at the mean of the old ones"
        head = "tied" if self.is_tied else "not tied"
        if self.num_slots:
            head += f", and {self.num_slots} action slots"
        return f"{len(self.ids)} action tokens: ids {min(self.ids)} to {max(self.ids)}, {rows}, head {head}"


def add_action_tokens(
    model: OneViewLlava, tokenizer: PreTrainedTokenizerBase, num_slots: int = 0
) -> ActionTokens:
    """Add the 256 action tokens once, and prove that they survive the tokenizer, alone and side by side.

    Rows of new tokens start at the mean of the old tokens' rows, in the input and in the output embedding, so
    that no action token begins as a stranger or a favourite; a tied head stays tied. A tokenizer that has
    the tokens already keeps what was learnt for them.

    Args:
        num_slots: for parallel decoding, as many action slots beside them.

    Raises: UserError when the tokenizer does not keep them apart, or has slots, but not so many.
    """
    known = sorted(set(tokenizer.get_vocab().values()))
    tokenizer.add_tokens(action_tokens(), special_tokens=True)
    add_slots(tokenizer, num_slots)
    ids = prove_action_tokens(tokenizer)
    new = set(ids) - set(known)
    begin_rows(model, sorted(set(own_ids(tokenizer)) - set(known)), known)
    is_tied = rows_of(model.get_output_embeddings()) is rows_of(model.get_input_embeddings())
    return ActionTokens(tuple(ids), len(new), is_tied, num_slots)


def own_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all tokens that are ours: the actions', in order of their bins, and then the slots'.

    Raises: UserError as `prove_action_tokens`.
    """
    return prove_action_tokens(tokenizer) + slot_ids(tokenizer)


def begin_rows(model: OneViewLlava, new: Sequence[int], known: Sequence[int]) -> None:
    """Begin the rows of new tokens at the mean of the known ones', in the input and the output embedding.

    The tables grow where they have no such rows. Where they have, as Qwen2's, which are longer than its
    vocabulary, these rows belong to no token yet: they are overwritten, and no part of the mean.
    """
    if not new:
        return
    old_rows = len(rows_of(model.get_input_embeddings()))
    if max(new) >= old_rows:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    real = torch.tensor([i for i in known if i < old_rows])
    both = (rows_of(model.get_input_embeddings()), rows_of(model.get_output_embeddings()))
    with torch.no_grad():
        for table in {id(table): table for table in both}.values():  # a tied head is one table
            # In float32: a bfloat16 sum over 150,000 rows would be off by more than the rows are large.
            total = sum(
                (table[part].float().sum(dim=0) for part in real.split(_ROWS_AT_ONCE)), torch.tensor(0)
            )
            table[list(new)] = (total / len(real)).to(table.dtype)


def prove_action_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the 256 action tokens, in order of their bins.

    Raises: UserError when they are not 256 distinct single ids that survive encoding and decoding side by
    side.
    """
    tokens = action_tokens()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary.get(token, -1) for token in tokens]
    alone = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    together = tokenizer("".join(tokens), add_special_tokens=False)["input_ids"]
    if len(set(ids)) != len(tokens) or alone != [[i] for i in ids] or together != ids:
        raise UserError(
            "the tokenizer does not keep the 256 action tokens apart; the checkpoint is not one of ours"
        )
    if tokenizer.decode(ids, spaces_between_special_tokens=False) != "".join(tokens):
        raise UserError("the tokenizer does not give the action tokens back as they were")
    return ids


def rows_of(layer: Any) -> Tensor:
    """The weights of an embedding or of a head, [vocabulary, hidden]."""
    weight: Tensor = layer.weight
    return weight
