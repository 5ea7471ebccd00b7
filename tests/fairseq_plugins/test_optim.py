"""ScaledAdam and Eden as fairseq's optimizer and learning rate schedule."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hubert_eff.errors import UserError
from hubert_eff.optim import FusedAdam, ScaledAdam, eden

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer, build_optimizer  # noqa: E402
from fairseq.optim.lr_scheduler import build_lr_scheduler  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from ..helpers.optimizers import gradients, tensors, values  # noqa: E402
from ..helpers.pretraining import fairseq_config, logged, make_data, run, start, update_made, weights  # noqa: E402

SWAPPED = (
    "optimizer={_name:scaled_adam}", "~optimizer.adam_betas", "~optimizer.adam_eps", "~optimizer.weight_decay",
    "lr_scheduler={_name:eden}", "~lr_scheduler.warmup_updates", "~lr_scheduler.total_num_update", "~lr_scheduler.end_learning_rate",
    "~lr_scheduler.power", "+lr_scheduler.lr_batches=20", "+lr_scheduler.lr_epochs=2", "+lr_scheduler.warmup_batches=2",
    "+lr_scheduler.warmup_start=0.5", "optimization.lr=[0.045]", "optimization.clip_norm=0",
)  # fmt: skip


def test_fairseq_builds_the_optimizer_and_the_schedule_for_any_model() -> None:
    cfg = fairseq_config("lr_scheduler.lr_epochs=3.5", "lr_scheduler.warmup_batches=500", "lr_scheduler.warmup_start=0.5")
    params, plain = tensors(), tensors()
    optimizer = build_optimizer(cfg.optimizer, params)
    schedule = build_lr_scheduler(cfg.lr_scheduler, optimizer)
    assert isinstance(optimizer.optimizer, ScaledAdam) and not optimizer.supports_flat_params
    assert optimizer.get_lr() == eden(0, 0, 0.045, 7500, 3.5, 500, 0.5)
    reference = ScaledAdam(plain)
    for update in range(12):
        epoch = update // 4
        if update % 4 == 0:
            schedule.step_begin_epoch(epoch + 1)
        lr = schedule.step_update(update)
        assert lr == optimizer.get_lr() == eden(update, epoch, 0.045, 7500, 3.5, 500, 0.5)
        reference.param_groups[0]["lr"] = lr
        gradients(params, update)
        gradients(plain, update)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(params, plain))
    # a schedule that goes on from a checkpoint is told the epoch, and nothing else
    resumed = build_lr_scheduler(cfg.lr_scheduler, build_optimizer(cfg.optimizer, tensors()))
    resumed.load_state_dict(schedule.state_dict())
    resumed.step(4)
    resumed.step_begin_epoch(4)
    assert resumed.step_update(12) == eden(12, 3, 0.045, 7500, 3.5, 500, 0.5)


def test_another_learning_rate_of_the_configuration_holds_over_a_checkpoint() -> None:
    optimizer = build_optimizer(fairseq_config().optimizer, tensors())
    again = build_optimizer(fairseq_config("optimization.lr=[0.01]", "optimizer.scalar_max=5.0").optimizer, tensors())
    again.load_state_dict(optimizer.state_dict(), again.optimizer_config)
    assert again.get_lr() == 0.01 and again.param_groups[0]["scalar_max"] == 5.0


def test_fused_adam_takes_adams_keys_and_makes_its_updates() -> None:
    keys = ("optimizer.adam_betas='(0.9,0.98)'", "optimizer.adam_eps=1e-6", "optimizer.weight_decay=0.01", "optimization.lr=[0.01]")
    sides = []
    for name in ("adam", "fused_adam"):
        params = tensors()
        optimizer = build_optimizer(fairseq_config(f"optimizer._name={name}", *keys).optimizer, params)
        for update in range(5):
            gradients(params, update)
            optimizer.step()
        sides.append(params)
    assert isinstance(optimizer.optimizer, FusedAdam) and optimizer.supports_flat_params
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    again = build_optimizer(fairseq_config("optimizer._name=fused_adam", *keys[:-1], "optimization.lr=[0.003]").optimizer, tensors())
    again.load_state_dict(optimizer.state_dict(), again.optimizer_config)
    assert again.get_lr() == 0.003 and again.param_groups[0]["updates"] == 5
    assert all(state["step"] == 5 for state in again.optimizer.state.values())


@pytest.mark.parametrize("betas", ["0.9", "(0.9,0.98,0.99)", "(0.9,", "(a,b)"])
def test_betas_that_are_no_pair_are_refused(betas: str) -> None:
    cfg = fairseq_config("optimizer._name=fused_adam")
    cfg.optimizer.adam_betas = betas
    with pytest.raises(UserError, match="adam_betas"):
        build_optimizer(cfg.optimizer, tensors())


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_precision_training_steps_on_float32_copies(half: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    cfg = fairseq_config(f"common.{half}=true", "common.fp16_no_flatten_grads=true")
    params = tensors(dtype)
    optimizer = FP16Optimizer.build_optimizer(cfg, params)
    schedule = build_lr_scheduler(cfg.lr_scheduler, optimizer)
    before = values(params)
    for update in range(1, 4):
        schedule.step_update(5000 * update)
        optimizer.zero_grad()
        optimizer.backward(sum(p.float().sum() for p in params))
        optimizer.clip_grad_norm(0.0)
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(params[:-1], before))
    masters = [p for group in optimizer.fp32_optimizer.param_groups for p in group["params"]]
    assert [p.shape for p in masters] == [p.shape for p in params] and all(p.dtype == torch.float32 for p in masters)
    optimizer.load_state_dict(optimizer.state_dict())


def test_memory_efficient_half_precision_keeps_its_state_over_a_checkpoint() -> None:
    cfg = fairseq_config("common.fp16=true", "common.memory_efficient_fp16=true")
    params = tensors(torch.float16)
    optimizer = MemoryEfficientFP16Optimizer.build_optimizer(cfg, params)
    gradients(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    gradients(params, 1)
    optimizer.step()
    states = optimizer.wrapped_optimizer.optimizer.state.values()
    assert all(state["delta"].dtype == torch.float32 and state["step"] == 2 for state in states)


def test_flattened_parameters_are_refused() -> None:
    with pytest.raises(UserError, match="fp16_no_flatten_grads=true"):
        build_optimizer(fairseq_config("common.fp16=true").optimizer, tensors())


def test_a_second_clipping_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    build_optimizer(fairseq_config("optimization.clip_norm=10").optimizer, tensors())
    assert "set optimization.clip_norm=0, not 10" in caplog.text
    caplog.clear()
    build_optimizer(fairseq_config().optimizer, tensors())
    build_optimizer(fairseq_config("optimization.clip_norm=10", "optimizer.clipping_scale=null").optimizer, tensors())
    assert not caplog.text


@pytest.mark.parametrize("change", ["optimization.lr=[0.1,0.2]", "lr_scheduler.lr_epochs=0", "lr_scheduler.lr_batches=-1",
                                    "lr_scheduler.warmup_start=2", "lr_scheduler.warmup_batches=-1"])  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(change: str) -> None:
    optimizer = build_optimizer(fairseq_config().optimizer, tensors())
    with pytest.raises(UserError, match=change.partition(".")[2].partition("=")[0]):
        build_lr_scheduler(fairseq_config(change).lr_scheduler, optimizer)


@pytest.mark.long
def test_training_with_them_goes_on_from_a_kill_as_if_nothing_had_happened(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [0.8 + 0.1 * (i % 5) for i in range(12)], "valid": [1.0, 0.9]})
    options = (*SWAPPED, "checkpoint.save_interval_updates=2")
    whole = run(data, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    rates, epochs = logged(whole.stdout, "lr"), logged(whole.stdout, "epoch")  # the rate is that of the next update
    assert epochs[1] == 1 and epochs[8] >= 2
    assert rates == {n: pytest.approx(eden(n, int(epochs[n]) - 1, 0.045, 20, 2, 2, 0.5), rel=1e-4) for n in range(1, 9)}
    process = start(data, tmp_path / "killed", *options)
    process.wait_for(update_made(5))
    process.kill()
    process.end()
    assert not (tmp_path / "killed" / "checkpoint_1_8.pt").exists()
    resumed = run(data, tmp_path / "killed", *options)
    assert resumed.returncode == 0, resumed.stderr
    expected, losses = logged(whole.stdout), logged(resumed.stdout)
    assert losses and 2 < min(losses) <= 6 and max(losses) == 8
    assert losses == {update: expected[update] for update in losses}
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
