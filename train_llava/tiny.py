"""A LLaVA-OneVision of random weights and a tokenizer trained on the spot: real, and fit for a CPU."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaOnevisionConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from convert.prompt import IMAGE
from train_llava.config import TinyModel
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor

_END_OF_TURN, VIDEO = "<|im_end|>", "<video>"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", _END_OF_TURN, IMAGE, VIDEO]
# Turns between <|im_start|> and <|im_end|>, images before the text, as LLaVA-OneVision's prompts.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' }}"
    "{% for part in turn['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny(tiny: TinyModel, questions: list[str]) -> tuple[OneViewLlava, OneViewProcessor]:
    """Model and processor of that shape, without action tokens; torch's seed decides the weights."""
    tokenizer = train_tokenizer(questions, tiny.vocabulary)
    size = {"height": tiny.image_size, "width": tiny.image_size}
    image_processor = LlavaOnevisionImageProcessorPil(
        size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[tiny.image_size] * 2]
    )
    patches = (tiny.image_size // tiny.patch_size) ** 2
    # The libraries' 0.02 suits thousands of columns; with a hundred it starves attention, and whether a run
    # learns to look at the named block is then up to its seed.
    spread = tiny.hidden_size**-0.5
    processor = OneViewProcessor(image_processor, tokenizer, patches, chat_template=CHAT_TEMPLATE)
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
        video_token_index=token_id(tokenizer, VIDEO),
        image_grid_pinpoints=[[tiny.image_size] * 2],
    )
    config.initializer_range = spread  # of the projector
    return OneViewLlava(config), processor


def train_tokenizer(questions: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
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


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token that the vocabulary has."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found
