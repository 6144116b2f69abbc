"""The metrics agree with those of well-known libraries."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rankwise.recipes.tasks.text_classification import classification_metrics, regression_metrics


def test_regression_metrics_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    chance = np.random.default_rng(0)
    truth = chance.integers(0, 6, 200).astype(float)  # integers, so that there are many ties
    guess = truth + chance.normal(size=200).round(1)
    found = regression_metrics(SimpleNamespace(predictions=guess[:, None], label_ids=truth))
    assert found["mse"] == pytest.approx(np.mean((guess - truth) ** 2))
    assert found["pearson"] == pytest.approx(stats.pearsonr(guess, truth)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(guess, truth)[0])


def test_a_constant_guess_has_no_correlation() -> None:
    found = regression_metrics(SimpleNamespace(predictions=np.zeros((4, 1)), label_ids=np.arange(4.0)))
    assert found["pearson"] == found["spearman"] == 0


def test_accuracy_and_f1() -> None:
    logits = np.eye(3)[[0, 0, 1, 1]]
    found = classification_metrics(SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 1, 2])))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
