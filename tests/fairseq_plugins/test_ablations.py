"""Ablations of Zipformer, both forms of ScaledAdam and two decoders, through fairseq-hydra-train."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import hubert_eff
from hubert_eff import cli
from hubert_eff.recognition import load_recognizer
from hubert_eff.utils.configurations import load_config

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from ..helpers import finetuning  # noqa: E402
from ..helpers.paths import ROOT  # noqa: E402
from ..helpers.pretraining import logged, make_data, run  # noqa: E402
from ..helpers.processes import Training  # noqa: E402


def test_every_key_can_be_set_with_either_optimizer() -> None:
    config = load_config("pretrain/zipformer_m", ["optim=adam", "model.zipformer_module_norm=true", "model.zipformer_norm=layer_norm"])
    assert config["optimizer"]["_name"] == "adam" and config["model"]["zipformer_norm"] == "layer_norm"
    printed = load_config("pretrain/zipformer_debug", ["optimizer.form=paper"])
    assert printed["optimizer"]["_name"] == "scaled_adam" and printed["optimizer"]["form"] == "paper"


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=adam", "model.zipformer_module_norm=true", "model.zipformer_norm=layer_norm"),
        ("optim=scaled_adam", "optimizer.form=paper", "model.zipformer_block=conformer"),
    ],
)
def test_ablations_train(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    data = make_data(tmp_path / "data", {"train": [0.8 + 0.1 * (i % 5) for i in range(12)], "valid": [1.0, 0.9]})
    done = run(data, tmp_path / "run", "encoder=zipformer_debug", *overrides, "optimization.max_update=4")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = logged(done.stdout)
    assert set(losses) == {1, 2, 3, 4} and all(math.isfinite(loss) for loss in losses.values())
    config = hubert_eff.load(tmp_path / "run" / "checkpoint_last.pt").config.to_dict()
    for key, value in (word.removeprefix("model.").split("=") for word in overrides if word.startswith("model.")):
        assert str(config[key]).lower() == value


@pytest.mark.long
def test_two_decoders_at_half_the_frame_rate_train_and_rescore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = finetuning.make_data(tmp_path / "data", {"train": finetuning.TEXTS, "valid": ["one ten"]})
    done = Training(
        "--config-dir", str(finetuning.CONFIGS), "--config-name", "debug_aed", f"common.user_dir={ROOT / 'fairseq_plugins'}",
        f"task.data={data}", "model.w2v_path=null", "model.preset=fusionformer-debug", f"checkpoint.save_dir={tmp_path / 'run'}",
        "optimization.max_update=2", "model.decoder_right_layers=1", "model.decoder_norm=batch_norm", "model.output_downsampling=2",
    ).end()  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    model = load_recognizer(checkpoint)
    assert model.head.right is not None and model.num_frames(16_000) == 25 and model.config.decoder_reverse_weight == 0.3
    assert cli.main(["transcribe", str(checkpoint), str(data / "audio" / "valid0.wav"), "--search", "rescore"]) == 0
    assert "valid0.wav" in capsys.readouterr().out
