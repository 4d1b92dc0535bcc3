"""Ask a trained checkpoint for an action: one image and one instruction in, one JSON object out, in robot
units.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from oxe_mix.errors import UserError
from oxe_mix.text import complain, say


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that make train wrote")
    parser.add_argument("--image", type=Path, required=True, help="what the robot's camera sees")
    parser.add_argument("--instruction", required=True, help='in words: "put the carrot on the plate"')
    parser.add_argument(
        "--unnorm-key", help="dataset whose statistics give the units; needed if there are several"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    args = parser.parse_args()
    try:
        record = act(args.checkpoint, args.image, args.instruction, args.unnorm_key, args.device)
    except UserError as error:
        complain(str(error))
        raise SystemExit(2) from error
    say(json.dumps(record))


def act(
    checkpoint: Path, image: Path, instruction: str, unnorm_key: str | None, device: str
) -> dict[str, object]:
    """Load a checkpoint and answer once; `latency_ms` is of the answer, loading left out.

    Raises: UserError for a checkpoint, codec, key, image or instruction that will not do.
    """
    from convert.action_codec import read_codec

    codec = read_codec(checkpoint)
    key, _ = codec.stats(unnorm_key)  # a wrong key is refused before the model is loaded
    if codec.asking.state or len(codec.asking.cameras) > 1:
        asked_for = ", ".join(codec.asking.cameras) + (" and the robot's state" if codec.asking.state else "")
        raise UserError(f"{checkpoint}: was trained on {asked_for}; here one image is all that can be given")
    try:
        asked = codec.asking.question(instruction)
    except ValueError as error:
        raise UserError(f"--instruction: {error}") from error

    import torch

    from train_llava.decode import ActionDecoder, action_record
    from train_llava.loading import load_checkpoint
    from train_llava.processor import open_image
    from train_llava.quiet import quiet_libraries

    quiet_libraries()
    frame = open_image(image)
    model, processor = load_checkpoint(checkpoint)
    try:
        torch.nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" with an AssertionError.
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    decoder = ActionDecoder(model, processor, codec)
    start = time.perf_counter()
    prediction = decoder.predict([asked], [processor.view(frame)], [key])
    latency = (time.perf_counter() - start) * 1000
    return action_record(codec, prediction, key) | {"latency_ms": round(latency, 2)}


if __name__ == "__main__":
    main()
