"""VL-BART: a BART whose encoder reads visual features beside words (arXiv 2102.02779).

Legend of shapes: B rows, S text tokens, N visual tokens, T target tokens, D features of a visual token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder

NUM_BOX_FEATURES = 5
"""Left, top, right, bottom and area, all zero: grids and frames have no boxes, so this is a learned constant."""
NUM_PICTURES = 2
"""Pictures that a row may have."""


class VisualEmbedding(nn.Module):
    """Features, box, picture and place of a visual token to a vector of BART's width: the sum of four.

    ``position`` and ``feature`` are each a linear layer and a layer norm. The vectors for places are those of the words
    ``<vis_extra_id_*>`` and belong to the word embeddings.
    """

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(feature_dim, width), nn.LayerNorm(width))
        self.position = nn.Sequential(nn.Linear(NUM_BOX_FEATURES, width), nn.LayerNorm(width))
        self.picture = nn.Embedding(NUM_PICTURES, width)

    def forward(self, features: Tensor, places: Tensor, num_pictures: int) -> Tensor:
        """Return ``[B, N, width]`` for ``features`` [B, N, D] of ``num_pictures`` pictures one after the other.

        ``places`` ``[N / num_pictures, width]`` are the vectors for places, which begin anew with each picture.
        """
        per_picture = features.shape[1] // num_pictures
        boxes = features.new_zeros(NUM_BOX_FEATURES)
        which = torch.arange(num_pictures, device=features.device).repeat_interleave(per_picture)
        return self.feature(features) + self.position(boxes) + self.picture(which) + places.repeat(num_pictures, 1)


class VLBartEncoder(BartEncoder):
    """BART's encoder, to whose embedded words the visual tokens are appended.

    They have no BART positions, so attention, and thus the model, is the same whether they come first or last. BART's
    first layer norm is the words' alone; the visual embedding has its own.
    """

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config.visual_dim, config.d_model)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor | None = None,
        num_pictures: int = 1,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Return the last hidden state ``[B, S + N, width]``. ``attention_mask`` is of words and visual tokens."""
        words = self.embed_tokens(input_ids)
        hidden = self.layernorm_embedding(words + self.embed_positions(input_ids))
        if features is not None:
            per_picture = features.shape[1] // num_pictures
            ids = torch.arange(per_picture, device=input_ids.device) + self.config.first_place_id
            places = self.embed_tokens(ids)
            visual = self.visual_embedding(features.to(hidden.dtype), places, num_pictures)
            hidden = torch.cat([hidden, visual.to(hidden.dtype)], 1)
        hidden = F.dropout(hidden, p=self.dropout, training=self.training)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)


class VLBart(BartForConditionalGeneration):
    """BART for conditional generation, given ``features`` besides words.

    ``config`` is BART's with ``visual_dim``, the D of features, and ``first_place_id``, the id of ``<vis_extra_id_0>``.
    """

    _keys_to_ignore_on_load_missing = ["final_logits_bias", "visual_embedding"]  # a plain BART has none

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.model.encoder = VLBartEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        feature_mask: Tensor | None = None,
        num_pictures: int = 1,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the outputs of BART, whose ``labels`` or ``decoder_input_ids`` ``[B, T]`` it takes.

        ``input_ids`` and ``attention_mask`` are ``[B, S]``, ``features`` ``[B, N, D]`` and ``feature_mask`` ``[B, N]``,
        0 where the model may not look. Given ``encoder_outputs``, ``attention_mask`` is theirs, ``[B, S + N]``.
        """
        if encoder_outputs is None:
            encoder_outputs, attention_mask = self.encode(
                input_ids, attention_mask, features, feature_mask, num_pictures
            )
        return super().forward(encoder_outputs=encoder_outputs, attention_mask=attention_mask, **kwargs)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        features: Tensor | None,
        feature_mask: Tensor | None,
        num_pictures: int = 1,
    ) -> tuple[BaseModelOutput, Tensor]:
        """Return the encoder's outputs and the mask of its ``S + N`` places."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if features is not None:
            if feature_mask is None:
                feature_mask = mask.new_ones(features.shape[:2])
            mask = torch.cat([mask, feature_mask.to(mask.dtype)], 1)
        return self.model.encoder(input_ids, mask, features=features, num_pictures=num_pictures), mask

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        feature_mask: Tensor | None = None,
        num_pictures: int = 1,
        **kwargs: Any,
    ) -> Tensor:
        """Return token ids as ``generate`` of transformers does; rows are encoded once, before the search."""
        with torch.no_grad():
            outputs, mask = self.encode(input_ids, attention_mask, features, feature_mask, num_pictures)
        return super().generate(encoder_outputs=outputs, attention_mask=mask, **kwargs)
