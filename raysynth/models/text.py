"""Prompts as tokens: of a small text encoder of our own, and of Stable Diffusion's.

Our own is for prompts of `raysynth.prompt` and trained with the model it guides. Its vocabulary is
closed: the words of that grammar and numbers. So a word it never saw is refused, where Stable
Diffusion makes something of any.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from raysynth.config.model import TextDiffusionConfig
from raysynth.errors import InputError
from raysynth.prompt import all_words

PAD = 0
MAX_NUMBER = 99
"""Largest diameter in millimetres that has a word of its own."""


@cache
def vocabulary() -> dict[str, int]:
    """The number of every word, from 1; `PAD` stands for no word."""
    words = [",", *map(str, range(MAX_NUMBER + 1)), *sorted(_split(" ".join(all_words())))]
    return {word: number for number, word in enumerate(dict.fromkeys(words), start=1)}


def tokenize(prompt: str, max_tokens: int) -> list[int]:
    """Numbers of a prompt's words, filled up with `PAD`. Upper and lower case are the same.

    Raises:
        InputError: a word is unknown, or there are more than `max_tokens`.
    """
    known = vocabulary()
    words = _split(prompt)
    for word in words:
        if word not in known:
            raise InputError(
                f"prompt {prompt!r}: the word {word!r} is unknown to this model; write as in "
                "'axial chest CT, 12 mm part-solid pulmonary nodule, sharp margin, left lung'"
            )
    if len(words) > max_tokens:
        raise InputError(
            f"prompt of {len(words)} words and commas: this model reads {max_tokens}; leave some "
            "clauses out"
        )
    return [known[word] for word in words] + [PAD] * (max_tokens - len(words))


def clip_tokens(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Numbers of the tokens of prompts, each filled up to the tokenizer's length.

    Raises:
        InputError: a prompt has more. Nothing is cut off in silence.
    """
    assert tokenizer.padding is not None
    longest = tokenizer.padding["length"]
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > longest:
            raise InputError(
                f"prompt {prompt!r} is {len(row)} tokens long: this model reads {longest}; leave "
                "some clauses out"
            )
    return rows


def _split(prompt: str) -> list[str]:
    return re.findall(r"[^\s,]+|,", prompt.lower())


class TextEncoder(nn.Module):
    """A transformer over the words of prompts; the empty prompt is the null condition.

    Before the words stands their sum, to which the layers add what they say together.
    """

    def __init__(self, config: TextDiffusionConfig) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        self.width = width = config.text_width
        self.words = nn.Embedding(len(vocabulary()) + 1, width)
        with torch.no_grad():
            numbers = range(1, MAX_NUMBER + 1)
            rows = [vocabulary()[str(number)] for number in numbers]
            # Sizes begin as places on one line: from 9 mm a network learns of 10 mm, too.
            self.words.weight[rows] = _waves(torch.tensor(numbers).log(), width)
        self.positions = nn.Parameter(0.02 * torch.randn(1 + config.max_tokens, width))
        layer = nn.TransformerEncoderLayer(
            width,
            config.text_heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        # The nested tensors of its fast path would make a sample's bits depend on its mates.
        self.layers = nn.TransformerEncoder(layer, config.text_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """What cross-attention reads of prompts, (B, 1 + max_tokens, width); the whole one first.

        The whole one stands in the places without a word, too.

        Raises:
            InputError: see `tokenize`.
        """
        rows = [tokenize(prompt, self.max_tokens) for prompt in prompts]
        tokens = torch.tensor(rows, device=self.positions.device)
        absent = functional.pad(tokens == PAD, (1, 0))
        words = functional.pad(self.words(tokens), (0, 0, 1, 0)).masked_fill(absent[..., None], 0)
        words[:, 0] = words.sum(dim=1) / (~absent).sum(dim=1, keepdim=True).sqrt()
        encoded = self.norm(self.layers(words + self.positions, src_key_padding_mask=absent))
        # Left to themselves, two empty places in three would drown the words in every attention.
        return torch.where(absent[..., None], encoded[:, :1], encoded)


def _waves(values: Tensor, width: int) -> Tensor:
    """Sines and cosines of values (n,), from slow to fast, (n, width)."""
    frequency = torch.logspace(-0.5, 1, (width + 1) // 2)
    angles = values[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width] * 2**0.5
