"""Binarized models in fairseq: configurations, the criterion `hubert_distill`, the group of the scales, stages as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.quant import Quantizer
from hubert_eff.quant.distill import codebook_divergence, hidden_distances
from hubert_eff.reports.table1 import PAPER_TABLE

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq import optim  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.optim.lr_scheduler import build_lr_scheduler  # noqa: E402
from fairseq.tasks import setup_task  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from ..helpers.distillation import CONFIGS, composed, parts, teacher  # noqa: E402
from ..helpers.paths import ROOT  # noqa: E402
from ..helpers.pretraining import make_data, update_made, weights  # noqa: E402
from ..helpers.processes import Training  # noqa: E402

NAMES = sorted(path.stem.removesuffix("_w1a1") for path in (CONFIGS / "quantize").glob("*_w1a1.yaml"))
PAPER_ROWS = {row.preset.partition("+")[0].replace("-", "_") for row in PAPER_TABLE if "+" in row.preset}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = [0.8 + 0.1 * (i % 5) for i in range(12)]
    return make_data(tmp_path_factory.mktemp("distill") / "data", {"train": lengths, "valid": [1.0, 0.9]})


# -- configurations ------------------------------------------------------------------------------------------------------


def test_there_are_configurations() -> None:
    assert {"debug", "transformer_debug", "sparseformer_debug", "conformer_s", "transformer_base"} <= set(NAMES)


@pytest.mark.parametrize("kind", ["w1a1", "distill"])
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_differs_from_its_float_model_only_as_stated(name: str, kind: str) -> None:
    ours = composed("quantize", f"{name}_{kind}")
    theirs = composed("pretrain", name)
    assert ours.model.quant == "w1a1" and theirs.model.quant == "none"
    assert ours.task.init_from == ("T" if kind == "distill" else None)
    assert ours.model.quant_policy == ("paper" if name in PAPER_ROWS else "default") and theirs.model.quant_policy == "default"
    for cfg in (ours, theirs):
        cfg.model.quant, cfg.checkpoint.save_dir, cfg.common.fp16_no_flatten_grads, cfg.task.init_from = "", "", False, None
        cfg.model.quant_policy = ""
    groups = ours.optimizer.groups
    assert set(groups) == {"default", "scales"} and ours.lr_scheduler._name == "pass_through"
    assert groups.scales.optimizer.lr == [1e-4] and groups.scales.optimizer.weight_decay == 0.0
    for key in ("adam_betas", "adam_eps", "weight_decay", "lr"):
        assert groups.default.optimizer[key] == theirs.optimizer[key]
    for group in groups.values():
        assert group.lr_scheduler.items() <= theirs.lr_scheduler.items()
    if kind == "distill":
        assert ours.model.dropout == ours.model.attention_dropout == ours.model.dropout_input == ours.model.encoder_layerdrop == 0.0
        for key in ("encoder_layerdrop", "dropout", "attention_dropout", "activation_dropout", "dropout_input"):
            ours.model[key] = theirs.model[key]
        assert ours.criterion._name == "hubert_distill"
    else:
        assert ours.criterion == theirs.criterion
    for section in ("common", "task", "dataset", "optimization", "checkpoint", "model"):
        assert ours[section] == theirs[section], section


def test_scales_are_in_a_group_of_their_own(data: Path) -> None:
    cfg, model, _, _ = parts(data, f"criterion.teacher={teacher(data)}")
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    assert build_lr_scheduler(cfg.lr_scheduler, optimizer).step_update(cfg.optimization.max_update // 2)["scales"] < 1e-4
    wanted = {id(m.scale) for m in model.modules() if isinstance(m, Quantizer)}
    found = optimizer.optimizers["scales"].param_groups[0]
    assert {id(p) for p in found["params"]} == wanted and found["weight_decay"] == 0.0
    (others,) = optimizer.optimizers["default"].param_groups
    assert others["weight_decay"] == 0.01 and len(others["params"]) + len(wanted) == len(list(model.parameters()))


def test_scales_that_share_a_group_with_weights_are_told_once(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, warnings in (("debug_w1a1", 0), ("debug", 1)):
        group = "quantize" if warnings == 0 else "pretrain"
        cfg = composed(group, name, f"task.data={data}", f"task.label_dir={data}", "model.quant=w1a1")
        task = setup_task(cfg.task)
        optimizer = optim.build_optimizer(cfg.optimizer, list(task.build_model(cfg.model).parameters()))
        caplog.clear()
        task._check_groups(optimizer)
        task._check_groups(optimizer)
        assert len([r for r in caplog.records if "configs/quantize give them a group of their own" in r.message]) == warnings


def test_a_look_at_the_model_is_logged_with_a_warning_of_collapsed_scales(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = composed("quantize", "debug_w1a1", f"task.data={data}", f"task.label_dir={data}", "common.log_interval=2")
    task = setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    build_lr_scheduler(cfg.lr_scheduler, optimizer).step_update(20)
    task.load_dataset("train")
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[0], dataset[1]])
    caplog.set_level("INFO")
    for update in range(3):
        with metrics.aggregate() as meters:
            optimizer.zero_grad()
            task.train_step(sample, model, criterion, optimizer, update)
            task.optimizer_step(optimizer, model, update)
        values = meters.get_smoothed_values()
        assert ("flipped_0" in values) == (update == 1)
        if update == 1:
            assert 0 < values["flipped_0"] < 1 and 0 < values["saturated_1"] < 1 and 0 <= values["dead_0"] < 1
        with torch.no_grad():
            model.encoder.layers[0].self_attn.out_proj.input.scale.fill_(-1.0)
    assert ["update 2: " in r.message for r in caplog.records if "most saturated" in r.message] == [True]
    (warning,) = [r.message for r in caplog.records if "fallen to its floor" in r.message]
    assert "the scale of encoder.layers.0.self_attn.out_proj.input" in warning


# -- criterion -----------------------------------------------------------------------------------------------------------


def test_distillation_is_of_the_models_at_the_students_masks(data: Path) -> None:
    source = teacher(data)
    old = ("criterion.pred_masked_weight=0", "criterion.pred_nomask_weight=0", "criterion.codebook_nomask_weight=0")
    weighted = ("criterion.codebook_weight=0.5", "criterion.hidden_weight=2.0")
    _, model, criterion, sample = parts(data, f"criterion.teacher={source}", *old, *weighted)
    loss, frames, log = criterion(model.eval(), sample)
    inputs = sample["net_input"]
    with torch.no_grad():
        ours = model(target_list=sample["target_list"], return_states=True, **inputs)
        reference = hubert_eff.load(source)
        theirs = reference(inputs["source"], sample["target_list"], inputs["padding_mask"], masks=ours["masks"], return_states=True)
    valid = ~ours["padding_mask"]
    masked = (ours["mask_indices"] & valid).sum(1)  # (B,)
    kl = codebook_divergence(ours["logits_m"], theirs["logits_m"])
    mse = hidden_distances(ours["states"], theirs["states"], valid).mean(1)
    assert frames == masked.sum() and torch.allclose(loss, 0.5 * kl + 2.0 * (mse * masked).sum(), rtol=1e-5)
    assert log["loss_kl"] == pytest.approx(float(kl), rel=1e-5) and log["count_t_0"] == masked.sum()
    loss.backward()
    assert model.encoder.layers[0].ffn1.w_1.weight.grad.abs().sum() > 0
    assert not list(criterion.parameters()) and not criterion.state_dict()


def test_a_float_student_that_is_its_teacher_has_nothing_to_learn(data: Path) -> None:
    no_labels = ("criterion.pred_masked_weight=0", "criterion.pred_nomask_weight=0")
    _, model, criterion, sample = parts(data, f"criterion.teacher={teacher(data)}", "model.quant=none", *no_labels)
    loss, _, log = criterion(model.eval(), sample)
    assert float(loss) == pytest.approx(0.0, abs=1e-4) and log["correct_t_0"] == log["count_t_0"]


def test_a_teacher_that_streams_is_heard_in_the_chunks_of_its_student(data: Path) -> None:
    source = teacher(data, normalize=False, streaming=True, chunk_sizes="4")
    keys = ("task.normalize=false", "model.streaming=true", "model.chunk_sizes='8'", "model.quant=none")
    no_labels = ("criterion.pred_masked_weight=0", "criterion.pred_nomask_weight=0")
    _, model, criterion, sample = parts(data, f"criterion.teacher={source}", *keys, *no_labels)
    loss, _, _ = criterion(model.eval(), sample)
    assert loss.item() == pytest.approx(0.0, abs=1e-4)
    assert model(target_list=sample["target_list"], **sample["net_input"])["chunks"] == (8, -1)


@pytest.mark.parametrize(
    "keys, override, message",
    [
        ({"encoder_layers": 3}, "task.init_from=null", "criterion.teacher=.*: the teacher does not fit the student: layers 3"),
        ({"encoder_layers": 3}, "", "task.init_from=.*: the student has no 'encoder.layers.2"),
        ({"label_rate": 50.0}, "task.init_from=null", "label rate .* 50.0, the student's 100.0"),
        ({"final_dim": 32}, "", "task.init_from=.*the sizes must agree"),
        ({}, "model.skip_masked=true", "criterion.pred_masked_weight is positive, but model.skip_masked"),
    ],
)
def test_bad_teachers_are_refused_before_training(data: Path, keys: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parts(data, f"criterion.teacher={teacher(data, **keys)}", *([override] if override else []))
    assert "\n" not in str(caught.value)


def test_a_teacher_that_is_no_checkpoint_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint"):
        parts(data, f"criterion.teacher={data / 'train.tsv'}")


def test_a_student_starts_from_stock_hubert_and_learns_from_it(data: Path, tmp_path: Path) -> None:
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    dictionary = Dictionary.load(str(data / "dict.km.txt"))
    sizes = composed("pretrain", "transformer_debug").model
    keys = (
        "encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "conv_feature_layers", "conv_bias",
        "extractor_mode", "final_dim", "conv_pos", "conv_pos_groups", "untie_final_proj", "required_seq_len_multiple",
    )  # fmt: skip
    cfg = OmegaConf.structured(HubertConfig(label_rate=100.0, **{key: sizes[key] for key in keys}))
    cfg._name = "hubert"
    model = HubertModel(cfg, HubertPretrainingConfig(sample_rate=16_000), [dictionary])
    config = {"model": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True), "task": {"normalize": True}}
    stock = tmp_path / "stock.pt"
    torch.save({"args": None, "cfg": config, "model": model.state_dict(), "task_state": {"dictionaries": [dictionary]}}, stock)
    given = (
        f"criterion.teacher={stock}",
        "model.valid_frames=fairseq",
        *(f"criterion.pred_{part}_weight=0" for part in ("masked", "nomask")),
    )
    losses = []
    for start in (stock, "null"):
        _, student, criterion, sample = parts(data, *given, f"task.init_from={start}", "model.quant=w1a2", name="transformer_debug_distill")
        criterion(student.train(), sample)  # the scales start
        loss, frames, _ = criterion(student.eval(), sample)
        losses.append(float(loss) / frames)
    assert losses[0] < 0.5 * losses[1]
    with pytest.raises(UserError, match=r"rule for padding \(valid_frames\) fairseq, the student's receptive_field"):
        parts(data, given[0], name="transformer_debug_distill")


# -- as a user runs it ---------------------------------------------------------------------------------------------------


def start(group: str, name: str, data: Path, save_dir: Path, *overrides: str) -> Training:
    return Training(
        "--config-dir", str(CONFIGS / group), "--config-name", name,
        f"common.user_dir={ROOT / 'fairseq_plugins'}", f"task.data={data}", f"task.label_dir={data}", f"checkpoint.save_dir={save_dir}",
        "common.log_format=json", "common.log_interval=1", "dataset.max_tokens=64000", "optimization.max_update=6",
        "checkpoint.save_interval_updates=2", *overrides,
    )  # fmt: skip


def logged(output: str) -> dict[int, dict[str, str]]:
    records = (json.loads(m[0]) for line in output.splitlines() if "[train_inner]" in line and (m := re.search(r"\{.*\}$", line)))
    return {int(record["num_updates"]): record for record in records}


@pytest.mark.long
def test_quantized_pretraining_goes_on_as_if_nothing_had_happened(data: Path, tmp_path: Path) -> None:
    board = f"common.tensorboard_logdir={tmp_path / 'board'}"
    whole = start("quantize", "debug_w1a1", data, tmp_path / "whole", board).end()
    assert whole.returncode == 0, whole.stderr
    expected = logged(whole.stdout)
    assert list(expected) == list(range(1, 7))
    assert float(expected[3]["lr_scales"]) < float(expected[3]["lr_default"])
    assert all(f"{measure}_{block}" in expected[3] for measure in ("saturated", "dead", "flipped") for block in (0, 1))
    events = b"".join(path.read_bytes() for path in (tmp_path / "board").rglob("events*"))
    assert b"flipped_0" in events and b"saturated_1" in events and b"dead_0" in events
    killed = ("quantize", "debug_w1a1", data, tmp_path / "killed")
    process = start(*killed)
    process.wait_for(update_made(4))
    process.kill()
    process.end()
    resumed = start(*killed).end()
    assert resumed.returncode == 0, resumed.stderr
    found = logged(resumed.stdout)
    assert found and min(found) > 2 and {u: r["loss"] for u, r in found.items()} == {u: expected[u]["loss"] for u in found}
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.long
def test_binarize_recipe_stops_on_sigterm_and_goes_on(data: Path, tmp_path: Path) -> None:
    program, environment = Path(sys.executable).parent / "hubert-eff", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        str(program), "binarize-recipe", str(data), str(data), "--out", str(tmp_path / "out"), "--updates", "4", "20", "4", "--json",
        "--set", "dataset.max_tokens=64000", "common.log_interval=1",
    ]  # fmt: skip
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if "== w1a2" in seen and line.startswith("update 2: most saturated"):
            process.terminate()
            break
    rest, _ = process.communicate(timeout=200)
    assert process.returncode == 143, seen + rest
    assert "the step 'w1a2' ended with exit code 143; its messages are above; the same command resumes there" in rest
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "== float (done before)" in done.stderr and "Loaded checkpoint" in done.stderr
    figures = json.loads(done.stdout)
    assert list(figures) == ["float", "w1a2", "w1a1"] and figures["w1a1"]["updates"] <= 4
    models = {stage: hubert_eff.load(tmp_path / "out" / stage / "checkpoint_last.pt") for stage in figures}
    assert [model.config.quant for model in models.values()] == ["none", "w1a2", "w1a1"]
