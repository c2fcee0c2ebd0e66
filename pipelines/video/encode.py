"""An example's texts to tokens; what is too long is cut where it hurts least."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipelines.video.task import Example, RecordError

NUM_VISUAL_TOKENS = 100
EXTRA_TOKENS = tuple(f"<{kind}_{place}>" for kind in ("extra_id", "vis_extra_id") for place in range(NUM_VISUAL_TOKENS))
"""What VL-BART adds to BART's vocabulary; the second hundred name places among the visual tokens."""


def add_extra_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add ``EXTRA_TOKENS`` to a tokenizer that does not have them."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in EXTRA_TOKENS if token not in known], special_tokens=True)


@dataclass(frozen=True)
class TextEncoder:
    """Makes token ids of texts, the tokenizer's own tokens at both ends included."""

    tokenizer: PreTrainedTokenizerBase
    task_prompts: bool = True
    reference_truncation: bool = False
    num_positions: int | None = None
    """Tokens that the model takes at most, however long a task's texts may be; None knows no such limit."""

    def text(self, example: Example, max_length: int | None) -> tuple[list[int], bool]:
        """Return the ids of the example's text, at most ``max_length``, and whether it was cut.

        ``cuttable`` loses its last tokens; what stands before and after it is kept whole. With ``reference_truncation``
        the text is cut from its end. Raises ``RecordError`` if the rest alone is too long.
        """
        max_length = self._limit(max_length)
        before = example.before if self.task_prompts or not _is_prompt(example.before) else ""
        text = before + example.cuttable + example.after
        encoding = self.tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        ids, spans = list(encoding["input_ids"]), encoding["offset_mapping"]
        surplus = 0 if max_length is None else len(ids) - max_length
        if surplus <= 0:
            return ids, False
        if self.reference_truncation:
            return [*ids[: max_length - 1], ids[-1]], True
        start, stop = len(before), len(before) + len(example.cuttable)
        inside = [place for place, (begin, end) in enumerate(spans) if start <= begin < end <= stop]
        if len(inside) < surplus:
            fixed = max_length == self.num_positions
            remedy = "Shorten or remove" if fixed else "Raise max_text_length of its task, or remove"
            raise RecordError(
                f"The text of {example.id} has {len(ids)} tokens, of which {len(inside)} may be cut; at most "
                f"{max_length} are allowed. {remedy} the row."
            )
        dropped = set(inside[len(inside) - surplus :])
        return [token for place, token in enumerate(ids) if place not in dropped], True

    def target(self, text: str, max_length: int | None) -> list[int]:
        """Return the ids of a target, at most ``max_length``; the last token, which ends texts, stays."""
        max_length = self._limit(max_length)
        ids = list(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if max_length is not None and len(ids) > max_length:
            ids = [*ids[: max_length - 1], ids[-1]]
        return ids

    def _limit(self, max_length: int | None) -> int | None:
        return min((limit for limit in (max_length, self.num_positions) if limit is not None), default=None)


def _is_prompt(before: str) -> bool:
    """Whether the text's beginning is a task's name, as that of image tasks is, and not a mark for subtitles."""
    return before.endswith(": ")
