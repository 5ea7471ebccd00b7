"""The recipe from recordings to an export: its commands, what a dry run finds out beforehand, and one small run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.commands.recipe import _plan
from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.profiling.training_cost import MFU, PAPER_GPUS, PAPER_HOURS, PAPER_UPDATES, kept_bytes, training_needs
from hubert_eff.recipes import base
from hubert_eff.recipes.pretrain import Pretraining, look_at
from hubert_eff.reports.training_log import TrainingLog
from hubert_eff.utils.configurations import load_config

from ..helpers.foreign import theirs

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four speakers, sixteen recordings of two seconds."""
    folder = tmp_path_factory.mktemp("speech")
    draw = np.random.default_rng(0)
    for speaker in range(4):
        (folder / f"s{speaker}").mkdir()
        for number in range(4):
            soundfile.write(folder / f"s{speaker}" / f"{number}.flac", 0.1 * draw.standard_normal(32_000), 16_000)
    return folder


def test_commands_of_the_papers_recipe(speech: Path, tmp_path: Path) -> None:
    commands = [step.words for step in Pretraining(speech, tmp_path, "conformer_s", gpus=8).steps()]
    assert [words[0] for words in commands] == [*("hubert-eff", "hubert-eff", "fairseq-hydra-train") * 2][:3] + [
        "hubert-eff", "fairseq-hydra-train", "hubert-eff"
    ]  # fmt: skip
    first, second = ({str(word) for word in commands[i]} for i in (2, 4))
    assert {"optimization.max_update=250000", "task.label_rate=100", "optimization.update_freq=[4]"} <= first
    assert {"optimization.max_update=600000", "task.label_rate=50", "lr_scheduler.warmup_updates=48000"} <= second
    assert f"task.label_dir={tmp_path / 'labels-layer'}" in second and "checkpoint.keep_interval_updates=5" in second
    assert commands[3][commands[3].index("--layer") + 1] == 8 and commands[3][commands[3].index("--clusters") + 1] == 500
    alone = [str(w) for step in Pretraining(speech, tmp_path, "debug", updates=(500, 900)).steps() for w in step.words]
    # the batch of a configuration for a CPU is its own
    assert not any(word.startswith(("optimization.update_freq", "distributed_training")) for word in alone)
    assert "distributed_training.distributed_world_size=8" in first & second
    start = {f"task.init_from={tmp_path / 'phase1' / 'checkpoint_last.pt'}", "task.new_codebooks=true"}
    warm = [{str(word) for word in step.words} for step in Pretraining(speech, tmp_path, "conformer_s", gpus=8, warm=True).steps()]
    assert warm[2] == first and warm[4] == second | start and not start & second


def test_needs_follow_batch_updates_and_device() -> None:
    written = load_config("pretrain/conformer_s")
    alone = training_needs(written, 100, 1, "a100", 0.1)
    joint = training_needs(written, 100, 8, "a100", 0.2)
    assert alone.audio_seconds_per_update == 2 * 250_000 / 16_000 and joint.audio_seconds_per_update == 8 * alone.audio_seconds_per_update
    assert joint.pflop == pytest.approx(8 * alone.pflop) and joint.gpu_hours == pytest.approx(4 * alone.gpu_hours)
    macs = hubert_eff.profile("conformer-s", seconds=250_000 / 16_000).macs
    assert alone.pflop == pytest.approx(6 * macs * 2 * 250_000 / 1e15, rel=0.02)  # positions are cut otherwise on a CPU
    assert alone.gpu_hours == pytest.approx(alone.pflop * 1e15 / (312e12 * 0.1) / 3600)
    assert 1.2 < alone.gpu_gb < 10


def test_gpu_hours_are_the_papers() -> None:
    """8.5 hours per 100k updates on 32 A100, whose model is taken to be transformer_base."""
    for overrides, clusters, hours in (([], 100, 680), (["data=iter2"], 500, 1632)):
        written = load_config("pretrain/transformer_base", overrides)
        assert training_needs(written, clusters, PAPER_GPUS, "a100", MFU).gpu_hours == pytest.approx(hours, rel=1e-3)
    assert [PAPER_GPUS * PAPER_HOURS * updates / 100_000 for updates in PAPER_UPDATES] == [680, 1632]


@pytest.mark.parametrize("preset", ["transformer-debug", "sparseformer-debug", "zipformer-debug"])
def test_activations_are_those_that_autograd_keeps(preset: str) -> None:
    """They grow with the audio, and a block more keeps what its products need."""
    config = preset_config(preset)
    short, long = kept_bytes(config, 16_000), kept_bytes(config, 48_000)
    assert 2 < long / short < 4.5
    deeper = preset_config(preset, **({} if preset.startswith("zipformer") else {"encoder_layers": 4}))
    if deeper != config:
        block = (kept_bytes(deeper, 48_000) - long) / 2
        frames, dim, ffn = 149, config.encoder_embed_dim, config.encoder_ffn_embed_dim
        least = 4 * frames * (6 * dim + 2 * ffn)  # queries, keys, values, their mix, two norms' inputs, the feed-forward module's two sides
        assert least <= block < 6 * least


def test_dry_run_says_what_is_needed(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipe", str(speech), "--config", "conformer_s", "--out", str(tmp_path / "out"), "--gpus", "4", "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speech"]["recordings"] == 16 and found["speech"]["hours"] == pytest.approx(32 / 3600)
    assert not found["speech"]["convert_hours"]
    assert len(found["phases"]) == 2 and found["phases"][1]["gpu_hours"] > found["phases"][0]["gpu_hours"] > 1
    assert found["disk_gb"]["checkpoints"] > 0.5 and not any(step["done"] for step in found["steps"])
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "GPU-hours" in out and "fairseq-hydra-train" in out and "Estimated, not measured" in out
    assert "1.1% of a100's peak: the paper's 8.5 h per 100k updates on 32 A100" in out and found["mfu"] == MFU
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--config", "conformer_x"], "unknown configuration 'conformer_x'"),
        (["--layer", "3"], "has blocks 1 to 2"),
        (["--gpus", "0"], "must be at least 1"),
        (["--mfu", "1.5"], "at most 1"),
        (["--set", "task.data=x"], "the recipe decides task.data itself"),
        (["--set", "dataset.max_token=4"], "did you mean 'dataset.max_tokens'"),
        (["--set", "model.encoder_embed_dim=63"], "does not divide"),
        (["--superb", "nowhere"], "nowhere is not a folder"),
        (["--device", "tpu"], "unknown device"),
        (["--warm", "--set", "task.init_from=x"], "--warm starts phase 2 from phase 1"),
        (["--valid-percent", "0"], "above 0 and below 100"),
        (
            ["--updates", "500", "600"],
            "saves every 125, and the last 5 of these are averaged: add --set checkpoint.save_interval_updates=85",
        ),
        (["--updates", "5", "6"], "are averaged: add at least 7 --updates"),
        (["--set", "checkpoint.keep_interval_updates=1"], "the recipe decides checkpoint.keep_interval_updates itself"),
    ],
)
def test_bad_input_is_one_line(change: list[str], message: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(speech), "--config", "debug", "--out", str(tmp_path / "out"), "--dry-run", *change]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("hubert-eff recipe: ")


def test_a_folder_is_of_one_recipe_and_gpus_must_be_there(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(base, "run_command", lambda words: ran.append(words) or 0)
    monkeypatch.setattr("hubert_eff.recipes.pretrain.read_log", lambda *_: TrainingLog("run", [], [{"loss": 1.0, "num_updates": 1.0}]))
    Pretraining(speech, tmp_path, "debug").run()
    assert len(ran) == 6
    for change in ({"warm": True}, {"clusters": (50, 500)}, {"updates": (800, 900)}, {"overrides": ["model.dropout=0.0"]}):
        with pytest.raises(UserError, match=f"belongs to a recipe with {next(iter(change))}=.*take another --out"):
            Pretraining(speech, tmp_path, "debug", **change).run()
    with pytest.raises(UserError, match=f"has {torch.cuda.device_count()} GPUs"):
        Pretraining(speech, tmp_path / "other", "conformer_s", gpus=64).run()
    assert len(ran) == 6


def test_kaldi_folders_are_looked_at_too(speech: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kaldi"
    folder.mkdir()
    (folder / "wav.scp").write_text(f"a {speech / 's0' / '0.flac'}\nb {speech / 's1' / '1.flac'}\n")
    (folder / "segments").write_text("a-1 a 0.0 1.5\nb-1 b 0.5 1.5\n")
    found = look_at(folder)
    assert found["recordings"] == 2 and found["hours"] == pytest.approx(2.5 / 3600) == found["convert_hours"]  # they are cut out


def test_folders_without_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in ((tmp_path, "no recording in"), (tmp_path / "none", "is not there")):
        assert main(["recipe", str(folder), "--config", "debug", "--out", str(tmp_path / "out"), "--dry-run"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_small_run_from_recordings_to_an_export(speech: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "recipe", str(speech), "--config", "debug", "--out", str(tmp_path / "out"), "--updates", "6", "10", "--clusters", "8", "12",
        "--valid-percent", "25", "--set", "dataset.max_tokens=64000", "checkpoint.save_interval_updates=1", "dataset.num_workers=0",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "phase 2: masked accuracy, valid" in capfd.readouterr().out
    model = hubert_eff.load(tmp_path / "out" / "model.safetensors")
    assert model.config.label_rate == 50 and len(list((tmp_path / "out" / "phase2").glob("checkpoint_*_*.pt"))) == 5
    assert main([*arguments, "--dry-run", "--json"]) == 0
    assert all(step["done"] for step in json.loads(capfd.readouterr().out)["steps"])

    # the same folder goes on to one bit; it is killed in the middle of that, and goes on there
    arguments += ["--quant", "w1a1", "--quant-updates", "8"]
    stage, shipped = tmp_path / "out" / "w1a1", tmp_path / "out" / "model-w1a1.safetensors"
    started = subprocess.Popen(
        [sys.executable, "-m", "hubert_eff.cli", *arguments], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (stage / "checkpoint_last.pt").is_file() and started.poll() is None:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL and not shipped.exists()
    assert main(arguments) == 0
    found = capfd.readouterr()
    assert found.err.count("(done before)") == 6 and "w1a1: masked accuracy, valid" in found.out and str(shipped) in found.out
    log = (stage / "hydra_train.log").read_text()
    resumed = re.findall(r"Loaded checkpoint .*checkpoint_last.pt \(epoch \d+ @ (\d+) updates\)", log)
    assert resumed and 0 < int(resumed[-1]) <= 8
    assert hubert_eff.load(shipped).config.quant == "w1a1"


# -- one bit -------------------------------------------------------------------------------------------------------------


def test_stages_at_one_bit_follow_phase_2(speech: Path, tmp_path: Path) -> None:
    recipe = Pretraining(speech, tmp_path, "transformer_base", gpus=8, superb=tmp_path, quant=("w1a2", "w1a1"))
    steps = recipe.steps()
    titles = [step.title for step in steps]
    assert titles[6:9] == ["Distillation to w1a2", "Distillation to w1a1", "The model at one bit, as one file"]
    first, second = ({str(word) for word in step.words} for step in steps[6:8])
    warm_up = {f"optimizer.groups.{name}.lr_scheduler.warmup_updates=48000" for name in ("default", "scales")}
    shared = {"transformer_base_distill", "task.label_rate=50", f"task.label_dir={tmp_path / 'labels-layer'}", *warm_up}
    shared |= {"optimization.max_update=600000", "optimization.update_freq=[4]", "model.quant_policy=paper"}
    assert shared | {"model.quant=w1a2", f"criterion.teacher={tmp_path / 'phase2' / 'checkpoint_last.pt'}"} <= first
    assert shared | {"model.quant=w1a1", f"criterion.teacher={steps[6].result}"} <= second
    assert {str(tmp_path / "superb"), str(tmp_path / "superb-w1a1")} <= {str(word) for word in steps[-1].words}
    assert steps[8].words[2] == steps[7].result and recipe.one_bit in steps[-2].words
    assert "--small" not in steps[-2].words
    small = Pretraining(speech, tmp_path, "debug", superb=tmp_path, quant=("w1a1",)).steps()
    assert [step.words[-1] for step in small[-3:-1]] == ["--small"] * 2
    plain = Pretraining(speech, tmp_path, "transformer_base", gpus=8, superb=tmp_path).steps()
    assert [step.words for step in plain[:7]] == [step.words for step in (*steps[:6], steps[9])]  # a folder of before goes on


def test_one_bit_may_come_later_but_not_change(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(base, "run_command", lambda words: ran.append(words) or 0)
    monkeypatch.setattr("hubert_eff.recipes.pretrain.read_log", lambda *_: TrainingLog("run", [], [{"loss": 1.0, "num_updates": 1.0}]))
    policy = tmp_path / "mine.yaml"
    policy.write_text("feed_forward: float")
    out = tmp_path / "out"
    Pretraining(speech, out, "debug").run()
    found = Pretraining(speech, out, "debug", quant=("w1a1",), policy=str(policy)).run()
    assert set(found["quantization"]) == {"w1a1"} and f"model.quant_policy={out / 'policy.yaml'}" in ran[6]
    assert json.loads((out / "policy.yaml").read_text()) == {"feed_forward": "float"}
    assert len(ran) == 8
    Pretraining(speech, out, "debug").run()
    assert len(ran) == 8
    for change in ({"quant": ("w1a2", "w1a1")}, {"quant": ("w1a1",), "quant_updates": (5,)}, {"quant": ("w1a1",), "policy": "paper"}):
        with pytest.raises(UserError, match=f"belongs to a recipe with {list(change)[-1]}=.*take another --out"):
            Pretraining(speech, out, "debug", **change).run()


def test_dry_run_counts_the_teacher(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Pretraining(speech, tmp_path, "debug", updates=(1000, 1000), clusters=(9, 9), quant=("w1a1",))
    found = recipe.dry_run("a100", 0.2)
    assert found["quantization"]["w1a1"]["pflop"] == pytest.approx(4 / 3 * found["phases"][1]["pflop"])
    assert found["quantization"]["w1a1"]["gpu_gb"] > found["phases"][1]["gpu_gb"]
    _plan(found)
    out = capsys.readouterr().out
    assert "\n w1a1 " in out and "20.0% of a100's peak: --mfu." in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--quant", "w1a2"], "the stages go down to w1a1"),
        (["--quant", "w1a1", "w1a2"], "the stages go down to w1a1"),
        (["--quant", "w2a1"], "the stages go down to w1a1"),
        (["--quant", "w1a1", "--quant-updates", "5", "5"], "one number for each of w1a1"),
        (["--quant", "w1a1", "--quant-updates", "0"], "--quant-updates"),
        (["--quant-updates", "5"], "add --quant w1a1"),
        (["--policy", "paper"], "add --quant w1a1"),
        (["--quant", "w1a1", "--policy", "papr"], "did you mean 'paper'"),
        (["--quant", "w1a1", "--config", "zipformer_debug"], "unknown distillation"),
        (["--quant", "w1a1", "--set", "model.quant=w1a2"], "the recipe decides model.quant itself"),
        (["--quant", "w1a1", "--set", "lr_scheduler.power=0.5"], "key in the overrides of quantize/debug_distill"),
    ],
)
def test_bad_stages_are_one_line(change: list[str], message: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(speech), "--config", "debug", "--out", str(tmp_path / "out"), "--dry-run", *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# -- from a model that there is ------------------------------------------------------------------------------------------


@pytest.fixture
def found_model(tmp_path: Path) -> Path:
    """A HuBERT of Hugging Face of other sizes than the configuration's, and another front."""
    pytest.importorskip("transformers")
    theirs().save_pretrained(tmp_path / "hubert")
    (tmp_path / "hubert" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 16_000}))
    return tmp_path / "hubert"


def test_a_model_takes_the_place_of_phase_1(speech: Path, tmp_path: Path, found_model: Path) -> None:
    recipe = Pretraining(speech, tmp_path / "out", "transformer_base", gpus=8, start=str(found_model), layer=1)
    manifest, labels, training, export = ([str(word) for word in step.words] for step in recipe.steps())
    assert labels[labels.index("--checkpoint") + 1] == str(found_model) and labels[labels.index("--layer") + 1] == "1"
    assert labels[labels.index("--clusters") + 1] == "500"
    sizes = {"model.encoder_layers=2", "model.encoder_embed_dim=32", "model.conv_pos_groups=4", "task.normalize=true"}
    start = {f"task.init_from={found_model}", "task.new_codebooks=true", "task.label_rate=50", "optimization.max_update=250000"}
    assert sizes | start <= set(training)
    assert any(word.startswith("model.conv_feature_layers='[(16, 10, 5)") for word in training)
    recipe.check()
    found = recipe.dry_run("a100")
    assert len(found["phases"]) == 1 and found["phases"][0]["updates"] == 250_000
    _plan(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--from", "nowhere"], "--from nowhere is not there"),
        (["--config", "debug"], "is a model with the encoder transformer, debug one with conformer: choose another --config"),
        (["--warm"], "--from decides the start of training"),
        (["--set", "task.init_from=x"], "--from decides the start of training"),
        (["--updates", "10", "20"], "--updates 10 20: give one number, since there is only one phase with --from"),
        (["--layer", "3"], "has blocks 1 to 2"),
        (["--set", "model.encoder_layers=1"], "the student has no 'encoder.layers.1"),
    ],
)
def test_what_cannot_be_gone_on_from(
    change: list[str], message: str, speech: Path, tmp_path: Path, found_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recipe", str(speech), "--config", "transformer_debug", "--out", str(tmp_path / "out"), "--from", str(found_model)]
    change = [*change, "checkpoint.save_interval_updates=9"] if "--set" in change else change
    assert main([*arguments, "--dry-run", *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["recipe", str(speech), "--config", "debug", "--out", str(tmp_path / "out"), "--dry-run", "--updates", "900"]) == 2
    assert "--updates 900: give two numbers, one for each phase" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.long
def test_one_command_from_a_folder_of_hugging_face_to_a_model(
    speech: Path, tmp_path: Path, found_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "recipe", str(speech), "--config", "transformer_debug", "--out", str(tmp_path / "out"), "--from", str(found_model), "--updates",
        "8", "--clusters", "12", "--valid-percent", "25", "--set", "dataset.max_tokens=64000", "checkpoint.save_interval_updates=1",
        "dataset.num_workers=0",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "phase 2: masked accuracy, valid" in capfd.readouterr().out
    log = (tmp_path / "out" / "phase2" / "hydra_train.log").read_text()
    assert re.search(r"task.init_from=\S+hubert: \d+ tensors .* taken over, codebooks of \[16\] classes are new", log)
    labels = json.loads((tmp_path / "out" / "labels-layer" / "labels.json").read_text())
    assert (labels["checkpoint"], labels["layer"], labels["rate"]) == (str(found_model), 1, 50.0)
    model, source = hubert_eff.load(tmp_path / "out" / "model.safetensors"), hubert_eff.load(found_model)
    assert model.config.conv_layers == source.config.conv_layers and model.config.normalize and source.config.normalize
    moved = [
        float((model.state_dict()[name] - tensor).abs().max()) for name, tensor in source.encoder.state_dict(prefix="encoder.").items()
    ]
    assert max(moved) > 0 and all(m < 0.1 for m in moved)  # eight updates away from where it came from
