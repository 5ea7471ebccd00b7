"""A script that was written when modules stood elsewhere still runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import hubert_eff
from hubert_eff._moved import MOVED


@pytest.mark.parametrize("name", sorted(name for name in MOVED if not name.startswith("fairseq_plugins")))
def test_a_module_that_has_moved_is_found_by_its_old_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{name} is now {MOVED[name]}"):
        old = importlib.import_module(name)
    assert old is importlib.import_module(MOVED[name])


def test_public_names_of_an_old_script(tmp_path: Path) -> None:
    from hubert_eff.checkpoint import load
    from hubert_eff.extraction import extract
    from hubert_eff.model import HubertModel, build

    from hubert_eff.config import HubertConfig
    from hubert_eff.edge import rewrite
    from hubert_eff.encoders.base import Encoder
    from hubert_eff.quant import BinaryConv1d, BinaryLinear, Policy, binarize, pack, quant_report, read_policy
    from hubert_eff.registry import get_encoder, preset_config, register_encoder
    from hubert_eff.streaming import StreamingModel

    model = hubert_eff.build("conformer-debug", streaming=True).eval()
    assert isinstance(model, HubertModel) and isinstance(model.config, HubertConfig) and isinstance(model.encoder, Encoder)
    assert StreamingModel(model, chunk_size=16, left_chunks=4).flush() is None
    hubert_eff.export(hubert_eff.fuse(build("transformer-debug")), tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").config == hubert_eff.load(tmp_path / "model.safetensors").config
    one_bit = binarize(build("transformer-debug"), "w1a1")
    assert hubert_eff.binarize is binarize and any(isinstance(m, BinaryLinear | BinaryConv1d) for m in one_bit.modules())
    assert isinstance(read_policy("paper"), Policy) and quant_report(one_bit) and callable(pack)
    assert callable(rewrite) and callable(extract) and callable(register_encoder)
    assert get_encoder("conformer").presets.keys() <= set(hubert_eff.list_presets()) and "conformer" in hubert_eff.list_encoders()
    assert preset_config("conformer-debug+w1a1").quant == "w1a1"
    assert hubert_eff.profile("conformer-debug", seconds=1.0).params > 0
