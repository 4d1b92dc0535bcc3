"""README.md of a run: what the model is, how to act with it, how good it is, and what it comes from. All of
it is read from the files that the run left.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from convert.action_codec import CODEC_FILE, NUM_BINS, ActionCodec, ActionStats
from convert.finish import CARDS
from convert.manifest import ConvertedDataset
from oxe_mix.cards import Card
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write
from oxe_mix.text import count
from train_llava.card_figures import data, figures, origin, training
from train_llava.card_source import CardSource, left_out, read_source
from train_llava.config import METRICS_FILE, ModelConfig
from train_llava.curves import draw_curves
from train_llava.markdown import block, code, front_matter, items, one_line, plain, table
from train_llava.result import CONFIG_FILE, DATA_MANIFEST

CARD_FILE, CURVES_FILE = "README.md", "curves.png"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INSTRUCTION = "put the carrot on the plate"


def write_card(run: Path) -> None:
    """Write curves.png and README.md, a Hugging Face model card, into a run's folder; of the same files the
    same bytes.

    What a file that is not there would say is left out, and the card says so.

    Raises: UserError when `run` is no folder, or a file in it is broken.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the one that training wrote")
    source = read_source(run)
    if source.has_curves:
        draw_curves(source.lines, run / CURVES_FILE)
    with atomic_write(run / CARD_FILE) as stream:
        stream.write(card(source).encode())


def card(source: CardSource) -> str:
    """The whole card."""
    sections = {
        "What it is": _what(source),
        "How to act with it": _acting(source),
        "Figures on held-out episodes": figures(source),
        "Training": training(source, CURVES_FILE),
        "Data": data(source),
        "Licences": _licences(source),
        "Versions and hashes": origin(source),
        "Limits": items(_limits(source)),
    }
    parts = [front_matter(_head(source)), f"# {plain(source.name)}", _first_words(source)]
    return "\n\n".join([*parts, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _head(source: CardSource) -> dict[str, object]:
    """What the hub reads."""
    base = _hub_id(source.config.model) if source.config is not None else None
    names = [own.name for own in source.datasets]
    others = [own.name for own in source.config.data.sources] if source.config is not None else []
    # Another converted folder is named by its datasets; what is none of these is LLaVA data.
    names += [name for name in others if name in source.drawn]
    return {
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "robotics",
        **({"base_model": base} if base else {}),
        "tags": ["vision-language-action", "robotics", "llava-onevision"],
        **({"datasets": names} if names else {}),
    }


def _hub_id(model: ModelConfig) -> str | None:
    """Where training started, when that is on the hub and no folder here."""
    path = model.path
    return path if path is not None and _HUB_ID.fullmatch(path) and not Path(path).exists() else None


def _first_words(source: CardSource) -> str:
    robots = sorted({own.robot for own in source.cards.values()})
    of = f" Trained on recordings of {', '.join(map(plain, robots))}." if robots else ""
    return (
        "A vision-language-action model: LLaVA-OneVision that answers a camera's frame and an instruction "
        f"with a robot's next actions, as tokens.{of} Made with oxe-mix."
    )


def _what(source: CardSource) -> str:
    parts = []
    if source.config is None:
        parts.append(left_out(CONFIG_FILE))
    if source.codec is None:
        parts.append(left_out(CODEC_FILE))
    lines = [*_model_lines(source), *_asking_lines(source.codec)]
    parts += [items(lines)] if lines else []
    if source.codec is not None:
        parts.append(_actions(source, source.codec))
    return "\n\n".join(parts)


def _model_lines(source: CardSource) -> Iterator[str]:
    if source.config is None:
        return
    own = source.config.model
    if own.tiny is not None:
        yield (
            "**Model:** a LLaVA-OneVision that began as random weights, with a tokenizer of its own: "
            f"{count(own.tiny.text_layers, 'text layer')} of {own.tiny.hidden_size} columns, frames of "
            f"{own.tiny.image_size} x {own.tiny.image_size}. It is there to try the line, not to act"
        )
    else:
        yield f"**Model:** started from {code(own.path or '')}"
    if own.lora is not None:
        bits = ", over a language model frozen in 4 bits (nf4)" if own.lora.quantize == "nf4" else ""
        yield f"**Adapters:** LoRA of rank {own.lora.rank}, alpha {own.lora.alpha:g}{bits}"
    yield f"**Frames:** {code(own.image_mode)}"


def _asking_lines(codec: ActionCodec | None) -> Iterator[str]:
    if codec is None:
        return
    state = ", and the robot's own state in bins" if codec.asking.state else ""
    yield f"**Cameras, in order:** {', '.join(codec.asking.cameras)}{state}"
    yield f"**Prompt after the frames:** {code(codec.asking.template)}"
    yield (
        f"**Answer:** {count(codec.chunk, 'action')} of {codec.action_dim} dimensions, for each one of "
        f"{NUM_BINS} tokens ({code(codec.binning)})"
    )


def _actions(source: CardSource, codec: ActionCodec) -> str:
    header = ("unnorm key", "robot", "cameras", "control rate", "encoding", "movements", "gripper", "recipe")
    converted = {own.name: own for own in source.datasets}
    rows = []
    for name, stats in codec.datasets.items():
        own = converted.get(name)
        recipe = "unknown" if own is None else own.recipe
        rows.append((code(name), *_meaning(source.card_of(name), own), _gripper(stats), recipe))
    return "\n\n".join(
        [
            "What an action means, by dataset (its name is the key that gives the units):",
            table(header, rows, left=len(header)),
            "The frame of the movements, and their units where none stand here: as recorded; unknown, where "
            "the notes under Data do not say. A movement comes out between its dataset's 1 % and 99 % "
            "quantile. Where there is a gripper it is the last dimension.",
        ]
    )


def _meaning(card: Card | None, converted: ConvertedDataset | None) -> tuple[str, str, str, str, str]:
    """Robot, cameras, rate, encoding, and what a movement is; "unknown" where no card says."""
    cameras = ", ".join(converted.cameras) if converted is not None else "unknown"
    if card is None:
        return ("unknown", cameras, "unknown", "unknown", "unknown")
    rate = "unknown" if card.control_hz is None else f"{card.control_hz:g} Hz"
    own = card if converted is None else card.with_recipe(converted.recipe)
    units = f", {plain(', '.join(own.action.units))}" if own.action.units else ""
    return (plain(card.robot), cameras, rate, code(own.action.encoding), own.action_kind + units)


def _gripper(stats: ActionStats) -> str:
    if stats.mask[-1]:
        return "none"
    return f"always {stats.mean[-1]:g}" if stats.constant[-1] else "0 closed to 1 open"


def _acting(source: CardSource) -> str:
    codec = source.codec
    if codec is None:
        return left_out(CODEC_FILE)
    key, instruction = _example(source, codec)
    images = ["--image camera.jpg"]
    asking = codec.asking_of(key)
    if len(asking.cameras) > 1:
        images = [f"--image {camera}={camera}.jpg" for camera in asking.cameras]
    state = ["--state", shlex.quote(_mean_state(codec, key))] if asking.state else []
    asked = ["--instruction", shlex.quote(instruction), "--unnorm-key", shlex.quote(key)]
    command = " ".join(["python inference_action.py --checkpoint RUN", *images, *state, *asked])
    how = "all from one pass over the prompt" if source.is_parallel else "token by token"
    ask = "\n\n".join(
        [
            "In the oxe-mix repository, with `RUN` for this folder:",
            block("bash", [command]),
            f"It prints {count(codec.chunk, 'action')} of {codec.action_dim} dimensions in the units of "
            f"{code(key)}, {how}, with bins and probabilities. `--unnorm-key` takes any key of the table "
            "above.",
        ]
    )
    return f"{ask}\n\n{_stock(source)}"


def _mean_state(codec: ActionCodec, key: str) -> str:
    """A state that the robot may well be in, in its own units."""
    return " ".join(f"{value:.3g}" for value in codec.states[key].mean)


def _example(source: CardSource, codec: ActionCodec) -> tuple[str, str]:
    """A key, and something that its robot was told."""
    told = {own.name: own.instructions.most_repeated for own in source.datasets}
    key = next(iter(codec.datasets))
    words = next(iter(told.get(key, {})), _INSTRUCTION)
    return key, one_line(words)


def _stock(source: CardSource) -> str:
    folder = "RUN" if source.is_whole else "MERGED"
    merge = (
        "These are adapters. `oxe-mix export --checkpoint RUN --out MERGED` makes one model of them and "
        "their base, which stock transformers loads:"
    )
    lines = [
        "from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration",
        f'model = LlavaOnevisionForConditionalGeneration.from_pretrained("{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
    return f"{'Stock transformers loads it, too:' if source.is_whole else merge}\n\n{block('python', lines)}"


def _licences(source: CardSource) -> str:
    base = (
        "The licence of the weights that training started from is not recorded here: see where they are from."
    )
    if source.config is not None and source.config.model.tiny is not None:
        base = "Training started from random weights."
    if not source.cards:
        return f"{base}\n\n{left_out(f'{CARDS}/')}"
    rows = [(code(own.name), plain(own.license)) for own in source.cards.values()]
    return f"{base} Of the datasets, as their cards have it:\n\n{table(('dataset', 'licence'), rows, left=2)}"


def _limits(source: CardSource) -> Iterator[str]:
    yield (
        "No robot was driven with this model, real or simulated: nothing is said of how often it succeeds at "
        "a task, or that it is safe."
    )
    if source.held_out is not None:
        yield (
            "Predictions were compared with recorded actions on recorded frames: what becomes of an error "
            "once the robot has moved by it was not measured."
        )
        yield (
            "Held-out episodes are of the same datasets as the training ones: robots, scenes and cameras "
            "that are not in these were not measured."
        )
    yield "How long an answer takes was not measured."
    if any(folder.asked.statistics == "all" for folder in source.manifests):
        yield "The quantiles that give the units are of all episodes, the held-out ones included."
    if not source.manifests:
        yield f"What the training data held is not known: there is no `{DATA_MANIFEST}`."
    if not source.has_curves:
        yield f"How the run went is not known: there is no line of training in `{METRICS_FILE}`."
    yield "The weights are those of the last step, whether or not an earlier one scored better."
