"""Distillation from encoders of other shapes and packages: named states, through linear maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.labels.teachers import open_teacher
from hubert_eff.quant.distill import hidden_distances

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
pytest.importorskip("transformers")

from ..helpers.distillation import parts, teacher  # noqa: E402
from ..helpers.pretraining import logged, make_data, run, start, update_made, weights  # noqa: E402
from ..helpers.teachers import folder, installed  # noqa: E402, F401 (a fixture)

HIDDEN_ONLY = ("criterion.codebook_weight=0", "criterion.codebook_nomask_weight=0", "criterion.hidden_weight=1.0", "task.init_from=null")
PAIRS = (*HIDDEN_ONLY, "criterion.student_layers=[1,2]", "criterion.teacher_layers=[0,2]")
RAW = ("task.normalize=false", "model.quant=none")
NO_LABELS = ("criterion.pred_masked_weight=0", "criterion.pred_nomask_weight=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = [0.8 + 0.1 * (i % 5) for i in range(12)]
    return make_data(tmp_path_factory.mktemp("teachers") / "data", {"train": lengths, "valid": [1.0, 0.7]})


@pytest.mark.parametrize("kind", ["whisper", "wavlm", "hubert"])
def test_states_are_pulled_to_those_of_the_teacher(data: Path, tmp_path: Path, kind: str) -> None:
    folder(tmp_path, kind)
    _, model, criterion, sample = parts(data, f"criterion.teacher={tmp_path}", *PAIRS, *RAW, *NO_LABELS)
    assert [tuple(m.weight.shape) for m in criterion.maps.maps] == [(16 if kind == "whisper" else 32, 64)] * 2
    loss, frames, log = criterion(model.eval(), sample)
    inputs = sample["net_input"]
    with torch.no_grad():
        ours = model(target_list=sample["target_list"], return_states=True, **inputs)
        theirs = open_teacher(str(tmp_path)).of_batch(inputs["source"], inputs["padding_mask"], (0, 2))
        valid = ~ours["padding_mask"]
        mapped = [m(ours["states"][i]) for m, i in zip(criterion.maps.maps, (1, 2), strict=True)]
        wanted = hidden_distances(mapped, theirs, valid).mean(1) * valid.sum(1)  # only hidden states count: all frames
    assert frames == int(valid.sum()) == 49 + 34 and loss.item() == pytest.approx(float(wanted.sum()), rel=1e-5)
    assert "loss_kl" not in log and "count_t_0" not in log
    before = log["log_hidden_mse"].item()
    learned = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.Adam(learned, lr=3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        criterion(model, sample)[0].backward()
        optimizer.step()
    assert criterion(model, sample)[2]["log_hidden_mse"].item() < 0.7 * before
    assert set(criterion.state_dict()) == {f"maps.maps.{i}.{name}" for i in range(2) for name in ("weight", "bias")}


def test_a_folder_of_the_students_shape_teaches_every_state(data: Path, tmp_path: Path) -> None:
    from hubert_eff.exporting.huggingface import export_folder

    model = hubert_eff.build("transformer-debug").eval()
    export_folder(model, tmp_path)
    given = (f"criterion.teacher={tmp_path}", *HIDDEN_ONLY, *RAW, *NO_LABELS, f"task.init_from={tmp_path}")
    _, student, criterion, sample = parts(data, *given, name="transformer_debug_distill")
    loss, _, log = criterion(student.eval(), sample)  # labels at 100 Hz, and a teacher that knows no labels
    assert loss.item() == pytest.approx(0.0, abs=1e-4) and "loss_kl" not in log and not criterion.state_dict()
    with pytest.raises(UserError, match=r"it has no codebooks, .* or set the weights of KL .* to 0"):
        parts(data, f"criterion.teacher={tmp_path}", *RAW, "task.init_from=null", name="transformer_debug_distill")


def test_a_preset_and_a_filter_bank_teach(data: Path, installed: None) -> None:  # noqa: F811
    for spec, layers in (("transformer-debug@2", "[1,2]"), ("toy:100", "[1,1]")):
        given = (f"criterion.teacher={spec}", *PAIRS[:-1], f"criterion.teacher_layers={layers}", *RAW)
        _, model, criterion, sample = parts(data, *given)
        loss, frames, log = criterion(model.eval(), sample)
        assert torch.isfinite(loss) and frames > 0 and float(log["log_hidden_mse"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (PAIRS[:-2], "another package runs it, .*: name the states to compare, such as criterion.student_layers"),
        (("task.init_from=null", *PAIRS[-2:]), "only hidden states teach: set criterion.codebook_weight=0"),
        ((*PAIRS, "criterion.hidden_weight=0"), "but criterion.hidden_weight is 0"),
        ((*PAIRS, "criterion.student_layers=[1]"), r"student_layers=\[1\] and teacher_layers=\[0, 2\] are pairs"),
        ((*PAIRS, "criterion.student_layers=[1,3]"), "the student has hidden states 0 to 2"),
        ((*PAIRS, "criterion.teacher_layers=[0,7]"), "criterion.teacher_layers: 7 is not in .*: it has hidden states 0 to 2"),
        ((*PAIRS, "task.normalize=true"), "which task.normalize=true changes: set task.normalize=false"),
        ((*PAIRS, "criterion.teacher=nobody:x"), "unknown kind of teacher"),
    ],
)
def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path, changes: tuple[str, ...], message: str) -> None:
    folder(tmp_path, "whisper")
    with pytest.raises(UserError, match=message) as caught:
        parts(data, f"criterion.teacher={tmp_path}", *RAW, *changes)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_shape_names_the_remedy(data: Path) -> None:
    with pytest.raises(UserError, match=r"layers 3, .* or name the states that are to be compared"):
        parts(data, f"criterion.teacher={teacher(data, encoder_layers=3)}", "task.init_from=null")
    _, _, criterion, _ = parts(data, f"criterion.teacher={teacher(data, encoder_layers=3)}", *PAIRS, "criterion.teacher_layers=[1,3]")
    assert criterion.maps is not None


@pytest.mark.long
def test_a_killed_distillation_goes_on_with_its_maps(data: Path, tmp_path: Path) -> None:
    """As a user runs it: Whisper's encoder teaches a float student, which is killed, resumed, and refused another teacher."""
    folder(tmp_path / "model", "whisper")
    words = (
        "objective=distill", f"criterion.teacher={tmp_path / 'model'}", *PAIRS, "task.normalize=false", "optimization.max_update=6",
        "checkpoint.save_interval_updates=2",
    )  # fmt: skip
    whole = run(data, tmp_path / "whole", *words)
    assert whole.returncode == 0, whole.stderr
    expected = logged(whole.stdout)
    killed = start(data, tmp_path / "killed", *words)
    killed.wait_for(update_made(4))
    killed.kill()
    killed.end()
    resumed = run(data, tmp_path / "killed", *words)
    assert resumed.returncode == 0, resumed.stderr
    found = logged(resumed.stdout)
    assert found and min(found) > 2 and found == {update: expected[update] for update in found}
    first, second = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    maps: dict[str, Tensor] = torch.load(tmp_path / "whole" / "checkpoint_last.pt", weights_only=False)["criterion"]
    assert len(maps) == 4
    folder(tmp_path / "model", "whisper", encoder_layers=3)
    refused: Any = run(data, tmp_path / "killed", *words, "optimization.max_update=8")
    assert refused.returncode == 2 and "criterion.teacher" in refused.stderr
