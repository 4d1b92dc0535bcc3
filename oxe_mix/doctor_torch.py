"""What torch and DeepSpeed are here, asked in a process of its own: a build that crashes when it is imported
ends that one, not ours, and whatever it prints stays there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from oxe_mix.text import size
from oxe_mix.verdicts import Verdict

_TIMEOUT_S = 60.0  # a cold start on a network disk
_TOO_LITTLE_GPU = 8 * 2**30  # bytes; the smallest released model with its optimizer does not fit below
_CPU_BUILD = "only its CPU build is installed"
# Prints one JSON object behind this mark; libraries print before it.
_MARK = "oxe-mix doctor: "
_PROBE = """
import json
said = {}
try:
    import torch
    said["torch"], said["cuda"] = torch.__version__, torch.version.cuda
    said["gpus"] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            said["gpus"].append([gpu.name, gpu.total_memory])
except Exception as error:
    said["torch_error"] = f"{type(error).__name__}: {error}"
else:
    try:
        import deepspeed
        said["deepspeed"] = deepspeed.__version__
    except Exception as error:
        said["deepspeed_error"] = f"{type(error).__name__}: {error}"
print("MARK" + json.dumps(said))
""".replace("MARK", _MARK)


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What the probe saw; an error is empty where there was none."""

    torch: str | None = None
    cuda: str | None = None  # of the build; None for a CPU build
    gpus: tuple[tuple[str, int], ...] = ()  # name, bytes
    deepspeed: str | None = None
    torch_error: str = ""
    deepspeed_error: str = ""


def torch_facts() -> TorchFacts:
    """Import torch and DeepSpeed in another process and say what they are."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return TorchFacts(torch_error=f"the import takes longer than {_TIMEOUT_S:.0f} s")
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    if last is None:
        words = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
        return TorchFacts(torch_error=f"the import ends the process (exit {done.returncode}): {words[0]}")
    said: dict[str, Any] = json.loads(last.removeprefix(_MARK))
    gpus = tuple((str(name), int(memory)) for name, memory in said.pop("gpus", ()))
    return TorchFacts(**said, gpus=gpus)


def nvidia_driver() -> str | None:
    """`NAME, driver VERSION` as nvidia-smi says it; None without one, or when it finds no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    name, _, driver = lines[0].rpartition(",")
    return f"{name.strip()}, driver {driver.strip()}"


def check_torch(facts: TorchFacts) -> Verdict:
    """Is there a torch, and of which build?"""
    if facts.torch_error:
        missing = facts.torch_error.startswith("ModuleNotFoundError: No module named 'torch'")
        if missing:
            text = "not installed; download and convert do without it, training does not"
            return Verdict("warning", "environment", "torch", text, mend='pip install "oxe-mix[train]"')
        mend = "rm -rf .venv, then make setup"
        return Verdict("error", "environment", "torch", facts.torch_error, mend=mend)
    build = f"CUDA {facts.cuda}" if facts.cuda else "CPU build"
    return Verdict("ok", "environment", "torch", f"{facts.torch}, {build}")


def check_gpu(facts: TorchFacts, driver: str | None) -> Verdict:
    """Does torch see the GPU that the machine has?"""
    if facts.gpus:
        names = ", ".join(f"{name} with {size(memory)}" for name, memory in facts.gpus)
        text = f"{names}{f' ({driver})' if driver else ''}"
        if min(memory for _, memory in facts.gpus) < _TOO_LITTLE_GPU:
            mend = "no released model fits; make train CONFIG=train_llava/configs/tiny-cpu.yaml does"
            return Verdict("warning", "machine", "gpu", f"{text}: little memory", mend=mend)
        return Verdict("ok", "machine", "gpu", text)
    if driver is None:
        return Verdict("ok", "machine", "gpu", "none; training runs on the CPU, small models only")
    why = _CPU_BUILD if facts.torch and not facts.cuda else "its CUDA does not start with this driver"
    mend = (
        "make setup CONSTRAINTS=envs/cuda.txt" if why == _CPU_BUILD else "nvidia-smi, then update the driver"
    )
    return Verdict("warning", "machine", "gpu", f"{driver}, but torch sees none: {why}", mend=mend)


def check_deepspeed(facts: TorchFacts) -> Verdict:
    """Can DeepSpeed, by which training shares a model among ranks, be imported?"""
    if facts.deepspeed:
        return Verdict("ok", "environment", "deepspeed", facts.deepspeed)
    if not facts.torch:
        return Verdict("warning", "environment", "deepspeed", "not looked at, since torch is not there")
    if "No module named 'deepspeed'" in facts.deepspeed_error:
        text, mend = "not installed; make train needs it", 'pip install "oxe-mix[train]"'
        return Verdict("warning", "environment", "deepspeed", text, mend=mend)
    mend = "rm -rf .venv, then make setup"
    return Verdict("error", "environment", "deepspeed", facts.deepspeed_error, mend=mend)
