"""A run on several machines, started from one of them: a hostfile as DeepSpeed's, and ssh."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from oxe_mix.errors import UserError
from oxe_mix.text import complain, say

_LINE = re.compile(r"(?P<name>\S+)(?:\s+slots=(?P<slots>\S+))?")
# No name may be taken for an option of ssh.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.-]*")
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
# Of the environment here, what ranks need there too; ssh passes nothing on. No secrets: all see a command.
_PASSED_ON = re.compile(r"NCCL_\w+|GLOO_\w+|OMP_NUM_THREADS|STOP_SECONDS|HF_HOME|HF_HUB_OFFLINE")
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
_SSH_FAILED = 255
# Seconds that the others have to end by themselves when one machine failed; with it gone they cannot save.
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, and how many ranks it takes."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """Without the user who logs in."""
        return self.name.rpartition("@")[2]


def read_hostfile(file: Path) -> tuple[Host, ...]:
    """Read lines such as `node1 slots=8`; `#` begins a comment.

    Raises: UserError with file and line. All hosts have the same number of slots, as every NPROC is the same.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); expected a hostfile, `node1 slots=8` a line"
        ) from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            hosts.append(_host(text, hosts))
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from error
    if not hosts:
        raise UserError(f"{file}: names no host; write `node1 slots=8` for each machine")
    return tuple(hosts)


def _host(text: str, before: list[Host]) -> Host:
    """One line's. Raises: ValueError without the place."""
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not of the form `node1 slots=8`")
    name, slots = match["name"], match["slots"] or ""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no host's name")
    if not re.fullmatch("[1-9][0-9]*", slots):
        raise ValueError(f"{name} needs slots=N, the number of its GPUs; at least 1")
    if name in (host.name for host in before):
        raise ValueError(f"{name} is named twice; one line with all its slots")
    if before and int(slots) != before[0].slots:
        raise ValueError(
            f"{name} has {slots} slots and {before[0].name} {before[0].slots}; give all the same number"
        )
    return Host(name, int(slots))


def run_on_hosts(commands: dict[str, list[str]], grace_s: float = _GRACE_S) -> int:
    """Run a command on each host, in this working folder, and stay with them to the end.

    Args:
        commands: of each host; the first's standard output is shown as it comes, all else under the host's
            name. They take `stop` on their standard input for SIGTERM, and its end too, so that none goes on
            alone; and `now` for SIGINT.
        grace_s: from a failure of one until the others are told `now`, and again until they are cut off.

    Returns: the exit code. Raises: UserError where there is no ssh.
    """
    if shutil.which("ssh") is None:
        raise UserError(
            "there is no ssh on this machine; install an ssh client, or start each host with NODE_RANK"
        )
    return _Started(commands).stay(grace_s)


class _Started:
    """The ssh processes, one per host."""

    def __init__(self, commands: dict[str, list[str]]) -> None:
        self._asked: signal.Signals | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        for host, command in commands.items():
            # A session of its own: Ctrl-C must not cut the line on which the other side is told to save.
            process = subprocess.Popen(
                ["ssh", *_OPTIONS, host, _over_ssh(command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self._processes[host] = process
            self._follow(host, process.stdout, is_error=False, prefix=f"{host}: " if self._readers else "")
            self._follow(host, process.stderr, is_error=True, prefix=f"{host}: ")
        if self._asked is not None:
            self._tell("stop")

    def stay(self, grace_s: float) -> int:
        """Until all have ended; when one failed, the others are told to."""
        failed, since = "", 0.0
        told = {"stop": 0.0, "now": grace_s, "cut": 2 * grace_s}
        while None in (codes := {host: process.poll() for host, process in self._processes.items()}).values():
            if not failed:
                failed = next((host for host, code in codes.items() if code not in (None, 0, *_STOPPED)), "")
                since = time.monotonic()
            while failed and told and time.monotonic() - since >= min(told.values()):
                word = next(iter(told))
                del told[word]
                self._tell(word)
            time.sleep(0.1)
        for reader in self._readers:
            reader.join()
        return self._outcome({host: process.returncode for host, process in self._processes.items()}, failed)

    def _outcome(self, codes: dict[str, int], failed: str) -> int:
        wrong = {host: code for host, code in codes.items() if code not in (0, *_STOPPED)}
        if not wrong:
            stopped = any(codes.values())
            return 128 + (self._asked or signal.SIGTERM) if stopped else 0
        host = failed or next(iter(wrong))
        why = " (ssh: not connected, or cut off)" if wrong[host] == _SSH_FAILED else ""
        others = "; the others were ended" if len(codes) > 1 else ""
        complain(f"{host}: ended with exit code {wrong[host]}{why}{others}")
        return 2 if wrong[host] == 2 else 1

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        first, self._asked = self._asked is None, self._asked or signal.Signals(number)
        if first:
            self._tell("stop")
        elif number == signal.SIGINT:
            self._tell("now")

    def _tell(self, word: str) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            try:
                if word == "cut":
                    process.kill()
                # Past the buffer, which a signal could find in use.
                os.write(process.stdin.fileno(), f"{word}\n".encode())
            except BrokenPipeError:
                continue  # it has ended

    def _follow(self, host: str, stream: IO[bytes] | None, *, is_error: bool, prefix: str) -> None:
        assert stream is not None

        def follow(stream: IO[bytes] = stream) -> None:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip("\n")
                if is_error and line.startswith("error: "):
                    complain(prefix + line.removeprefix("error: "))
                elif is_error:
                    sys.stderr.write(f"{prefix}{line}\n")
                    sys.stderr.flush()
                else:
                    say(prefix + line)

        reader = threading.Thread(target=follow, daemon=True, name=f"output of {host}")
        reader.start()
        self._readers.append(reader)


def _over_ssh(command: list[str]) -> str:
    """One line for the other side's shell: the same folder, and what it needs of this environment."""
    passed = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _PASSED_ON.fullmatch(name)]
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *passed, *command])}"
