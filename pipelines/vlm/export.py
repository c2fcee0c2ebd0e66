"""Write what a run has made: an adapter with its projector, a projector alone, or a whole LLaVA for transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from dora_core.adapters import save_adapter
from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.linear import LoRALinear
from dora_core.config import ConfigError
from dora_core.engine.distributed import World
from dora_core.engine.export import save_model
from pipelines.vlm.conversation import SYSTEM
from pipelines.vlm.model import has_foreign_tower
from pipelines.vlm.original import write_projector
from pipelines.vlm.towers import VisionFacts

CHAT_TEMPLATE = (
    SYSTEM + " {% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def what_is_trained(model: LlavaForConditionalGeneration) -> str:
    """Return ``adapter``, ``projector`` or ``model``: which of the three a run has to write.

    Raises ``ConfigError`` if it is the whole model and transformers has no class for its tower.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        return "adapter"
    projector = {id(parameter) for parameter in model.model.multi_modal_projector.parameters()}
    if all(id(parameter) in projector for parameter in model.parameters() if parameter.requires_grad):
        return "projector"
    require_savable(model)
    return "model"


def require_savable(model: LlavaForConditionalGeneration) -> None:
    """Raise ``ConfigError`` unless transformers could load the whole model again."""
    if has_foreign_tower(model):
        kind = type(model.model.vision_tower.visual).__name__
        raise ConfigError(
            f"The vision tower is open_clip's {kind}, which transformers has no class for, so no whole model can be "
            "saved for it. Train an adapter or the projector, which are saved without the tower, or use a CLIP "
            "transformer such as open_clip:ViT-L-14-336:openai."
        )


def export(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionFacts,
    adapter: AdapterConfig,
    base: str | None,
    precision: str,
    template: str,
    world: World,
) -> Path:
    """Write the result of training below ``folder`` and return where. Every rank must call it; rank 0 writes."""
    kind = what_is_trained(model)
    target = folder / kind
    if kind == "adapter":
        save_adapter(model, adapter, target, base)
        world.on_main(lambda: tokenizer.save_pretrained(target))
    elif kind == "projector":
        write_projector(model.model.multi_modal_projector, target)
    else:
        save_model(model, target, precision)
        world.on_main(lambda: save_processor(target, model, tokenizer, vision, template))
    return target


def save_processor(
    folder: Path,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionFacts,
    template: str,
) -> None:
    """Write tokenizer, image processor and chat template beside a whole model, for ``AutoProcessor``.

    The chat template is that of ``template``: Vicuna's (v1), or with ``chat`` the tokenizer's own.
    """
    images = CLIPImageProcessor(
        size={"shortest_edge": vision.size},
        crop_size={"height": vision.size, "width": vision.size},
        image_mean=list(vision.mean),
        image_std=list(vision.std),
        resample={"bilinear": 2, "bicubic": 3}[vision.resample],
    )
    strategy = model.config.vision_feature_select_strategy
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=tokenizer.chat_template if template == "chat" else CHAT_TEMPLATE,
        num_additional_image_tokens=1 if strategy == "default" else 0,
    ).save_pretrained(folder)
