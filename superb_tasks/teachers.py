"""S3PRL's upstreams as encoders for labels and teachers: `s3prl:NAME`, an entry point of the group `hubert_eff.teachers`."""

# B batch, S samples, T frames, D channels of a state

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
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
    """Open the upstream that S3PRL's hub builds under a name; S3PRL downloads its weights, as for `run_downstream.py -u`.

    Raises `UserError` for an unknown name and if S3PRL is missing.
    """
    require("s3prl", "superb", f"s3prl:{name}")
    patches.apply()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        from s3prl import hub

        known = [option for option in hub.options() if not option.endswith(("_local", "_url", "_gdriveid", "_custom"))]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UserError(f"S3PRL has no upstream {short(repr(name))}" + (f": did you mean {' or '.join(near)}?" if near else ""))
        model: Any = getattr(hub, name)()
    return Upstream(model.eval())
