"""The sides of train_gpu.py: which models stand against each other, that they compute the same, and how one takes an update."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from restated import PENALTY, RestatedAdam, RestatedHubert, Update, restated_loss
from torch import Tensor, nn
from torch.nn import functional as F

import hubert_eff
from hubert_eff.optim import FusedAdam

CLASSES = 504
ADAM = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}  # the recipe's
TOLERANCE = 2e-3  # relative, of loss and of all gradients together
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "dropout_input"), 0.0)
SPARSE_SECONDS = 60.0


@dataclass(frozen=True)
class Pair:
    """A preset of ours and what it is held against."""

    name: str
    preset: str
    debug: str  # the preset in its place with --debug
    target: float  # times faster
    keys: dict[str, Any] = field(default_factory=dict)
    conformer: bool = False
    sparse: bool = False
    utterance: float = 12.5  # seconds, about


PAIRS = {
    "transformer": Pair(
        "transformer-base, stock extractor", "transformer-base", "transformer-debug", 2.0, {"conv_feature_layers": "default"}
    ),
    "fastconv": Pair("transformer-base, FastConv on both sides", "transformer-base", "transformer-debug", 2.0),
    "conformer": Pair("conformer-s", "conformer-s", "conformer-debug", 2.5, conformer=True),
    "sparse": Pair(
        "sparseformer-dn-s, dense peer", "sparseformer-dn-s", "sparseformer-debug", 3.0,
        {"attention_dropout": 0.0, "flex_attention": True}, sparse=True, utterance=SPARSE_SECONDS,
    ),
}  # fmt: skip


def has_fairseq() -> bool:
    """Whether fairseq's real classes can be used."""
    try:
        import stock  # noqa: F401
    except ImportError:
        return False
    return True


class Bench:
    """What all rows share: where, how precise, which peer."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.precision, self.debug = torch.device(args.device), args.precision, args.debug
        self.restated = args.restated or not has_fairseq()
        self.peer_name = "fairseq (restated)" if self.restated else "fairseq"

    def autocast(self) -> AbstractContextManager[Any]:
        """Around forward passes of either side."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "autocast" else nullcontext()

    def our_model(self, pair: Pair, **keys: Any) -> Any:
        """Our model of a pair, with training keys that suit a measurement."""
        keys = {**({"sparse_stride": 32} if self.debug and pair.sparse else {}), **({} if self.debug else pair.keys), **keys}
        preset = pair.debug if self.debug else pair.preset
        return hubert_eff.build(preset, num_classes=(CLASSES,), encoder_layerdrop=0.0, label_rate=50.0, **keys).to(self.device)

    def peer(self, pair: Pair, config: Any) -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
        """The other side's model, loss and Adam."""
        if self.restated:
            return RestatedHubert(config, CLASSES, pair.conformer).to(self.device), restated_loss, RestatedAdam
        import stock

        return stock.stock_model(config, CLASSES, pair.conformer).to(self.device), stock.stock_loss, stock.stock_adam

    def use_masks(self, model: Any, masks: Tensor) -> None:
        """Make the peer mask these frames (B, T)."""
        if self.restated:
            model.masks = masks
        else:
            import stock

            stock.use_masks(masks)

    def our_loss(self) -> Callable[..., Any]:
        """The plug-in's criterion, or the same without fairseq."""
        try:
            from fairseq_plugins.criterions.hubert_eff import HubertEffCriterion
        except ImportError:
            return plain_loss
        return HubertEffCriterion(None, 1.0, 0.0, [PENALTY])


def plain_loss(model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
    """What the criterion `hubert_eff` computes and logs of a batch."""
    output = model(target_list=sample["target_list"], **sample["net_input"])
    logs: dict[str, Any] = {}
    for part in "mu":
        logits, targets = output[f"logits_{part}"][0].float(), output[f"targets_{part}"][0]
        logs[f"loss_{part}"] = F.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():
            predicted = logits.argmax(-1)
            logs[f"correct_{part}"] = (predicted == targets).sum()
            for what in (predicted, targets) if part == "m" else ():
                torch.zeros(CLASSES, dtype=torch.long, device=what.device).scatter_add_(0, what, torch.ones_like(what))
    size = output["targets_m"][0].numel()
    return logs["loss_m"] + PENALTY * output["features_pen"].float() * size, size, logs


def samples_of(seconds: float) -> int:
    """Samples of about so many seconds that make a multiple of 8 frames, as task.length_buckets chooses them."""
    return 320 * (max(8, 8 * round(seconds * 50 / 8)) + 1)


def make_sample(bench: Bench, utterances: int, samples: int, padding: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch as the collater makes it, the same for every call: noise with labels; `padding`: with a mask that hides nothing."""
    draw = torch.Generator().manual_seed(0)
    source = 0.1 * torch.randn(utterances, samples, generator=draw)
    mask = torch.zeros(utterances, samples, dtype=torch.bool, device=bench.device) if padding else None
    return {
        "id": torch.arange(utterances),
        "net_input": {"source": source.to(bench.device, dtype), "padding_mask": mask},
        "target_list": [torch.randint(CLASSES, (utterances, samples // 320 - 1), generator=draw).to(bench.device)],
    }


def masks_of(model: Any, sample: dict[str, Any]) -> Tensor:
    """The frames that our model masks in a batch, (B, T) bool."""
    with torch.no_grad():
        return model(**sample["net_input"], target_list=sample["target_list"], features_only=True)["mask_indices"]


def our_name(name: str) -> str:
    """fairseq's name of a parameter -> ours."""
    for theirs, mine in (("linear_q", "q_proj"), ("linear_k", "k_proj"), ("linear_v", "v_proj"), ("linear_out", "out_proj")):
        name = name.replace(theirs, mine)
    return name


def give_weights(peer: nn.Module, ours: nn.Module) -> None:
    """Load the peer's weights into our model; pointwise convolutions are linear layers there."""
    shapes = ours.state_dict()
    state = {our_name(name): value for name, value in peer.state_dict().items()}
    ours.load_state_dict({name: value.reshape(shapes[name].shape) for name, value in state.items()})


def gradients(model: nn.Module, loss: Callable[..., Any], sample: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss per frame and gradients by our names, flat."""
    model.zero_grad(set_to_none=True)
    value, size, _ = loss(model, sample)
    (value / size).backward()
    return float(value.detach() / size), {our_name(n): p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}


def difference(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> dict[str, float]:
    """Relative differences of two losses and of all gradients together."""
    (a, grads), (b, others) = first, second
    if grads.keys() != others.keys():
        raise SystemExit(f"the two sides have gradients of other tensors: {sorted(grads.keys() ^ others.keys())[:4]}")
    square = sum(float(g.square().sum()) for g in grads.values())
    apart = sum(float((g - others[name]).square().sum()) for name, g in grads.items())
    return {"loss": abs(a - b) / abs(a), "gradient": (apart / square) ** 0.5}


def check(bench: Bench, pair: Pair) -> dict[str, float]:
    """Compare loss and gradients of the peer, of our plain and of our compiled side; stops the run where they differ."""
    plain, compiled = (bench.our_model(pair, compile_blocks=compile, **NO_DROPOUT) for compile in (False, True))
    if pair.sparse and not bench.restated:  # the real layer takes no mask
        bench = copy_of(bench)
    peer, loss, _ = bench.peer(pair, plain.config)
    sample = make_sample(bench, 2, samples_of(1.6 if bench.debug else 4.0), padding=True)
    for ours in (plain, compiled):
        give_weights(peer, ours)
    bench.use_masks(peer, masks_of(plain, sample))
    if pair.sparse:
        place = torch.arange(sample["target_list"][0].size(1), device=bench.device)
        for block in peer.encoder.layers:
            block.self_attn.hidden = ~plain.encoder.layers[0].self_attn.pattern.sees(place, place)
    expected = gradients(peer, loss, sample)
    errors = {}
    for name, ours in (("eager", plain), ("compiled", compiled)):
        found = difference(expected, gradients(ours, bench.our_loss(), sample))
        errors |= {f"{name} {what}": value for what, value in found.items()}
    if max(errors.values()) > TOLERANCE:
        raise SystemExit(f"{pair.name}: the sides differ ({errors}): there is nothing to compare")
    return errors


def copy_of(bench: Bench) -> Bench:
    """The same with the restated peer."""
    return Bench(argparse.Namespace(device=str(bench.device), precision=bench.precision, debug=bench.debug, restated=True))


class Side:
    """A model in training on one batch."""

    def __init__(self, bench: Bench, model: nn.Module, loss: Callable[..., Any], adam: Callable[..., Any], sample: dict[str, Any]) -> None:
        self.bench, self.loss, self.sample = bench, loss, sample
        self.model = model.to(torch.bfloat16) if bench.precision == "bf16" else model
        self.update = Update(self.model, lambda params: adam(params, **ADAM))

    def step(self) -> None:
        """One update."""
        self.update.zero_grad()
        with self.bench.autocast():
            loss, size, _ = self.loss(self.model, self.sample)
        loss.backward()
        self.update.step(size)

    def resident(self) -> int:
        """Bytes of weights, their float32 copies and the optimizer's averages."""
        state = [t for values in self.update.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        held = {id(t): t for t in [*self.model.parameters(), *self.model.buffers(), *self.update.stepped, *state]}
        return sum(t.numel() * t.element_size() for t in held.values())


def make_sides(bench: Bench, pair: Pair, utterances: int, samples: int) -> dict[str, Callable[[], Side]]:
    """How to make every side of a row, the peer first."""
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    masked, fixed = (make_sample(bench, utterances, samples, padding, dtype) for padding in (True, False))

    def peer() -> Side:
        config = bench.our_model(pair).config
        model, loss, adam = bench.peer(pair, config)
        bench.use_masks(model, masks_of(bench.our_model(pair), make_sample(bench, utterances, samples, True)))
        return Side(bench, model, loss, adam, masked)

    def ours(adam: Callable[..., Any], sample: dict[str, Any], **keys: Any) -> Callable[[], Side]:
        return lambda: Side(bench, bench.our_model(pair, **keys), bench.our_loss(), adam, sample)

    def fused(params: list[Tensor], eps: float, **keys: Any) -> FusedAdam:
        return FusedAdam(params, plain_eps=eps, **keys)

    return {
        bench.peer_name: peer,
        "eager": ours(RestatedAdam, masked),
        "+ fused": ours(fused, masked),
        "+ compiled": ours(fused, fixed, compile_blocks=True),
    }
