"""Before several machines start a run, they prove in its folder that they share it, and run the same."""

from __future__ import annotations

import hashlib
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oxe_mix.errors import UserError
from oxe_mix.files import parse_json, write_json
from oxe_mix.text import say
from train_llava.supervise import Cluster

_FOLDER, _ANSWER = ".nodes", "answer.json"
# Seconds: the command is typed on one machine after the other.
_PATIENCE_S, _SAY_AFTER_S, _POLL_S = 600.0, 5.0, 0.2
_WHAT_TO_DO = "start the same command there, with RUN on a file system that all machines share"
_CODE = ("train_llava", "convert", "oxe_mix")


def what_runs_here(config: Path, llava_manifest: Path, cluster: Cluster) -> dict[str, str]:
    """What must be the same on all machines, under the name that a message gives it."""
    code = hashlib.sha256()
    for package in _CODE:
        for file in sorted((Path(__file__).parent.parent / package).glob("*.py")):
            code.update(file.name.encode() + file.read_bytes())
    return {
        "NPROC": str(cluster.num_local),
        "NNODES": str(cluster.num_nodes),
        "MASTER": "{}:{}".format(*cluster.master or ("", "")),
        "Python": platform.python_version(),
        "torch": version("torch"),
        "CONFIG": _digest(config.read_bytes()),
        "LLAVA": _digest(llava_manifest.read_bytes()),
        "the checkout": code.hexdigest()[:8],
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


@contextmanager
def met(
    run: Path, cluster: Cluster, facts: dict[str, str], patience_s: float = _PATIENCE_S
) -> Iterator[None]:
    """The block is run when all machines have seen each other in the run's folder; node 0 leads.

    Raises: UserError when one of them is not seen there in time, or runs something else.
    """
    folder = run / _FOLDER
    if cluster.num_nodes == 1:
        yield
    elif cluster.node == 0:
        # Not the folder: another machine may just be writing there.
        for leftover in folder.glob("*.json"):
            leftover.unlink(missing_ok=True)
        _lead(folder, cluster, facts, patience_s)
        yield
    else:
        _follow(folder, cluster, facts, patience_s)
        yield


def _lead(folder: Path, cluster: Cluster, facts: dict[str, str], patience_s: float) -> None:
    files = {node: _file(folder, node) for node in range(1, cluster.num_nodes)}

    notes: dict[int, dict[str, Any]] = {}

    def missing() -> list[int]:
        notes.update({node: note for node, file in files.items() if (note := read_note(file))})
        return [node for node in files if node not in notes]

    if not wait_for(lambda: not missing(), f"waiting for the other machines in {folder.parent}", patience_s):
        nodes = ", ".join(map(str, missing()))
        raise UserError(f"{folder.parent}: no sign of NODE_RANK={nodes} in {patience_s:g} s; {_WHAT_TO_DO}")
    problem = "; ".join(
        f"{name} is {note['facts'].get(name)} on NODE_RANK={node}, but {value} on NODE_RANK=0"
        for node, note in notes.items()
        for name, value in facts.items()
        if note["facts"].get(name) != value
    )
    problem = problem and f"the machines do not run the same: {problem}"
    write_json(folder / _ANSWER, {"tokens": [note["token"] for note in notes.values()], "problem": problem})
    if problem:
        raise UserError(problem)


def _follow(folder: Path, cluster: Cluster, facts: dict[str, str], patience_s: float) -> None:
    # What an earlier start left there is not an answer to this one.
    token = secrets.token_hex(8)
    answer: dict[str, Any] = {}

    def answered() -> bool:
        if not _file(folder, cluster.node).exists():  # node 0 starts with an empty folder
            write_json(_file(folder, cluster.node), {"token": token, "facts": facts})
        answer.update(read_note(folder / _ANSWER))
        return token in answer.get("tokens", ())

    _file(folder, cluster.node).unlink(missing_ok=True)
    if not wait_for(answered, f"waiting for NODE_RANK=0 in {folder.parent}", patience_s):
        raise UserError(f"{folder.parent}: no sign of NODE_RANK=0 in {patience_s:g} s; {_WHAT_TO_DO}")
    if answer["problem"]:
        raise UserError(answer["problem"])


def read_note(file: Path) -> dict[str, Any]:
    """A note; empty while there is none. It may go between two looks: node 0 clears the folder."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return {}
    note: dict[str, Any] = parse_json(text, str(file), "a machine's note")
    return note


def _file(folder: Path, node: int) -> Path:
    return folder / f"node-{node}.json"


def wait_for(done: Callable[[], bool], what: str, patience_s: float) -> bool:
    """Until it is so or the time is up; says what it waits for when it takes long. Returns: whether it is."""
    start, said = time.monotonic(), False
    while not done():
        waited = time.monotonic() - start
        if waited > patience_s:
            return False
        if waited > _SAY_AFTER_S and not said:
            say(what)
            said = True
        time.sleep(_POLL_S)
    return True
