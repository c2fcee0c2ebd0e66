"""VQAv2: test-dev, whose answers a server keeps, or val2014, scored here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import need_file, read_lines, read_list
from pipelines.vlm.evaluators.questions import QUESTION_ID, SHORT_ANSWER, Row, read_questions
from pipelines.vlm.evaluators.vqa import VQAEvaluator, add_answers, annotators

if TYPE_CHECKING:
    from pipelines.vlm.config import EvaluateSection

LLAVA_QUESTIONS = "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
WHOLE_TEST_SET = "vqav2/llava_vqav2_mscoco_test2015.jsonl"
"""The ids that a submission must have, of which test-dev is a part."""
OFFICIAL_QUESTIONS = {
    "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json": "test2015",
    "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": "val2014",
}
"""File to the split of its images."""
ANNOTATIONS = "vqav2/v2_mscoco_val2014_annotations.json"


class VQAv2(VQAEvaluator):
    """VQAv2, from LLaVA's question file or else from the official ones."""

    name = "vlm/vqav2"

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the questions, with answers if there are annotations for them."""
        path = need_file(root, [LLAVA_QUESTIONS, *OFFICIAL_QUESTIONS], f"{self.name} needs its questions")
        if path == root / LLAVA_QUESTIONS:
            rows = read_questions(path, "vqav2/test2015")
        else:
            rows = _official_rows(path, OFFICIAL_QUESTIONS[path.relative_to(root).as_posix()])
        annotations = root / ANNOTATIONS
        if not annotations.is_file():
            return rows
        entries = read_list(annotations, "annotations", {"question_id": QUESTION_ID, "answers": list})
        known = {entry["question_id"]: annotators(entry, annotations) for entry in entries}
        return add_answers(rows, known, annotations)

    def submissions(self, predictions: list[Row], root: Path) -> dict[str, Any]:
        """Return the server's list of normalised answers, with "" for the rest of the test set if that is known."""
        answers = {row["question_id"]: row["pred"] for row in predictions}
        path = root / WHOLE_TEST_SET
        ids = [line["question_id"] for line in read_lines(path, {"question_id": QUESTION_ID})] if path.is_file() else []
        if not answers.keys() <= set(ids):
            ids = list(answers)
        return {"vqav2.json": [{"question_id": each, "answer": answers.get(each, "")} for each in ids]}


def _official_rows(path: Path, split: str) -> list[Row]:
    entries = read_list(path, "questions", {"question_id": QUESTION_ID, "image_id": int, "question": str})
    return [
        {
            "question_id": entry["question_id"],
            "prompt": f"{entry['question']}\n{SHORT_ANSWER}",
            "image": f"vqav2/{split}/COCO_{split}_{entry['image_id']:012d}.jpg",
        }
        for entry in entries
    ]


EVALUATORS.register(VQAv2.name)(VQAv2())
