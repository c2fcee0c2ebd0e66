"""COCO captions, TVC and YouCook2 captions: a picture or a moment described, compared with all its references."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dora_core.evaluation.results import Metric, mean_metric
from dora_core.registry import EVALUATORS
from pipelines.video.evaluators.examples import ExampleEvaluator, Row, json_line, problem
from pipelines.video.task import Record, Split

NUM_CONSTANTS = 50
"""So many of the commonest references are tried as the caption of everything."""


class CaptionEvaluator(ExampleEvaluator):
    """A benchmark scored by CIDEr-D, with word rareness from the references of the rows evaluated.

    The tokenizer and METEOR are not the official Java programs: see ``dora_core.evaluation.captions``. A caption is
    compared with all references of its row, as official scores are. The paper's code, validating during training,
    compares it with one at a time: those numbers are others.
    """

    def as_scored(self, text: str) -> str:
        """Return a caption or a reference as the benchmark's tool takes it."""
        return text

    def complete(self, rows: list[Row], root: Path) -> list[Row]:
        """Return ``rows``; raises ``DataError`` for references to some of them only or without words."""
        for row in super().complete(rows, root):
            texts = [text for text, _ in row["targets"]]
            if texts and not any(letter.isalnum() for text in texts for letter in self.as_scored(text)):
                raise problem(
                    f"{self.name}: {row['id']} has the references {texts!r}; at least one must have a word that is "
                    "scored. Correct the annotation, or remove it."
                )
        return rows

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the caption as it is scored; what it is worth depends on the other rows."""
        return {"pred": self.as_scored(text).strip()}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return CIDEr-D (1.159 is what papers print as 115.9), BLEU-4, METEOR of a kind, and ROUGE-L.

        Beside CIDEr-D is that of the best single caption for everything among the commonest references.
        """
        from dora_core.evaluation.captions import METEOR_KIND, TOKENIZER, caption_scores, constant_cider

        if not predictions[0]["targets"]:
            return []
        references = [[self.as_scored(text) for text, _ in row["targets"]] for row in predictions]
        scores = caption_scores([row["pred"] for row in predictions], references)
        counts = Counter(text for row in references for text in row)
        constants = [text for text, _ in counts.most_common(NUM_CONSTANTS)]
        level, caption = max(
            zip(constant_cider(constants, references), constants, strict=True), key=lambda pair: pair[0]
        )
        extra = {"tokenizer": TOKENIZER, "num_references": counts.total()}
        majority = {"majority": level, "majority_answer": caption}
        bleu4 = Metric(
            name=self.name,
            metric="bleu4",
            value=scores.bleu4,
            stderr=None,
            n=len(predictions),
            extra=extra,
        )
        return [
            mean_metric(self.name, "cider", scores.cider.rows, extra=extra | majority),
            bleu4,
            mean_metric(self.name, "meteor", scores.meteor.rows, extra=extra | {"kind": METEOR_KIND}),
            mean_metric(self.name, "rouge_l", scores.rouge_l.rows, extra=extra),
        ]


class COCOCaption(CaptionEvaluator):
    """COCO captions in Karpathy's split: 5,000 pictures with about five references each."""

    name = "video/coco_caption"
    task_name = "caption"
    max_new_tokens = 40

    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return what the COCO tool reads."""
        captions = [{"image_id": row["id"], "caption": row["text"]} for row in predictions]
        return {f"coco_caption_{split}_predictions.json": [json_line(captions)]}


class ValueCaptionEvaluator(CaptionEvaluator):
    """A caption benchmark of VALUE, whose tool removes what is not ASCII; its server alone has the test references."""

    def as_scored(self, text: str) -> str:
        """Return ``text`` without its characters outside of ASCII."""
        return text.encode("ascii", "ignore").decode("ascii")

    def fields(self, record: Record) -> dict[str, Any]:
        """Return the video's name, which the server wants to know."""
        return {"vid_name": record["vid_name"]}

    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return VALUE's file: one line a clip."""
        lines = [
            json_line({"vid_name": row["vid_name"], "clip_id": row["id"], "descs": [{"desc": row["text"]}]})
            for row in predictions
        ]
        return {f"{self.benchmark}_{split}_predictions.jsonl": lines}


class TVC(ValueCaptionEvaluator):
    """TVC: moments of television shows, four references each."""

    name = "video/tvc"
    task_name = "tvc"


class YC2C(ValueCaptionEvaluator):
    """YouCook2 captions: steps of recipes, one reference each."""

    name = "video/yc2c"
    task_name = "yc2c"


for _evaluator in (COCOCaption(), TVC(), YC2C()):
    EVALUATORS.register(_evaluator.name)(_evaluator)
