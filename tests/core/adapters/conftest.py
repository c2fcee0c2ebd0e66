"""Layers and models with adapters in the state that training leaves them in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_core.adapters import LoRALinear


def _train(model: nn.Module, seed: int = 0) -> nn.Module:
    """Write random A, B and m into every adapted layer; the update is about as large as the weight."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, LoRALinear)):
            if layer.rank:
                layer.lora_A.copy_(noise(layer.lora_A))
                size = layer.weight.double().std() / (layer.scale * layer.rank**0.5)
                layer.lora_B.copy_(noise(layer.lora_B) * size.to(layer.lora_B.dtype))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.3 * noise(layer.magnitude))
    return model


@pytest.fixture(scope="session")
def train() -> Callable[..., nn.Module]:
    return _train


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    """A maker of tiny LLaMA models in eval mode: the same weights at each call."""

    def make(*, hidden: int = 32, layers: int = 2, tie_embeddings: bool = False) -> nn.Module:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.05,
            tie_word_embeddings=tie_embeddings,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 64
