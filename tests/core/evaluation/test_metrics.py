from __future__ import annotations

import pytest

from dora_core.registry import METRICS


def test_accuracy_counts_equal_places_and_never_a_missing_prediction() -> None:
    accuracy = METRICS.get("accuracy")
    assert accuracy(["a", None, "c", "d"], ["a", "b", "c", "x"]) == 0.5
    assert accuracy([None], [None]) == 0.0


def test_exact_match_strips_the_ends_only() -> None:
    exact_match = METRICS.get("exact_match")
    assert exact_match([" 42\n", "Yes", "a  b", "x"], ["42", "yes", "a b", "x"]) == 0.5


@pytest.mark.parametrize("name", ["accuracy", "exact_match"])
@pytest.mark.parametrize(("predicted", "expected"), [([], []), (["a"], ["a", "b"])])
def test_metrics_refuse_nothing_and_unequal_counts(name: str, predicted: list[str], expected: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{name} got {len(predicted)} predictions for {len(expected)} references"):
        METRICS.get(name)(predicted, expected)
