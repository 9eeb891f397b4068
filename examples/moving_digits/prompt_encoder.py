"""Tokenizer and text encoder of the moving digits: a vocabulary of two dozen words, and a two-layer UMT5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .data import DIRECTIONS, SPEEDS

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
VOCABULARY = (PAD, END, UNKNOWN, *map(str, range(10)), *DIRECTIONS, *SPEEDS, "and")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, `</s>` at the end."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, VOCABULARY.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def text_encoder(dim: int) -> UMT5EncoderModel:
    """A UMT5 encoder with random weights whose states have `dim` channels."""
    config = UMT5Config(
        vocab_size=len(VOCABULARY), d_model=dim, d_kv=dim // 4, d_ff=2 * dim, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=VOCABULARY.index(PAD), eos_token_id=VOCABULARY.index(END),
    )  # fmt: skip
    return UMT5EncoderModel(config)


def encode(prompts: Sequence[str], words: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, length: int) -> Tensor:
    """What `WanPipeline` makes of `prompts`, `[B, length, dim]`, computed on their own tokens alone.

    The states of the padding are zeros; gradients reach the encoder.
    """
    tokens = words(list(prompts), padding="longest", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    states = encoder(ids, mask).last_hidden_state
    padded: Tensor = torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, length - states.shape[1]))
    return padded
