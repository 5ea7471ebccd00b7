"""S3PRL's upstreams by `s3prl:NAME`: to evaluate, and for labels and teachers as an entry point of the group `hubert_eff.teachers`."""

# B batch, S samples, T frames, D channels of a state

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hubert_eff.errors import UserError, require, short

from . import patches


class Upstream(nn.Module):
    """An upstream of S3PRL that takes audio (B, S) and returns its hidden states, a sequence of (B, T, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, wav: Tensor) -> Sequence[Tensor]:
        """Compute hidden states. Raises `UserError` for an upstream without them."""
        with contextlib.redirect_stdout(sys.stderr):
            states = self.model(list(wav)).get("hidden_states")
        if not states:
            raise UserError(f"the upstream {type(self.model).__module__} gives no hidden states")
        return list(states)


def open_s3prl(name: str) -> Upstream:
    """Open the upstream that S3PRL's hub builds under a name; S3PRL downloads its weights unless it has done so before.

    Raises `UserError` for an unknown name, an upstream that S3PRL cannot build, as without a network, and if S3PRL is missing.
    """
    known = published()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(f"S3PRL has no upstream {short(repr(name))}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        from s3prl import hub

        try:
            model: Any = getattr(hub, name)()
        except Exception as error:  # each upstream has its own reader, and its own errors
            reason = short(f"{type(error).__name__}: {error}")
            raise UserError(
                f"S3PRL cannot build s3prl:{name} ({reason}): its weights must be in {Path.home() / '.cache/s3prl/download'}, where S3PRL "
                "puts what it downloads, and its packages must be installed"
            ) from error
    return Upstream(model.eval())


def published() -> list[str]:
    """The names in S3PRL's hub that need no file from the user."""
    require("s3prl", "superb", "S3PRL's upstreams")
    patches.apply()
    with contextlib.redirect_stdout(sys.stderr):
        from s3prl import hub
    return [name for name in hub.options(only_registered_ckpt=True) if name not in ("hubert_eff", "customized_upstream")]
