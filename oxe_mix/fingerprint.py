"""What `oxe-mix --version` says: all that decides about a result, so that two machines can be compared."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from oxe_mix import __version__

_ROOT = Path(__file__).parents[1]
_CODE = ("oxe_mix", "convert", "pipelines", "train_llava")
_CODE_SUFFIXES = (".py", ".html", ".css", ".js")  # a report's templates, too
_DRIVER = Path("/proc/driver/nvidia/version")
# Those whose version can change bytes, or losses.
_PACKAGES = (
    "apache-beam",
    "numpy",
    "pillow",
    "simplejpeg",
    "pydantic",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
)


def fingerprint() -> str:
    """Version, hashes of code, cards and mixes, Python and packages; a line each."""
    code = (
        file for package in _CODE for file in (_ROOT / package).rglob("*") if file.suffix in _CODE_SUFFIXES
    )
    packages = (f"{name} {_version(name)}" for name in _PACKAGES)
    return "\n".join(
        [
            f"oxe-mix {__version__}",
            f"code {_digest(code)}, cards {_digest((_ROOT / 'oxe_mix/cards').glob('*.yaml'))}, "
            f"feature trees {_digest((_ROOT / 'oxe_mix/trees').glob('*.json'))}, "
            f"mixes {_digest((_ROOT / 'mixtures').glob('*.yaml'))}, "
            f"configs {_digest((_ROOT / 'train_llava/configs').glob('*.yaml'))}",
            f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
            f"GPU driver {_driver()}",
            ", ".join(packages),
        ]
    )


def _digest(files: Iterable[Path]) -> str:
    """Of names and bytes; "none" where there are no files."""
    found = sorted(file.relative_to(_ROOT).as_posix() for file in files)
    whole = hashlib.sha256()
    for name in found:
        content = hashlib.sha256((_ROOT / name).read_bytes()).hexdigest()
        whole.update(f"{name}\0{content}\n".encode())
    return whole.hexdigest()[:12] if found else "none"


def _driver() -> str:
    """Of the kernel: CUDA's own version is in torch's."""
    found = re.search(r"\d+(\.\d+)+", _DRIVER.read_text()) if _DRIVER.exists() else None
    return found[0] if found else "none"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
