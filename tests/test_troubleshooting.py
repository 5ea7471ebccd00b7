"""docs/troubleshooting.md quotes what users see today: texts that are easily made are made, the others stand in the code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import hubert_eff
from hubert_eff import cli
from hubert_eff.errors import UserError
from hubert_eff.quant import pack
from hubert_eff.streaming import StreamingModel

from .helpers.pages import page
from .helpers.paths import ROOT

QUOTES = re.findall(r"^\| `([^`]+)` \|", page("troubleshooting"), re.M)
MADE_ELSEWHERE = {"module 's3prl.hub' has no attribute 'hubert_eff'"}  # by Python; tests/superb_tasks/test_upstream.py makes it
DATA = "task.data=a task.label_dir=b"
COMMANDS = {
    "invalid choice: ... did you mean": "profil",
    "is not a folder: name a folder of wav, flac or ogg files": "manifest nowhere --out new",
    "no recording in ...: it must hold": "manifest empty --out new",
    "no usable recording in ... (silent: every sample is zero)": "manifest silent --out new",
    "no manifest in ...: it must hold train.tsv": "labels empty --out new --features mfcc --clusters 5",
    "unknown configuration ... did you mean": f"train sparseformer-debg {DATA} --dry-run",
    "needs task.data=... task.label_dir=...": "train debug --dry-run",
    "unknown key in the overrides of ... did you mean": f"train debug {DATA} model.encoder_layer=3 --dry-run",
    "no checkpoint at": "run nothing.pt r8.wav --out new.npz",
    "is not a checkpoint, or is truncated": "run bad.pt r8.wav --out new.npz",
    "unknown preset or checkpoint ... did you mean": "run conformer-debg r8.wav --out new.npz",
    "no audio file at": "run conformer-debug nofile.wav --out new.npz",
    "a stream takes mono at 16000 Hz": "run fusionformer-debug r8.wav --stream 16-4 --out new.npy",
    "int8 is a precision of float models, and this one is binarized": "bench conformer-debug+w1a1 --precision int8 --seconds 1",
    "must end in .safetensors": "export conformer-debug --out x.txt",
    "no folder at ... (needed:": "superb check --data empty --task ks",
    "holds no hydra_train.log of training, no result.json": "report empty --out new",
}
CALLS: dict[str, Callable[[], Any]] = {
    "this model cannot stream": lambda: StreamingModel(hubert_eff.build("conformer-debug"), chunk_size=16, left_chunks=4),
    "this model has no one-bit layers to pack": lambda: pack(hubert_eff.build("conformer-debug")),
    "activations of ... bits cannot be packed": lambda: pack(hubert_eff.build("conformer-debug+w1a8").eval()),
    "samples must be floats of the shape (S,), one channel": lambda: hubert_eff.features("conformer-debug", np.zeros((2, 100)), 16000),
}


def shown(quote: str, text: str) -> bool:
    """Whether a text holds a quote, whose `...` stands for anything, or are dots of the text itself."""
    return quote in text or re.search(".*".join(map(re.escape, quote.split(" ... "))).replace("\\.\\.\\.", ".*"), text) is not None


def test_quotes_are_made_or_stand_in_the_code() -> None:
    assert len(QUOTES) > 20 and {*COMMANDS, *CALLS} <= set(QUOTES)
    rooms = ("hubert_eff", "fairseq_plugins", "superb_tasks")
    code = "".join(path.read_text(encoding="utf-8") for room in rooms for path in (ROOT / room).rglob("*.py"))
    for quote in set(QUOTES) - {*COMMANDS, *CALLS, *MADE_ELSEWHERE}:
        assert all(part in code for part in quote.split(" ... ")), quote


@pytest.mark.parametrize("quote", COMMANDS)
def test_commands_say_so(quote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if quote.startswith(("unknown configuration", "needs task.data", "unknown key")):
        pytest.importorskip("hydra", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "silent"):
        (tmp_path / folder).mkdir()
    soundfile.write("silent/a.wav", np.zeros(16000), 16000)
    soundfile.write("r8.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    Path("bad.pt").write_bytes(bytes(100))
    assert cli.main(COMMANDS[quote].split()) == 2
    assert shown(quote, capsys.readouterr().err)


@pytest.mark.parametrize("quote", CALLS)
def test_python_says_so(quote: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as raised:
            CALLS[quote]()
    assert shown(quote, str(raised.value))
