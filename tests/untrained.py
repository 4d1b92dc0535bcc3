"""Checkpoints that nobody trained, for tests that need a model and not its skill."""

from __future__ import annotations

from pathlib import Path

import torch

from convert.action_codec import read_codec, write_codec
from convert.reader import ConversationReader
from train_llava.config import ModelConfig, TinyModel
from train_llava.loading import load_or_build, save_checkpoint


def untrained(llava: Path, out: Path) -> Path:
    """A checkpoint of random weights for a converted folder; they look at their frames."""
    reader = ConversationReader(llava, "train")
    questions = [reader[i].question for i in range(0, len(reader), 50)]
    small = TinyModel(hidden_size=32, text_layers=2, heads=2)
    model, processor, _ = load_or_build(ModelConfig(tiny=small), questions, seed=0)
    # New rows are alike; with rows of their own the tokens differ by frame.
    torch.nn.init.normal_(model.lm_head.weight)
    save_checkpoint(out, model, processor)
    write_codec(out, read_codec(llava))
    return out
