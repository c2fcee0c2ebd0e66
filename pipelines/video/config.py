"""The video pipeline's configuration."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from dora_core.adapters.config import AdapterConfig
from dora_core.config import DeepSpeedSection, LogSection, RunSection, TrainSection, require, section

RECIPES = Path(__file__).parent / "recipes"

VIDEO_TASKS = ("tvqa", "how2qa", "tvc", "yc2c")
"""In the order of the paper's Table 3."""


@section
class ModelSection:
    """Which BART to start from; the visual embedding is added to it."""

    path: str
    """A folder or Hugging Face name of a BART such as facebook/bart-base, or of a model that this pipeline saved."""
    tokenizer: str | None = None
    """Another folder or name for the tokenizer; ``path`` if not given."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    from_scratch: bool = False
    """Random initial weights in the shape of ``path``'s config, for pre-training and for speed measurements."""


@section
class TaskSection:
    """One task of a run, where it differs from what ``tasks.py`` says of it."""

    name: str
    batch_ratio: float | None = None
    """Rows of this task's batches over ``train.global_batch_size``."""
    max_text_length: int | None = None
    """In tokens, those at both ends included."""
    max_target_length: int | None = None

    def __post_init__(self) -> None:
        require(
            self.batch_ratio is None or self.batch_ratio > 0, "data.tasks.batch_ratio", self.batch_ratio, "positive"
        )
        for name, least in (("max_text_length", 8), ("max_target_length", 3)):
            given = getattr(self, name)
            require(given is None or given >= least, f"data.tasks.{name}", given, f"at least {least} tokens, or absent")


@section
class VisualSection:
    """Where features come from: files, or an encoder that runs in the step."""

    mode: Literal["cached", "online"] = "cached"
    """cached: shards that ``pipelines.video.extract`` wrote, or the published .npz and .h5 files; online: pictures and
    videos are read by the data workers and encoded in the step."""
    path: str | None = None
    """Folder of the features, or with ``online`` of the media, of all collections; ``data.path`` if not given."""
    folders: dict[str, str] = field(default_factory=dict)
    """By collection (COCO, VG, GQA, nlvr, tv, how2, yc2), a folder that is elsewhere."""
    encoder: str = "open_clip:ViT-B-32:openai"
    """With ``online``: ``open_clip:<model>[:<pretrained tag or weights file>]`` or ``pixels:<side>``."""
    kind: Literal["frame", "grid"] = "frame"
    """With ``online``: one vector a frame, or 36 vectors a picture, of a ResNet's last feature map."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """With ``online``: what the encoder computes in; features are rounded to fp16 as cached ones are."""
    seconds_per_frame: float = 1.5
    """With ``online``: one frame is taken per so many seconds."""
    num_slots: int = 64
    """Vectors per picture or video: shorter ones are padded, longer ones max-pooled to so many."""
    reference_padding: bool = False
    """Let the model see padded slots as zeros, as the paper's code does; they are masked otherwise."""

    def __post_init__(self) -> None:
        require(1 <= self.num_slots <= 100, "data.visual.num_slots", self.num_slots, "1 to 100 (BART has 100 for them)")
        require(self.seconds_per_frame > 0, "data.visual.seconds_per_frame", self.seconds_per_frame, "positive")


@section
class DataSection:
    """Which tasks to train on and how a row becomes tokens and features."""

    tasks: list[str | TaskSection]
    """Names as ``tasks.py`` has them, or mappings that change a task's lengths or batch ratio."""
    path: str = "datasets"
    """Folder of the annotations, laid out as VL-Adapter's ``datasets``."""
    visual: VisualSection = field(default_factory=VisualSection)
    num_validation: int = 0
    """Rows of each task's validation split, chosen by seed, for the validation loss."""
    task_prompts: bool = True
    """Begin the text of image tasks with the task's name, as the paper's scripts do."""
    reference_truncation: bool = False
    """Cut a long text from its end, question and task tag first, as the paper's code does, instead of its subtitles."""
    max_bad_fraction: float = 0.001
    """Share of rows that may be unusable (counted, reported, left out) before the run stops."""
    num_workers: int = 4

    def __post_init__(self) -> None:
        require(bool(self.tasks), "data.tasks", self.tasks, "a non-empty list of tasks")
        names = [each if isinstance(each, str) else each.name for each in self.tasks]
        require(len(set(names)) == len(names), "data.tasks", names, "a list that names each task once")
        require(self.num_validation >= 0, "data.num_validation", self.num_validation, "0 or more")
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


@section
class VideoAdapterSection(AdapterConfig):
    """Adapters on query and value of every attention, as in the paper's code; its Table 9 says query and key."""

    rank: int = 128
    alpha: float = 128.0
    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    trainable: list[str] | str = field(default_factory=lambda: ["visual_embedding"])
    bias: Literal["none", "all", "lora_only"] = "all"


@section
class EvaluateSection:
    """Which benchmarks to score and how."""

    tasks: list[str] = field(default_factory=lambda: list(VIDEO_TASKS))
    """Evaluators without their prefix: tvqa for video/tvqa."""
    path: str | None = None
    """Folder of the annotations; ``data.path`` if not given."""
    split: Literal["test", "val"] = "test"
    """The video tasks' public test files have no answers: they are written down for VALUE's server."""
    batch_size: int = 32
    num_beams: int = 5
    reference_decoding: bool = False
    """Answer vqa and gqa greedily, as the paper's code does whatever its number of beams."""
    max_new_tokens: int | None = None
    """The task's own (20; 40 for coco_caption) if not given."""
    look: Literal["own", "shuffled", "one_frame"] = "own"
    """shuffled: each row sees another row's picture or video; one_frame: the middle frame of a video (of a picture's
    cached grid the middle cell) in place of all. What is left of a score then needs no looking, or no time."""
    num_workers: int = 4
    """Threads that read features or media ahead."""
    limit: int | None = None
    """Score only the first ``limit`` rows of each task."""
    before_training: bool = False
    after_training: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "num_workers"):
            require(getattr(self, name) > 0, f"evaluate.{name}", getattr(self, name), "a positive integer")
        for name in ("max_new_tokens", "limit"):
            given = getattr(self, name)
            require(given is None or given > 0, f"evaluate.{name}", given, "a positive integer or absent")


@section
class VideoConfig:
    """Everything a run of the video pipeline depends on."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    run: RunSection = field(default_factory=RunSection)
    adapter: VideoAdapterSection = field(default_factory=VideoAdapterSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    log: LogSection = field(default_factory=LogSection)
