"""Decoding: token by token and in one pass, alone and in batches, with what a robot's loop keeps between."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convert.action_codec import ActionCodec
from convert.prompt import Asking, question
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from train_llava.action_tokens import own_ids, prove_action_tokens
from train_llava.attention import visible
from train_llava.config import ModelConfig, TinyModel
from train_llava.data import Tokenized, collate
from train_llava.decode import ActionDecoder, Prediction, Sampling
from train_llava.loading import load_or_build
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor, View
from train_llava.prompt_cache import PromptCache
from train_llava.slots import slot_ids

QUESTIONS = [question(f"pick up the {color} block") for color in ("red", "green", "blue", "yellow")]
STATS = action_stats(
    np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32), (True,) * 6 + (False,), 1
)
CODEC = ActionCodec(action_dim=7, datasets={"viola": STATS})
CHUNK = ActionCodec(action_dim=7, chunk=2, datasets={"viola": STATS})
TINY = ModelConfig(tiny=TinyModel(hidden_size=32, text_layers=2, heads=2))

Tiny = tuple[OneViewLlava, OneViewProcessor]


def _with_rows_apart(num_slots: int) -> Tiny:
    """Actions and slots with rows of their own, as after training: they begin as one and the same."""
    model, processor, _ = load_or_build(TINY, QUESTIONS, seed=0, num_slots=num_slots)
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    chance = torch.Generator().manual_seed(1)
    ids = own_ids(processor.tokenizer)
    with torch.no_grad():
        for weight in {id(table.weight): table.weight for table in tables}.values():
            weight[ids] += 0.5 * torch.randn(len(ids), 32, generator=chance)
    return model.eval(), processor


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return _with_rows_apart(0)


@pytest.fixture(scope="module")
def slotted() -> Tiny:
    return _with_rows_apart(14)


def _views(number: int, size: int = 64, seed: int = 0) -> list[View]:
    pixels = np.random.default_rng([number, seed]).integers(0, 256, (number, 1, size, size, 3), np.uint8)
    return [View(patches, (size, size)) for patches in pixels]


def _pixels(processor: OneViewProcessor, views: list[View]) -> torch.Tensor:
    return torch.from_numpy(processor.frames(views)["pixel_values"])


def _same(one: Prediction, other: Prediction, row: int = 0) -> None:
    """The first of `one` is that row of the other."""
    assert (one.bins[0] == other.bins[row]).all()
    assert np.abs(one.probabilities[0] - other.probabilities[row]).max() < 1e-5
    assert np.abs(one.entropies[0] - other.entropies[row]).max() < 1e-4


def test_decoding_takes_exactly_seven_action_tokens_and_equals_decoding_without_a_cache(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    views = _views(1)
    prediction = ActionDecoder(model, processor, CODEC).predict([QUESTIONS[2]], views, ["viola"])
    assert prediction.bins.shape == prediction.probabilities.shape == (1, 1, 7)
    ids, action_ids = processor.prompt_ids(QUESTIONS[2], [17]), prove_action_tokens(processor.tokenizer)
    pixels = _pixels(processor, views)
    for i in range(7):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), pixels).logits[0, -1]
        # The gripper's bins are the upper half: the lower one would be no gripper at all.
        among = torch.where(torch.tensor(i == 6) & (torch.arange(256) < 128), -torch.inf, logits[action_ids])
        among = among.softmax(dim=-1)
        assert int(among.argmax()) == prediction.bins[0, 0, i]
        assert float(among.max()) == pytest.approx(prediction.probabilities[0, 0, i], abs=1e-5)
        ids.append(action_ids[int(among.argmax())])


def test_alone_and_in_a_batch_with_longer_prompts_the_bins_are_the_same(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    decoder = ActionDecoder(model, processor, CODEC)
    asked = [QUESTIONS[0], question("please be so kind and pick up the yellow block now"), question("go")]
    views = _views(3)
    together = decoder.predict(asked, views, ["viola"] * 3)
    for i, one in enumerate(asked):
        alone = decoder.predict([one], views[i : i + 1], ["viola"])
        assert (alone.bins[0] == together.bins[i]).all()
        assert np.abs(alone.probabilities[0] - together.probabilities[i]).max() < 1e-5


def test_each_token_costs_one_pass_and_none_is_wasted(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny
    lengths: list[int] = []
    forward = model.hidden_states

    def counted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(ids.shape[1])
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", counted)
    ActionDecoder(model, processor, CHUNK).predict([QUESTIONS[0]], _views(1), ["viola"])
    assert lengths == [len(processor.prompt_ids(QUESTIONS[0], [17]))] + [1] * 13


@pytest.mark.parametrize(("fixture", "codec", "end"), [("tiny", CODEC, 1), ("slotted", CHUNK, 14)])
def test_the_last_layer_computes_the_end_of_a_prompt_alone(
    fixture: str, codec: ActionCodec, end: int, request: pytest.FixtureRequest
) -> None:
    model, processor = request.getfixturevalue(fixture)
    layers: Any = model.model.language_model.layers
    rows: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, __, found: rows.append(found.shape[1])) for layer in layers
    ]
    ActionDecoder(model, processor, codec).predict([QUESTIONS[0]] * 2, _views(2), ["viola"] * 2)
    for hook in hooks:
        hook.remove()
    own = len(processor.prompt_ids(QUESTIONS[0], [17])) + (end if end > 1 else 0)
    assert rows[:2] == [own, end]
    assert "forward" not in vars(layers[-1])


def test_only_the_256_action_ids_can_be_answered(tiny: Tiny) -> None:
    model, processor = tiny
    favourite = torch.nn.Linear(32, model.lm_head.out_features)
    with torch.no_grad():
        favourite.weight.zero_()
        favourite.bias.zero_()
        favourite.bias[5] = 100.0  # a word, far ahead of all actions
    head, model.lm_head = model.lm_head, favourite
    try:
        found = ActionDecoder(model, processor, CODEC).predict([QUESTIONS[0]], _views(1), ["viola"])
    finally:
        model.lm_head = head
    # Nothing is told apart: each of 256 bins, or of the gripper's 128, is as likely as any other.
    assert found.probabilities[0, 0] == pytest.approx([1 / 256] * 6 + [1 / 128])
    assert found.entropies[0, 0] == pytest.approx(np.log([256] * 6 + [128]), abs=1e-4)


@pytest.mark.parametrize("instruction_first", [False, True])
def test_what_is_before_the_first_frame_is_computed_once(tiny: Tiny, instruction_first: bool) -> None:
    model, processor = tiny
    stock: Any = processor.chat_template
    if instruction_first:  # some models' templates write the text before the images
        start = stock.index("{% for part in turn['content'] if part['type'] == 'image'")
        middle = stock.index("{% for part in turn['content'] if part['type'] == 'text'")
        end = stock.index("{{ '<|im_end|>")
        processor.chat_template = stock[:start] + stock[middle:end] + stock[start:middle] + stock[end:]
    try:
        keeping = ActionDecoder(model, processor, CODEC, reuse=True)
        reused = []
        for step, asked in enumerate([QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]]):
            views = _views(1, seed=step)
            found = keeping.predict([asked], views, ["viola"])
            _same(found, ActionDecoder(model, processor, CODEC).predict([asked], views, ["viola"]))
            reused.append(found.reused)
        ids = processor.prompt_ids(QUESTIONS[0], [17])
    finally:
        processor.chat_template = stock
    before_the_frame = ids.index(processor.image_token_id)
    assert before_the_frame > (10 if instruction_first else 2)
    assert reused[0] == 0
    assert reused[1] == reused[3] == before_the_frame
    assert (reused[2] < before_the_frame) == instruction_first  # another colour: as far as they are alike


def test_batches_in_between_leave_what_is_kept_alone(tiny: Tiny) -> None:
    keeping, fresh = (ActionDecoder(*tiny, CODEC, reuse=reuse) for reuse in (True, False))
    views = _views(3)
    keeping.predict([QUESTIONS[0]], views[:1], ["viola"])
    keeping.predict(QUESTIONS[:2], views[1:], ["viola"] * 2)
    again = keeping.predict([QUESTIONS[0]], views[2:], ["viola"])
    assert again.reused
    _same(again, fresh.predict([QUESTIONS[0]], views[2:], ["viola"]))


@pytest.mark.parametrize("fixture", ["tiny", "slotted"])
def test_a_pass_that_fails_leaves_nothing_for_the_next_answer(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a GPU's memory is full for a moment: cache and prompt are there, their keys are not."""
    model, processor = request.getfixturevalue(fixture)
    codec = CODEC if fixture == "tiny" else CHUNK
    keeping, fresh = (ActionDecoder(model, processor, codec, reuse=reuse) for reuse in (True, False))
    views = _views(1)
    layer: Any = model.model.language_model.layers[0]
    for before in range(2):  # at the very first pass, and after one that went well
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", _out_of_memory)
            with pytest.raises(MemoryError):
                keeping.predict([QUESTIONS[before]], views, ["viola"])
        for _ in range(2):
            found = keeping.predict([QUESTIONS[before]], views, ["viola"])
            _same(found, fresh.predict([QUESTIONS[before]], views, ["viola"]))
        assert found.reused


def _out_of_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_each_question_of_a_batch_has_its_own_robot_and_cameras(tiny: Tiny) -> None:
    gripperless = action_stats(
        np.random.default_rng(1).normal(size=(50, 7)).astype(np.float32), (True,) * 7, 1
    )
    codec = CODEC.model_copy(update={"datasets": {"viola": STATS, "bare": gripperless}})
    decoder = ActionDecoder(*tiny, codec)
    asked = [Asking().question(f"pick up the {color} block", 2) for color in ("red", "green")]
    views, keys = _views(4), ["bare", "viola"]
    together = decoder.predict(asked, views, keys)
    for i, key in enumerate(keys):
        alone = decoder.predict([asked[i]], views[2 * i : 2 * i + 2], [key])
        _same(alone, together, i)
    # Only the one with a gripper has half of the bins for it.
    entropies = together.entropies[:, 0, -1]
    assert entropies[1] <= np.log(128) + 1e-4
    other = decoder.predict(asked, views, keys[::-1])
    assert (other.entropies[:, 0, -1] != entropies).all()


def test_with_fewer_heads_for_keys_than_for_queries_it_is_the_same_model(slotted: Tiny) -> None:
    """As in the models that people train: cached, cut at the end, with slots, beside the plain model."""
    stock, processor = slotted
    config: Any = copy.deepcopy(stock.config)
    config.text_config.num_key_value_heads = 1
    torch.manual_seed(3)
    model = OneViewLlava(config).eval()
    ids = [*processor.prompt_ids(QUESTIONS[0], [17]), *slot_ids(processor.tokenizer)]
    views, action_ids = _views(1), prove_action_tokens(processor.tokenizer)
    slots = torch.tensor([[len(ids) - 14, len(ids)]])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), _pixels(processor, views), slots=slots).logits[
            0, -14:, action_ids
        ]
    possible = torch.from_numpy(np.tile(STATS.possible_bins("uniform256"), (2, 1)))
    shares = logits.masked_fill(~possible, -torch.inf).softmax(-1)
    found = ActionDecoder(model, processor, CHUNK, reuse=True).predict([QUESTIONS[0]], views, ["viola"])
    assert (shares.argmax(-1).numpy() == found.bins.reshape(-1)).all()
    assert np.abs(shares.amax(-1).numpy() - found.probabilities.reshape(-1)).max() < 1e-5


def test_a_draw_depends_on_its_seed_alone(tiny: Tiny) -> None:
    decoder = ActionDecoder(*tiny, CODEC)
    views = _views(3)
    together = decoder.predict(QUESTIONS[:3], views, ["viola"] * 3, Sampling(1.0, [4, 5, 6]))
    for i, seed in enumerate((4, 5, 6)):
        alone = decoder.predict([QUESTIONS[i]], views[i : i + 1], ["viola"], Sampling(1.0, [seed]))
        _same(alone, together, i)
    other = decoder.predict([QUESTIONS[0]], views[:1], ["viola"], Sampling(1.0, [7]))
    assert (other.bins[0] != together.bins[0]).any()
    cold = decoder.predict(QUESTIONS[:3], views, ["viola"] * 3, Sampling(1e-4, [4, 5, 6]))
    assert (cold.bins == decoder.predict(QUESTIONS[:3], views, ["viola"] * 3).bins).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_have_the_shares_that_the_model_gives(tiny: Tiny, temperature: float) -> None:
    model, processor = tiny
    views = _views(1) * 400
    drawn = ActionDecoder(model, processor, CODEC).predict(
        [QUESTIONS[0]] * 400, views, ["viola"] * 400, Sampling(temperature, range(400))
    )
    with torch.no_grad():
        ids = torch.tensor([processor.prompt_ids(QUESTIONS[0], [17])])
        logits = model(ids, _pixels(processor, views[:1])).logits[0, -1][
            prove_action_tokens(processor.tokenizer)
        ]
    # In eight groups of bins, most likely first: four standard deviations of a count of 400.
    order = logits.argsort(descending=True)
    shares = (logits / temperature).softmax(-1)[order].reshape(8, 32).sum(-1).numpy()
    rank = order.argsort().numpy()[drawn.bins[:, 0, 0]]
    counts = np.bincount(rank // 32, minlength=8) / 400
    assert (np.abs(counts - shares) < 4 * np.sqrt(shares * (1 - shares) / 400)).all()


def test_a_frame_in_tiles_is_answered(tiny: Tiny) -> None:
    model, processor = tiny
    processor.image_mode = "anyres_max_9"
    try:
        view = processor.view(Image.fromarray(np.zeros((64, 100, 3), np.uint8)))
        found = ActionDecoder(model, processor, CODEC).predict([QUESTIONS[0]], [view], ["viola"])
    finally:
        processor.image_mode = "single"
    assert found.bins.shape == (1, 1, 7)


def test_several_cameras_and_a_chunk(tiny: Tiny) -> None:
    asking = Asking(cameras=("primary", "wrist"))
    codec = CHUNK.model_copy(update={"asking": asking})
    asked, views = asking.question("pick up the red block", 2), _views(2)
    decoder = ActionDecoder(*tiny, codec)
    found = decoder.predict([asked], views, ["viola"])
    assert found.bins.shape == (1, 2, 7)
    swapped = decoder.predict([asked], views[::-1], ["viola"])
    assert (found.probabilities != swapped.probabilities).any()


def test_slots_are_answered_as_they_are_trained(slotted: Tiny) -> None:
    """The pass that acts gives the distributions that the loss sees, and takes their most likely bins."""
    model, processor = slotted
    tokenized = Tokenized(processor, 7)
    answer = "".join(f"<ACTION_{i}>" for i in range(128, 142))
    views = _views(2)
    asked = [QUESTIONS[0], question("please be so kind and pick up the yellow block now")]
    samples: Any = [
        Tokenized.__call__(tokenized, [("human", one), ("gpt", answer)], [(64, 64)], is_robot=True)
        for one in asked
    ]
    batch = collate(samples, processor)
    ids = prove_action_tokens(processor.tokenizer)
    assert batch["targets"].tolist() == [ids[i] for i in range(128, 142)] * 2
    assert batch["dimensions"].tolist() == [*range(7)] * 4
    with torch.no_grad():
        logits = model(
            batch["input_ids"], _pixels(processor, views), logits_at=batch["logits_at"], slots=batch["slots"]
        ).logits[:, ids]
    found = ActionDecoder(model, processor, CHUNK).predict(asked, views, ["viola"] * 2)
    possible = torch.from_numpy(np.tile(STATS.possible_bins("uniform256"), (4, 1)))
    shares = logits.masked_fill(~possible, -torch.inf).softmax(-1).reshape(2, 2, 7, 256)
    assert (shares.argmax(-1).numpy() == found.bins).all()
    assert np.abs(shares.amax(-1).numpy() - found.probabilities).max() < 1e-5


def test_slots_take_one_pass_and_see_one_another(slotted: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = slotted
    decoder = ActionDecoder(model, processor, CHUNK)
    assert decoder.is_parallel
    lengths: list[int] = []
    forward = model.hidden_states

    def counted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(ids.shape[1])
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", counted)
    before = decoder.predict([QUESTIONS[0]], _views(1), ["viola"])
    assert lengths == [len(processor.prompt_ids(QUESTIONS[0], [17])) + 14]
    # The first slot knows of a change of the last one, which a causal mask would hide from it.
    rows: Any = model.get_input_embeddings()
    last = slot_ids(processor.tokenizer)[-1]
    kept = rows.weight[last].clone()
    with torch.no_grad():
        rows.weight[last] += 1
    after = decoder.predict([QUESTIONS[0]], _views(1), ["viola"])
    with torch.no_grad():
        rows.weight[last] = kept
    assert before.probabilities[0, 0, 0] != after.probabilities[0, 0, 0]


def test_slots_alone_in_a_batch_and_with_a_kept_prompt_are_the_same(slotted: Tiny) -> None:
    fresh, keeping = (ActionDecoder(*slotted, CHUNK, reuse=reuse) for reuse in (False, True))
    asked = [QUESTIONS[0], question("please be so kind and pick up the yellow block now"), question("go")]
    views = _views(3)
    together = fresh.predict(asked, views, ["viola"] * 3)
    for i, one in enumerate(asked):
        for decoder in (fresh, keeping):
            _same(decoder.predict([one], views[i : i + 1], ["viola"]), together, i)
    assert keeping.predict([asked[2]], views[2:], ["viola"]).reused


def test_slots_of_another_codec_are_refused(slotted: Tiny) -> None:
    with pytest.raises(UserError, match="has 14 action slots, but an answer is 7 tokens"):
        ActionDecoder(*slotted, CODEC)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_kernels_take_our_masks(attention: str) -> None:
    found = []
    for config in (TINY, TINY.model_copy(update={"attention": attention})):
        model, processor, _ = load_or_build(config, QUESTIONS, seed=0, num_slots=14)
        asked = [QUESTIONS[0], question("go")]
        found.append(ActionDecoder(model, processor, CHUNK).predict(asked, _views(2), ["viola"] * 2))
    for row in range(2):
        assert np.abs(found[0].probabilities[row] - found[1].probabilities[row]).max() < 1e-5


def test_who_sees_whom() -> None:
    """A row of two tokens of padding, one of prompt and two slots; what is marked is seen."""
    reach = torch.tensor([[0, 1, 2, 4, 4]])
    rows = ["x....", ".x...", "..x..", "..xxx", "..xxx"]
    wanted = torch.tensor([[mark == "x" for mark in row] for row in rows])
    assert torch.equal(visible(torch.tensor([2]), reach, 5)[0, 0], wanted)
    assert torch.equal(visible(torch.tensor([2]), reach[:, 3:], 5, start=3)[0, 0], wanted[3:])


def test_a_static_cache_keeps_its_place_in_memory(tiny: Tiny) -> None:
    """What a recorded pass on a GPU relies on."""
    model, processor = tiny
    cache = PromptCache(model.config, processor.image_token_id, keep=True)
    prompts = [processor.prompt_ids(asked, [17]) for asked in QUESTIONS]
    taken = []
    for prompt in prompts:
        taken.append(cache.take([prompt], 1, 6)[0])
        cache.filled([prompt], taken[-1])
    assert all(one is taken[0] for one in taken)
    assert cache.take(prompts, 1, 6)[0] is not taken[0]  # of a batch
    assert cache.take([prompts[0] * 4], 1, 6)[0] is not taken[0]  # too long
