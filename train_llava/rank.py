"""One rank of a training run, as the launcher starts it."""

from __future__ import annotations

from train_llava.agent import end_with_parent
from train_llava.quiet import quiet_libraries


def main() -> None:
    """The entry point of each rank."""
    end_with_parent()
    quiet_libraries()
    # Only now: with the Trainer comes peft, with it bitsandbytes, and that speaks while it is imported.
    from train_llava.train import main as train

    train()


if __name__ == "__main__":
    main()
