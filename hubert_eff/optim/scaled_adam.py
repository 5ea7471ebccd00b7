"""ScaledAdam, the optimizer of Zipformer (Yao et al. 2024, arXiv:2310.11230, section 3.5)."""

# N parameters of one shape in a batch, K elements of each, P = size_update_period

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown

EARLY_ESTIMATES = (10, 20, 40)  # steps at which the clipping threshold is estimated before clipping_update_period is reached
FORMS = ("authors", "paper")
MAX_SKIPPED = 10  # steps in a row that are left out because the gradient is not finite


@dataclass
class _Batch:
    """Parameters of one device, type, shape and age, and their stacked state; `Optimizer.state` holds views of its rows."""

    params: list[Tensor]
    state: dict[str, Tensor]

    def gradient(self) -> Tensor:
        """(N, K), at least float32."""
        return _flat([p.grad for p in self.params if p.grad is not None])

    def value(self) -> Tensor:
        """(N, K), at least float32."""
        return _flat([p.detach() for p in self.params])

    def add(self, change: Tensor) -> None:
        """Add a change (N, K) to the parameters."""
        for p, row in zip(self.params, change):
            p.add_(row.view(p.shape))


def _flat(tensors: list[Tensor]) -> Tensor:
    x = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
    return x.to(_state_dtype(x)).reshape(len(tensors), -1)


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row: (N, K) -> (N, 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each row: (N, K) -> (N, 1)."""
    return _norm(x) / math.sqrt(x.size(1))


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose step is relative to each tensor's root mean square (rms), and which learns that rms too.

    With `form` "authors" it is what the authors train with. For a tensor with elements theta, rms r and gradient g at step t = 0, 1, ...

    - Delta <- beta1 Delta + (1 - beta1) (direction + size), theta <- theta + Delta,
    - direction = -lr max(r, param_min_rms) g / (sqrt(v) + eps), v the average of g^2 (beta2),
    - size, every P = `size_update_period` steps: theta s, with s the Adam step (rate lr scalar_lr_scale, beta2^P) of the gradient with
      respect to log r, which is the sum of g theta; |s| <= 0.1; a tensor below `param_min_rms` grows, one above `param_max_rms` shrinks
      to it,
    - a tensor of one element ("scalar"): Adam with the rate lr scalar_lr_scale, kept within +-`scalar_max` before the step,
    - gradients are clipped per parameter group to `clipping_scale` times the median of the latest norms, in which a tensor's gradient
      counts times r and a scalar's times scalar_lr_scale. The threshold is estimated at steps 10, 20 and 40, and doubled there, then
      every `clipping_update_period` steps.

    With `form` "paper" it is the paper's Algorithm 1 (equations 6 to 9): beta1 averages the gradient, both averages have Adam's bias
    corrections, and r and the size are refreshed in every step, without bounds (`size_update_period` and `param_max_rms` do nothing):

    - theta <- theta - lr r' m / (sqrt(v) + eps) - lr scalar_lr_scale theta n / (sqrt(w) + eps), times sqrt(1 - beta2^t) / (1 - beta1^t),
      t = 1, 2, ..., m and v the averages of g and g^2, n and w those of h and h^2, h = sum(g theta) / r', r' = max(r, param_min_rms).

    The algorithm does not cover tensors of zeros or scalars, and does not clip. Here `param_min_rms` bounds r, which grows slowly from
    there; scalars and clipping are treated as by the authors (clipping_scale=None for no clipping).

    Parameters are updated in batches of one shape, so that many small tensors cost few operations. Parameters without gradient and their
    state are left unchanged. State is float32 for parameters of half precision.

    A step with a gradient that is not finite is skipped: parameters and state do not change. Ten in a row raise `FloatingPointError`.

    Because the step is relative, `lr` is larger than Adam's (0.045 in the paper), and neither weight decay nor another clipping is needed.
    Raises `UserError` for a value out of range.
    """

    supports_memory_efficient_fp16 = True  # for fairseq: half precision parameters can be updated in place
    supports_flat_params = False  # for fairseq: the rms of all parameters together would be meaningless

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.045,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        clipping_scale: float | None = 2.0,
        clipping_update_period: int = 100,
        scalar_lr_scale: float = 0.1,
        scalar_max: float = 10.0,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        size_update_period: int = 4,
        form: str = FORMS[0],
    ) -> None:
        if form not in FORMS:
            raise unknown("form of ScaledAdam", form, FORMS)
        for name, count in (("clipping_update_period", clipping_update_period), ("size_update_period", size_update_period)):
            if count < 1:
                raise UserError(f"{name}={count} must be at least 1: it counts steps")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise UserError(f"betas={betas} must be two numbers in [0, 1)")
        for name, value in (("lr", lr), ("scalar_lr_scale", scalar_lr_scale)):
            if not 0.0 <= value < math.inf:
                raise UserError(f"{name}={value} must be a number that is not negative")
        for name, value in (("eps", eps), ("scalar_max", scalar_max)):
            if not 0.0 < value < math.inf:
                raise UserError(f"{name}={value} must be a positive number")
        if not 0.0 < param_min_rms < param_max_rms:
            raise UserError(f"param_min_rms={param_min_rms} must be positive and less than param_max_rms={param_max_rms}")
        if clipping_scale is not None and clipping_scale <= 0.0:
            raise UserError(f"clipping_scale={clipping_scale} must be positive, or None for no clipping")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "clipping_scale": clipping_scale, "clipping_update_period": clipping_update_period,
            "scalar_lr_scale": scalar_lr_scale, "scalar_max": scalar_max, "param_min_rms": param_min_rms, "param_max_rms": param_max_rms,
            "size_update_period": size_update_period, "form": form, "step": 0, "skipped": 0, "threshold": None,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._stacked: dict[tuple[int, ...], _Batch] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("form", FORMS[0])  # states saved before there were two forms
        self._stacked = {}  # rebuilt from the state at the next step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, so that training resumes exactly. Raises `UserError` for a state of the other form."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"]):
            if own["form"] != saved.get("form", FORMS[0]):
                raise UserError(
                    f"this is a state of ScaledAdam's form={saved.get('form', FORMS[0])}: resume with that form, not {own['form']}"
                )
        super().load_state_dict(state_dict)
        # the base class casts to the type of the parameters, which may be half precision
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, _state_dtype(p), copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():  # type: ignore[no-untyped-call]
                loss = closure()
        current: dict[tuple[int, ...], _Batch] = {}
        for group in self.param_groups:
            batches = self._batches(group)
            current.update(batches)
            self._step_group(group, list(batches.values()))
        self._stacked = current
        return loss

    def _batches(self, group: dict[str, Any]) -> dict[tuple[int, ...], _Batch]:
        """The group's parameters with a gradient, by device, type, shape and age."""
        alike: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None or not p.numel():
                continue
            if p.grad.is_sparse:
                raise UserError("ScaledAdam takes no sparse gradients: build the embedding with sparse=False")
            if not self.state[p]:
                self.state[p] = self._new_state(p, group)
            alike.setdefault((p.device, p.dtype, p.shape, self.state[p]["step"]), []).append(p)
        keyed = {tuple(map(id, params)): params for params in alike.values()}
        return {key: self._stacked.get(key) or self._stack(params) for key, params in keyed.items()}

    @staticmethod
    def _new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        zeros = torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.contiguous_format)
        if p.numel() == 1:
            return {"step": 0, "delta": zeros, "exp_avg_sq": zeros}
        size = {"rms": _rms(_flat([p.detach()]))[0], "size_exp_avg_sq": zeros.new_zeros(1)}
        if group["form"] == "paper":
            return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros, "size_exp_avg": zeros.new_zeros(1), **size}
        return {"step": 0, "delta": zeros, "exp_avg_sq": zeros, "size_grads": zeros.new_zeros(group["size_update_period"]), **size}

    def _stack(self, params: list[Tensor]) -> _Batch:
        """Join the states of `params`, which become rows of the joint state."""
        states = [self.state[p] for p in params]
        joint = {name: torch.stack([s[name] for s in states]) for name in states[0] if name != "step"}
        for i, state in enumerate(states):
            state.update({name: tensor[i] for name, tensor in joint.items()})
        return _Batch(params, {name: tensor.view(len(params), -1) for name, tensor in joint.items()})

    def _step_group(self, group: dict[str, Any], batches: list[_Batch]) -> None:
        grads = [batch.gradient() for batch in batches]
        scale = self._clip(group, batches, grads)
        if scale is None:
            return
        for batch, grad in zip(batches, grads):
            if scale < 1.0:
                grad = grad * scale
            step = self.state[batch.params[0]]["step"]
            if grad.size(1) == 1:
                _step_scalars(group, batch, grad, step)
            elif group["form"] == "paper":
                _step_as_printed(group, batch, grad, step)
            else:
                _step_tensors(group, batch, grad, step)
            for p in batch.params:
                self.state[p]["step"] = step + 1

    @staticmethod
    def _clip(group: dict[str, Any], batches: list[_Batch], grads: list[Tensor]) -> float | None:
        """The factor on all gradients; None if they are not finite."""
        if not grads:
            return 1.0
        weighted = [  # a tensor's gradient is weighted by how far a relative step moves the tensor
            torch.linalg.vector_norm(_norm(grad) * batch.state.get("rms", group["scalar_lr_scale"])).to(grads[0])
            for batch, grad in zip(batches, grads)
        ]
        norm = float(torch.linalg.vector_norm(torch.stack(weighted)))
        if not math.isfinite(norm):
            group["skipped"] += 1
            if group["skipped"] >= MAX_SKIPPED:
                raise FloatingPointError(f"ScaledAdam: the gradient was not finite in {MAX_SKIPPED} steps in a row")
            return None
        step, period = group["step"], group["clipping_update_period"]
        group.update(step=step + 1, skipped=0)
        if group["clipping_scale"] is None or step == 0:
            return 1.0
        group["norms"] = latest = [*group.get("norms", []), norm][-period:]
        early = step in EARLY_ESTIMATES and step < period
        if early or step % period == 0:
            median = sorted(latest)[len(latest) // 4 * 2]  # the authors' choice of index
            group["threshold"] = group["clipping_scale"] * median * (2.0 if early else 1.0)
        return 1.0 if group["threshold"] is None else min(1.0, group["threshold"] / (norm + 1e-20))


def _step_tensors(group: dict[str, Any], batch: _Batch, grad: Tensor, step: int) -> None:
    """Update tensors of K > 1 elements. grad (N, K)."""
    (beta1, beta2), period, state = group["betas"], group["size_update_period"], batch.state
    state["delta"].mul_(beta1)
    value = batch.value()
    # derivative with respect to the logarithm of each tensor's size
    state["size_grads"][:, step % period] = torch.bmm(value.unsqueeze(1), grad.unsqueeze(2))[:, 0, 0]
    if step % period == period - 1:
        state["rms"].copy_(_rms(value))
        if step > 0:
            state["delta"].addcmul_(value, _size_step(group, state, (step + 1) // period), value=1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction = 1 - beta2 ** (step + 1)
    denominator = (v / correction if correction < 0.99 else v).sqrt().add_(group["eps"])
    rate = state["rms"].clamp(min=group["param_min_rms"]).mul_(-group["lr"] * (1 - beta1))  # (N, 1)
    state["delta"].addcmul_(grad / denominator, rate)
    batch.add(state["delta"])


def _step_as_printed(group: dict[str, Any], batch: _Batch, grad: Tensor, step: int) -> None:
    """Update tensors of K > 1 elements by the paper's Algorithm 1. grad (N, K)."""
    (beta1, beta2), state, value = group["betas"], batch.state, batch.value()
    rms = state["rms"].copy_(_rms(value)).clamp(min=group["param_min_rms"])
    rate = group["lr"] * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
    size_grad = (grad * value).sum(1, keepdim=True) / rms  # derivative with respect to each tensor's size
    change = _averaged(state, "exp_avg", grad, beta1, beta2, group["eps"]).mul_(-rate * rms)
    size_change = _averaged(state, "size_exp_avg", size_grad, beta1, beta2, group["eps"]).mul_(-rate * group["scalar_lr_scale"])
    batch.add(change.addcmul_(value, size_change))


def _averaged(state: dict[str, Tensor], name: str, grad: Tensor, beta1: float, beta2: float, eps: float) -> Tensor:
    """Adam's ratio of averages, without bias corrections."""
    mean = state[name].mul_(beta1).add_(grad, alpha=1 - beta1)
    square = state[f"{name}_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return mean / square.sqrt().add_(eps)


def _size_step(group: dict[str, Any], state: dict[str, Tensor], count: int) -> Tensor:
    """Relative change of each tensor's size, (N, 1), in the `count`-th update of sizes."""
    period, lr = group["size_update_period"], group["lr"] * group["scalar_lr_scale"]
    beta2 = group["betas"][1] ** period
    grads, rms = state["size_grads"], state["rms"]
    v = state["size_exp_avg_sq"].mul_(beta2).add_(grads.square().mean(1, keepdim=True), alpha=1 - beta2)
    change = grads.sum(1, keepdim=True) / v.sqrt().add_(group["eps"]) * (-lr * math.sqrt(1 - beta2**count))
    change = change.masked_fill(rms < group["param_min_rms"], lr * period).clamp(-0.1, 0.1)
    return torch.minimum(change, (group["param_max_rms"] - rms) / rms)


def _step_scalars(group: dict[str, Any], batch: _Batch, grad: Tensor, step: int) -> None:
    """Update tensors of one element. grad (N, 1)."""
    (beta1, beta2), state = group["betas"], batch.state
    state["delta"].mul_(beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v / (1 - beta2 ** (step + 1))).sqrt_().add_(group["eps"])
    state["delta"].addcdiv_(grad, denominator, value=-group["lr"] * group["scalar_lr_scale"] * (1 - beta1))
    for p in batch.params:
        p.clamp_(-group["scalar_max"], group["scalar_max"])
    batch.add(state["delta"])
