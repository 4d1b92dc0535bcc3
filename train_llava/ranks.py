"""The processes of a training run: who this one is, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from oxe_mix.text import say

# Rank 0 alone saves, loads again and indexes data while the others wait for it.
_LONGEST_WAIT = timedelta(hours=2)
_agreeing: dict[str, dist.ProcessGroup] = {}


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    """Processes of the run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """Where this rank computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join() -> None:
    """Meet the other ranks."""
    import deepspeed

    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # DeepSpeed would compile an all-reduce of its own for CPUs, in a cache of torch's whose lock is a plain
    # file: a rank killed meanwhile leaves it behind, and every later run on the machine waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=_LONGEST_WAIT, verbose=False)
    # What the ranks agree on is on the CPU: to ask a GPU would be to wait for all that it still has to do.
    _agreeing["cpu"] = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def leave() -> None:
    """End the connections to the other ranks. Left to the interpreter's end, their threads now and then abort
    the process: "terminate called without an active exception".
    """
    _agreeing.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank; all of them must ask."""
    if not _agreeing:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_agreeing["cpu"])
    return bool(value)


def gather(value: Any) -> list[Any]:
    """A value of each rank, in order; all of them must call."""
    if not _agreeing:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group=_agreeing["cpu"])
    return values


def wait() -> None:
    """Go on when all ranks are here."""
    if _agreeing:
        dist.barrier(group=_agreeing["cpu"])


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The block is run by rank 0, and then by all others: what the first left on disk is there for them."""
    if rank() != 0:
        wait()
    try:
        yield
    finally:
        if rank() == 0:
            wait()


def tell(text: str) -> None:
    """Said once, by the first rank."""
    if rank() == 0:
        say(text)
