from __future__ import annotations

import numpy as np
import pytest
import torch

from raysynth.case import ATTRIBUTES, SCORE_RANGES
from raysynth.condition import Condition
from raysynth.config.model import TextDiffusionConfig
from raysynth.errors import InputError
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import build_denoiser
from raysynth.models.text import PAD, TextEncoder, tokenize, vocabulary
from raysynth.prompt import NO_NODULE, PLACES, write_prompt

CONFIG = TextDiffusionConfig.model_validate(
    {
        "autoencoder": "unused",
        "channels": (8, 16),
        "attention_levels": (False, True),
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 8,
        "text_width": 16,
        "text_layers": 2,
        "text_heads": 2,
    }
)


def random_prompt(rng: np.random.Generator) -> str:
    scores = [int(rng.integers(0, SCORE_RANGES[name][1] + 1)) for name in ATTRIBUTES]
    place = list(PLACES.values())[rng.integers(2)]
    size = float(rng.uniform(1, 99))
    return write_prompt(scores, size, place, rng=rng, with_malignancy=True)


def test_every_prompt_of_the_grammar_can_be_read_back() -> None:
    rng = np.random.default_rng(0)
    word = {number: word for word, number in vocabulary().items()}
    assert len(word) == len(vocabulary())
    assert PAD not in word
    for prompt in (NO_NODULE, *(random_prompt(rng) for _ in range(2000))):
        tokens = tokenize(prompt, 77)
        assert len(tokens) == 77
        said = " ".join(word[token] for token in tokens if token != PAD)
        assert said.replace(" ,", ",") == prompt.lower()


def test_what_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'hamartoma' is unknown"):
        tokenize("axial chest CT, 8 mm hamartoma", 77)
    with pytest.raises(InputError, match="of 9 words and commas: this model reads 8"):
        tokenize("axial chest CT, 8 mm solid pulmonary nodule", 8)
    assert tokenize("", 8) == [PAD] * 8


def test_a_prompt_means_the_same_whatever_its_mates() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    rng = np.random.default_rng(1)
    prompts = [random_prompt(rng) for _ in range(5)]
    with torch.inference_mode():
        together = encoder(prompts)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(encoder([prompt])[0], together[row])
    assert len({tuple(row.flatten().tolist()) for row in together}) == len(prompts)


def test_places_without_a_word_say_nothing() -> None:
    """They are two in three: nothing flows out of them, and who looks there reads the whole."""
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    prompt = "axial chest CT, 8 mm solid pulmonary nodule"
    count = sum(token != PAD for token in tokenize(prompt, encoder.max_tokens))
    with torch.no_grad():
        encoded = encoder([prompt, ""])
        encoder.words.weight[PAD] = 100.0
        encoder.positions[1 + count :] = -100.0
        torch.testing.assert_close(encoder([prompt])[0], encoded[0])
    assert torch.equal(encoded[0, 1 + count :], encoded[0, :1].expand(77 - count, -1))
    assert torch.equal(encoded[1], encoded[1, :1].expand(78, -1))


def test_the_whole_prompt_begins_as_the_sum_of_its_words() -> None:
    """However long the prompt is, the sum is of the size of one word."""
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    for parameter in encoder.layers.parameters():  # what they add is nothing
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        encoder.positions.zero_()
        said = encoder(["left lung"])[0, 0]
        words = encoder.words.weight[[vocabulary()["left"], vocabulary()["lung"]]]
        torch.testing.assert_close(said, encoder.norm(words.sum(dim=0) / 2**0.5))


def test_sizes_begin_in_their_order() -> None:
    encoder = TextEncoder(TextDiffusionConfig.model_validate({"autoencoder": "unused"}))
    rows = encoder.words.weight[[vocabulary()[str(mm)] for mm in (4, 5, 8, 16, 32)]]
    likeness = torch.nn.functional.cosine_similarity(rows[:1], rows[1:]).tolist()
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[0] > 0.5


def test_text_is_dropped_chosen_and_filled_up_with_nothing() -> None:
    batch = collate([Condition(text=text) for text in ("a", "b", None)], 16)
    assert batch.text == ("a", "b", "")
    assert batch.drop(torch.tensor([True, False, False])).text == ("", "b", "")
    assert batch.select(slice(1, 3)).text == ("b", "")
    assert batch.select(torch.tensor([2, 0])).text == ("", "a")
    assert batch.null().text == ("", "", "")
    assert collate([Condition()], 16).text is None


def test_a_text_network_hears_the_prompt_alone() -> None:
    """Every parameter learns, another prompt draws something else, and boxes change nothing."""
    torch.manual_seed(0)
    denoiser = build_denoiser(CONFIG, latent_channels=3, latent_size=8)
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x_t, timestep = torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    texts = ["axial chest CT, 8 mm solid pulmonary nodule", NO_NODULE]

    def predicted(texts: list[str], box: tuple[int, int, int, int] | None = None) -> torch.Tensor:
        conditions = [Condition(box=box, text=text) for text in texts]
        prediction: torch.Tensor = denoiser(x_t, timestep, collate(conditions, 32))
        return prediction

    said = predicted(texts)
    said.square().sum().backward()
    assert all(p.grad is not None for p in denoiser.parameters())
    assert torch.equal(predicted(texts, (4, 4, 9, 9)), said)
    swapped = predicted(texts[::-1])
    assert all((swapped[row] - said[row]).abs().max() > 1e-4 for row in range(2))
    empty = denoiser(x_t, timestep, collate([Condition()] * 2, 32))
    assert torch.equal(predicted(["", ""]), empty)


def test_the_encoder_has_its_published_size() -> None:
    """Methods B's default: 4 layers of 256 numbers, word by word."""
    with torch.device("meta"):
        encoder = TextEncoder(TextDiffusionConfig.model_validate({"autoencoder": "unused"}))
    layer = 4 * 256 * 256 + 4 * 256 + 8 * 256 * 256 + 5 * 256 + 4 * 256
    words = (len(vocabulary()) + 1) * 256
    assert sum(p.numel() for p in encoder.parameters()) == 4 * layer + words + 78 * 256 + 2 * 256
