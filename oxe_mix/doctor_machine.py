"""`oxe-mix doctor` without a folder: can this machine, and this environment, do the work?

Each check is a pure function of facts; `machine_verdicts` collects the facts.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from oxe_mix.cards import Cards
from oxe_mix.doctor_packages import check_conflicts, check_pins, check_ranges, installed, pins_file, read_pins
from oxe_mix.doctor_torch import check_deepspeed, check_gpu, check_torch, nvidia_driver, torch_facts
from oxe_mix.errors import UserError
from oxe_mix.mix import Mix
from oxe_mix.rlds import INFO_FILE
from oxe_mix.source_file import FileMissingError, TransientError
from oxe_mix.text import size
from oxe_mix.transport import open_range
from oxe_mix.verdicts import Verdict

_MACHINE = "machine"
_GIB = 2**30
_PYTHONS = ((3, 11), (3, 12))
# Below these, what runs by default has not enough: bytes, and numbers of files.
_FEW_BYTES, _NO_BYTES = 20 * _GIB, _GIB
_SMALL_MEMORY = 4 * _GIB
_SMALL_SHM = _GIB  # a loader's workers hand batches over through it; a container has 64 MiB unless asked
_FEW_FILES = 1024
NETWORK_TIMEOUT_S = 4.0
_REASON = 160  # letters of it


def machine_verdicts(data: Path, mix: Mix | None, cards: Cards) -> list[Verdict]:
    """Look at the machine and the environment.

    Args:
        data: where downloads are to go; it need not be there yet.
        mix: whose sources are asked for one small file each; None: no network.
        cards: of the mix's datasets.
    """
    with ThreadPoolExecutor(2) as pool:
        # These two wait for another process; meanwhile the packages are read.
        torch, driver = pool.submit(torch_facts), pool.submit(nvidia_driver)
        have = installed()
        conflicts = check_conflicts(have)
        facts = torch.result()
        pins = pins_file(facts.cuda is not None)
        versions = check_pins(have, read_pins(pins), pins) if pins else check_ranges(have)
        machine = [check_gpu(facts, driver.result()), check_compiler(_compiler()), *_resources(data)]
    environment = [check_python(sys.version_info[:3]), versions, conflicts]
    with ThreadPoolExecutor(8) as pool:
        network = list(pool.map(check_source, _addresses(mix, cards) if mix else []))
    return [*environment, check_torch(facts), check_deepspeed(facts), *machine, *network]


def _resources(data: Path) -> list[Verdict]:
    shm = Path("/dev/shm")
    return [
        check_disk(data, _free(data)),
        check_memory(len(os.sched_getaffinity(0)), _memory()),
        check_shared_memory(shutil.disk_usage(shm).free if shm.is_dir() else None),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]


def check_python(version: tuple[int, int, int]) -> Verdict:
    """Python 3.11 or 3.12."""
    text = ".".join(map(str, version))
    if version[:2] in _PYTHONS:
        return Verdict("ok", "environment", "python", text)
    mend = "make setup PYTHON=/path/to/python3.11"
    return Verdict("error", "environment", "python", f"{text}; tested are 3.11 and 3.12", mend=mend)


def check_compiler(program: str | None) -> Verdict:
    """A C++ compiler: `train.compile: true` needs one, nothing else does."""
    if program:
        return Verdict("ok", _MACHINE, "compiler", program)
    text = "no C++ compiler; only train.compile: true needs one"
    return Verdict("warning", _MACHINE, "compiler", text, mend="apt-get install g++")


def check_disk(data: Path, free: int | None) -> Verdict:
    """Room where downloads go; `free` in bytes, None when the folder cannot be asked."""
    if free is None:
        return Verdict("warning", _MACHINE, "disk", f"{data}: cannot be asked for its free space")
    text = f"{size(free)} free for {data}"
    # 0.9: convert writes the frames again.
    half = max(1, int(free * 0.45 / 1e9))
    if free < _NO_BYTES:
        mend = "free some space, or give --out a folder on another disk"
        return Verdict("error", _MACHINE, "disk", text, mend=mend)
    mend = f"oxe-mix download --mix default.yaml --max-gb {half}"
    if free < _FEW_BYTES:
        return Verdict("warning", _MACHINE, "disk", text, mend=mend)
    return Verdict("ok", _MACHINE, "disk", f"{text}: {mend} and its conversion fit")


def check_memory(cores: int, available: int | None) -> Verdict:
    """Cores that this process may use, and bytes of memory that are free for it."""
    cpus = f"{cores} core{'' if cores == 1 else 's'}"
    if available is None:
        return Verdict("ok", _MACHINE, "memory", f"{cpus}; free memory is not known")
    text = f"{cpus}, {size(available)} free"
    if available >= _SMALL_MEMORY:
        return Verdict("ok", _MACHINE, "memory", text)
    mend = "free some memory, or: oxe-mix convert --workers 1"
    return Verdict("warning", _MACHINE, "memory", text, mend=mend)


def check_shared_memory(free: int | None) -> Verdict:
    """Bytes free in /dev/shm; None where there is none."""
    if free is None:
        text = "no /dev/shm; a loader's workers need it"
    elif free >= _SMALL_SHM:
        return Verdict("ok", _MACHINE, "shared memory", f"{size(free)} free in /dev/shm")
    else:
        text = f"{size(free)} free in /dev/shm; a loader's workers may die of a bus error"
    return Verdict("warning", _MACHINE, "shared memory", text, mend="docker run --shm-size=8g")


def check_open_files(limit: int) -> Verdict:
    """Files that a process may have open."""
    if limit == resource.RLIM_INFINITY:
        return Verdict("ok", _MACHINE, "open files", "no limit")
    if limit >= _FEW_FILES:
        return Verdict("ok", _MACHINE, "open files", f"at most {limit:,}")
    return Verdict("warning", _MACHINE, "open files", f"at most {limit:,}", mend="ulimit -n 65536")


def check_source(url: str, timeout_s: float = NETWORK_TIMEOUT_S) -> Verdict:
    """Read the first bytes of a file at a source. It has `timeout_s` in all: the name of a host may take its
    resolver longer than any timeout of ours.
    """
    said: list[str] = []

    def read() -> None:
        try:
            with open_range(url, 0, 64, timeout_s) as stream:
                next(stream.chunks, b"")
            said.append("")
        except FileMissingError:  # an answer, too
            said.append("")
        except (UserError, TransientError, OSError) as error:
            said.append(f"{error}")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout_s)
    parts = urlsplit(url)
    where = f"{parts.scheme}://{parts.netloc}"
    problem = said[0] if said else f"no answer within {timeout_s:g} s"
    if not problem:
        return Verdict("ok", _MACHINE, "network", f"{where} answers")
    reason = _last_cause(problem.removeprefix(f"{url}: "))
    mend = "see https_proxy, or name a copy: oxe-mix download --mix default.yaml --source URI"
    return Verdict("warning", _MACHINE, "network", f"{where}: {reason}", mend=mend)


def _last_cause(problem: str) -> str:
    """Of the whole chain of causes that urllib3 tells: what happened."""
    reason = problem.rpartition(": ")[2]
    # The brackets and quotes of those before end behind it.
    while (reason.endswith(")") and reason.count("(") < reason.count(")")) or reason.count('"') % 2:
        reason = reason.rpartition(reason[-1])[0] if reason[-1] in '")' else reason.replace('"', "")
    return reason if len(reason) <= _REASON else f"{reason[:_REASON]} ..."


def _addresses(mix: Mix, cards: Cards) -> list[str]:
    """One file of each source of a mix: the metadata of its first dataset there."""
    found: dict[str, str] = {}
    for spec in mix.datasets:
        for source in mix.sources_of(spec):
            card = cards.find(spec.name)
            name = card.name if card else spec.name
            found.setdefault(source, f"{source.rstrip('/')}/{name}/{spec.version}/{INFO_FILE}")
    return list(found.values())


def _compiler() -> str | None:
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _free(data: Path) -> int | None:
    """Bytes free where `data` is or will be."""
    there = data.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def _memory() -> int | None:
    """Bytes free for this process: what the machine has left, and a container's limit if that is less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit: `max` is no number
        return free
    return min(free, max(0, limit - used))
