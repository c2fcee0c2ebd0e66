from __future__ import annotations

import math
import random
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu

from dora_core.evaluation.captions import (
    DROPPED,
    METEOR_KIND,
    CaptionScores,
    caption_scores,
    constant_cider,
    tokenize_caption,
)

WHO = ("a man", "two women", "the little girl", "a big brown dog", "Someone's cat", "a red bus")
DOES = ("rides", "is looking at", "holds", "sits on", "jumps over", "is next to", "isn't near")
WHAT = ("a horse", "a red umbrella", "the big big bed", "some grass", "a man", "a bus, a car and a bus")
WHERE = ("", "", " in the park", " on a sunny day", " near the water", " in the the street.")

RowsOf = list[list[str]]


def caption(choose: random.Random) -> str:
    if choose.random() < 0.08:
        return choose.choice(("dog", "a", "a dog", "a red bus", ""))
    return f"{choose.choice(WHO)} {choose.choice(DOES)} {choose.choice(WHAT)}{choose.choice(WHERE)}"


def world(seed: int, num_rows: int) -> tuple[list[str], RowsOf]:
    """Return captions, some of them references of their row or of another one, and 1 to 5 references a row."""
    choose = random.Random(seed)
    references = [[caption(choose) or "a" for _ in range(choose.randint(1, 5))] for _ in range(num_rows)]
    references[1] = references[0]
    predictions = [
        choose.choice((caption(choose), choose.choice(row), choose.choice(references)[0], row[0].partition(" ")[0]))
        for row in references
    ]
    return predictions, references


def ngrams(words: list[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(order)), strict=False))


def cider_d(predictions: list[str], references: RowsOf) -> list[float]:
    """Return CIDEr-D as sections 3 and 6 of arXiv 1411.5726 define it, with plain counts as term frequencies."""
    candidates = [tokenize_caption(text) for text in predictions]
    truths = [[tokenize_caption(text) for text in row] for row in references]
    scores = [0.0] * len(predictions)
    for order in (1, 2, 3, 4):
        rows_with = Counter(gram for row in truths for gram in {gram for words in row for gram in ngrams(words, order)})

        def vector(words: list[str], order: int = order, rows_with: Counter = rows_with) -> dict:
            counts = Counter(ngrams(words, order))
            return {gram: num * math.log(len(truths) / max(1, rows_with[gram])) for gram, num in counts.items()}

        for place, (candidate, row) in enumerate(zip(candidates, truths, strict=True)):
            ours = vector(candidate)
            for words in row:
                theirs = vector(words)
                product = sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours.keys() & theirs.keys())
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                penalty = math.exp(-((len(candidate) - len(words)) ** 2) / (2 * 6**2))
                scores[place] += 10 * penalty * (product / norms if norms else 0.0) / 4 / len(row)
    return scores


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cider_is_cider_d_as_its_paper_defines_it(seed: int) -> None:
    predictions, references = world(seed, 220)
    own = cider_d(predictions, references)
    cider = caption_scores(predictions, references).cider
    assert cider.rows == pytest.approx(own, abs=1e-9)
    assert cider.corpus == pytest.approx(sum(own) / len(own), abs=1e-9)
    assert 0.2 < cider.corpus < max(own) < 10.0000001
    assert min(own) == 0.0


def test_the_corpus_values_are_means_of_the_rows() -> None:
    scores = caption_scores(*world(4, 60))
    for metric in (scores.cider, scores.rouge_l, scores.meteor):
        assert metric.corpus == pytest.approx(math.fsum(metric.rows) / 60, abs=1e-12)


def test_bleu_is_the_coco_tools() -> None:
    for seed in range(3):
        predictions, references = world(seed, 200)
        targets = {place: [" ".join(tokenize_caption(each)) for each in row] for place, row in enumerate(references)}
        hypotheses = {place: [" ".join(tokenize_caption(each))] for place, each in enumerate(predictions)}
        expected = Bleu(4).compute_score(targets, hypotheses, verbose=0)[0][-1]
        assert caption_scores(predictions, references).bleu4 == pytest.approx(expected, rel=1e-6)


def test_cider_of_one_caption_for_all_rows_is_found_without_reading_the_references_anew() -> None:
    _, references = world(5, 70)
    captions = ["a man rides a horse", "the the the big", "", "zebra", references[3][0], "a"]
    expected = [caption_scores([each] * 70, references).cider.corpus for each in captions]
    assert constant_cider(captions, references) == pytest.approx(expected, abs=1e-12)
    assert expected[0] > 0.0 == expected[2]


def test_bleu_adds_up_clipped_counts_over_the_rows_and_punishes_shortness() -> None:
    predictions = ["a dog runs on the grass", "a a cat sleeps"]
    references = [["a dog runs on the green grass"], ["a cat sleeps here"]]
    matched = [(6 + 3) / 10, (4 + 2) / 8, (3 + 1) / 6, (2 + 0) / 4]
    bleu = caption_scores(predictions, references).bleu4
    assert bleu == pytest.approx(math.exp(1 - 11 / 10) * math.prod(matched) ** 0.25, abs=1e-8)


def test_bleu_compares_with_the_length_of_the_closest_reference() -> None:
    references = [["one two three four five six seven eight nine", "one two three four five", "one"]]
    assert caption_scores(["one two three four five"], references).bleu4 == pytest.approx(1, abs=1e-8)
    long = caption_scores(["one two three four five six"], references).bleu4
    assert long == pytest.approx(1, abs=1e-8), "longer than the closest, and all in the longest"


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    references = [["a dog on the green grass", "dog runs"]]
    precision, recall = max(4 / 5, 2 / 5), max(4 / 6, 2 / 2)
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert caption_scores(["a dog runs on grass"], references).rouge_l.rows == pytest.approx([expected])


def test_meteor_matches_words_and_stems_and_no_synonyms() -> None:
    references = ["a dog runs on the green grass", "unlike"]
    recall, chunks, matches = 5 / 7, 2, 5  # dogs running on | green grass
    expected = recall / (0.9 + 0.1 * recall) * (1 - 0.5 * (chunks / matches) ** 3)
    assert caption_scores(["dogs running on green grass"], [references]).meteor.rows == pytest.approx([expected])
    assert caption_scores(["automobile"], [["car"]]).meteor.corpus == 0.0
    assert "not METEOR 1.5" in METEOR_KIND


@pytest.mark.parametrize("nothing", ["", "  ", "...", "!?.,;", "\n", "''"])
def test_a_caption_without_words_scores_nothing(nothing: str) -> None:
    references = [["a dog", "..."], ["a cat"], ["a cow sits"]]
    scores = caption_scores([nothing, "a cat", nothing], references)
    for metric in (scores.cider, scores.rouge_l, scores.meteor):
        assert (metric.rows[0], metric.rows[2]) == (0.0, 0.0) < (metric.rows[1], metric.corpus)
    empty = caption_scores([nothing] * 3, references)
    assert [each.corpus for each in (empty.cider, empty.rouge_l, empty.meteor)] == [0.0] * 3
    assert empty.bleu4 == 0.0


def test_cider_of_a_single_row_is_zero_because_no_word_is_rarer_than_another() -> None:
    scores = caption_scores(["a dog runs on grass"], [["a dog runs on grass"]])
    assert (scores.cider.corpus, scores.rouge_l.corpus) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], r"0 captions and references for 0 rows; there must be .*at least one\. Pass one caption per row"),
        (["a"], [["a"], ["b"]], r"1 captions and references for 2 rows; there must be as many"),
        (["a", "b"], [["a"], []], r"Row 1 has the references \[\]; it must have .* a word\. Correct them"),
        (["a"], [["", " ..."]], r"Row 0 has the references \['', ' \.\.\.'\]; it must have"),
        (["a"], ["a dog"], r"Row 0 has the references 'a dog'; it must have a list of texts"),
    ],
)
def test_rows_without_references_are_refused(predictions: list[str], references: RowsOf, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references)


def test_one_caption_for_all_rows_needs_references_too() -> None:
    with pytest.raises(ValueError, match="Row 1 has the references"):
        constant_cider(["a"], [["a"], [""]])


def test_scoring_is_quiet_deterministic_and_starts_no_program_and_no_connection(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"{arguments} was to be started")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    predictions, references = world(6, 40)
    first: CaptionScores = caption_scores(predictions, references)
    assert caption_scores(predictions, references) == first
    backwards = caption_scores(predictions[::-1], references[::-1])
    assert backwards.cider.rows[::-1] == pytest.approx(first.cider.rows, abs=1e-12)
    assert backwards.bleu4 == pytest.approx(first.bleu4, abs=1e-12)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


HUMAN = {  # each checked against PTBTokenizer of Stanford CoreNLP 3.4.1 with the COCO tool's list
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "A dog. Another dog": "a dog another dog",
    "Mr. Smith's dog can't run... over there": "mr. smith 's dog ca n't run over there",
    "A U.S. flag at 10:30 a.m.": "a u.s. flag at 10:30 a.m.",
    "on Main St. and in the U.S.": "on main st. and in the u.s.",
    "a half-eaten pizza -- 1/2 of it - on a plate": "a half-eaten pizza 1/2 of it on a plate",
    "“Curly” quotes, it’s a dog’s ‘bone’": "curly quotes it 's a dog 's bone",
    "a \"stop\" sign, the 'yield' sign and 'em": "a stop sign the yield sign and 'em",
    "A sign that reads 'stop'.": "a sign that reads stop",
    'He said "stop." Then left': "he said stop then left",
    "a toy (blue) [x]": "a toy -lrb- blue -rrb- -lsb- x -rsb-",
    "a red, white, and blue kite; $5.50 for 1,000": "a red white and blue kite $ 5.50 for 1,000",
    "black/white cat & dog @ #1": "black/white cat & dog @ # 1",
    "the dogs' toys in the 90's.": "the dogs toys in the 90 's",
    "a man cannot; gonna": "a man can not gon na",
    "in mid–air — jumping…": "in mid air jumping",
    "a dog.. runs": "a dog runs",
    "(the end.)": "-lrb- the end -rrb-",
    "café": "café",
    " ": "",
}


@pytest.mark.parametrize(("text", "words"), HUMAN.items())
def test_captions_are_split_as_the_official_tokenizer_splits_them(text: str, words: str) -> None:
    assert tokenize_caption(text) == words.split()


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer is a Java program")
def test_the_official_tokenizer_agrees(tmp_path: Path) -> None:
    import pycocoevalcap

    [folder] = pycocoevalcap.__path__
    choose = random.Random(7)
    texts = [text for text in HUMAN if text.strip()]
    texts += [
        f"{choose.choice(texts)}{choose.choice((' ', ' and '))}{caption(choose)}{choose.choice(('.', '!', '...', ''))}"
        for _ in range(300)
    ]
    (tmp_path / "captions.txt").write_text("\n".join(texts), encoding="utf-8")
    program = ["java", "-cp", f"{folder}/tokenizer/stanford-corenlp-3.4.1.jar", "-Dfile.encoding=UTF-8"]
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(tmp_path / "captions.txt")]
    done = subprocess.run([*program, *options], capture_output=True, encoding="utf-8", check=True, timeout=120)
    official = [[word for word in line.split() if word not in DROPPED] for line in done.stdout.splitlines()]
    ours = [tokenize_caption(text) for text in texts]
    assert [pair for pair in zip(texts, ours, official, strict=True) if pair[1] != pair[2]] == []
