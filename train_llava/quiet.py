"""What libraries say that is nothing to a user of ours: silenced here, and nowhere else."""

from __future__ import annotations

import logging
import os

import torch


def quiet_libraries() -> None:
    """Call it in commands that load models, before peft and the Trainer are imported: some speak then."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The Trainer tells accelerate of no accumulation and DeepSpeed of ours; accelerate warns, and takes
    # DeepSpeed's, as it should.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # On a CPU it looks for a faster kernel on the hub, which is not wanted.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Asked what the machine has, DeepSpeed would say on the screen that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
