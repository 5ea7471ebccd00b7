"""Distillation: a student, usually a binarized one, learns from labels and from every layer and the codebook of a teacher."""

# B batch, S samples, T frames, N frames of one kind (masked or unmasked), C classes of a codebook, L layers

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import FairseqDataclass
from omegaconf import MISSING
from torch import Tensor, nn

from hubert_eff.checkpoints.open import open_model
from hubert_eff.errors import UserError
from hubert_eff.labels.teachers import Teacher, is_foreign, open_teacher, weights_digest
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant.distill import check_teacher, codebook_divergence, hidden_distances

from ..runtime.stopping import one_line_errors
from .hubert_eff import HubertEffCriterion
from .throughput import audio_seconds


@dataclass
class HubertDistillConfig(FairseqDataclass):
    """Keys of `criterion`."""

    teacher: str = field(
        default=MISSING,
        metadata={
            "help": "encoder to learn from: a checkpoint of this plug-in or of stock HuBERT; with teacher_layers, what `hubert-eff "
            "labels --checkpoint` takes"
        },
    )
    student_layers: list[int] = field(
        default_factory=list, metadata={"help": "hidden states of the student that learn, one for each of teacher_layers"}
    )
    teacher_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "hidden states of a teacher of any shape that teach, through learned linear maps, from audio without masks; "
            "empty: each state of a teacher of the student's shape"
        },
    )
    pred_masked_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy with the labels at masked frames"})
    pred_nomask_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy with the labels at unmasked frames"})
    codebook_weight: float = field(default=1.0, metadata={"help": "weight of KL(teacher || student) over the codebook at masked frames"})
    codebook_nomask_weight: float = field(
        default=0.0, metadata={"help": "weight of KL(teacher || student) over the codebook at unmasked frames"}
    )
    hidden_weight: float = field(
        default=1.0, metadata={"help": "weight of the mean squared difference of the hidden states, averaged over states"}
    )
    hidden_normalize: bool = field(
        default=False, metadata={"help": "divide the squared difference of each state by the variance of the teacher's state"}
    )


class StateMaps(nn.Module):
    """Linear maps from a student's states, of one width, to a teacher's: FitNets' regressors (Romero et al. 2015, section 2.2)."""

    def __init__(self, ours: tuple[int, ...], theirs: tuple[int, ...], width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.ours, self.theirs = ours, theirs
        self.maps = nn.ModuleList(nn.Linear(width, wide) for wide in widths)

    def forward(self, states: Sequence[Tensor], wanted: Sequence[Tensor], length: int) -> tuple[list[Tensor], list[Tensor]]:
        """Pair the student's states (B, T, D), all of which are given, with the teacher's chosen ones, over the first `length` frames."""
        return [m(states[i][:, :length]) for m, i in zip(self.maps, self.ours, strict=True)], [w[:, :length] for w in wanted]


@register_criterion("hubert_distill", dataclass=HubertDistillConfig)
class HubertDistillCriterion(HubertEffCriterion):
    """Cross-entropy with labels and KL from a teacher, each at masked and at unmasked frames, and the differences of all hidden states.

    With the weights l, k and h of the keys, M masked and U unmasked frames (of every codebook), the loss is a sum over frames,

        l_m CE(M) + l_u CE(U) + k_m KL(M) + k_u KL(U) + h sum_b n_b mean_s |student_s - teacher_s|^2

    where n_b is the number of frames of utterance b that count: the kinds (masked, unmasked) for which labels or KL have a weight, or all
    frames if only hidden states do. fairseq divides by their total. The last mean is over the states 0 ... L, valid frames and channels of
    the utterance, so neither depth nor the other utterances of a batch change the balance.

    The teacher is in eval mode and sees the student's masks, in the student's chunks if it was built for them. It is neither optimized nor
    saved.

    With `student_layers` and `teacher_layers` the teacher may be any encoder (`hubert_eff.labels.teachers`). It reads the audio without
    masks, the last term is |map(student_s) - teacher_t|^2 with a learned linear map for each pair, a mean over these pairs (FitNets, Romero
    et al. 2015, section 2.2), and there is no KL. The maps are trained and saved with the criterion.

    Beside the figures of `hubert_eff` it logs `loss_kl` and `loss_kl_u` (bits per masked and per unmasked frame), `hidden_mse` (a mean over
    states) and `correct_t_i`, the share of masked frames at which student and teacher choose the same class.
    """

    terms: ClassVar[Mapping[str, str]] = {
        **HubertEffCriterion.terms, "codebook_weight": "m", "codebook_nomask_weight": "u", "hidden_weight": "",
    }  # fmt: skip

    def __init__(
        self,
        task: Any,
        teacher: str,
        codebook_weight: float,
        hidden_weight: float,
        hidden_normalize: bool,
        pred_masked_weight: float = 0.0,
        pred_nomask_weight: float = 0.0,
        codebook_nomask_weight: float = 0.0,
        student_layers: Sequence[int] = (),
        teacher_layers: Sequence[int] = (),
    ) -> None:
        super().__init__(task, pred_masked_weight, pred_nomask_weight)
        self.divergence_weights = {"m": codebook_weight, "u": codebook_nomask_weight}
        self.hidden_weight, self.hidden_normalize = hidden_weight, hidden_normalize
        self.maps: StateMaps | None = None
        self.same_classes = False
        with one_line_errors():
            if not teacher:
                raise UserError("criterion.teacher is not set: give the checkpoint to learn from, criterion.teacher=FILE")
            model: HubertModel | Teacher
            try:
                if student_layers or teacher_layers:
                    model = self._by_layers(teacher, task.model, tuple(student_layers), tuple(teacher_layers))
                else:
                    model = self._by_shape(teacher, task.model)
            except UserError as error:
                raise UserError(f"criterion.teacher={teacher}: {error}") from error
            task.note_file("criterion.teacher", Path(teacher) if Path(teacher).exists() else weights_digest(teacher, model).encode())
        self.teacher = (model,)  # a tuple keeps it out of the criterion's parameters

    def _by_shape(self, name: str, student: HubertModel) -> HubertModel:
        """Open a teacher with the student's states and codebooks."""
        if is_foreign(name):
            raise UserError(
                "another package runs it, and its states are not the student's: name the states to compare, such as "
                "criterion.student_layers=[2] criterion.teacher_layers=[12]"
            )
        model = open_model(name).requires_grad_(False)
        check_teacher(model, student, codebooks=any(self.divergence_weights.values()))
        self.same_classes = model.num_classes == student.num_classes
        model.config = replace(
            model.config, label_rate=student.config.label_rate
        )  # audio is cut to labels in the same way, even without codebooks
        return model

    def _by_layers(self, name: str, student: HubertModel, ours: tuple[int, ...], theirs: tuple[int, ...]) -> Teacher:
        """Open a teacher of any shape, and make the maps to its states."""
        if any(self.divergence_weights.values()):
            raise UserError(
                "with criterion.teacher_layers only hidden states teach: set criterion.codebook_weight=0 and "
                "criterion.codebook_nomask_weight=0"
            )
        if self.hidden_weight == 0:
            raise UserError("criterion.teacher_layers are compared, but criterion.hidden_weight is 0: set it above 0")
        if len(ours) != len(theirs):
            raise UserError(f"criterion.student_layers={list(ours)} and teacher_layers={list(theirs)} are pairs: give as many of both")
        depth = len(student.encoder.layers)
        if not all(0 <= layer <= depth for layer in ours):
            raise UserError(f"criterion.student_layers={list(ours)}: the student has hidden states 0 to {depth}")
        model = open_teacher(name).requires_grad_(False)
        model.check_layers(theirs, "criterion.teacher_layers:")
        if student.config.normalize and model.eps is None:
            raise UserError("it takes audio as it is recorded, which task.normalize=true changes: set task.normalize=false")
        self.maps = StateMaps(ours, theirs, student.config.encoder_embed_dim, model.widths(theirs))
        return model

    def forward(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns the loss (a sum over frames), the number of frames it counts, and what to log: numbers and histograms."""
        inputs, targets = sample["net_input"], sample["target_list"]
        output = model(target_list=targets, return_states=True, **inputs)
        teacher = self._placed(inputs["source"])
        with torch.no_grad():
            taught: Any = None if self.maps is not None else self._heard(teacher, inputs, targets, output)
            padding, masked = output["padding_mask"], output["mask_indices"]  # (B, T)
            x = output["x"]
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if padding is None else ~padding
            masked = torch.zeros_like(valid) if masked is None else masked
            frames = {"m": valid & masked, "u": valid & ~masked}
        loss, _, log = self.label_losses(output)
        for part, weight in self.divergence_weights.items():
            ours = output[f"logits_{part}"]  # (N, C) per codebook
            if taught is None or not self.same_classes or ours is None or (part == "u" and weight == 0):
                continue
            with torch.no_grad():
                theirs = teacher.logits(taught["x"][frames[part]])
            divergence = codebook_divergence(ours, theirs)
            loss = loss + weight * divergence
            name = "kl" if part == "m" else "kl_u"
            log[f"loss_{name}"], log[f"count_{name}"] = divergence.detach(), theirs[0].size(0)
            if part == "m":
                for i, (mine, wanted) in enumerate(zip(ours, theirs)):
                    log[f"correct_t_{i}"], log[f"count_t_{i}"] = (mine.argmax(-1) == wanted.argmax(-1)).sum(), wanted.size(0)
        counted = torch.stack([frames[part].sum(1) for part in self._counted()]).sum(0)  # (B,)
        sample_size = int(counted.sum())
        if self.maps is None:
            states = output["states"], taught["states"]
        else:
            with torch.no_grad():
                wanted = teacher.of_batch(inputs["source"], inputs.get("padding_mask"), self.maps.theirs)
            length = min(valid.size(1), wanted[0].size(1))
            states, valid = self.maps(output["states"], wanted, length), valid[:, :length]
        distance = hidden_distances(*states, None if padding is None else valid, self.hidden_normalize).mean(1)
        hidden = (distance * counted).sum()
        loss = loss + self.hidden_weight * hidden
        log.update(
            log_hidden_mse=hidden.detach(), loss=loss.detach(), ntokens=sample_size, nsentences=sample["id"].numel(),
            sample_size=sample_size, audio_seconds=audio_seconds(sample),
        )  # fmt: skip
        return loss, sample_size, log

    def _heard(self, teacher: HubertModel, inputs: dict[str, Any], targets: Any, output: Any) -> Any:
        """Run a teacher of the student's shape on a batch, under the student's masks."""
        return teacher(
            inputs["source"], targets, inputs.get("padding_mask"), features_only=True, masks=output["masks"], return_states=True,
            chunks=output["chunks"] if teacher.config.streaming else None,
        )  # fmt: skip

    def _counted(self) -> list[str]:
        """The kinds of frames over which the loss is averaged."""
        return [part for part in "mu" if self.weights[part] > 0 or self.divergence_weights[part] > 0] or ["m", "u"]

    def _placed(self, source: Tensor) -> Any:
        """The teacher on the device and in the precision of the audio (B, S)."""
        (teacher,) = self.teacher
        first = next(teacher.parameters(), None)
        if first is None:  # such as a filter bank
            return teacher
        if first.device != source.device or first.dtype != source.dtype:
            teacher.to(source.device, source.dtype)
        return teacher
