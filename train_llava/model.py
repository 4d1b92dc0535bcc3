"""The model: stock LLaVA-OneVision weights and layers, with one view per frame and 256 action tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from convert.action_codec import action_tokens
from convert.prompt import IMAGE
from oxe_mix.errors import UserError
from train_llava.config import ModelConfig, TinyModel
from train_llava.processor import IGNORE, OneViewProcessor

_END_OF_TURN, _VIDEO = "<|im_end|>", "<video>"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", _END_OF_TURN, IMAGE, _VIDEO]
# Turns between <|im_start|> and <|im_end|>, images before the text, as LLaVA-OneVision's prompts.
_CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' }}"
    "{% for part in turn['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class OneViewLlava(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that takes one view per frame; weights, names and files are the stock class's.

    The stock class knows a single view only beside other images, and fails with it for a batch of one.
    """

    def frame_features(self, pixel_values: Tensor) -> Tensor:
        """Views [N, 3, S, S] to what stands in for a frame's tokens, [N, patches + 1, hidden]: a newline
        comes last.
        """
        layer = self.config.vision_feature_layer
        states = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        picked = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], dim=-1)
        if self.config.vision_feature_select_strategy == "default":
            picked = picked[:, 1:]
        features = self.model.multi_modal_projector(picked)
        newline = self.model.image_newline.to(features).expand(len(features), 1, -1)
        return torch.cat([features, newline], dim=1)

    def hidden_states(self, input_ids: Tensor, pixel_values: Tensor | None, **kwargs: Any) -> Any:
        """The language model's output over a batch; the library checks that frames and image tokens match."""
        encoded = None
        if pixel_values is not None:
            # The library takes features that are ready, one [tokens, hidden] per frame.
            features: Any = tuple(self.frame_features(pixel_values))
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return self.model(input_ids=input_ids, mm_encoder_outputs=encoded, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, or with labels the loss on the supervised ones alone.

        Args:
            input_ids: [B, L]; pixel_values: [N, 3, S, S] in order of the image tokens; labels: [B, L], IGNORE
                where
                a token is not supervised.
            num_items_in_batch: supervised tokens of the whole optimizer step, when the loss is to be their
                mean.
        """
        hidden = self.hidden_states(
            input_ids, pixel_values, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        if labels is None:
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        # Logits at the supervised positions only: over the whole prompt they would be most of the memory.
        logits = self.lm_head(hidden[:, :-1][supervised]).float()
        total = nn.functional.cross_entropy(logits, targets[supervised], reduction="sum")
        count = supervised.sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count, logits=logits)


def load_or_build(
    config: ModelConfig, questions: list[str], seed: int
) -> tuple[OneViewLlava, OneViewProcessor]:
    """The model and processor that training starts from, with the action tokens in both.

    Args:
        questions: what a tiny model's tokenizer is trained on.

    Raises: UserError when the folder holds no such model or the action tokens do not survive the tokenizer.
    """
    torch.manual_seed(seed)
    if config.tiny is not None:
        model, processor = _build_tiny(config.tiny, questions)
    else:
        assert config.path is not None
        model, processor = load_checkpoint(config.path)
    add_action_tokens(model, processor.tokenizer)
    return model, processor


def load_checkpoint(path: str | Path) -> tuple[OneViewLlava, OneViewProcessor]:
    """A LLaVA-OneVision in transformers' format, from a folder or the hub.

    Raises: UserError when it is not there, is another kind of model, or weights are missing from its files.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path}: no config.json, so no model; give the folder that training wrote")
    try:
        loaded: Any = OneViewLlava.from_pretrained(str(path), output_loading_info=True, dtype=torch.float32)
        processor = OneViewProcessor.from_pretrained(str(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path}: no LLaVA-OneVision that can be loaded ({str(error).splitlines()[0]})"
        ) from error
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        missing, extra = sorted(report["missing_keys"])[:3], sorted(report["unexpected_keys"])[:3]
        raise UserError(f"{path}: weights do not fit the model; missing {missing}, unexpected {extra}")
    return model, processor


def save_checkpoint(folder: Path, model: OneViewLlava, processor: OneViewProcessor) -> None:
    """Write weights, config, tokenizer and processor so that the stock classes load them."""
    model.save_pretrained(folder)
    # The subclass adds no weight: the file names the class that everybody has.
    config = model.config.to_dict() | {"architectures": ["LlavaOnevisionForConditionalGeneration"]}
    LlavaOnevisionConfig.from_dict(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def add_action_tokens(model: OneViewLlava, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the 256 action tokens once, and prove that they survive the tokenizer, alone and side by side.

    New rows of the input and output embeddings start at the mean of the old ones, so that no action token
    begins as a stranger or a favourite; a tied head stays tied.
    """
    old_rows = int(_table(model.get_input_embeddings()).shape[0])
    added = tokenizer.add_tokens(action_tokens(), special_tokens=True)
    if len(tokenizer) > old_rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added:
        first = len(tokenizer) - added
        both = (_table(model.get_input_embeddings()), _table(model.get_output_embeddings()))
        with torch.no_grad():
            for weight in {id(table): table for table in both}.values():  # a tied head is one table
                weight[first:] = weight[:first].mean(dim=0)
    prove_action_tokens(tokenizer)


def prove_action_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the 256 action tokens, in order of their bins.

    Raises: UserError when they are not 256 distinct single ids that survive encoding and decoding side by
    side.
    """
    tokens = action_tokens()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary.get(token, -1) for token in tokens]
    alone = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    together = tokenizer("".join(tokens), add_special_tokens=False)["input_ids"]
    if len(set(ids)) != len(tokens) or alone != [[i] for i in ids] or together != ids:
        raise UserError(
            "the tokenizer does not keep the 256 action tokens apart; the checkpoint is not one of ours"
        )
    if tokenizer.decode(ids, spaces_between_special_tokens=False) != "".join(tokens):
        raise UserError("the tokenizer does not give the action tokens back as they were")
    return ids


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _table(layer: Any) -> Tensor:
    """The weights of an embedding or of a head, [vocabulary, hidden]."""
    weight: Tensor = layer.weight
    return weight


def _build_tiny(tiny: TinyModel, questions: list[str]) -> tuple[OneViewLlava, OneViewProcessor]:
    tokenizer = _train_tokenizer(questions, tiny.vocabulary)
    size = {"height": tiny.image_size, "width": tiny.image_size}
    image_processor = LlavaOnevisionImageProcessorPil(
        size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[tiny.image_size] * 2]
    )
    patches = (tiny.image_size // tiny.patch_size) ** 2
    # The libraries' 0.02 suits thousands of columns; with a hundred it starves attention, and whether a run
    # learns to look at the named block is then up to its seed.
    spread = tiny.hidden_size**-0.5
    processor = OneViewProcessor(image_processor, tokenizer, patches, chat_template=_CHAT_TEMPLATE)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=tiny.hidden_size,
            intermediate_size=4 * tiny.hidden_size,
            num_hidden_layers=tiny.vision_layers,
            num_attention_heads=tiny.heads,
            image_size=tiny.image_size,
            patch_size=tiny.patch_size,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            initializer_range=spread,
            hidden_size=tiny.hidden_size,
            intermediate_size=4 * tiny.hidden_size,
            num_hidden_layers=tiny.text_layers,
            num_attention_heads=tiny.heads,
            num_key_value_heads=tiny.heads,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
        video_token_index=_token_id(tokenizer, _VIDEO),
        image_grid_pinpoints=[[tiny.image_size] * 2],
    )
    config.initializer_range = spread  # of the projector
    return OneViewLlava(config), processor


def _train_tokenizer(questions: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE over the questions: any text can be encoded, and their own words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"user\n{q}assistant\n" for q in sorted(set(questions))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END_OF_TURN,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
