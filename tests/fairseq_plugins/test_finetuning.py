"""Fine-tuning through fairseq: configurations, checks of transcripts, data, criterion, runs of fairseq-hydra-train."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff import cli
from hubert_eff.errors import UserError
from hubert_eff.quant import BinaryLinear
from hubert_eff.recognition import load_recognizer
from hubert_eff.utils.configurations import load_config

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.logging import metrics  # noqa: E402
from fairseq.models import MODEL_DATACLASS_REGISTRY  # noqa: E402
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import fairseq_plugins  # noqa: E402, F401
from fairseq_plugins.criterions.recognition import HubertEffAsrCriterion  # noqa: E402
from fairseq_plugins.data.transcripts import at_speed  # noqa: E402

from ..helpers.finetuning import CONFIGS, TEXTS, by_hydra, make_data, make_task  # noqa: E402
from ..helpers.paths import ROOT  # noqa: E402
from ..helpers.processes import Training  # noqa: E402

NAMES = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {"train": TEXTS, "valid": ["one ten"]})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "model.safetensors"
    hubert_eff.export(hubert_eff.build("conformer-debug", normalize=True, dropout=0.3), path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_config_lists_every_key(name: str) -> None:
    written = OmegaConf.create(load_config(f"finetune/{name}"))
    model = MODEL_DATACLASS_REGISTRY[written.model._name]
    assert set(written.model) | {"_name"} == set(model.__dataclass_fields__)
    task = TASK_DATACLASS_REGISTRY[written.task._name]
    interpolated = {"train_subset", "seed", "fp16", "amp", "cpu", "save_dir", "max_tokens", "max_tokens_valid", "best_checkpoint_metric"}
    assert set(written.task) | {"_name"} | interpolated == set(task.__dataclass_fields__)
    assert written.checkpoint.best_checkpoint_metric == "wer" and written.criterion._name == "hubert_eff_asr"


def test_recipes() -> None:
    assert {
        "ctc_10min",
        "ctc_1h",
        "ctc_10h",
        "ctc_100h",
        "aed_conformer_100h",
        "aed_fusionformer_100h",
        "debug",
        "debug_aed",
        "debug_lstm",
    } == set(NAMES)
    fusion, conformer = by_hydra("aed_fusionformer_100h"), by_hydra("aed_conformer_100h")
    assert (fusion.lr_scheduler._name, fusion.optimization.lr, fusion.model.decoder_norm) == ("noam", [0.002], "batch_norm")
    assert (conformer.lr_scheduler._name, conformer.optimization.lr, conformer.model.decoder_norm) == ("noam", [0.001], "layer_norm")
    assert fusion.model.decoder_layers == conformer.model.decoder_layers == 6


@pytest.mark.parametrize("name", ["debug", "debug_aed"])
def test_model_starts_from_the_checkpoint_and_keeps_no_path(name: str, data: Path, pretrained: Path) -> None:
    task, cfg = make_task(name, f"task.data={data}", f"model.w2v_path={pretrained}", "model.dropout=0.2", "model.attention_dropout=null")
    model = task.build_model(cfg.model)
    before = hubert_eff.load(pretrained)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.hubert.state_dict().items())
    assert (model.hubert.config.dropout, model.hubert.config.attention_dropout, model.hubert.config.normalize) == (0.2, 0.1, True)
    assert (model.decoder is not None) == (name == "debug_aed")
    assert cfg.model.w2v_path is None and str(pretrained.parent) not in json.dumps(OmegaConf.to_container(cfg.model))
    assert cfg.model.letters == "|ENOTW"
    again = setup_task(cfg.task, from_checkpoint=True).build_model(cfg.model, from_checkpoint=True)  # as fairseq loads a checkpoint
    again.load_state_dict(model.state_dict(), strict=True, model_cfg=cfg.model)


def test_a_binarized_model_is_fine_tuned_as_one(data: Path) -> None:
    task, cfg = make_task("debug", f"task.data={data}", "model.w2v_path=null", "model.preset=conformer-debug+w1a1")
    model = task.build_model(cfg.model)
    assert isinstance(model.hubert.encoder.layers[0].self_attn.q_proj, BinaryLinear) and cfg.model.preset is None
    assert json.loads(cfg.model.encoder_config)["quant"] == "w1a1"


def test_batches_depend_on_seed_and_epoch_only(data: Path, pretrained: Path) -> None:
    task, cfg = make_task("debug", f"task.data={data}", f"model.w2v_path={pretrained}")
    task.build_model(cfg.model)
    task.load_dataset("train")
    task.load_dataset("valid")
    train, valid = task.dataset("train"), task.dataset("valid")
    lengths = set()
    for epoch in range(1, 8):
        train.set_epoch(epoch)
        first, again = train[1], train[1]
        assert torch.equal(first["source"], again["source"])
        lengths.add(len(first["source"]))
        valid.set_epoch(epoch)
        assert len(valid[0]["source"]) == 16_000
    assert lengths == {round(17_600 / speed) for speed in (0.9, 1.0, 1.1)}
    batch = train.collater([train[0], train[3]])
    assert batch["net_input"]["source"].shape == batch["net_input"]["padding_mask"].shape
    assert task.alphabet.text(batch["targets"][1][: batch["target_lengths"][1]].tolist()) == "TWO TWO"
    tone = torch.sin(torch.arange(16_000) * 2 * torch.pi * 440 / 16_000)
    spectrum = torch.fft.rfft(at_speed(tone, 1.1)).abs()
    assert abs(float(spectrum.argmax()) * 16_000 / (2 * (len(spectrum) - 1)) - 484) < 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("letter", "the transcript of valid0.wav has 'R', which is not in the dictionary of 6 letters: |ENOTW"),
        ("long", "the transcript of train0.wav at speed 1.1: "),
        ("missing", "has no transcript of train2.wav"),
        ("none", "no transcripts: neither"),
        ("columns", "parts.tsv lacks a column 'utterance' or 'transcript'"),
        ("bytes", "parts.tsv is not UTF-8 text (invalid start byte at byte 0)"),
        ("speed", "task.speed_perturb=[3.0] must be speeds from 0.5 to 2"),
        ("start", "set one of model.w2v_path"),
        ("fused", "is fused for inference and cannot be trained"),
        ("packed", "is packed for inference and cannot be trained"),
        ("name", "unknown model for fine-tuning"),
    ],
)
def test_bad_input_is_one_clear_line(case: str, message: str, data: Path, pretrained: Path) -> None:
    table = data / "parts.tsv"
    rows = table.read_text()
    changed = {
        "letter": rows.replace("valid0.wav\tone", "valid0.wav\tzero"),
        "long": rows.replace("train0.wav\tone", "train0.wav\t" + "toonnoottwwe" * 4 + "tt"),
        "missing": rows.replace("train2.wav\tone", "train2.wav\t"),
        "columns": rows.partition("\n")[2],
    }
    table.write_text(changed.get(case, rows))
    if case == "none":
        table.unlink()
    if case == "bytes":
        table.write_bytes(b"\xff" + rows.encode())
    if case == "fused":
        pretrained = data / "fused.safetensors"
        hubert_eff.export(hubert_eff.fuse(hubert_eff.build("conformer-debug")), pretrained)
    if case == "packed":
        pretrained = data / "packed.safetensors"
        model = hubert_eff.build("conformer-debug+w1a1")
        model.hidden_states(torch.randn(1, 8_000))  # scales begin with what they see
        hubert_eff.export(model.eval(), pretrained)
    changes = {"speed": "task.speed_perturb=[3.0]", "start": "model.w2v_path=null", "name": "model._name=hubert_eff_asr"}
    with pytest.raises(UserError) as caught:
        task, cfg = make_task("debug", f"task.data={data}", f"model.w2v_path={pretrained}", *([changes[case]] if case in changes else []))
        task.build_model(cfg.model)
        task.load_dataset("train")
        task.load_dataset("valid")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_letters_of_fairseq_files_are_taken_as_they_stand(data: Path, pretrained: Path) -> None:
    (data / "dict.ltr.txt").write_text("| 9\no 5\nn 4\ne 3\nt 2\nw 1\n")
    (data / "valid.ltr").write_text("o n e | t e n |\n")
    task, cfg = make_task("debug", f"task.data={data}", f"model.w2v_path={pretrained}")
    task.build_model(cfg.model)
    task.load_dataset("valid")
    assert task.alphabet.letters == "|onetw" and task.alphabet.text(task.dataset("valid")[0]["target"]) == "one ten"


def test_error_rates_are_exact_over_a_validation(data: Path, pretrained: Path) -> None:
    task, cfg = make_task("debug_aed", f"task.data={data}", f"model.w2v_path={pretrained}")
    model = task.build_model(cfg.model).eval()
    task.load_dataset("train")
    dataset = task.dataset("train")
    criterion = HubertEffAsrCriterion(task)
    with torch.no_grad():
        model.ctc_proj.weight.zero_()
        model.ctc_proj.bias.zero_()
        model.ctc_proj.bias[0] = 9.0  # blank: nothing is heard
    with metrics.aggregate() as found:
        for batch in ([0, 1], [2, 3, 4]):
            loss, size, log = criterion(model, dataset.collater([dataset[i] for i in batch]))
            HubertEffAsrCriterion.reduce_metrics([log])
        values = found.get_smoothed_values()
    assert values["wer"] == 100.0 and values["cer"] == 100.0 and 0 <= values["accuracy"] <= 1
    assert log["words"] == sum(len(TEXTS[i].split()) for i in (2, 3, 4)) and log["word_errors"] == log["words"]
    assert size == sum(len(TEXTS[i]) for i in (2, 3, 4))


@pytest.mark.long
def test_it_trains_goes_on_and_leaves_a_checkpoint_that_needs_nothing_else(data: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    hubert_eff.export(hubert_eff.build("fusionformer-debug"), start)

    def run(updates: int, *more: str) -> subprocess.CompletedProcess[str]:
        return Training(
            "--config-dir", str(CONFIGS), "--config-name", "debug_aed", f"common.user_dir={ROOT / 'fairseq_plugins'}", f"task.data={data}",
            f"model.w2v_path={start}", f"checkpoint.save_dir={tmp_path / 'run'}", f"optimization.max_update={updates}",
            "common.log_interval=1", *more,
        ).end()  # fmt: skip

    done = run(2, "task.trends_interval=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wer" in next(line for line in done.stdout.splitlines() if "[valid]" in line)
    assert run(3, "task.trends_interval=1").returncode == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "trends.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == [0, 1, 2]
    start.unlink()
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    recognizer = load_recognizer(checkpoint)
    assert hubert_eff.load(checkpoint).config.encoder_embed_dim == 64 and recognizer.decoder is not None
    wav = str(data / "audio" / "valid0.wav")
    assert cli.main(["transcribe", str(checkpoint), wav]) == 0
    bad = run(3, "model.w2v_path=nowhere.pt")
    assert bad.returncode == 2 and "fairseq-hydra-train: no checkpoint at nowhere.pt" in bad.stderr
