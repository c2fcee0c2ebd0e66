from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dora_core.registry import EVALUATORS
from pipelines.llm.config import COMMONSENSE, EvaluateSection
from pipelines.llm.data import task_instruction
from pipelines.llm.evaluators import ANSWER_PREFIX, TASKS, CommonsenseTask, majority

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("DORA_COMMONSENSE", ROOT.parent / "shared" / "data" / "commonsense"))

FACTS = {  # rows of each answer in label order, and the majority answer's percentage
    "boolq": ([2033, 1237], 62.2),
    "piqa": ([910, 928], 50.5),
    "social_i_qa": ([643, 654, 657], 33.6),
    "winogrande": ([628, 639], 50.4),
    "arc_easy": ([596, 585, 633, 561, 1], 26.6),
    "arc_challenge": ([266, 311, 310, 285], 26.5),
    "openbookqa": ([138, 126, 132, 104], 27.6),
}


def row(instruction: str, answer: str) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": ANSWER_PREFIX + answer, "answer": answer}


def piqa_row(goal: str, answer: str) -> dict[str, Any]:
    return row(task_instruction("piqa", goal=goal, options=["twist the lid", "boil the lid"]), answer)


def arc_row(question: str, num_options: int, answer: str) -> dict[str, Any]:
    options = [f"thing {number}" for number in range(1, num_options + 1)]
    return row(task_instruction("arc_easy", question=question, options=options), answer)


def boolq_row(question: str, answer: str) -> dict[str, Any]:
    return row(task_instruction("boolq", question=question), answer)


def task(name: str) -> CommonsenseTask:
    return EVALUATORS.get(f"llm/{name}")


def real_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / task(name).folder / "test.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set DORA_COMMONSENSE to a folder with the test files")
    return task(name).load(EvaluateSection(path=str(DATA)))


def test_importing_the_evaluators_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pipelines.llm.evaluators\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules)) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "packages"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_registered_tasks_are_those_of_the_default_recipe() -> None:
    assert [one.name for one in TASKS] == [f"llm/{name}" for name in COMMONSENSE]
    assert all(EVALUATORS.get(one.name) is one for one in TASKS)
    assert (task("arc_easy").folder, task("arc_challenge").folder) == ("ARC-Easy", "ARC-Challenge")


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "False. The statement is true", "true"),
        ("boolq", "TRUE", None),
        ("boolq", "untrue", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "The answer is not solution1 but solution2", "solution1"),
        ("piqa", "Solution1", None),
        ("piqa", "solution3", None),
        ("piqa", "solution12", "solution1"),
        ("social_i_qa", "answer 3", None),
        ("social_i_qa", "answer3", "answer3"),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("hellaswag", "ending5", None),
        ("winogrande", "option2\n\noption1", "option2"),
        ("winogrande", "option3", None),
        ("arc_easy", "the correct answer is answer5", "answer5"),
        ("arc_challenge", "answer6 answer4", "answer4"),
        ("openbookqa", "correct:answer1.", "answer1"),
        ("openbookqa", "answer1\n### Response:\nanswer2", "answer2"),
    ],
)
def test_the_first_label_after_the_last_response_mark_counts_as_in_the_papers_code(
    name: str, text: str, label: str | None
) -> None:
    assert task(name).extract(text) == label


@pytest.mark.parametrize("num_options", [3, 4, 5])
def test_options_are_those_that_the_row_numbers(num_options: int) -> None:
    options = task("arc_challenge").options(arc_row("Does Answer9: count, or 10?", num_options, "answer1"))
    assert options == [f"answer{number}" for number in range(1, num_options + 1)]


def test_a_true_or_false_row_offers_both_words() -> None:
    assert task("boolq").options(boolq_row("does ice float", "true")) == ["true", "false"]


@pytest.mark.parametrize("name", COMMONSENSE)
def test_every_gold_answer_of_the_real_test_files_is_extracted_and_offered(name: str) -> None:
    one = task(name)
    for real in real_rows(name):
        assert one.extract(real["output"]) == real["answer"]
        options = one.options(real)
        assert real["answer"] in options
        assert real["instruction"].endswith("Answer format: " + "/".join(options))


@pytest.mark.parametrize("name", FACTS)
def test_label_counts_and_majority_of_the_real_test_files_are_the_published_ones(name: str) -> None:
    counts, percent = FACTS[name]
    rows = real_rows(name)
    found = Counter(real["answer"] for real in rows)
    labels = task(name).labels
    assert [found[label] for label in labels[: len(counts)]] == counts
    assert sum(counts) == len(rows)
    label, share = majority(rows)
    assert (label, round(100 * share, 1)) == (labels[counts.index(max(counts))], percent)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([piqa_row("open", "solution3")], r"row 0 has answer 'solution3'.*'solution1', 'solution2'"),
        ([{"instruction": "Solution1: a"}], "answer"),
        ([arc_row("no solutions here", 4, "answer1")], r"its options are \[\]"),
    ],
)
def test_a_malformed_row_is_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        task("piqa").load(EvaluateSection(path=str(tmp_path)))
