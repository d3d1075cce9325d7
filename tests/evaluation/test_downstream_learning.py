"""Networks of the trial learn what is easy, and nothing else of a trial differs between arms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raysynth.config import DownstreamConfig
from raysynth.errors import InputError
from raysynth.evaluation.downstream.classification import nodule_crops
from raysynth.evaluation.downstream.fit import fit
from raysynth.evaluation.downstream.malignancy import labels_of, logistic
from raysynth.evaluation.downstream.networks import se_resnet18
from raysynth.evaluation.downstream.tables import (
    classification_figures,
    localisation_figures,
    segmentation_figures,
)
from raysynth.evaluation.downstream.trial import HEADLINES, learn_task
from tests.evaluation.trial_examples import SIZE, toy, toy_synthetic

CONFIG = DownstreamConfig(
    steps=40, width=8, batch_size=16, backbone="narrow", detection_size=96, learning_rate=3e-3
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_crops_with_and_without_nodule_are_told_apart() -> None:
    learn, measure = learn_task("classification")
    table = learn(toy(6), toy(4, seed=1), CONFIG, 0)
    assert len(table["row"]) == 2 * 12
    assert measure(table, np.ones(24))["accuracy"] > 0.9


def test_every_slice_lends_one_crop_with_and_one_without_nodule() -> None:
    examples = toy(4)
    crops, label, rows = nodule_crops(examples)
    assert crops.shape == (24, 16, 16)
    assert label.tolist() == [1] * 12 + [0] * 12
    assert rows.tolist() == list(range(12)) * 2
    assert (crops[:12].max(axis=(1, 2)) == 30).all()
    assert (crops[12:].max(axis=(1, 2)) < -400).all()
    # The place without nodule is the slice's own, whoever is beside it.
    assert np.array_equal(nodule_crops(examples.take(np.arange(5, 7)))[0][2:], crops[[17, 18]])


def test_slices_that_show_nothing_but_nodules_are_refused() -> None:
    examples = toy(2)
    with pytest.raises(InputError, match="no slice with a nodule shows lung beside it"):
        nodule_crops(replace(examples, layout=np.zeros_like(examples.layout)))


def test_boxes_are_learned() -> None:
    learn, _ = learn_task("localisation")
    table = learn(toy(6), toy(3, seed=1), CONFIG, 0)
    assert localisation_figures(table, np.ones(len(table["row"])))["ap50"] > 0.8
    assert np.isnan(table["score"]).sum() == 9


def test_masks_are_learned_in_slices_of_any_side() -> None:
    learn, _ = learn_task("segmentation")
    config = CONFIG.model_copy(update={"steps": 100, "batch_size": 8, "learning_rate": 1e-2})
    odd = [
        replace(one, hu=one.hu[:, :-3], layout=one.layout[:, :-3])
        for one in (toy(6), toy(3, seed=1))
    ]
    table = learn(odd[0], odd[1], config, 0)
    figures = segmentation_figures(table | {"patient": np.repeat([0, 1, 2], 3)}, np.ones(9))
    assert figures["dice"] > 0.7
    assert figures["lesion_sensitivity"] > 0.8


def test_labels_of_synthetic_nodules_are_read_off_their_scores() -> None:
    real, drawn = toy(20), toy_synthetic(40)
    parts = [real, drawn]
    train = real.take(np.arange(0))
    train = replace(
        train,
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(train)},
    )
    label = labels_of(train)
    assert np.array_equal(label[: len(real)] == 1, real.malignancy > 3)
    guessed = label[len(real) :]
    assert ((guessed > 0.5) == (drawn.scores[:, 0] > 3)).mean() > 0.85
    assert ((guessed > 0) & (guessed < 1)).all()
    train = replace(train, malignancy=np.where(np.isnan(train.malignancy), np.nan, 1))
    with pytest.raises(InputError, match="too few real nodules have all scores"):
        labels_of(train)


def test_the_logistic_regression_recovers_its_model() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 2))
    truth = 1 / (1 + np.exp(-(0.5 + 2 * features[:, 0])))
    label = (rng.uniform(size=4000) < truth).astype(float)
    assert np.abs(logistic(features, label, features) - truth).max() < 0.08


@pytest.mark.parametrize("count", [3, 16, 500])
def test_every_training_takes_the_same_steps_and_batches(count: int) -> None:
    network = nn.Linear(1, 1)
    seen: list[int] = []
    drawn: list[int] = []

    def loss_of(rows: np.ndarray) -> torch.Tensor:
        seen.append(len(rows))
        drawn.extend(rows.tolist())
        return network(torch.ones(1, 1)).square().mean()

    fit(network, count, loss_of, CONFIG, 16, seed=0)
    assert seen == [16] * CONFIG.steps
    times = np.bincount(drawn, minlength=count)
    assert times.max() - times.min() <= 1
    assert not network.training


def test_the_classifier_keeps_the_detail_of_small_crops() -> None:
    network = se_resnet18(8)
    seen = []
    network[3].register_forward_hook(lambda _, __, out: seen.append(out.shape))
    images = torch.randn(2, 1, 16, 16)
    assert network(images).shape == (2, 1)
    assert seen == [(2, 8, 16, 16)]
    network(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_headlines_are_measured() -> None:
    assert HEADLINES["malignancy"] in classification_figures(
        {"score": np.ones(2), "label": np.array([0, 1])}, np.ones(2)
    )
    assert SIZE == 48
