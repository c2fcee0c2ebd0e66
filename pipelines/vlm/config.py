"""The VLM pipeline's configuration."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from dora_core.adapters.config import AdapterConfig
from dora_core.config import DeepSpeedSection, LogSection, RunSection, TrainSection, require, section

RECIPES = Path(__file__).parent / "recipes"

BENCHMARKS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench")
"""In the order of the paper's Table 4."""

Template = Literal["v1", "plain", "chat"]
Aspect = Literal["pad", "square"]


@section
class ModelSection:
    """Which LLaVA to start from: a whole one, or a language model, a vision tower and a projector."""

    path: str | None = None
    """A folder or Hugging Face name of a LLaVA, in transformers' layout or in that of the original repository."""
    language_model: str | None = None
    """A causal language model that transformers loads; with ``vision_tower`` in place of ``path``."""
    vision_tower: str | None = None
    """A CLIP vision model that transformers loads, or ``open_clip:<name>[:<pretrained tag or file>]``. Beside ``path``
    it replaces the tower that an original checkpoint names."""
    projector: str | None = None
    """LLaVA's ``mm_projector.bin``; random if not given, for training it. Beside ``path`` it replaces that one."""
    tokenizer: str | None = None
    """Another folder or name for the tokenizer; that of the language model if not given."""
    feature_layer: int = -2
    """Which of the tower's hidden states the projector sees, counted from its end; for an assembled model."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    from_scratch: bool = False
    """Random initial weights in the shape of ``path``'s config, for pre-training and for speed measurements."""

    def __post_init__(self) -> None:
        parts = self.language_model is not None
        require(
            (self.path is None) == parts and (not parts or self.vision_tower is not None),
            "model",
            {"path": self.path, "language_model": self.language_model, "vision_tower": self.vision_tower},
            "either path, or language_model and vision_tower",
            "Give a whole LLaVA or its parts.",
        )
        require(not (self.from_scratch and parts), "model.from_scratch", True, "false without model.path")
        require(self.feature_layer < 0, "model.feature_layer", self.feature_layer, "negative: -2 is the last but one")


@section
class SourceSection:
    """One data set of a mixture."""

    rows: str
    """A JSON list or JSON lines of conversations, or WebDataset shards: a .tar, a folder of them, a pattern such as
    ``shard-{000000..000664}.tar``."""
    images: str | None = None
    """Folder that the rows' image paths start at; ``data.images`` if not given. Shards hold their images."""
    weight: float = 1.0
    """How often its rows occur in an epoch: 2 for twice, 0.5 for another half of them in each epoch."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.train.weight", self.weight, "positive", "Remove the source to leave it out.")


@section
class DataSection:
    """Which conversations to train on and how a row becomes tokens and pixels."""

    train: list[str | SourceSection]
    """Data sets: each a string as ``SourceSection.rows`` takes, or a mapping of rows, images and weight."""
    images: str | None = None
    """Folder that image paths start at."""
    validation: list[str | SourceSection] = field(default_factory=list)
    """Rows for the validation loss; if empty, ``num_validation`` rows are held out from ``train`` by seed."""
    num_validation: int = 0
    template: Template = "v1"
    """v1: Vicuna's; plain: image and answer alone (projector training); chat: the tokenizer's chat template."""
    max_length: int = 2048
    """Rows are cut at this many tokens, image tokens included. An image that would be cut is left out whole."""
    image_aspect_ratio: Aspect = "pad"
    """pad: on a square canvas of the mean colour, as LLaVA-1.5; square: short side resized and centre cropped."""
    group_by_modality: bool = False
    """Rows of a step are all with images or all without, and of similar lengths."""
    max_bad_fraction: float = 0.001
    """Share of rows that may be unreadable (counted, reported, left out) before the run stops."""
    max_image_pixels: int = 89_478_485
    """Larger images are unreadable: a small file may decode to more memory than there is."""
    num_workers: int = 4

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "a non-empty list of data sets")
        require(self.max_length >= 8, "data.max_length", self.max_length, "at least 8 tokens")
        require(self.num_validation >= 0, "data.num_validation", self.num_validation, "0 or more")
        require(self.max_image_pixels > 0, "data.max_image_pixels", self.max_image_pixels, "positive")
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")


@section
class VLMAdapterSection(AdapterConfig):
    """Adapters on every linear of the language model but ``lm_head``, unless the recipe names others."""

    rank: int = 128
    alpha: float = 256.0
    targets: list[str] | str = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    exclude: list[str] | str = r".*(vision_tower|multi_modal_projector).*"
    """The tower's projections are called as the language model's are; an empty list adapts them too."""
    trainable: list[str] | str = field(default_factory=lambda: ["multi_modal_projector"])


@section
class VLMTrainSection(TrainSection):
    """Training, where the projector may have a learning rate of its own."""

    projector_lr: float | None = None
    """Learning rate of the projector; ``lr`` if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.projector_lr
        require(given is None or given > 0, "train.projector_lr", given, "positive, or null for train.lr")


@section
class EvaluateSection:
    """Which benchmarks to score and how; decoding is greedy, as in LLaVA's scripts."""

    tasks: list[str] = field(default_factory=lambda: list(BENCHMARKS))
    """Evaluators without their prefix: gqa for vlm/gqa."""
    path: str = "playground/data/eval"
    """Folder with one folder a benchmark, laid out as LLaVA's eval.zip."""
    batch_size: int = 16
    max_new_tokens: int | None = None
    """The benchmark's own (128; 1024 for scienceqa and mmbench) if not given."""
    circular: bool = True
    """MMBench: ask every rotation of the options; a question counts only if all are right."""
    shuffle_images: bool = False
    """Give each question another question's picture: what is left is what needs no looking."""
    num_workers: int = 8
    """Threads that decode images ahead."""
    limit: int | None = None
    """Score only the first ``limit`` rows of each task."""
    before_training: bool = False
    after_training: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_workers"):
            require(getattr(self, name) > 0, f"evaluate.{name}", getattr(self, name), "a positive integer")
        for name in ("max_new_tokens", "limit"):
            given = getattr(self, name)
            require(given is None or given > 0, f"evaluate.{name}", given, "a positive integer or absent")


@section
class VLMConfig:
    """Everything a run of the VLM pipeline depends on."""

    model: ModelSection
    data: DataSection
    train: VLMTrainSection
    run: RunSection = field(default_factory=RunSection)
    adapter: VLMAdapterSection = field(default_factory=VLMAdapterSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    log: LogSection = field(default_factory=LogSection)
