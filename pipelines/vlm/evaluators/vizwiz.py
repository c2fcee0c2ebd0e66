"""VizWiz: photographs and questions of blind people, of which many cannot be answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import need_file, problem, read_lines
from pipelines.vlm.evaluators.questions import SHORT_ANSWER, Row, read_questions
from pipelines.vlm.evaluators.vqa import VQAEvaluator, annotators

if TYPE_CHECKING:
    from pipelines.vlm.config import EvaluateSection

LLAVA_QUESTIONS = "vizwiz/llava_test.jsonl"
OFFICIAL_QUESTIONS = ("vizwiz/test.json", "vizwiz/val.json")
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(VQAEvaluator):
    """VizWiz, from LLaVA's question file or else from the official test or validation file."""

    name = "vlm/vizwiz"

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the questions; those of the validation file come with answers."""
        path = need_file(root, [LLAVA_QUESTIONS, *OFFICIAL_QUESTIONS], f"{self.name} needs its questions")
        return read_questions(path, "vizwiz/test") if path == root / LLAVA_QUESTIONS else _official_rows(path)

    def submissions(self, predictions: list[Row], root: Path) -> dict[str, Any]:
        """Return the server's list of images with normalised answers."""
        return {"vizwiz.json": [{"image": Path(row["image"]).name, "answer": row["pred"]} for row in predictions]}


def _official_rows(path: Path) -> list[Row]:
    entries = read_lines(path, {"image": str, "question": str})
    num_answered = sum("answers" in entry for entry in entries)
    if num_answered not in (0, len(entries)):
        raise problem(
            f"{path} has answers to {num_answered} of {len(entries)} questions; it must have them for all or for none. "
            "Download the file again."
        )
    return [
        {
            "question_id": entry["image"],
            "prompt": f"{entry['question']}\n{UNANSWERABLE}\n{SHORT_ANSWER}",
            "image": f"vizwiz/{path.stem}/{entry['image']}",
            **({"answers": annotators(entry, path)} if num_answered else {}),
        }
        for entry in entries
    ]


EVALUATORS.register(VizWiz.name)(VizWiz())
