from __future__ import annotations

import pytest

from dora_core.evaluation.vqa_accuracy import (
    CONTRACTIONS,
    answer_scores,
    normalize_answer,
    normalize_prediction,
    toolkit_accuracy,
    toolkit_scores,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("  Yes\n", "yes"),
        ("The dog, a cat", "dog cat"),
        ("An apple and the pear", "apple and pear"),
        ("1,000", "1000"),
        ("what?!", "what"),
        ("dog's", "dog 's"),
        ("Whats the time", "what's time"),
        ("two\tbirds\nfly", "2 birds fly"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("a", ""),
        ("", ""),
    ],
)
def test_case_commas_articles_number_words_and_white_space_do_not_count(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black/white - grey", "black white grey"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("(left) side", "left side"),
        ("(left)side (b)", "left side b"),
        ('"stop"', "stop"),
        ("e@mail_x", "e mail x"),
        ("a&b: 5%", "a&b: 5%"),
    ],
)
def test_a_mark_that_touches_a_space_anywhere_is_deleted_everywhere_and_else_made_a_space(
    text: str, normalized: str
) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("no.5", "no.5"),
        ("5.", "5"),
        ("5.a", "5a"),
        ("." * 40, "." * 8),
    ],
)
def test_a_full_stop_stays_before_a_digit_and_beyond_the_thirty_second(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_missing_apostrophes_are_put_in_by_the_table() -> None:
    assert normalize_answer("dont") == "don't"
    assert normalize_answer("couldntve") == "couldntve"
    assert normalize_answer("couldnt've") == normalize_answer("couldn'tve") == "couldn't've"
    assert normalize_answer("ow's'at") == "ow 's'at"
    assert normalize_answer("twas") == "'twas"
    assert len(CONTRACTIONS) == 114


def test_quirks_of_the_table_are_kept() -> None:
    assert normalize_answer("im") == "im"
    assert normalize_answer("lets") == "lets"
    assert normalize_answer("Somebody'd") == "somebodyd"


@pytest.mark.parametrize(("count", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_each_of_ten_annotators_is_left_out_in_turn(count: int, score: float) -> None:
    answers = ["two"] * count + [f"other {number}" for number in range(10 - count)]
    assert vqa_accuracy("2", answers) == pytest.approx(score)


def test_prediction_and_references_are_both_normalized() -> None:
    assert vqa_accuracy("The Dog.", ["dog", "a dog", "DOG", "dog?"] + ["cat"] * 6) == 1.0
    assert vqa_accuracy("dogs", ["dog"] * 10) == 0.0


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["x"], 1.0),
        (["x", "x"], 1.0),
        (["x", "y"], 0.5),
        (["x", "x", "x"], 1.0),
        (["x", "x", "y"], (2 * 0.5 + 1) / 3),
        (["x", "y", "z"], (0 + 0.5 + 0.5) / 3),
        (["x", "x", "y", "z"], (2 * (1 / 3) + 2 * (2 / 3)) / 4),
    ],
)
def test_with_few_annotators_agreement_with_all_the_others_is_full(answers: list[str], score: float) -> None:
    assert vqa_accuracy("x", answers) == pytest.approx(score)


def test_every_given_answer_has_its_score() -> None:
    scores = answer_scores(["yes", "Yes.", "no"] + ["maybe"] * 7)
    assert scores == {"yes": pytest.approx(0.6), "no": pytest.approx(0.3), "maybe": 1.0}


def test_a_question_without_annotators_is_refused() -> None:
    with pytest.raises(ValueError, match="0 reference answers"):
        vqa_accuracy("x", [])


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("  The Dog.\n", "dog"),
        ("two\tbirds", "2 birds"),
        ("dog's", "dog's"),
        ("dont", "don't"),
        ("yes?no", "yes no"),
        ("red, white?", "red white"),
        ("red,white", "red white"),
        ("1,000", "1000"),
        ("1,000-2/3", "100023"),
        ("1000-2/3", "1000 2 3"),
        ("U.S.A. 3.5", "usa 3.5"),
        ("." * 40, "." * 8),
        ("", ""),
    ],
)
def test_the_toolkit_treats_commas_and_question_marks_as_marks_and_possessives_not_at_all(
    text: str, normalized: str
) -> None:
    assert normalize_prediction(text) == normalized


@pytest.mark.parametrize(("count", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_toolkit_too_leaves_each_of_ten_annotators_out_in_turn(count: int, score: float) -> None:
    answers = ["2"] * count + [f"other {number}" for number in range(10 - count)]
    assert toolkit_accuracy("Two", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("t-shirt", ["t shirt"] * 10, 1.0),
        ("t-shirt", ["t-shirt"] * 10, 0.0),  # all the same: left as they are
        ("t-shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),
        ("two", ["two"] * 9 + ["2"], 0.3),
        ("the dog", ["the dog"] * 9 + ["cat"], 0.0),
        ("dog", ["Dog"] * 9 + ["cat"], 0.0),
        ("x - y", ["x - y"] * 9 + ["z"], 0.0),  # both spaces stay
        ("u.s.", ["u.s."] * 9 + ["us"], 1.0),
        ("u.s.", ["u.s."] * 10, 0.0),
    ],
)
def test_the_toolkit_normalizes_references_less_than_predictions(
    prediction: str, answers: list[str], score: float
) -> None:
    assert toolkit_accuracy(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answers", "score"),
    [(["x"], 0.0), (["x", "x"], 1 / 3), (["x"] * 3, 2 / 3), (["x"] * 4, 1.0), (["x", "y"], 1 / 6)],
)
def test_the_toolkit_always_asks_for_three_other_annotators(answers: list[str], score: float) -> None:
    assert toolkit_accuracy("x", answers) == pytest.approx(score)


def test_the_toolkit_has_a_score_for_every_given_answer_and_refuses_none() -> None:
    assert toolkit_scores(["yes", "yes.", "no"] + ["a b?"] * 7) == {
        "yes": pytest.approx(0.6),
        "no": pytest.approx(0.3),
        "a b ": 1.0,
    }
    with pytest.raises(ValueError, match="0 reference answers"):
        toolkit_accuracy("x", [])
