"""The LLM pipeline's configuration."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from dora_core.adapters.config import AdapterConfig
from dora_core.config import DeepSpeedSection, LogSection, RunSection, TrainSection, require, section

RECIPES = Path(__file__).parent / "recipes"

COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)


@section
class ModelSection:
    """Which causal language model to start from."""

    path: str
    """A folder or a Hugging Face name."""
    tokenizer: str | None = None
    """Another folder or name for the tokenizer; ``path`` if not given."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    from_scratch: bool = False
    """Random initial weights in the shape of ``path``'s config, for pre-training and for speed measurements."""


@section
class DataSection:
    """Which rows to train on and how a row becomes tokens."""

    train: list[str]
    """Files (JSON list or JSON lines), folders, ``hf:<name>[:<split>]`` or registered names such as llm/commonsense."""
    validation: list[str] = field(default_factory=list)
    """Rows for the validation loss; if empty, ``num_validation`` rows are held out from ``train`` by seed."""
    num_validation: int = 120
    template: Literal["alpaca", "alpaca_reference", "plain"] = "alpaca"
    """alpaca: the wrapper as published by Alpaca; alpaca_reference: with the whitespace of the paper's code;
    plain: the row's output alone."""
    train_on_inputs: bool = True
    """Loss on the prompt's tokens too, as the paper's code does."""
    cutoff_len: int = 256
    """Rows are at most this many tokens."""
    overlong: Literal["error", "truncate"] = "error"
    """What to do with a longer row; truncated rows are counted and reported."""
    group_by_length: bool = False
    packing: bool = False
    """Pack rows into sequences of ``pack_length`` tokens, with attention confined to each row, instead of padding
    them. The batch sizes then count sequences, which hold several rows each."""
    pack_length: int | None = None
    """Longest packed sequence, in tokens; ``cutoff_len`` if not given."""
    num_workers: int = 0

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "a non-empty list of files, folders or names")
        require(self.cutoff_len >= 8, "data.cutoff_len", self.cutoff_len, "at least 8 tokens")
        require(
            self.pack_length is None or self.pack_length >= self.cutoff_len,
            "data.pack_length",
            self.pack_length,
            f"at least data.cutoff_len ({self.cutoff_len})",
        )
        require(self.num_validation >= 0, "data.num_validation", self.num_validation, "0 or more")


@section
class EvaluateSection:
    """Which benchmarks to score and how."""

    tasks: list[str] = field(default_factory=lambda: list(COMMONSENSE))
    """Evaluators without their prefix: boolq for llm/boolq."""
    path: str = "data/commonsense"
    """Folder with ``<task>/test.json``."""
    mode: Literal["generate", "rank"] = "generate"
    """generate: the paper's protocol, the first option word in the generated text; rank: the option of the highest
    log-likelihood."""
    batch_size: int = 8
    num_beams: int = 4
    max_new_tokens: int = 32
    limit: int | None = None
    """Score only the first ``limit`` rows of each task."""
    before_training: bool = False
    after_training: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "max_new_tokens"):
            require(getattr(self, name) > 0, f"evaluate.{name}", getattr(self, name), "a positive integer")


@section
class LLMConfig:
    """Everything a run of the LLM pipeline depends on."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    run: RunSection = field(default_factory=RunSection)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    log: LogSection = field(default_factory=LogSection)
