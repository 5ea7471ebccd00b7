"""S3PRL's view of a hubert-eff model: a list of waveforms in, hidden states every 20 ms out.

# B utterances, S samples, T frames, D model dim
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hubert_eff.checkpoints.open import open_model
from hubert_eff.config import FRAME_STRIDE
from hubert_eff.errors import UserError
from hubert_eff.models.extractor import receptive_field


class UpstreamExpert(nn.Module):
    """An upstream with the interface that S3PRL's programs expect.

    `ckpt` is a checkpoint file or `PRESET[@SEED]`, see `hubert_eff.checkpoints.open`. Time and channel masks and LayerDrop are off;
    dropout follows the module's train / eval mode. The forward pass keeps gradients, for runs that fine-tune it.
    """

    def __init__(self, ckpt: str, model_config: str | None = None) -> None:
        super().__init__()
        if model_config is not None:
            raise UserError(f"leave out the model config '{model_config}': a checkpoint of hubert_eff holds its own")
        self.model = open_model(ckpt)
        # samples of one frame; shorter audio is extended to a frame by silence
        self.receptive_field = receptive_field(self.model.config.conv_layers)

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame, the same for every state."""
        return FRAME_STRIDE

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """`wavs`: B float waveforms (S_i,), 16 kHz. Returns under `hidden_states` the L+1 states, each (B, T, D).

        T is the frames of the longest waveform. S3PRL takes ceil(S_i / 320) frames of an utterance, up to two more than
        the model has: those repeat the utterance's last frame, as S3PRL itself does for the longest one. So its features
        do not depend on the batch it is in. Frames beyond are zero.
        """
        samples = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        heard = samples.clamp(min=self.receptive_field)
        wav = pad_sequence(list(wavs), batch_first=True)
        wav = nn.functional.pad(wav, (0, max(0, self.receptive_field - wav.shape[1])))  # (B, S)
        padding = torch.arange(wav.shape[1], device=wav.device) >= heard[:, None]  # (B, S)
        states, frame_padding = self.model.hidden_states(wav, padding if padding.any() else None)

        frame = torch.arange(frame_padding.shape[1], device=wav.device)  # (T,)
        last = (~frame_padding).sum(1, keepdim=True) - 1
        index = torch.minimum(frame, last)[:, :, None]  # (B, T, 1)
        taken = (frame < (samples[:, None] + FRAME_STRIDE - 1) // FRAME_STRIDE)[:, :, None]
        states = [torch.where(taken, state.gather(1, index.expand_as(state)), 0) for state in states]
        return {
            "hidden_states": states,
            "last_hidden_state": states[-1],
            **{f"hidden_state_{i}": state for i, state in enumerate(states)},
        }
