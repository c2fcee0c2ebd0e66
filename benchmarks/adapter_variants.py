"""One random LLaMA, and the adapters of PEFT and of ``dora_core`` put into it and taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import training_runs  # noqa: F401  (it finds dora_core in this checkout)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dora_core.adapters import AdapterConfig, LoRALinear, apply_adapters, checkpoint_activations, reuse_norms

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the widths are LLaMA-7B's."""

    layers: int = 16
    hidden: int = 4096
    mlp: int = 11008
    heads: int = 32
    vocab: int = 32000


TINY = Shape(layers=2, hidden=64, mlp=160, heads=4, vocab=256)
"""To try a script."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Whose adapter a model gets, and how."""

    library: Literal["none", "peft", "ours"]
    kind: Literal["lora", "dora"] = "dora"
    kernel: Literal["auto", "plain", "fused"] = "auto"
    dropout: float = 0.0
    full_precision: bool = False
    """Adapters in fp32, as ``dora_core`` makes them, instead of in the model's type."""
    norm_gradient: Literal["detached", "full"] = "detached"
    """Of ours; PEFT's is detached."""
    kept_outputs: tuple[str, ...] = ()
    """Of ours: layers whose outputs checkpointing keeps."""
    offload: bool = False
    """In the host's memory."""
    cached: bool = False
    """With PEFT's ``DoraCaching``, which keeps norms and B A in evaluation mode."""


VARIANTS = {
    "floor": Variant(library="none"),
    "peft-lora": Variant(library="peft", kind="lora"),
    "peft-dora": Variant(library="peft"),
    "peft-dora-cached": Variant(library="peft", cached=True),
    "ours-lora": Variant(library="ours", kind="lora"),
    "ours-dora": Variant(library="ours"),
    "ours-dora-kept": Variant(library="ours", kept_outputs=("down_proj",)),
    "ours-dora-offloaded": Variant(library="ours", kept_outputs=("down_proj",), offload=True),
    "ours-lora-kept": Variant(library="ours", kind="lora", kept_outputs=("down_proj",)),
    "ours-dora-fp32": Variant(library="ours", full_precision=True),
    "ours-dora-plain": Variant(library="ours", kernel="plain"),
    "ours-dora-full": Variant(library="ours", full_precision=True, norm_gradient="full"),
    "ours-lora-fp32": Variant(library="ours", kind="lora", full_precision=True),
    "ours-dora-dropout": Variant(library="ours", dropout=0.05),
    "ours-dora-dropout-kept": Variant(library="ours", dropout=0.05, kept_outputs=("down_proj",)),
    "ours-lora-dropout": Variant(library="ours", kind="lora", dropout=0.05),
}


def training_step(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what does one step on input ids, which are the labels too, and returns the loss.

    Forward, backward, AdamW (fused on CUDA; none without trained parameters) and ``zero_grad``.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda") if parameters else None

    def step(input_ids: Tensor) -> Tensor:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def build_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a frozen ``LlamaForCausalLM`` with random weights of standard deviation 0.02, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=8192,
        initializer_range=0.02,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).train()


@contextmanager
def adapted(model: PreTrainedModel, variant: Variant, rank: int) -> Iterator[nn.Module]:
    """Within the block ``model`` has the adapter of ``variant``; yields what to call. The base is left as it was.

    alpha is twice the rank. B and the magnitudes are moved away from where they start.
    """
    with ExitStack() as stack:
        wrapped: nn.Module = model
        if variant.library == "peft":
            wrapped = _with_peft(model, variant, rank)
            stack.callback(wrapped.unload)
        elif variant.library == "ours":
            stack.callback(_take_out, model)
            apply_adapters(model, adapter_config(variant, rank))
        if variant.library != "none":
            disturb(wrapped)
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and not variant.full_precision and not name.endswith(".magnitude"):
                    parameter.data = parameter.data.to(model.dtype)
        if variant.library == "ours":
            for layer in model.modules():
                if isinstance(layer, LoRALinear):
                    layer.invalidate()
            stack.enter_context(reuse_norms(model))
        if variant.cached:
            from peft.helpers import DoraCaching

            stack.enter_context(DoraCaching())
        yield wrapped


def adapter_config(variant: Variant, rank: int) -> AdapterConfig:
    """Return how ``dora_core`` is told of a variant."""
    return AdapterConfig(
        kind=variant.kind,
        rank=rank,
        alpha=2 * rank,
        dropout=variant.dropout,
        dropout_mode="lowrank",
        targets=TARGETS,
        kernel=variant.kernel,
        norm_gradient=variant.norm_gradient,
        kept_outputs=list(variant.kept_outputs),
        offload_kept_outputs=variant.offload,
    )


def _with_peft(model: PreTrainedModel, variant: Variant, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=variant.dropout,
        target_modules=TARGETS,
        use_dora=variant.kind == "dora",
    )
    with torch.device(model.device):  # PEFT would draw large factors on the CPU, for seconds
        return get_peft_model(model, config, autocast_adapter_dtype=False)


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Give B small random values and move each magnitude by about 1 %, so that no term is trivially zero."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or ("lora_B" not in name and "magnitude" not in name):
            continue
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(1))
        noise = 0.01 * torch.randn(parameter.shape, generator=generator, device=device)
        if "lora_B" in name:
            parameter.copy_(noise)
        else:
            parameter.mul_((1 + noise).to(parameter.dtype))


def _take_out(model: nn.Module) -> None:
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(name, plain.train(layer.training))


@contextmanager
def checkpointed(model: PreTrainedModel, enable: bool, kept_outputs: Sequence[str] = ()) -> Iterator[None]:
    """Within the block activations are checkpointed, if ``enable``; enter it after adapters are in.

    PEFT would put a hook of its own on a model that checkpoints already.
    """
    if not enable:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        checkpoint_activations(model, AdapterConfig(kept_outputs=list(kept_outputs)))
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_disable()
        model.disable_input_require_grads()  # transformers asks for them too, and does not take that back


@contextmanager
def input_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the embedding's output requires grad, so that every layer computes its input's gradient."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
