"""The terms of the criterion `hubert_distill`: gradients by hand, what they are means over, and weights that cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.recipes.schedule import shared_schedule
from hubert_eff.utils.configurations import load_config

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq import optim  # noqa: E402
from fairseq.optim.lr_scheduler import build_lr_scheduler  # noqa: E402

from fairseq_plugins.criterions.hubert_distill import HubertDistillCriterion  # noqa: E402

from ..helpers.checkpoints import checkpoint  # noqa: E402
from ..helpers.distillation import composed, parts, teacher  # noqa: E402
from ..helpers.pretraining import CLASSES, make_data  # noqa: E402

LN3 = math.log(3)
WEIGHTS = {
    "pred_masked_weight": 1.0,
    "pred_nomask_weight": 0.5,
    "codebook_weight": 2.0,
    "codebook_nomask_weight": 0.25,
    "hidden_weight": 0.1,
}

# two utterances of two frames: masked and unmasked, masked and padding; two classes; two states of one channel, the second learned already
MASKED, PADDING = torch.tensor([[True, False], [True, False]]), torch.tensor([[False, False], [False, True]])
STUDENT_M, STUDENT_U = torch.tensor([[0.0, LN3], [0.0, 0.0]]), torch.tensor([[LN3, 0.0]])
TEACHER = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[LN3, 0.0], [9.0, 9.0]]])  # (B, T, C): its states are its logits here
STATE = torch.tensor([[[1.0], [3.0]], [[2.0], [99.0]]])

# for each key alone at weight 1: the loss, and its gradients of STUDENT_M, STUDENT_U and STATE, and the frames that it counts
KL_FIRST, KL_SECOND = 0.5 * math.log(4 / 3), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
NO_M, NO_U, NO_STATE = [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]], [[[0.0], [0.0]], [[0.0], [0.0]]]
BY_HAND: dict[str, tuple[float, Any, Any, Any, int]] = {
    "pred_masked_weight": (math.log(4) + math.log(2), [[-0.75, 0.75], [0.5, -0.5]], NO_U, NO_STATE, 2),
    "pred_nomask_weight": (math.log(4), NO_M, [[0.75, -0.75]], NO_STATE, 1),
    "codebook_weight": (KL_FIRST + KL_SECOND, [[-0.25, 0.25], [-0.25, 0.25]], NO_U, NO_STATE, 2),
    "codebook_nomask_weight": (KL_FIRST, NO_M, [[0.25, -0.25]], NO_STATE, 1),
    # 2 frames x (1 + 9) / 2 / 2 states, 1 frame x 4 / 2 states; its gradient 2 s n / (valid frames x states)
    "hidden_weight": (5.0 + 2.0, NO_M, NO_U, [[[1.0], [3.0]], [[2.0], [0.0]]], 3),
}


class Teacher(nn.Module):
    config = SimpleNamespace(streaming=False)

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, *args: Any, **keys: Any) -> dict[str, Any]:
        return {"x": TEACHER, "states": [torch.zeros(2, 2, 1), torch.ones(2, 2, 1)]}

    def logits(self, x: Tensor) -> list[Tensor]:
        return [x]


def losses(monkeypatch: pytest.MonkeyPatch, **weights: float) -> tuple[Tensor, int, dict[str, Any], list[Tensor]]:
    """Loss, frames, log, and the tensors that the loss is of."""

    def teacher(criterion: HubertDistillCriterion, name: str, student: Any) -> Teacher:
        criterion.same_classes = True
        return Teacher()

    monkeypatch.setattr(HubertDistillCriterion, "_by_shape", teacher)
    keys = {"codebook_weight": 0.0, "hidden_weight": 0.0, "hidden_normalize": False, **weights}
    criterion = HubertDistillCriterion(SimpleNamespace(model=None, note_file=lambda *_: None), "teacher.pt", **keys)
    leaves = [x.clone().requires_grad_() for x in (STUDENT_M, STUDENT_U, STATE)]
    output = {
        "logits_m": [leaves[0]], "targets_m": [torch.tensor([0, 1])], "logits_u": [leaves[1]], "targets_u": [torch.tensor([1])],
        "states": [leaves[2], torch.ones(2, 2, 1)], "masks": (MASKED, None), "mask_indices": MASKED, "padding_mask": PADDING,
        "features_pen": torch.zeros(()), "x": torch.zeros(2, 2, 1),
    }  # fmt: skip
    sample = {"id": torch.arange(2), "target_list": [torch.zeros(2, 2)], "net_input": {"source": torch.zeros(2, 800), "padding_mask": None}}
    return *criterion(lambda **_: output, sample), leaves


@pytest.mark.parametrize("key", BY_HAND)
def test_gradients_of_each_term_are_those_by_hand(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, frames, _, leaves = losses(monkeypatch, **{key: 2.0})
    value, *wanted, counted = BY_HAND[key]
    assert frames == counted and loss.item() == pytest.approx(2 * value, rel=1e-5)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    for gradient, expected in zip(found, wanted):
        expected = 2 * torch.tensor(expected)
        torch.testing.assert_close(torch.zeros_like(expected) if gradient is None else gradient, expected)


def test_terms_add_up_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, frames, log, leaves = losses(monkeypatch, **WEIGHTS)
    assert frames == 3 and float(loss) == pytest.approx(sum(weight * BY_HAND[key][0] for key, weight in WEIGHTS.items()), rel=1e-5)
    for index, gradient in enumerate(torch.autograd.grad(loss, leaves), start=1):
        expected = sum(weight * torch.tensor(BY_HAND[key][index]) for key, weight in WEIGHTS.items())
        torch.testing.assert_close(gradient, expected)
    assert (log["loss_kl"], log["loss_kl_u"]) == (pytest.approx(KL_FIRST + KL_SECOND), pytest.approx(KL_FIRST))
    assert (log["count_kl"], log["count_kl_u"], log["log_hidden_mse"]) == (2, 1, pytest.approx(7.0))


def test_labels_at_masked_frames_alone_count_these_frames_of_each_utterance(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, frames, _, _ = losses(monkeypatch, pred_masked_weight=1.0, hidden_weight=1.0)
    assert frames == 2  # one of each: 1 x 2.5 + 1 x 2
    assert float(loss) == pytest.approx(BY_HAND["pred_masked_weight"][0] + 4.5, rel=1e-5)


# -- in fairseq ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("terms") / "data", {"train": [1.0, 1.2], "valid": [1.4, 0.6]})


def make(data: Path, *overrides: str, **keys: Any) -> tuple[Any, Any, Any]:
    """Model, criterion and the batch of both utterances, for a teacher with these keys."""
    return parts(data, f"criterion.teacher={teacher(data, **keys)}", "task.init_from=null", *overrides)[1:]


@pytest.mark.parametrize("normalize", ["true", "false"])
@pytest.mark.parametrize("unmasked", ["1.0", "0.0"])
def test_the_loss_of_a_validation_does_not_depend_on_its_batches(data: Path, normalize: str, unmasked: str) -> None:
    only_masked = (f"criterion.pred_nomask_weight={unmasked}", f"criterion.codebook_nomask_weight={unmasked}")
    model, criterion, sample = make(data, f"criterion.hidden_normalize={normalize}", *only_masked)
    model.eval()
    together, frames, _ = criterion(model, sample)
    dataset = criterion.task.dataset("valid")
    alone = [criterion(model, dataset.collater([dataset[i]])) for i in range(2)]
    assert frames == sum(size for _, size, _ in alone)
    assert float(together) == pytest.approx(sum(float(loss) for loss, _, _ in alone), rel=1e-4)
    if unmasked == "1.0" and normalize == "false":  # a mean over frames of all: by the states themselves
        assert frames == 69 + 29


@pytest.mark.parametrize(
    "keys, overrides, message",
    [
        ({}, [f"criterion.{key}=0" for key in WEIGHTS], "are all 0, so nothing would be learned"),
        ({}, ["criterion.hidden_weight=-1"], r"criterion.hidden_weight=-1: the weight of a loss must be 0 or more"),
        ({}, ["criterion.codebook_weight=nan"], r"criterion.codebook_weight=nan"),
        ({}, ["model.skip_nomask=true"], "criterion.pred_nomask_weight is positive, but model.skip_nomask=true"),
        ({}, ["model.mask_prob=0"], "criterion.pred_masked_weight is positive, but model.mask_prob=0 masks no frame"),
        ({"num_classes": (6,)}, [], r"criterion.teacher=.*: the teacher does not fit the student: codebooks \(classes of each\) \[6\]"),
        ({"encoder_layers": 3}, [], "does not fit the student: layers 3, the student's 2"),
        ({"label_rate": 50.0}, [], r"label rate \(task.label_rate\) 50.0, the student's 100.0"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line(data: Path, keys: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(data, *overrides, **keys)
    assert "\n" not in str(caught.value)


def test_labels_alone_without_a_weight_are_refused(data: Path) -> None:
    with pytest.raises(UserError, match="pred_masked_weight, pred_nomask_weight are all 0"):
        parts(data, "criterion.pred_masked_weight=0", "criterion.pred_nomask_weight=0", name="debug_w1a1")


def test_a_student_starts_from_another_model_than_its_teacher(data: Path) -> None:
    start = hubert_eff.build("conformer-debug", (CLASSES + 4,), label_rate=100.0, normalize=True, quant="w1a2")
    nn.init.constant_(start.encoder.layers[0].ffn1.w_2.input.scale, 0.37)
    model, criterion, _ = make(data, f"task.init_from={checkpoint(start, data / 'w1a2.pt')}")
    assert model.encoder.layers[0].ffn1.w_2.input.scale.item() == pytest.approx(0.37)
    assert criterion.teacher[0].config.quant == "none"


# -- one schedule over stages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantize/debug_distill", "pretrain/debug"])
def test_runs_that_share_a_schedule_have_the_rates_of_one_run(name: str) -> None:
    total, cut = 100_000, 40_000

    def rates(updates: int, overrides: list[str], wanted: tuple[int, int]) -> list[Any]:
        cfg = composed(*name.split("/"), f"optimization.max_update={updates}", *overrides)
        weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
        weights[1].param_group = "scales"  # type: ignore[attr-defined]
        schedule = build_lr_scheduler(cfg.lr_scheduler, optim.build_optimizer(cfg.optimizer, weights))
        return [schedule.step_update(update) for update in wanted]

    config = load_config(name)
    for start, end in ((0, cut), (cut, total)):
        of_stage = rates(end - start, shared_schedule(config, start, total), (1, 30_000))
        for found, expected in zip(of_stage, rates(total, [], (start + 1, start + 30_000)), strict=True):
            assert found == pytest.approx(expected, rel=1e-6)


def test_schedules_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match="needs lr_scheduler=polynomial_decay, not eden"):
        shared_schedule(load_config("pretrain/zipformer_debug"), 0, 100)
    with pytest.raises(UserError, match="within a warm-up of 20 updates"):
        shared_schedule(load_config("pretrain/debug"), 10, 100)
