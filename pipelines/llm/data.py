"""Instruction rows to tokens: prompt templates, where the loss applies, and what was cut."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from dora_core.data.collate import IGNORED, TokenRow
from dora_core.data.rows import DataError, hold_out, read_rows, read_source, require_fields
from dora_core.registry import DATASETS, unknown_name
from pipelines.llm.config import COMMONSENSE, DataSection

Row = dict[str, Any]

_INDENT = " " * 16
_CHUNK = 2000  # rows tokenized per call: enough to use every core, few enough that their offsets stay small


def _wrapper(with_input: bool, after_request: str, indent: str, blank: str) -> str:
    context = ", paired with an input that provides further context" if with_input else ""
    blocks = ["Instruction:\n" + indent + "{instruction}"] + ["Input:\n" + indent + "{input}"] * with_input
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        f"request.{after_request}\n\n"
        + "".join(f"{indent}### {block}\n{blank}\n" for block in blocks)
        + f"{indent}### Response:\n{indent}"
    )


_ALPACA = (_wrapper(False, "", "", ""), _wrapper(True, "", "", ""))
_WRAPPERS = {  # template -> (without input, with input), for training and then for evaluation
    "alpaca": (_ALPACA, _ALPACA),
    "alpaca_reference": (  # trailing spaces and the line of 16 spaces differ, as in the paper's code
        (_wrapper(False, "  ", _INDENT, _INDENT), _wrapper(True, " ", _INDENT, _INDENT)),
        (_wrapper(False, " ", _INDENT, ""), _wrapper(True, "", _INDENT, "")),
    ),
    "plain": (("", ""), ("", "")),
}


def _choose(what: str, fields: str, word: str, between: str = " ", after: str = "\n\n") -> tuple[str, str, str]:
    text = f"Please choose the correct {what}: {fields}\n\n{{options}}{after}Answer format: {{labels}}"
    return text, word, between


_TRUE_OR_FALSE = "Please answer the following question with true or false, question: {question}?"
_QUESTION = _choose("answer to the question", "{question}", "Answer")
_BLANK = "answer to fill in the blank to complete the given sentence"
TASK_TEMPLATES = {  # task -> instruction, the word before an option's number, what stands between two options
    "boolq": (_TRUE_OR_FALSE + "\n\nAnswer format: true/false", "", ""),
    "piqa": _choose("solution to the question", "{goal}", "Solution", between="\n\n"),
    "social_i_qa": _choose("answer to the question", "{context} {question}", "Answer"),
    "hellaswag": _choose("ending to complete the given sentence", "{activity}: {context}", "Ending"),
    "winogrande": _choose(_BLANK, "{sentence}", "Option", after=" "),
    "arc_easy": _QUESTION,
    "arc_challenge": _QUESTION,
    "openbookqa": _QUESTION,
}
ROW_COUNTS = ("num_truncated", "num_truncated_answers", "num_without_eos", "num_untrainable")
TASK_FOLDERS = {task: task for task in COMMONSENSE} | {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
"""Folder of each task under ``data/commonsense``."""


def task_instruction(task: str, **fields: Any) -> str:
    """Return the ``instruction`` of a benchmark question; ``options`` is the list of its answers' texts.

    ``task_instruction("piqa", goal="open a jar", options=["twist it", "boil it"])``. Raises ``ValueError`` for an
    unknown task and for fields that are not exactly those of the task's template.
    """
    if task not in TASK_TEMPLATES:
        raise unknown_name("task", task, sorted(TASK_TEMPLATES))
    text, word, separator = TASK_TEMPLATES[task]
    needed = {name for _, name, _, _ in Formatter().parse(text) if name} - {"labels"}
    if set(fields) != needed:
        raise ValueError(
            f"{task} was given {sorted(fields)}; it takes the fields {sorted(needed)}. Pass exactly these."
        )
    options = list(enumerate(fields.pop("options", ()), start=1))
    labels = "/".join(f"{word.lower()}{number}" for number, _ in options)
    shown = separator.join(f"{word}{number}: {option}" for number, option in options)
    return text.format(options=shown, labels=labels, **fields)


def render_prompt(row: Row, template: str, for_evaluation: bool = False) -> str:
    """Return the text before the answer; only ``alpaca_reference`` differs between training and evaluation."""
    if template not in _WRAPPERS:
        raise unknown_name("template", template, sorted(_WRAPPERS))
    wrapper = _WRAPPERS[template][for_evaluation][bool(row.get("input"))]
    return wrapper.format(instruction=row.get("instruction"), input=row.get("input"))


def render(row: Row, template: str) -> tuple[str, str]:
    """Return the prompt and the answer of a training row."""
    return render_prompt(row, template), row["output"]


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> TokenRow:
    """Return the tokens of one row; see ``encode_rows``."""
    return encode_rows([row], tokenizer, section)[0][0]


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, section: DataSection, source: str = "the data"
) -> tuple[list[TokenRow], Counter[str]]:
    """Return the rows' tokens, and the four counts of rows that ``DataReport`` starts with.

    A row is what the tokenizer makes of prompt and answer in one text, with the BOS that it adds, at most
    ``cutoff_len`` tokens, and EOS if one more fits. Without ``train_on_inputs`` the loss starts at the first token
    that reaches into the answer, even if the token begins in the prompt. Longer rows raise ``DataError`` unless
    ``overlong`` is ``truncate``.
    """
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__} with the EOS token {tokenizer.eos_token!r}; it must be a "
            "fast tokenizer with an EOS token. Set model.tokenizer to a folder with a tokenizer.json that names one."
        )
    encoded: list[TokenRow] = []
    counts = Counter(dict.fromkeys(ROW_COUNTS, 0))
    too_long: list[tuple[int, int]] = []
    shared: dict[int, int] = {}  # one int object per token id, not one per token: a quarter of the memory
    for chunk in range(0, len(rows), _CHUNK):
        parts = [render(row, section.template) for row in rows[chunk : chunk + _CHUNK]]
        texts = [prompt + answer for prompt, answer in parts]
        tokens = tokenizer(texts, padding=False, truncation=False, return_offsets_mapping=True, verbose=False)
        spans = zip(parts, tokens["input_ids"], tokens["offset_mapping"], strict=True)
        for number, ((prompt, _), ids, offsets) in enumerate(spans, start=chunk + 1):
            ids = [shared.setdefault(token, token) for token in ids]
            if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it; the rule below decides
                ids.pop()
            if len(ids) > section.cutoff_len:
                too_long.append((number, len(ids)))
            answer_start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
            encoded.append(_token_row(ids, answer_start, tokenizer.eos_token_id, section, counts))
    if too_long and section.overlong == "error":
        raise DataError(
            f"Row {too_long[0][0]} of {source} has {too_long[0][1]} tokens; at most data.cutoff_len "
            f"({section.cutoff_len}) are allowed. {len(too_long)} of {len(rows)} rows are too long, the longest has "
            f"{max(length for _, length in too_long)}. Raise data.cutoff_len or set data.overlong: truncate."
        )
    return encoded, counts


def _token_row(ids: list[int], answer_start: int, eos_id: int, section: DataSection, counts: Counter[str]) -> TokenRow:
    if len(ids) > section.cutoff_len:
        counts["num_truncated"] += 1
        counts["num_truncated_answers"] += answer_start >= section.cutoff_len
        del ids[section.cutoff_len :]
    if len(ids) < section.cutoff_len:
        ids.append(eos_id)
    else:
        counts["num_without_eos"] += 1
    masked = 0 if section.train_on_inputs else min(answer_start, len(ids))
    counts["num_untrainable"] += len(ids) <= max(masked, 1)
    return TokenRow(ids, [IGNORED] * masked + ids[masked:])


@dataclass(frozen=True)
class DataReport:
    """What ``load_training_data`` made of the rows."""

    num_truncated: int
    """Rows cut at ``cutoff_len``; the first four counts are of training and validation rows together."""
    num_truncated_answers: int
    """Truncated rows that keep no token of their answer."""
    num_without_eos: int
    num_untrainable: int
    """Rows without any token to train on; they stay in and add nothing to the loss."""
    num_rows: int
    """Training rows, without those held out; the two token counts are theirs, with BOS and EOS."""
    num_validation: int
    num_tokens: int
    num_target_tokens: int
    """Tokens with loss, after the model's shift by one token."""
    dataset_hash: str
    """sha256 of all rows as read, in order."""

    def __str__(self) -> str:
        share = self.num_target_tokens / max(self.num_tokens, 1)
        return (
            f"{self.num_rows:,} training rows with {self.num_tokens:,} tokens, {share:.1%} of them with loss; "
            f"{self.num_validation:,} validation rows. Of all rows {self.num_truncated:,} are truncated "
            f"({self.num_truncated_answers:,} keep nothing of their answer), {self.num_without_eos:,} have no EOS, "
            f"{self.num_untrainable:,} nothing to train on. sha256 {self.dataset_hash[:12]}"
        )


def load_training_data(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[TokenRow], list[TokenRow], DataReport]:
    """Return training rows, validation rows and the report; the same on every rank.

    Raises ``DataError`` for rows that cannot be read or are too long, and if over 1% have nothing to train on.
    """
    counts = Counter(dict.fromkeys(ROW_COUNTS, 0))
    digest = hashlib.sha256()
    parts: tuple[list[TokenRow], list[TokenRow]] = ([], [])
    for part, sources in zip(parts, (section.train, section.validation), strict=True):
        for source in sources:
            raw = read_source(source)
            if section.template == "plain":
                require_fields(raw, ["output"], source)
            else:
                require_fields(raw, ["instruction", "output"], source, optional=["input"])
            for row in raw:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            encoded, found = encode_rows(raw, tokenizer, section, source)
            part.extend(encoded)
            counts.update(found)
    rows, validation = parts if section.validation else hold_out(parts[0], section.num_validation, seed)
    num_all = len(rows) + len(validation)
    if counts["num_untrainable"] > 0.01 * num_all:
        raise DataError(
            f"{counts['num_untrainable']} of {num_all} rows have no token to train on; at most 1% may. Raise "
            "data.cutoff_len, shorten or remove these rows, or set data.train_on_inputs: true."
        )
    report = DataReport(
        **counts,
        num_rows=len(rows),
        num_validation=len(validation),
        num_tokens=sum(len(row.input_ids) for row in rows),
        num_target_tokens=sum(len(row.labels) - 1 - row.labels[1:].count(IGNORED) for row in rows),
        dataset_hash=digest.hexdigest(),
    )
    return rows, validation, report


@DATASETS.register("llm/commonsense")
def commonsense(folder: str = "data/commonsense") -> list[Row]:
    """Return the training rows of the eight commonsense tasks (170,420 in the paper's mix).

    Reads ``folder/commonsense_170k.json`` (from ft-training_set of https://github.com/AGI-Edgerunners/LLM-Adapters) or,
    where it is absent, ``folder/<task>/train.json`` of all eight. ``folder`` starts at the working directory.
    """
    mix = Path(folder) / "commonsense_170k.json"
    files = [mix] if mix.is_file() else [Path(folder) / TASK_FOLDERS[task] / "train.json" for task in COMMONSENSE]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"llm/commonsense found neither {mix} nor {', '.join(missing)}. Get the first from ft-training_set of "
            "https://github.com/AGI-Edgerunners/LLM-Adapters, or list the files that you have in data.train."
        )
    return [row for file in files for row in read_rows(str(file))]
