"""How fast a robot gets its actions, on a GPU: the true shape of the 7B model with random weights in bf16.

Where there is no GPU, `--dry` goes the same way with a small model on the CPU, and the result says that
nothing was measured.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.act import measure
from benchmarks.acting_models import NARROW, TRUE_7B
from benchmarks.results import write_result
from oxe_mix.text import complain, say
from train_llava.quiet import quiet_libraries

_TARGETS = {"token by token": 12.0, "one pass, chunk 8": 200.0}  # answers/s, and actions/s
_PACKAGES = ("torch", "transformers", "numpy", "pillow")


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="a small model on the CPU: nothing is measured")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        complain("no CUDA device; --dry tries the same way on the CPU")
        raise SystemExit(2)
    quiet_libraries()
    if args.dry:
        measure(NARROW, torch.device("cpu"), torch.float32, rounds=1)
        figures: dict[str, Any] = {
            "measured": False,
            "why": "not measured: no GPU; the same way was gone on a CPU",
        }
    else:
        figures = {"measured": True, "gpu": torch.cuda.get_device_name(), "targets_per_s": _TARGETS}
        figures |= measure(TRUE_7B, torch.device("cuda"), torch.bfloat16, rounds=30)
    say(f"result: {write_result('gpu-act' + ('-dry' if args.dry else ''), _PACKAGES, figures)}")


if __name__ == "__main__":
    main()
