"""Parallel decoding: one slot token behind the prompt for each action token, all answered by one pass.

A slot is an input token like any other, so its learned embedding lies in the model's own table and a
checkpoint keeps its format; a tokenizer that has slots says that its model is asked this way. Slots see the
prompt and one another, the prompt sees what is before it.
Source: OpenVLA-OFT (arXiv:2502.19645), parallel decoding with bidirectional attention.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from oxe_mix.errors import UserError


def slot_tokens(number: int) -> list[str]:
    """The tokens of so many slots, in order."""
    return [f"<ACTION_SLOT_{i}>" for i in range(number)]


def slot_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a tokenizer's slots, in order; none where its model answers token by token."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<ACTION_SLOT_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    return ids


def add_slots(tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """Give a tokenizer its slots; 0: none. Raises: UserError when it has some already, but not so many."""
    there = len(slot_ids(tokenizer))
    if there not in (0, number):
        wanted = f"{number} are wanted" if number else "train.parallel_action_slots is false"
        raise UserError(f"the checkpoint's tokenizer has {there} action slots, but {wanted}")
    tokenizer.add_tokens(slot_tokens(number), special_tokens=True)


def check_slots(ids: list[int], tokens_per_answer: int) -> None:
    """Raises: UserError when there are slots, but not one for each token of an answer."""
    if ids and len(ids) != tokens_per_answer:
        raise UserError(
            f"the tokenizer has {len(ids)} action slots, but an answer is {tokens_per_answer} tokens; "
            "checkpoint and action codec do not belong together"
        )
