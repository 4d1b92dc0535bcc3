"""Is the environment the one that the project was tested with? Installed packages beside the pins of envs/,
or, away from a checkout, beside the ranges that the package itself declares. Nothing is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from oxe_mix.text import count
from oxe_mix.verdicts import Verdict

_OWN = "oxe-mix"
_CHECKOUT = Path(__file__).parent.parent
_CPU_PINS, _CUDA_PINS = "envs/cpu.txt", "envs/cuda.txt"
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;#]+)")
_SHOWN = 6
_SUBJECT = "environment"


@dataclass(frozen=True, slots=True)
class Installed:
    """Distributions by canonical name: their versions, and the requirements that each declares."""

    versions: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]]


def installed() -> Installed:
    """What this Python finds; of a name that is there twice the first on the path counts."""
    versions: dict[str, str] = {}
    requires: dict[str, tuple[str, ...]] = {}
    for one in metadata.distributions():
        name = canonicalize_name(one.metadata["Name"] or "")
        if name and name not in versions:
            versions[name], requires[name] = one.version, tuple(one.requires or ())
    return Installed(versions, requires)


def pins_file(cuda: bool) -> Path | None:
    """The pins that this environment is held to: those that `make setup` chose, else by torch's build.

    None away from a checkout.
    """
    chosen = Path(sys.prefix, ".constraints")
    name = chosen.read_text().strip() if chosen.is_file() else ""
    file = _CHECKOUT / (name or (_CUDA_PINS if cuda else _CPU_PINS))
    return file if file.is_file() else None


def read_pins(file: Path) -> dict[str, str]:
    """Versions by canonical name, those of the files that it names with `-c` included."""
    pins: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[:1] in (["-c"], ["-r"]) and len(words) == 2:
            pins |= read_pins(file.parent / words[1])
        elif match := _PIN.match(line.strip()):
            pins[canonicalize_name(match["name"])] = match["version"]
    return pins


def check_pins(have: Installed, pins: Mapping[str, str], file: Path) -> Verdict:
    """Installed versions beside the tested ones; a pinned package that is not installed is of an extra."""
    name = f"{file.parent.name}/{file.name}"
    there = {one: version for one, version in pins.items() if one in have.versions}
    other = [
        f"{one} {have.versions[one]} (tested {version})"
        for one, version in sorted(there.items())
        if not _same(have.versions[one], version)
    ]
    if not other:
        return Verdict("ok", _SUBJECT, "versions", f"{count(len(there), 'package')} as pinned in {name}")
    text = f"{len(other)} of {count(len(there), 'package')} are not as pinned in {name}: {_few(other)}"
    return Verdict("warning", _SUBJECT, "versions", text, mend=f"make setup CONSTRAINTS={name}")


def check_ranges(have: Installed) -> Verdict:
    """Our own requirements, where no pins are at hand; what an extra asks for is checked if it is there."""
    if _OWN not in have.versions:
        return Verdict("warning", _SUBJECT, "versions", f"{_OWN} is not installed", mend="pip install -e .")
    wrong, num = list[str](), 0
    for line in have.requires[_OWN]:
        requirement = Requirement(line)
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        version = have.versions.get(canonicalize_name(requirement.name))
        if version is None and extra:
            continue
        num += 1
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})")
    if not wrong:
        return Verdict("ok", _SUBJECT, "versions", f"{count(num, 'requirement')} met")
    return Verdict("error", _SUBJECT, "versions", _few(wrong), mend="pip install --upgrade oxe-mix")


def check_conflicts(have: Installed) -> Verdict:
    """What `pip check` asks: does every package find what it requires, in a version that it takes?"""
    wrong = [problem for name in sorted(have.requires) for problem in _conflicts(have, name)]
    if not wrong:
        num = count(len(have.versions), "package")
        return Verdict("ok", _SUBJECT, "conflicts", f"none among {num}")
    text = f"{count(len(wrong), 'conflict')}: {_few(wrong)}"
    return Verdict("error", _SUBJECT, "conflicts", text, mend="rm -rf .venv, then make setup")


def _conflicts(have: Installed, name: str) -> Iterable[str]:
    for line in have.requires[name]:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # pip, too, leaves alone what it cannot read in others' metadata
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = have.versions.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"{name} needs {requirement.name}, which is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{name} needs {requirement.name}{requirement.specifier}, there is {version}"


def _same(version: str, pinned: str) -> bool:
    """A local suffix (2.13.0+cpu) names a build of the same release."""
    try:
        return Version(Version(version).public) == Version(Version(pinned).public)
    except InvalidVersion:
        return version == pinned


def _few(lines: list[str]) -> str:
    more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + more
