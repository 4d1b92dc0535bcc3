"""`make train`: checks what was asked, then starts one process per rank with torchrun."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from convert.action_codec import read_codec
from convert.manifest import read_manifest
from oxe_mix.errors import UserError
from oxe_mix.files import folder_lock, read_json
from oxe_mix.text import complain, count, say
from train_llava.config import ERROR_FILE, METRICS_FILE, REHEARSAL, load_config


def launch(config_file: Path, llava: Path, run: Path | None, num_ranks: int) -> int:
    """Train on this machine with `num_ranks` processes.

    Returns: the exit code.
    Raises: UserError for what can be seen to be wrong before a process is started.
    """
    config = load_config(config_file)
    config.accumulation(num_ranks)
    manifest, codec = read_manifest(llava), read_codec(llava)
    if manifest.num_samples == 0:
        raise UserError(f"{llava}: holds no training sample")
    run = run or Path("runs") / config.name
    if (run / "config.json").exists():
        raise UserError(f"{run}: holds a trained model already; delete it or name another folder with RUN=")
    say(
        f"{config.name}: {count(manifest.num_samples, 'sample')} of {count(len(codec.datasets), 'dataset')}, "
        f"{count(num_ranks, 'rank')}, {config.train.max_steps:,} steps of {config.train.global_batch}"
    )
    shares = ", ".join(f"{d.name} {d.share:.1%}" for d in manifest.datasets)
    say(f"mixture, weight x samples: {shares}")
    with folder_lock(run, "training"):
        for leftover in (run / ERROR_FILE, run / METRICS_FILE):
            leftover.unlink(missing_ok=True)
        for leftover in run.glob(f"{REHEARSAL}*"):
            shutil.rmtree(leftover)
        code = subprocess.run(
            _command(config_file, llava, run, num_ranks), env=_environment(num_ranks), check=False
        )
        if (run / ERROR_FILE).exists():
            raise UserError(read_json(run / ERROR_FILE, "the trainer's error")["error"])
    return code.returncode


def _command(config_file: Path, llava: Path, run: Path, num_ranks: int) -> list[str]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_ranks),
    ]
    options = ["--config", str(config_file), "--llava", str(llava), "--into", str(run)]
    return [*torchrun, "-m", "train_llava.train", *options]


def _environment(num_ranks: int) -> dict[str, str]:
    environment = dict(os.environ)
    # DeepSpeed compiles its shared-memory op on the first run and looks for ninja on the PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    # A file that happens to lie in the user's folder must not stand in for a package.
    environment["PYTHONSAFEPATH"] = "1"
    # torch 2.13 warns, in every run, of what DeepSpeed 0.19 calls.
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if shutil.which("nvidia-smi") is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def main() -> None:
    """The command line behind `make train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("train_llava/configs/tiny-cpu.yaml"))
    parser.add_argument("--llava", type=Path, default=Path("llava"))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--nproc", type=int, default=1)
    args = parser.parse_args()
    try:
        raise SystemExit(launch(args.config, args.llava, args.run, args.nproc))
    except UserError as error:
        complain(str(error))
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
