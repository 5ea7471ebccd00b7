"""ScaledAdam and Eden: the authors' numbers, batching, resuming, odd gradients."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hubert_eff.errors import UserError
from hubert_eff.optim import ScaledAdam, eden

from ..helpers.optimizers import golden, gradients, tensors, values


def train(params: list[nn.Parameter], optimizer: ScaledAdam, steps: range, missing: dict[int, tuple[int, ...]] | None = None) -> None:
    for step in steps:
        gradients(params, step, (missing or {}).get(step, ()))
        optimizer.step()


def test_scaled_adam_follows_the_authors_trajectory() -> None:
    data = golden("scaled_adam")
    params = {name: nn.Parameter(torch.from_numpy(data[f"init.{name}"])) for name in "abcdef"}
    optimizer = ScaledAdam(params.values(), lr=0.045)
    for step in range(len(data["grads.a"])):
        for name, p in params.items():
            p.grad = torch.from_numpy(np.asarray(data[f"grads.{name}"][step]))
        optimizer.step()
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), data[f"traj.{name}"][step], rtol=1e-4, atol=2e-5)
    assert params["f"].detach().square().mean().sqrt() > 2e-6  # smaller than param_min_rms: it has grown, unlike its gradient says


def test_the_papers_form_is_its_algorithm() -> None:
    """Algorithm 1 written down tensor by tensor in float64; without clipping. A scalar is treated as the authors do."""
    params, theirs = tensors(torch.float64), tensors()
    paper, authors = (ScaledAdam(p, lr=0.03, clipping_scale=None, form=form) for p, form in ((params, "paper"), (theirs, "authors")))
    theta = [p.detach().clone() for p in params]
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    n, w = [0.0] * len(theta), [0.0] * len(theta)
    for t in range(1, 31):
        gradients(params, t)
        gradients(theirs, t)
        paper.step()
        authors.step()
        for i, p in enumerate(params):
            if p.numel() == 1:
                torch.testing.assert_close(p.float(), theirs[i], rtol=1e-5, atol=1e-6)
                continue
            g, r = p.grad, max(float(theta[i].square().mean().sqrt()), 1e-5)
            h = float((g * theta[i]).sum()) / r
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.98 * v[i] + 0.02 * g * g
            n[i], w[i] = 0.9 * n[i] + 0.1 * h, 0.98 * w[i] + 0.02 * h * h
            rate = 0.03 * (1 - 0.98**t) ** 0.5 / (1 - 0.9**t)
            along = r * m[i] / (v[i].sqrt() + 1e-8)
            grown = 0.1 * theta[i] * n[i] / (w[i] ** 0.5 + 1e-8)
            theta[i] = theta[i] - rate * (along + grown)
            torch.testing.assert_close(p.detach(), theta[i], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(params[0].float(), theirs[0], rtol=1e-2)  # and another trajectory than the authors'
    assert 0 < float(params[-1].detach().abs().max()) < 1e-4  # the tensor that began as zero has moved, hardly


def test_the_papers_form_goes_on_from_its_own_state_only() -> None:
    whole, first, second = tensors(), tensors(), tensors()
    optimizer, before = ScaledAdam(whole, form="paper"), ScaledAdam(first, form="paper")
    train(whole, optimizer, range(20))
    train(first, before, range(12))
    with torch.no_grad():
        for p, q in zip(second, first):
            p.copy_(q)
    after = ScaledAdam(second, form="paper")
    after.load_state_dict(before.state_dict())
    train(second, after, range(12, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, second))
    old = ScaledAdam(tensors())
    train(old.param_groups[0]["params"], old, range(2))
    saved = old.state_dict()
    del saved["param_groups"][0]["form"]  # as it was before there were two
    with pytest.raises(UserError, match="form=authors: resume with that form, not paper"):
        after.load_state_dict(saved)
    new = ScaledAdam(tensors())
    new.load_state_dict(saved)
    train(new.param_groups[0]["params"], new, range(2, 4))
    with pytest.raises(UserError, match="unknown form of ScaledAdam 'printed'"):
        ScaledAdam(tensors(), form="printed")


def test_eden_is_the_closed_form() -> None:
    for batch, epoch, lr in golden("eden")["batch_epoch_lr_f64"]:
        assert eden(int(batch), int(epoch), 0.045, 7500, 3.5, 500, 0.5) == pytest.approx(lr, rel=1e-12)
    assert eden(0, 0, 0.045) == 0.0 and eden(0, 0, 0.045, warmup_batches=0) == 0.045
    # far out: as b^-1/2 and e^-1/2
    assert eden(4_000_000, 4000, 1.0) / eden(1_000_000, 1000, 1.0) == pytest.approx(0.25, rel=1e-3)


def test_batching_changes_nothing() -> None:
    together, alone = tensors(), tensors()
    joint = ScaledAdam(together, clipping_scale=None)
    single = [ScaledAdam([p], clipping_scale=None) for p in alone]
    for step in range(9):
        gradients(together, step)
        gradients(alone, step)
        joint.step()
        for optimizer in single:
            optimizer.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_step_does_not_depend_on_the_scale_of_gradients_and_follows_that_of_parameters() -> None:
    params, louder, larger = tensors()[:3], tensors()[:3], tensors()[:3]
    with torch.no_grad():
        for p in larger:
            p.mul_(4)
    start = values(params)
    optimizers = [ScaledAdam(p, param_max_rms=100.0, eps=1e-20) for p in (params, louder, larger)]
    for step in range(25):
        for group, scale in ((params, 1.0), (louder, 1024.0), (larger, 1.0)):
            gradients(group, step)
            for p in group:
                assert p.grad is not None
                p.grad *= scale
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c, before in zip(params, louder, larger, start):
        assert not torch.allclose(a, before)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c, 4 * a, rtol=1e-5, atol=1e-6)


def test_it_resumes_exactly_from_a_saved_state() -> None:
    # some tensors lack a gradient at times, so that tensors of one shape have made different numbers of steps
    missing = {2: (0, 3), 3: (0,), 7: (2, 5)}
    whole, first, second = tensors(), tensors(), tensors()
    optimizer = ScaledAdam(whole)
    train(whole, optimizer, range(60), missing)
    before = ScaledAdam(first)
    train(first, before, range(43), missing)
    buffer = io.BytesIO()
    torch.save(before.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for p, q in zip(second, first):
            p.copy_(q)
    after = ScaledAdam(second, lr=1.0)
    after.load_state_dict(torch.load(buffer, weights_only=True))
    train(second, after, range(43, 60), missing)
    train(first, before, range(43, 45))  # the loaded state is a copy
    assert all(torch.equal(a, b) for a, b in zip(whole, second))
    assert optimizer.param_groups[0]["norms"] == after.param_groups[0]["norms"]


def test_a_copy_goes_its_own_way() -> None:
    params = tensors()
    optimizer = ScaledAdam(params)
    train(params, optimizer, range(5))
    other = copy.deepcopy(optimizer)
    assert not other.state.keys() & optimizer.state.keys()
    state = copy.deepcopy(optimizer.state_dict()["state"][0])
    gradients(other.param_groups[0]["params"], 5)
    other.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["delta"], state["delta"])


def test_a_parameter_without_gradient_stays_and_starts_like_a_new_one() -> None:
    params, alone = tensors()[:3], tensors()[:1]
    before = values(params)[0]
    optimizer, single = ScaledAdam(params, clipping_scale=None), ScaledAdam(alone, clipping_scale=None)
    train(params, optimizer, range(5), {step: (0,) for step in range(5)})
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    assert not torch.equal(params[2], tensors()[2])
    for step in range(5, 12):
        gradients(params, step)
        gradients(alone, step)
        optimizer.step()
        single.step()
    torch.testing.assert_close(params[0], alone[0], rtol=1e-6, atol=1e-7)
    optimizer.zero_grad()
    now = values(params)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, now))


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out() -> None:
    params, clean = tensors(), tensors()
    optimizer, reference = ScaledAdam(params), ScaledAdam(clean)
    for step in range(15):
        if step in (0, 4, 12):
            for bad in (float("nan"), float("inf")):
                gradients(params, 100 + step)
                assert params[2].grad is not None
                params[2].grad[0, 0] = bad
                optimizer.step()
        train(params, optimizer, range(step, step + 1))
        train(clean, reference, range(step, step + 1))
    assert all(torch.equal(a, b) for a, b in zip(params, clean))
    gradients(params, 1)
    assert params[0].grad is not None
    params[0].grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        for _ in range(10):
            optimizer.step()


def test_no_tensor_grows_beyond_its_largest_size() -> None:
    p = nn.Parameter(torch.full((8,), 0.5))
    scalar = nn.Parameter(torch.zeros(()))
    optimizer = ScaledAdam([p, scalar], lr=0.02, param_max_rms=0.7, scalar_max=0.3)
    for _ in range(600):  # every gradient says: grow
        p.grad, scalar.grad = -p.detach().sign(), torch.tensor(-1.0)
        optimizer.step()
    assert 0.7 < float(p.detach().square().mean().sqrt()) < 0.8  # four relative steps of 0.02 beyond the bound
    assert 0.3 <= scalar.item() < 0.31


def test_half_precision_parameters_keep_a_float32_state() -> None:
    params = tensors(torch.bfloat16)
    optimizer = ScaledAdam(params)
    train(params, optimizer, range(6))
    again = ScaledAdam(params)
    again.load_state_dict(optimizer.state_dict())
    for p in params:
        for name, value in optimizer.state[p].items():
            if name != "step":
                assert value.dtype == again.state[p][name].dtype == torch.float32
                assert torch.equal(value, again.state[p][name])
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("form", ["authors", "paper"])
def test_it_fits_a_function(form: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(256, 8)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = ScaledAdam(model.parameters(), lr=0.045, form=form)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("betas", (0.9, 1.0)), ("betas", (0.9,)), ("lr", -1.0), ("size_update_period", 0), ("clipping_update_period", 0),
     ("clipping_scale", 0.0), ("param_min_rms", 5.0), ("eps", 0.0), ("scalar_max", 0.0), ("lr", float("nan"))],
)  # fmt: skip
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{option}="):
        ScaledAdam(tensors(), **{option: value})


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse"):
        ScaledAdam(table.parameters()).step()
