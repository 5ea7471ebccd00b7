"""One pre-training step (forward, loss, backward, Adam): our HuBERT against fairseq's stock HubertModel and criterion.

    python benchmarks/speed/train_step.py [--threads 1] [--batch 2] [--seconds 10] [--only default|fastconv|head]

transformer-base with one codebook of 504 classes, with the default and with the FastConv extractor on both sides, and the loss
head alone. Both sides hold the same weights and get the same audio, labels and masks; loss and gradients are compared, without
dropout, before anything is timed. The timed steps have the preset's dropout, but no LayerDrop, which would change the work from
step to step. Each side trains with the optimizer of its own configuration.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
import yaml
from fairseq import optim
from fairseq.criterions.hubert_criterion import HubertCriterion
from fairseq.models.hubert import hubert as fairseq_hubert
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from omegaconf import OmegaConf
from torch import Tensor

import hubert_eff
from fairseq_plugins.criterions.hubert_eff import HubertEffCriterion

CLASSES = 504
TARGETS = {"default": 2.0, "fastconv": 3.0, "head": 100.0}
CONFIG = Path(__file__).parents[2] / "configs" / "pretrain" / "transformer_base.yaml"


def stock_model(config: Any, classes: int = CLASSES) -> fairseq_hubert.HubertModel:
    """fairseq's model with the keys of our configuration."""
    keys = {field.name for field in dataclasses.fields(fairseq_hubert.HubertConfig)}
    values = {key: value for key, value in config.to_dict().items() if key in keys}
    values["conv_feature_layers"] = str(list(config.conv_layers))
    task = HubertPretrainingConfig(sample_rate=16_000)
    return fairseq_hubert.HubertModel(fairseq_hubert.HubertConfig(**values), task, [range(classes)])


def use_masks(masks: Tensor) -> None:
    """Make fairseq's model mask these frames, (B, T) bool, instead of drawing its own."""
    fairseq_hubert.compute_mask_indices = lambda *_, **__: masks.cpu().numpy()


def build_optimizer(model: torch.nn.Module, section: dict[str, Any]) -> Any:
    """The optimizer of an `optimizer:` section of a fairseq configuration, with fairseq's defaults."""
    defaults = dataclasses.asdict(optim.OPTIMIZER_DATACLASS_REGISTRY[section["_name"]]())
    # what the defaults interpolate
    config = {"common": {"tpu": False}, "optimization": {"lr": [5e-4]}, "optimizer": {**defaults, **section}}
    return optim.build_optimizer(OmegaConf.create(config).optimizer, list(model.parameters()))


class Side:
    """A model, its criterion and its optimizer."""

    def __init__(self, model: torch.nn.Module, criterion: Any, optimizer: Any) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer

    def backward(self, sample: dict[str, Any]) -> Tensor:
        """Forward, loss and backward; the loss per frame."""
        self.model.zero_grad(set_to_none=True)
        loss, size, _ = self.criterion(self.model, sample)
        (loss / size).backward()
        return loss.detach() / size

    def step(self, sample: dict[str, Any]) -> None:
        """One update."""
        self.backward(sample)
        self.optimizer.step()


def make_sides(extractor: str) -> tuple[Side, Side]:
    """fairseq's side and ours, with the same weights."""
    ours = hubert_eff.build(
        "transformer-base", num_classes=(CLASSES,), conv_feature_layers=extractor, encoder_layerdrop=0.0, label_rate=50.0
    )
    stock = stock_model(ours.config)
    ours.load_state_dict(stock.state_dict())
    section = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["optimizer"]
    return (
        Side(stock, HubertCriterion(None, 1.0, 0.0, [10.0]), build_optimizer(stock, {**section, "_name": "adam"})),
        Side(ours, HubertEffCriterion(None, 1.0, 0.0, [10.0]), build_optimizer(ours, section)),
    )


def make_sample(batch: int, seconds: float, frames: int) -> dict[str, Any]:
    """A batch as fairseq's collater makes it: unpadded noise with random labels."""
    samples = round(seconds * 16_000)
    return {
        "id": torch.arange(batch),
        "net_input": {
            "source": 0.1 * torch.randn(batch, samples),
            "padding_mask": torch.zeros(batch, samples, dtype=torch.bool),
        },
        "target_list": [torch.randint(CLASSES, (batch, frames))],
    }


def check(stock: Side, ours: Side, sample: dict[str, Any]) -> dict[str, float]:
    """Relative differences of loss and total gradient without dropout."""
    stock.model.eval(), ours.model.eval()
    use_masks(masks_of(ours.model, sample))
    losses = [float(side.backward(sample)) for side in (stock, ours)]
    gradients = dict(stock.model.named_parameters())
    square = difference = 0.0
    for name, parameter in ours.model.named_parameters():
        square += float(gradients[name].grad.square().sum())
        difference += float((gradients[name].grad - parameter.grad).square().sum())
    errors = {"loss": abs(losses[0] - losses[1]) / losses[0], "gradient": (difference / square) ** 0.5}
    assert max(errors.values()) < 1e-3, f"the two sides differ ({errors}): there is nothing to compare"
    stock.model.train(), ours.model.train()
    return errors


def masks_of(model: Any, sample: dict[str, Any]) -> Tensor:
    """The masks that our model draws for a batch in its present mode, (B, T) bool."""
    with torch.no_grad():
        return model(**sample["net_input"], target_list=sample["target_list"], features_only=True)["mask_indices"]


def step_row(extractor: str, args: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Time one update with an extractor."""
    stock, ours = make_sides(extractor)
    sample = make_sample(args.batch, args.seconds, ours.model.num_frames(round(args.seconds * 16_000)))
    errors = check(stock, ours, sample)
    use_masks(masks_of(ours.model, sample))  # ours draws the same ones in every step: its update number stands still
    times = harness.compare({"fairseq": lambda: stock.step(sample), "hubert_eff": lambda: ours.step(sample)}, args.rounds)
    what = f"step, {extractor} extractor, {args.batch} x {args.seconds:g} s"
    return harness.row(what, times, TARGETS[extractor]), errors


def head_row(args: Any) -> dict[str, Any]:
    """Time the loss head: from the encoder's output to the gradients of it, of the projection and of the codewords."""
    ours = hubert_eff.build("transformer-base", num_classes=(CLASSES,))
    stock = stock_model(ours.config)
    ours.load_state_dict(stock.state_dict())
    frames = args.batch * ours.num_frames(round(args.seconds * 16_000))
    x = torch.randn(frames, ours.config.encoder_embed_dim, requires_grad=True)
    target = torch.randint(CLASSES, (frames,))
    loss = torch.nn.functional.cross_entropy

    def stock_head() -> Tensor:
        # what fairseq's forward does per codebook; the positive stands first among its logits
        projected, codewords = stock.final_proj(x), stock.label_embs_concat
        negatives = codewords.unsqueeze(1).expand(-1, frames, -1)
        logits = stock.compute_nce(projected, codewords.index_select(0, target), negatives)
        value = loss(logits, torch.zeros_like(target), reduction="sum")
        value.backward()
        return value.detach()

    def our_head() -> Tensor:
        value = loss(ours.logits(x)[0], target, reduction="sum")
        value.backward()
        return value.detach()

    values = [float(stock_head()), float(our_head())]
    assert abs(values[0] / values[1] - 1) < 1e-4, f"the two losses differ: {values}"
    times = harness.compare({"fairseq": stock_head, "hubert_eff": our_head}, args.rounds)
    return harness.row(f"loss head alone, {args.batch} x {args.seconds:g} s", times, TARGETS["head"])


def main() -> None:
    """Check, time and print each part."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=2, help="utterances (default: 2)")
    options.add_argument("--seconds", type=float, default=10.0, help="length of each recording (default: 10)")
    options.add_argument("--only", choices=TARGETS, help="run one part instead of all three")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.disable(logging.INFO)  # fairseq prints its configuration
    warnings.simplefilter("ignore", FutureWarning)
    before = harness.guard("before the run")
    rows, errors = [], {}
    for part in [args.only] if args.only else TARGETS:
        if part == "head":
            rows.append(head_row(args))
        else:
            result, errors[part] = step_row(part, args)
            rows.append(result)
        gc.collect()
    facts = harness.machine() | {"probe": [round(before, 1), round(harness.guard("after the run"), 1)]}
    if errors:
        facts["relative_difference"] = errors
    harness.show(rows, facts, args.json)


if __name__ == "__main__":
    main()
