"""Shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.data.manifest import make_manifest
from hubert_eff.exporting.safetensors import export

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A minute of four voices, with phone timings."""
    pytest.importorskip("espeakng_loader")
    from hubert_eff.data.synthetic.sentences import make_demo

    folder = tmp_path_factory.mktemp("speech") / "corpus"
    make_demo(folder, minutes=1.0, speaker_count=4)
    return folder


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    make_manifest(corpus, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    export(hubert_eff.build("conformer-debug").eval(), path)
    return str(path)
