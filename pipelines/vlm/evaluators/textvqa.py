"""TextVQA: questions on the writing in a picture, with what a text recogniser read there in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import look_up, need_file, read_list
from pipelines.vlm.evaluators.questions import SHORT_ANSWER, Row, read_questions
from pipelines.vlm.evaluators.vqa import VQAEvaluator, annotators

if TYPE_CHECKING:
    from pipelines.vlm.config import EvaluateSection

LLAVA_QUESTIONS = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "textvqa/TextVQA_0.5.1_val.json"
IMAGES = "textvqa/train_images"
OCR_LINE = "Reference OCR token:"
"""Begins the line of recognised words; without it LLaVA-1.5-7B scores about 46 in place of 58."""


class TextVQA(VQAEvaluator):
    """TextVQA's validation split, from LLaVA's question file or else, without recognised words, from its own."""

    name = "vlm/textvqa"

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the questions with answers, found by image and question; as with LLaVA, the id is the image's."""
        path = need_file(root, [ANNOTATIONS], f"{self.name} needs its answers")
        entries = read_list(path, "data", {"image_id": str, "question": str, "answers": list})
        if not (root / LLAVA_QUESTIONS).is_file():
            return [_official_row(entry, path) for entry in entries]
        answers = {(entry["image_id"], entry["question"].lower()): annotators(entry, path) for entry in entries}
        rows = read_questions(root / LLAVA_QUESTIONS, IMAGES)
        return [
            {**row, "answers": look_up(answers, (row["question_id"], question_of(row["prompt"])), path)} for row in rows
        ]

    def remarks(self, predictions: list[Row]) -> dict[str, Any]:
        """Say whether the prompts have the recognised words, without which scores are not comparable."""
        return {"ocr_tokens": any(OCR_LINE in row["prompt"] for row in predictions)}


def question_of(prompt: str) -> str:
    """Return the question, in lower case, that one of LLaVA's prompts asks: its first line but for recognised words."""
    return next((line for line in prompt.split("\n") if not line.startswith(OCR_LINE)), "").lower()


def _official_row(entry: Row, path: Path) -> Row:
    return {
        "question_id": entry["image_id"],
        "prompt": f"{entry['question']}\n{SHORT_ANSWER}",
        "image": f"{IMAGES}/{entry['image_id']}.jpg",
        "answers": annotators(entry, path),
    }


EVALUATORS.register(TextVQA.name)(TextVQA())
