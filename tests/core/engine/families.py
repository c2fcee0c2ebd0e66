"""Tiny models of every type that trains with Liger's kernels, what they are given, and how their gradients compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from dora_core.adapters import AdapterConfig, DoRALinear, LoRALinear, apply_adapters
from dora_core.testing.tiny import LLAMA_3_ROPE

VOCAB, WIDTH, ROWS, PLACES = 211, 32, 2, 9
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DECODERS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
    "cohere": CohereConfig,
}
IMAGE_TOKEN = 7


def make(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a model in fp32 on the CPU, in training mode; ``changes`` are to its (language model's) configuration."""
    torch.manual_seed(seed)
    if family == "bart":
        config = BartConfig(
            vocab_size=VOCAB,
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=32,
            dropout=0.0,
            init_std=0.2,
            **changes,
        )
        model = BartForConditionalGeneration(config)
        model.final_logits_bias.normal_()
    elif family == "llava":
        tower = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        )
        text = LlamaConfig(**{**SIZES, **changes})
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=tower,
                text_config=text,
                image_token_index=IMAGE_TOKEN,
                tie_word_embeddings=text.tie_word_embeddings,
                initializer_range=0.2,
            )
        )
    else:
        rope = {"rope_parameters": LLAMA_3_ROPE} if family == "llama-3" else {}
        config = DECODERS[family.removesuffix("-3")](**{**SIZES, **rope, **changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide which weight is whose
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return model.train()


def batch(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return inputs, labels ``[B, T]`` of the places of the logits, some -100, and weights ``[B, T]``."""
    generator = torch.Generator().manual_seed(1)
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    ids, labels = (torch.randint(8, VOCAB, (ROWS, PLACES), generator=generator) for _ in range(2))
    labels[0, :4] = labels[1, -2:] = -100
    weights = torch.rand(ROWS, PLACES, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, -2:] = 0
    if model.config.model_type == "bart":
        inputs["decoder_input_ids"] = labels.roll(1, 1).clamp(min=1)
    if model.config.model_type == "llava":
        ids[:, :4] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(ROWS, 3, 8, 8, generator=generator).to(dtype)
        inputs["logits_to_keep"] = torch.arange(2, PLACES)
        labels, weights = labels[:, 2:], weights[:, 2:]
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    return on_device, labels.to(device), weights.to(device)


def adapt(model: nn.Module, **options: Any) -> nn.Module:
    """Put DoRA on every linear layer of the language model but the last, or what ``options`` say, and move it."""
    kinds = (LoRALinear, nn.Linear)
    suffixes = {
        name.rsplit(".", 1)[-1] for name, module in model.get_decoder().named_modules() if type(module) in kinds
    }
    default = {"rank": 4, "alpha": 8, "targets": sorted(suffixes), "exclude": ["vision_tower"]}
    apply_adapters(model, AdapterConfig(**{**default, **options}))
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            with torch.no_grad():
                module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.1)
                if isinstance(module, DoRALinear):
                    module.magnitude.mul_(
                        torch.rand(module.magnitude.shape, generator=generator).to(module.magnitude) + 0.5
                    )
            module.invalidate()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name in fp64 on the CPU and forget them."""
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference between gradients of one name."""
    assert found.keys() == expected.keys() and expected
    scale = max(float(each.norm()) for each in expected.values())
    return max(float((found[n] - e).norm()) / max(float(e.norm()), 1e-3 * scale) for n, e in expected.items())
