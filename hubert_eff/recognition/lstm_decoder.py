"""Attention decoder of one LSTM with single-head additive attention, as encoder-decoders that reverse time have (Schmitt et al. 2024)."""

# B batch, U letters, T frames, D model dim, A attention dim, E embedding dim, S size of the LSTM's state, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.dropout import Dropout
from ..layers.linear import Linear


class AdditiveAttention(nn.Module):
    """One head of weights v . tanh(W h_t + U s) over frames h_t for a state s (Bahdanau et al. 2015, appendix A.1.2)."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        self.key = Linear(dim, dim)
        self.query = Linear(state, dim, bias=False)
        self.energy = Linear(dim, 1, bias=False)

    def forward(self, keys: Tensor, memory: Tensor, state: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """keys (B, T, A) = key(memory), memory (B, T, D), state (B, N, S), padding (B, T) -> context (B, N, D), weights (B, N, T)."""
        energies = self.energy(torch.tanh(keys[:, None] + self.query(state)[:, :, None])).squeeze(-1)  # (B, N, T)
        if padding is not None:
            energies = energies.masked_fill(padding[:, None], float("-inf"))
        weights = energies.float().softmax(-1).to(memory.dtype)
        return weights @ memory, weights


class LSTMDecoder(nn.Module):
    """Letters so far (B, U) and encoder output (B, T, D) -> scores of the next letter (B, U, V).

    s_u = LSTM(s_{u-1}; embedding of letter u-1, context c_{u-1}); c_u by `AdditiveAttention` of s_u; scores from a maxout layer of s_u, the
    embedding and c_u. Attention does not read its earlier weights, and the LSTM has dropout on its inputs in the place of zoneout.
    """

    def __init__(self, vocabulary: int, dim: int, state: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.cell = nn.LSTMCell(2 * dim, state)
        self.attention = AdditiveAttention(dim, state)
        self.readout = Linear(state + 2 * dim, 2 * dim)
        self.output = Linear(dim, vocabulary)
        self.dropout = Dropout(dropout)

    def advance(
        self, letters: Tensor, context: Tensor, state: tuple[Tensor, Tensor] | None, keys: Tensor, memory: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """One step of N texts for each of B utterances.

        letters (B, N), context (B, N, D) of the step before, state: (B * N, S) twice, or None at the start; keys, memory, padding as in
        `AdditiveAttention`. Returns scores (B, N, V), and the next context, state and attention weights (B, N, T).
        """
        batch, texts = letters.shape
        embedded = self.dropout(self.embedding(letters))  # (B, N, E)
        hidden, cell = self.cell(torch.cat((embedded, context), -1).flatten(0, 1), state)
        seen = hidden.view(batch, texts, -1)
        context, weights = self.attention(keys, memory, seen, padding)
        read = self.readout(torch.cat((seen, embedded, context), -1))
        read = self.dropout(read.view(batch, texts, -1, 2).amax(-1))
        return self.output(read), context, (hidden, cell), weights

    def forward(
        self, letters: Tensor, memory: Tensor, memory_padding: Tensor | None = None, valid: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """As `AttentionDecoder.forward`; `weights` gets the one head's (B, 1, U, T)."""
        keys, context, state = self.attention.key(memory), memory.new_zeros(len(memory), 1, memory.size(-1)), None
        scores, attended = [], []
        for place in range(letters.size(1)):
            said, context, state, weight = self.advance(letters[:, place : place + 1], context, state, keys, memory, memory_padding)
            scores.append(said)
            attended.append(weight)
        if weights is not None:
            weights.append(torch.stack(attended, 2).detach())
        return torch.cat(scores, 1)
