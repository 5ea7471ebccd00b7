"""An attention decoder letter by letter: what it has computed of the letters before is kept, and frames are read once."""

# B utterances, K texts of each, U letters, T frames, D model dim, H heads, V vocabulary

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.attention import attention
from .decoder import AttentionDecoder, DecoderBlock
from .lstm_decoder import LSTMDecoder


class Steps(Protocol):
    """K growing texts for each of B utterances."""

    def next(self, letters: Tensor) -> Tensor:
        """Append letters (B, K) to the texts -> log-probabilities of what comes next (B, K, V), in float32."""

    def choose(self, texts: Tensor) -> None:
        """Go on with the texts of these numbers, (B, K'), below K, each from its own utterance's."""

    def keep(self, utterances: Tensor) -> None:
        """Go on with these utterances alone, (B',)."""


def steps_of(decoder: AttentionDecoder | LSTMDecoder, memory: Tensor, padding: Tensor) -> Steps:
    """The steps of a decoder in eval mode. memory (B, T, D); padding (B, T), True = padding."""
    return TransformerSteps(decoder, memory, padding) if isinstance(decoder, AttentionDecoder) else LSTMSteps(decoder, memory, padding)


def _chosen(x: Tensor, texts: Tensor) -> Tensor:
    """Rows of x (B, K, ...) by numbers (B, K') below K."""
    return x[torch.arange(len(x), device=x.device)[:, None], texts]


class TransformerSteps:
    """Keys and values of the letters so far are kept per text, (B, K, H, U, D / H).

    Those of the frames are there once per utterance, (B, H, T, D / H): the K texts are K queries of one attention.
    """

    def __init__(self, decoder: AttentionDecoder, memory: Tensor, padding: Tensor) -> None:
        self.decoder, self.attend = decoder, ~padding[:, None, None]
        self.blocks: list[DecoderBlock] = list(decoder.layers)  # type: ignore[arg-type]
        self.frames = []
        for block in self.blocks:
            cross = block.cross_attn
            self.frames.append(tuple(cross.split(proj(memory, None)) for proj in (cross.k_proj, cross.v_proj)))
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        self.place = 0

    def next(self, letters: Tensor) -> Tensor:
        """See `Steps`."""
        batch, texts = letters.shape
        x = self._embed(letters)  # (B, K, D)
        for number, block in enumerate(self.blocks):
            own = block.self_attn
            normed = block.self_attn_norm(x)
            q, k, v = (proj(normed, None).view(batch, texts, own.heads, 1, -1) for proj in (own.q_proj, own.k_proj, own.v_proj))
            before = self.past[number]
            if before is not None:
                k, v = torch.cat((before[0], k), 3), torch.cat((before[1], v), 3)
            self.past[number] = (k, v)
            mixed = F.scaled_dot_product_attention(q, k, v)  # (B, K, H, 1, D / H)
            x = x + own.out_proj(mixed.reshape(batch, texts, -1), None)
            cross = block.cross_attn
            keys, values = self.frames[number]
            mixed = attention(cross.split(cross.q_proj(block.cross_attn_norm(x), None)), keys, values, self.attend, 0.0)
            x = x + cross.out_proj(mixed.transpose(1, 2).flatten(2), None)
            x = x + block.w_2(F.relu(block.w_1(block.ffn_norm(x), None)), None)
        self.place += 1
        return self.decoder.output(self.decoder.layer_norm(x)).float().log_softmax(-1)  # type: ignore[no-any-return]

    def _embed(self, letters: Tensor) -> Tensor:
        """(B, K) at the present place -> (B, K, D), as `AttentionDecoder.embed`."""
        table = self.decoder.embedding
        dim = table.embedding_dim
        rates = torch.exp(torch.arange(0, dim, 2, device=letters.device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
        angles = self.place * rates
        x = table(letters) * math.sqrt(dim)
        return x + torch.stack((angles.sin(), angles.cos()), -1).flatten()[:dim].to(x.dtype)  # type: ignore[no-any-return]

    def choose(self, texts: Tensor) -> None:
        """See `Steps`."""
        self.past = [None if kept is None else (_chosen(kept[0], texts), _chosen(kept[1], texts)) for kept in self.past]

    def keep(self, utterances: Tensor) -> None:
        """See `Steps`."""
        self.attend = self.attend[utterances]
        self.frames = [tuple(part[utterances] for part in parts) for parts in self.frames]
        self.past = [None if kept is None else (kept[0][utterances], kept[1][utterances]) for kept in self.past]


class LSTMSteps:
    """State and context of each text are kept; the frames' keys once per utterance."""

    def __init__(self, decoder: LSTMDecoder, memory: Tensor, padding: Tensor) -> None:
        self.decoder, self.memory, self.padding = decoder, memory, padding
        self.keys = decoder.attention.key(memory)
        self.context: Tensor | None = None  # (B, K, D)
        self.state: tuple[Tensor, Tensor] | None = None  # (B, K, S) each

    def next(self, letters: Tensor) -> Tensor:
        """See `Steps`."""
        context = self.memory.new_zeros(*letters.shape, self.memory.size(-1)) if self.context is None else self.context
        state = None if self.state is None else (self.state[0].flatten(0, 1), self.state[1].flatten(0, 1))
        scores, self.context, state, _ = self.decoder.advance(letters, context, state, self.keys, self.memory, self.padding)
        self.state = (state[0].view(*letters.shape, -1), state[1].view(*letters.shape, -1))
        return scores.float().log_softmax(-1)

    def choose(self, texts: Tensor) -> None:
        """See `Steps`."""
        if self.context is not None and self.state is not None:
            self.context = _chosen(self.context, texts)
            self.state = (_chosen(self.state[0], texts), _chosen(self.state[1], texts))

    def keep(self, utterances: Tensor) -> None:
        """See `Steps`."""
        self.keys, self.memory, self.padding = self.keys[utterances], self.memory[utterances], self.padding[utterances]
        if self.context is not None and self.state is not None:
            self.context = self.context[utterances]
            self.state = (self.state[0][utterances], self.state[1][utterances])
