from __future__ import annotations

import pytest

from dora_core.evaluation.vqa_accuracy import CONTRACTIONS, answer_scores, normalize_answer, vqa_accuracy


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
