"""CIDEr-D, BLEU-4, ROUGE-L and METEOR of captions as the COCO tool computes them, but without Java and offline."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.tokenize.treebank import TreebankWordTokenizer
from nltk.translate.meteor_score import meteor_score
from nltk.util import ngrams
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

TOKENIZER = "treebank"
"""Belongs beside every score: the official tokenizer is a Java program, PTBTokenizer."""
METEOR_KIND = "exact and stem matches only: not METEOR 1.5, not comparable with published METEOR"
"""Belongs beside every METEOR: version 1.5 also matches synonyms and paraphrases, and weighs kinds of words."""

DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""The COCO tool's list of punctuation. It also has -LRB- and the like, which it meets in lower case and so keeps."""
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "--", "—": "--"})
WORD_FINAL_PERIODS = re.compile(r"""([^\s"(\[{<]*?)\.+(?=[])}>"',;:!?]*(?:\s|$))""")
INITIALS = re.compile(r"(?:[a-z]\.)+")
ABBREVIATED = """
mr. mrs. ms. dr. prof. rev. sgt. capt. lt. gen. gov. jr. sr. ph.d. st. mt. ft. ave. blvd. rd. inc. co. corp. ltd. bros.
dept. est. etc. vs. sq. jan. feb. mar. apr. jun. jul. aug. sep. sept. oct. nov. dec. mon. tue. tues. wed. thu. thurs.
fri.
"""
ABBREVIATIONS = frozenset(ABBREVIATED.split())
"""Words that keep their period, as in PTBTokenizer; so do initials such as U.S. and p.m."""
CLITICS = frozenset(("'s", "'m", "'d", "'ll", "'re", "'ve", "'t", "'n", "'em", "'til", "'cause", "'tis", "'twas"))
"""Words whose apostrophe is no quotation mark."""
TREEBANK = TreebankWordTokenizer()

MAX_ORDER = 4
"""CIDEr-D and BLEU-4 count runs of 1 to 4 words."""
LENGTH_SIGMA = 6.0
"""CIDEr-D's tolerance of a wrong length, in words."""

NO_WORDNET = SimpleNamespace(synsets=lambda word: ())
"""Stands where NLTK expects WordNet, whose files would have to be downloaded."""
STEMMER = SimpleNamespace(stem=lru_cache(maxsize=2**16)(PorterStemmer().stem))

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class RowScores:
    """One metric."""

    rows: list[float]
    corpus: float
    """The mean of ``rows``."""


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """The metrics of captions; each is better the larger it is."""

    cider: RowScores
    """CIDEr-D, from 0 to 10: 1.159 is what papers print as 115.9."""
    bleu4: float
    """From 0 to 1: counts are added up over all rows before dividing, so it is no mean of rows."""
    rouge_l: RowScores
    """From 0 to 1, with beta 1.2."""
    meteor: RowScores
    """From 0 to 1; of the kind that ``METEOR_KIND`` says."""


def tokenize_caption(text: str) -> list[str]:
    """Return the words of ``text`` in lower case, without punctuation.

    Like the COCO tool, which runs Java's PTBTokenizer: contractions and possessives are split (``dog's`` to ``dog``
    and ``'s``), brackets become words such as ``-lrb-``. NLTK's Treebank tokenizer does the splitting. It would leave
    periods within a text on their words and knows straight quotes only, which is made up for here. What remains
    different: PTBTokenizer keeps ``!!`` as a word, and the period in "No. 5".
    """
    plain = WORD_FINAL_PERIODS.sub(_keep_period_of_abbreviation, text.translate(PLAIN))
    # The period that is added is the last one, which the tokenizer would take from an abbreviation.
    words = TREEBANK.tokenize(plain + " .", convert_parentheses=True)
    unquoted = (_without_quotes(word.lower()) for word in words)
    return [word for word in unquoted if word and word not in DROPPED]


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Return the scores of one caption per row against the row's references.

    CIDEr-D (arXiv 1411.5726) weighs words by their rareness among the references given: with a single row every
    weight and the score are 0, and the scores of a part are not those of the whole. ROUGE-L takes the best precision
    and the best recall over the references, METEOR the best reference. A prediction without words scores 0.

    Raises ``ValueError`` for no rows, unequal numbers, and a row whose references have no words.
    """
    _require_rows(len(predictions), references)
    candidates = [_words(text) for text in predictions]
    truths = [[_words(text) for text in row] for row in references]
    hypotheses = {place: [" ".join(words)] for place, words in enumerate(candidates)}
    targets = {place: [" ".join(words) for words in row] for place, row in enumerate(truths)}
    cider, cider_rows = Cider(MAX_ORDER, LENGTH_SIGMA).compute_score(targets, hypotheses)
    rouge = Rouge()
    # Splitting an empty text at spaces gives one word, "", which would match that of an empty reference.
    rouge_rows = [rouge.calc_score(hypotheses[row], targets[row]) if candidates[row] else 0.0 for row in targets]
    meteor_rows = [
        float(meteor_score(row, words, stemmer=STEMMER, wordnet=NO_WORDNET))
        for words, row in zip(candidates, truths, strict=True)
    ]
    return CaptionScores(
        cider=RowScores([float(each) for each in cider_rows], float(cider)),
        bleu4=_corpus_bleu(candidates, truths),
        rouge_l=RowScores(rouge_rows, sum(rouge_rows) / len(rouge_rows)),
        meteor=RowScores(meteor_rows, sum(meteor_rows) / len(meteor_rows)),
    )


def _corpus_bleu(candidates: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    """Return BLEU-4 (Papineni et al., 2002) with the brevity penalty by the closest reference, the shorter of two.

    The COCO tool's own is not for commercial use, and NLTK's counts n-grams in texts that are too short to have one.
    """
    matched, total = Counter(), Counter()
    length = closest = 0
    for words, row in zip(candidates, references, strict=True):
        length += len(words)
        closest += min((abs(len(reference) - len(words)), len(reference)) for reference in row)[1]
        for order in range(1, MAX_ORDER + 1):
            counts = Counter(ngrams(words, order))
            most: Counter = Counter()
            for reference in row:
                most |= Counter(ngrams(reference, order))
            matched[order] += (counts & most).total()
            total[order] += counts.total()
    if not all(matched[order] for order in range(1, MAX_ORDER + 1)):
        return 0.0
    precision = math.prod(matched[order] / total[order] for order in total) ** (1 / MAX_ORDER)
    return precision * math.exp(min(0.0, 1 - closest / length))


def constant_cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return for each of ``captions`` the corpus CIDEr-D that it has if it is the prediction of every row.

    The same as ``caption_scores([caption] * num_rows, references).cider.corpus``, without reading the references anew
    for every caption. Raises ``ValueError`` as that does.
    """
    _require_rows(len(references), references)
    rows = [[_ngrams(_words(text)) for text in row] for row in references]
    num_rows_with = Counter(ngram for row in rows for ngram in set().union(*row))
    idf = defaultdict(lambda: math.log(len(rows)), {n: math.log(len(rows) / num) for n, num in num_rows_with.items()})

    counts = [ngrams for row in rows for ngrams in row]
    norms = np.array([_norms(ngrams, idf) for ngrams in counts])
    lengths = np.array([_num_words(ngrams) for ngrams in counts])
    shares = np.array([1 / (len(row) * len(rows)) for row in rows for _ in row])
    wanted = {ngram for text in captions for ngram in _ngrams(_words(text))}
    found: dict[Ngram, list[tuple[int, int]]] = {ngram: [] for ngram in wanted}
    for place, own in enumerate(counts):
        for ngram in wanted & own.keys():
            found[ngram].append((place, own[ngram]))
    columns = {ngram: np.array(pairs, dtype=int).reshape(-1, 2).T for ngram, pairs in found.items()}

    scores = []
    for own in (_ngrams(_words(text)) for text in captions):
        products = np.zeros_like(norms)
        for ngram, count in own.items():
            places, theirs = columns[ngram]
            products[places, len(ngram) - 1] += np.minimum(count, theirs) * theirs * idf[ngram] ** 2
        scale = norms * np.array(_norms(own, idf))
        cosines = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
        penalties = np.exp(-((lengths - _num_words(own)) ** 2) / (2 * LENGTH_SIGMA**2))
        scores.append(float(10 * (cosines.mean(axis=1) * penalties * shares).sum()))
    return scores


def _require_rows(num_predictions: int, references: Sequence[Sequence[str]]) -> None:
    if num_predictions != len(references) or not references:
        raise ValueError(
            f"There are {num_predictions} captions and references for {len(references)} rows; there must be as many of "
            "one as of the other, and at least one. Pass one caption per row."
        )
    for place, row in enumerate(references):
        if isinstance(row, str) or not any(_words(text) for text in row):
            raise ValueError(
                f"Row {place} has the references {row!r}; it must have a list of texts, at least one of them with a "
                "word. Correct them, or leave the row out."
            )


@lru_cache(maxsize=2**17)
def _words(text: str) -> tuple[str, ...]:
    """Return ``tokenize_caption``, remembered: references are often asked for again."""
    return tuple(tokenize_caption(text))


def _keep_period_of_abbreviation(match: re.Match[str]) -> str:
    word = match[1].lower() + "."
    return f"{match[1]}. " if word in ABBREVIATIONS or INITIALS.fullmatch(word) else f"{match[1]} "


def _without_quotes(word: str) -> str:
    """Return ``word`` without apostrophes around it, unless they are its own, as in ``'s`` and ``'90s``."""
    return word if word in CLITICS or (word[0] == "'" and word[1:2].isdigit()) else word.strip("'")


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _num_words(ngrams: Counter[Ngram]) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 1)


def _norms(ngrams: Counter[Ngram], idf: dict[Ngram, float]) -> list[float]:
    """Return the length of the tf-idf vector of each order."""
    squares = [0.0] * MAX_ORDER
    for ngram, count in ngrams.items():
        squares[len(ngram) - 1] += (count * idf[ngram]) ** 2
    return [math.sqrt(square) for square in squares]
