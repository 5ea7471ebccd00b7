"""The fairseq plug-in, piece by piece: registered models, configurations, data, criterion, checks, patches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

import hubert_eff
from hubert_eff.encoders.registry import get_encoder, preset_config
from hubert_eff.errors import UserError
from hubert_eff.models.extractor import frame_padding_mask
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import BinaryLinear
from hubert_eff.utils.configurations import load_config

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq import checkpoint_utils  # noqa: E402
from fairseq.dataclass.configs import FairseqConfig  # noqa: E402
from fairseq.dataclass.initialize import add_defaults, hydra_init  # noqa: E402
from fairseq.file_io import PathManager  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY  # noqa: E402
from fairseq.tasks import setup_task  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import fairseq_plugins  # noqa: E402, F401
from fairseq_plugins.criterions.hubert_eff import HubertEffCriterion, perplexity  # noqa: E402
from fairseq_plugins.data import dataset as dataset_module  # noqa: E402
from fairseq_plugins.data.buckets import Buckets  # noqa: E402
from fairseq_plugins.runtime import stopping  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "pretrain"
# a configuration is named after the preset it trains; `debug`, the one to start with, is a Conformer
PRESET_OF = {
    path.stem: "conformer-debug" if path.stem == "debug" else path.stem.replace("_", "-") for path in sorted(CONFIGS.glob("*.yaml"))
}
DECIDED_ELSEWHERE = {"label_rate", "normalize", "seed"}  # by the task and by common.seed
CLASSES = 5


def make_data(folder: Path, seconds: dict[str, list[float]], rate: int = 100) -> Path:
    """Noise with class labels at `rate`, as `hubert-eff manifest` and `labels` would write them."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    for split, lengths in seconds.items():
        rows, labels = [str(folder / "audio")], []
        for i, length in enumerate(lengths):
            samples = int(length * 16_000)
            soundfile.write(folder / "audio" / f"{split}{i}.wav", rng.normal(0, 0.1, samples), 16_000)
            rows.append(f"{split}{i}.wav\t{samples}")
            labels.append(" ".join(map(str, rng.integers(0, CLASSES, (samples - 400) * rate // 16_000 + 1))))
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        (folder / f"{split}.km").write_text("\n".join(labels) + "\n")
    (folder / "dict.km.txt").write_text("".join(f"{i} 1\n" for i in range(CLASSES)))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {"train": [1.0, 2.0, 1.5, 2.0, 2.0], "valid": [1.0]})


@functools.cache
def by_hydra(name: str, *overrides: str) -> Any:
    """A configuration as hydra composes it for fairseq-hydra-train."""
    hydra_init(name)
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        return compose(name, overrides=["common.user_dir=unused", "task.data=DIR", "task.label_dir=DIR", *overrides])


def completed(cfg: Any) -> Any:
    """What fairseq makes of it: resolved, completed by fairseq's dataclasses."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    return cfg


def composed(name: str, *overrides: str) -> Any:
    return completed(by_hydra(name, *overrides))


def make_task(data: Path, *changes: str, config: str = "debug") -> Any:
    """The task of a configuration with some keys changed, and the whole configuration."""
    cfg = copy.deepcopy(by_hydra(config))
    OmegaConf.set_struct(cfg, False)
    cfg = completed(OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"task.data={data}", f"task.label_dir={data}", *changes])))
    return setup_task(cfg.task), cfg


# -- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_every_encoder_is_a_fairseq_model_with_its_own_keys(encoder: str) -> None:
    config = get_encoder(encoder).config
    derived = {f.name: f.default for f in dataclasses.fields(MODEL_DATACLASS_REGISTRY[f"hubert_{encoder}"])}
    assert derived.pop("_name") is None
    assert {k: v for k, v in derived.items() if k not in DECIDED_ELSEWHERE} == {
        f.name: f.default for f in dataclasses.fields(config) if f.name not in DECIDED_ELSEWHERE
    }
    assert derived["label_rate"] == "${task.label_rate}" and derived["seed"] == "${common.seed}"


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_state_names_are_the_core_models(encoder: str, data: Path) -> None:
    task, cfg = make_task(data)
    preset = f"{encoder}-debug"
    keys = {k: v for k, v in preset_config(preset).to_dict().items() if k not in DECIDED_ELSEWHERE}
    section = OmegaConf.create({"_name": f"hubert_{encoder}", **keys, "label_rate": 100.0, "normalize": True, "seed": 7})
    model = task.build_model(section)
    assert isinstance(model, HubertModel) and isinstance(model, MODEL_REGISTRY[f"hubert_{encoder}"])
    assert (model.config.label_rate, model.config.normalize, model.config.seed) == (100.0, True, 7)
    plain = hubert_eff.build(preset, num_classes=[CLASSES + 4])  # fairseq's dictionaries begin with four special symbols
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    model.set_num_updates(12)
    assert model.num_updates == 12


def test_binarised_model_and_its_policy_are_in_the_configuration(data: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("feed_forward: float")
    task, cfg = make_task(data, "model.quant=w1a1", f"model.quant_policy={policy}")
    model = task.build_model(cfg.model)
    assert isinstance(model.encoder.layers[0].self_attn.q_proj, BinaryLinear)
    assert not isinstance(model.encoder.layers[0].ffn1.w_1, BinaryLinear)
    assert json.loads(cfg.model.quant_policy) == {"feed_forward": "float"}
    with pytest.raises(UserError, match="weights of a float model"):
        model.load_state_dict(hubert_eff.build("conformer-debug").state_dict(), strict=True, model_cfg=cfg.model)


def test_unknown_model_name_offers_the_nearest(data: Path) -> None:
    task, cfg = make_task(data)
    cfg.model._name = "hubert_conformr"
    with pytest.raises(UserError, match="did you mean 'hubert_conformer'"):
        task.build_model(cfg.model)


def test_bad_mask_setting_is_refused_before_training(data: Path) -> None:
    task, cfg = make_task(data, "model.mask_channel_prob=0.1", "model.mask_channel_length=10")
    with pytest.raises(UserError, match="mask_channel_prob=0.1"):
        task.build_model(cfg.model)


# -- configurations ------------------------------------------------------------------------------------------------------


def test_every_preset_has_its_configuration() -> None:
    assert set(PRESET_OF.values()) == set(hubert_eff.list_presets())


@pytest.mark.parametrize("name", [p.stem for p in sorted(CONFIGS.glob("*.yaml"))])
def test_config_composes_and_says_the_same_as_its_preset(name: str) -> None:
    cfg = composed(name)
    preset = preset_config(PRESET_OF[name]).to_dict()
    model = OmegaConf.to_container(cfg.model)
    assert model.pop("_name") == f"hubert_{PRESET_OF[name].split('-')[0]}"
    assert model.pop("seed") == cfg.common.seed
    assert model.pop("label_rate") == cfg.task.label_rate
    assert model.pop("normalize") == cfg.task.normalize
    assert model == {k: v for k, v in preset.items() if k not in DECIDED_ELSEWHERE}
    OmegaConf.merge(OmegaConf.structured(FairseqConfig), {k: cfg[k] for k in ("common", "dataset", "optimization", "checkpoint")})


@pytest.mark.parametrize("name", sorted(PRESET_OF))
def test_config_lists_every_key_so_that_all_can_be_overridden(name: str) -> None:
    written = OmegaConf.create(load_config(f"pretrain/{name}"))
    encoder = get_encoder(written.model._name.removeprefix("hubert_"))
    assert set(written.model) == {f.name for f in dataclasses.fields(encoder.config)} | {"_name"}
    cfg = composed(name, *(f"model.{key}={json.dumps(value)}" for key, value in written.model.items()
                           if key not in DECIDED_ELSEWHERE and isinstance(value, (int, float, bool))),
                   "task.label_rate=50", "common.all_gather_list_size=32768", "dataset.curriculum=1")  # fmt: skip
    assert cfg.model.label_rate == 50 and cfg.common.all_gather_list_size == 32768


def test_recipe_is_the_papers() -> None:
    for name in ("transformer_base", "conformer_s"):
        cfg = composed(name)
        assert cfg.dataset.max_tokens == 36.5 * 16_000
        assert cfg.optimization.max_update == cfg.lr_scheduler.total_num_update == 250_000
        assert cfg.task.label_rate == 100
        assert cfg.lr_scheduler.warmup_updates == 0.08 * cfg.optimization.max_update


# -- data ----------------------------------------------------------------------------------------------------------------


def test_batches_and_crops_depend_on_seed_epoch_and_utterances_only(data: Path) -> None:
    def crops(epoch: int, seed: int = 1) -> tuple[list[int], torch.Tensor]:
        task, _ = make_task(data, "task.pad_audio=false", f"common.seed={seed}")
        task.load_dataset("train")
        dataset = task.dataset("train")
        dataset.set_epoch(epoch)
        np.random.seed(int.from_bytes(os.urandom(3), "big"))  # the state that a resumed process happens to have
        order = dataset.ordered_indices()
        batch = dataset.collater([dataset[i] for i in order])
        assert batch["net_input"]["sample_ids"].tolist() == order.tolist()
        return order.tolist(), batch["net_input"]["source"]

    (order, first), (again, second), (_, third) = crops(3), crops(3), crops(4)
    assert order == again and torch.equal(first, second)
    assert not torch.equal(first, third)
    assert {tuple(crops(3, seed)[0]) for seed in range(6)} != {tuple(order)}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(1).uniform(0.4, 2.0, 40).round(3)
    return make_data(tmp_path_factory.mktemp("many") / "data", {"train": [*lengths, 2.5], "valid": [1.0]})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rate", [50, 100])
def test_buckets_leave_few_shapes(padded: bool, rate: int, many: Path, tmp_path: Path) -> None:
    data = many
    if rate == 50:  # every second label of the others
        data = tmp_path
        for name in ("train.tsv", "valid.tsv", "dict.km.txt"):
            (data / name).write_text((many / name).read_text())
        for name in ("train.km", "valid.km"):
            halves = [" ".join(line.split()[::2]) for line in (many / name).read_text().splitlines()]
            (data / name).write_text("\n".join(halves) + "\n")
    keys = (f"task.pad_audio={str(padded).lower()}", f"task.label_rate={rate}", "task.min_sample_size=6000", "task.max_sample_size=33000")
    task, cfg = make_task(data, "task.length_buckets=3", *keys)
    task.load_dataset("train"), task.load_dataset("valid")
    dataset, model = task.dataset("train"), task.build_model(cfg.model)
    assert task.dataset("valid").buckets is None
    lengths = dataset.buckets.lengths.tolist()
    assert len(lengths) == 3 and all(length % 2560 == 320 for length in lengths) and lengths[-1] <= 33_000
    epoch = task.get_batch_iterator(dataset, max_tokens=80_000, required_batch_size_multiple=1).next_epoch_itr(shuffle=False)
    shapes, seen = set(), []
    for batch in epoch:
        source, padding, (labels,) = batch["net_input"]["source"], batch["net_input"]["padding_mask"], batch["target_list"]
        features = torch.zeros(len(source), model.num_frames(source.size(1)), 1)
        frames = None if padding is None else frame_padding_mask(padding, features.size(1), model.config)
        features, frames, (targets,) = model._align(features, frames, [labels])
        assert features.size(1) == source.size(1) // 320 - 1  # no frame is lost for want of labels, so the encoder's shape is fixed too
        assert (frames is None) != padded
        assert (targets[~frames] if padded else targets).min() >= 4  # the dictionary begins with four special symbols
        assert source.numel() <= 80_000
        shapes.add(tuple(source.shape))
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(len(dataset))) and {length for _, length in shapes} == set(lengths)
    assert len(shapes) <= 6
    for index, size in enumerate(dataset.sizes):
        near = [n for n in lengths if (n >= size if padded else n <= size)]
        assert dataset.size(index) == ((min(near) if near else lengths[-1]) if padded else max(near))
    first, second = (dataset.collater([dataset[i] for i in (0, 1, 2)])["net_input"]["source"] for _ in range(2))
    assert torch.equal(first, second)


def test_utterances_too_short_for_a_bucket_are_named(data: Path) -> None:
    make_task(data, "task.length_buckets=2")[0].load_dataset("train")
    sizes = [32_000, 250_000]
    (length,) = (one := Buckets(sizes, 1, 200_000, padded=False)).lengths
    assert 29_000 < length <= 32_000 and one.kept(sizes) == pytest.approx(2 * length / 232_000)  # of what 200,000 samples leave
    with pytest.raises(UserError, match="length_buckets=-1"):
        make_task(data, "task.length_buckets=-1")
    with pytest.raises(UserError, match="length_buckets=2: the shortest utterance has 2000 samples.*task.min_sample_size"):
        Buckets([2000, 16_000], 2, 250_000, padded=False)


@pytest.mark.parametrize(("seconds", "limit"), [(4.0, 48_080), (17.0, 250_000)])
def test_no_padding_label_falls_on_a_valid_frame_of_a_random_crop(seconds: float, limit: int, data: Path, tmp_path: Path) -> None:
    make_data(tmp_path / "long", {"train": [seconds, seconds, 1.013], "valid": [1.0]})
    task, cfg = make_task(tmp_path / "long", "task.pad_audio=true", f"task.max_sample_size={limit}", "task.max_keep_size=null")
    task.load_dataset("train")
    dataset = task.dataset("train")
    model = task.build_model(cfg.model)
    samples, short = [dataset[i] for i in range(3)], 0
    for start in range(0, int(seconds * 16_000) - limit + 1, 40):
        # one crop at `start`, one at the beginning, an utterance that is padded
        with mock.patch.object(dataset_module, "crop_start", side_effect=[start, 0]):
            batch = dataset.collater(samples)
        source, padding = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
        frames = frame_padding_mask(padding, model.num_frames(source.size(1)), model.config)
        _, frames, (targets,) = model._align(torch.zeros(*frames.shape, 1), frames, batch["target_list"])
        assert (targets[~frames] >= 4).all()  # fairseq's dictionaries begin with four special symbols
        valid, lengths = (~frames).sum(1), batch["target_lengths_list"][0]
        expected = [min(model.num_frames(min(len(s["source"]), limit)), -(-int(n) // 2)) for s, n in zip(samples, lengths)]
        assert valid.tolist() == expected  # and no more is given up than has no label
        short += expected[0] < expected[1]
    assert short


def test_loading_processes_see_the_epoch_that_comes_after_they_started(data: Path) -> None:
    task, _ = make_task(data, "task.pad_audio=false")
    task.load_dataset("train")
    dataset = task.dataset("train")
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[[0, 1]], collate_fn=dataset.collater, num_workers=1, persistent_workers=True
    )
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["net_input"]["source"], dataset.collater([dataset[0], dataset[1]])["net_input"]["source"])


def test_a_loading_process_outlives_a_sigterm_that_is_not_its_parents(data: Path) -> None:
    task, _ = make_task(data)
    task.load_dataset("train")
    dataset = task.dataset("train")
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[[0], [1], [2]], collate_fn=dataset.collater, num_workers=1, persistent_workers=True
    )
    assert len(list(loader)) == 3
    (worker,) = loader._iterator._workers
    if os.fork() == 0:  # a process that is not the parent sends the signal
        os.kill(worker.pid, signal.SIGTERM)
        os._exit(0)
    os.wait()
    assert len(list(loader)) == 3
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()


# -- criterion -----------------------------------------------------------------------------------------------------------


class FixedOutput(torch.nn.Module):
    """Stands where a model stands: returns outputs made up beforehand."""

    def __init__(self, outputs: list[dict[str, Any]]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, target_list: Any, **_: Any) -> dict[str, Any]:
        return next(self.outputs)


NOISE = {"source": torch.zeros(2, 16_000), "padding_mask": torch.arange(16_000)[None] >= torch.tensor([[16_000], [8_000]])}  # 1.5 s


def made_up(masked: int, unmasked: int, classes: int = 7) -> dict[str, Any]:
    return {
        "logits_m": [torch.randn(masked, classes)], "targets_m": [torch.randint(0, 3, (masked,))],
        "logits_u": [torch.randn(unmasked, classes)], "targets_u": [torch.randint(0, classes, (unmasked,))],
        "features_pen": torch.rand(()),
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_criterion_values_are_exact_over_an_interval(ranks: int) -> None:
    outputs = [made_up(11, 5), made_up(3, 8), made_up(30, 2), made_up(6, 6)]
    criterion = HubertEffCriterion(None, 1.0, 0.5, [10.0], ["features_pen"])
    model, sample = FixedOutput(outputs), {"target_list": None, "net_input": NOISE, "id": torch.arange(2)}
    results = [criterion(model, sample) for _ in outputs]
    metrics.reset()
    with metrics.aggregate("interval") as interval:
        for i in range(0, len(results), ranks):
            criterion.reduce_metrics([log for _, _, log in results[i : i + ranks]])
    logged = interval.get_smoothed_values()
    for output, (loss, sample_size, _) in zip(outputs, results):
        ce_m, ce_u = (F.cross_entropy(output[f"logits_{p}"][0], output[f"targets_{p}"][0], reduction="sum") for p in "mu")
        assert sample_size == output["targets_m"][0].numel() + output["targets_u"][0].numel()
        torch.testing.assert_close(loss, ce_m + 0.5 * ce_u + 10 * output["features_pen"] * sample_size)
    assert all(float(log["audio_seconds"]) == 1.5 for _, _, log in results) and logged["audio_per_s"] > 0 and logged["mem_gb"] > 0
    frames = sum(size for _, size, _ in results)
    assert logged["loss"] == pytest.approx(float(sum(loss for loss, _, _ in results)) / frames / math.log(2), abs=1e-3)
    targets = torch.cat([o["targets_m"][0] for o in outputs])
    codes = torch.cat([o["logits_m"][0].argmax(-1) for o in outputs])
    assert logged["correct_m_0"] == pytest.approx((codes == targets).double().mean().item(), abs=1e-4)
    assert logged["majority_m_0"] == pytest.approx(targets.bincount().max().item() / targets.numel(), abs=1e-4)
    share = codes.bincount().double() / codes.numel()
    assert logged["code_ppl_0"] == pytest.approx(math.prod(float(p) ** -float(p) for p in share if p > 0), abs=1e-2)
    assert not any(key.startswith("_") for key in logged)
    restored = json.loads(json.dumps(logged))  # plain numbers: any progress format can print them
    assert restored == logged


def test_meters_survive_a_checkpoint(tmp_path: Path) -> None:
    criterion = HubertEffCriterion(None, 1.0, 0.0)
    _, _, log = criterion(FixedOutput([made_up(9, 4)]), {"target_list": None, "net_input": NOISE, "id": torch.arange(1)})
    metrics.reset()
    with metrics.aggregate("interval"):
        criterion.reduce_metrics([log])
    before = metrics.get_smoothed_values("interval")
    torch.save(metrics.state_dict(), tmp_path / "meters.pt")
    metrics.load_state_dict(torch.load(tmp_path / "meters.pt", weights_only=True))
    with metrics.aggregate("interval"):
        criterion.reduce_metrics([{key: value * 0 for key, value in log.items()}])
    after = metrics.get_smoothed_values("interval")
    for key in ("correct_m_0", "majority_m_0", "code_ppl_0", "label_ppl_0"):
        assert after[key] == before[key]


def test_perplexity_of_known_histograms() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)


def test_criterion_refuses_a_loss_on_frames_that_the_model_skips() -> None:
    output = {**made_up(3, 3), "logits_m": None, "targets_m": None}
    with pytest.raises(UserError, match="skip_masked"):
        HubertEffCriterion(None, 1.0, 0.0)(FixedOutput([output]), {"target_list": None, "net_input": {}, "id": torch.arange(1)})


# -- checks --------------------------------------------------------------------------------------------------------------


def edit(path: Path, change: Any) -> None:
    path.write_text(change(path.read_text()))


BAD_DATA = {
    "one label line short": (
        lambda d: edit(d / "train.km", lambda t: "\n".join(t.splitlines()[:-1]) + "\n"),
        "has 4 lines for the 5 utterances",
    ),
    "class beyond the dictionary": (
        lambda d: edit(d / "train.km", lambda t: t.replace(" 4", " 77", 1)),
        "line 1: class 77 is not among the 5",
    ),
    "labels of another length": (
        lambda d: edit(d / "train.km", lambda t: "\n".join([*t.splitlines()[:-1], "0 1 2 " * 40])),
        r"train.km line 5: 120 labels \(1.20 s",
    ),
    "no manifest": (lambda d: (d / "train.tsv").unlink(), "no manifest .*train.tsv"),
    "no labels": (lambda d: (d / "train.km").unlink(), "no labels .*train.km"),
    "no dictionary": (lambda d: (d / "dict.km.txt").unlink(), "no dictionary .*dict.km.txt"),
    "bad dictionary": (lambda d: (d / "dict.km.txt").write_text("0\n"), "no fairseq dictionary"),
    "no audio": (lambda d: (d / "audio" / "train3.wav").unlink(), "1 of 5 audio files are missing .*first train3.wav"),
    "other audio": (lambda d: soundfile.write(d / "audio" / "train0.wav", np.zeros(99), 16_000), "99 samples, not 16000"),
    "other rate": (lambda d: soundfile.write(d / "audio" / "train0.wav", np.zeros(16_000), 8_000), "8000 Hz"),
    "damaged audio": (lambda d: (d / "audio" / "train0.wav").write_bytes(b""), "cannot be read as audio"),
    "empty manifest": (lambda d: edit(d / "train.tsv", lambda t: t.splitlines()[0] + "\n"), "lists no utterance"),
    "malformed manifest": (lambda d: edit(d / "train.tsv", lambda t: t.replace("\t", " ")), "line 2: expected a path, a tab"),
    "recorded rate": (
        lambda d: (d / "labels.json").write_text('{"rate": 50, "source": "layer 6"}'),
        "made at 50 per second from layer 6",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_clear_line(case: str, data: Path) -> None:
    damage, message = BAD_DATA[case]
    damage(data)
    with pytest.raises(UserError, match=message) as error:
        task, _ = make_task(data)
        task.load_dataset("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.label_rate=50", "about 100 per second: set task.label_rate=100"),
        ("task.label_rate=-1", "labels come at a fixed rate"),
        ("task.min_sample_size=90000", "none of its 5 utterances"),
        ("task.data=nowhere", "nowhere is no directory"),
        ("task.label_dir=nowhere", "nowhere is no directory"),
        ("task.fine_tuning=true", "fine_tuning"),
        ("common.fp16=true", "needs a GPU"),
        ("model.depthwise_kernel_size=15", "unknown key of hubert_conformer .* did you mean 'depthwise_conv_kernel_size'"),
        ("optimizer.weight_decy=0.1", "did you mean 'weight_decay'"),
        ("model.encoder_layers=many", "hubert_conformer: encoder_layers: .*could not be converted to Integer"),
        ("model.pos_enc_type=[rel_pos]", "hubert_conformer: pos_enc_type: "),
    ],
)
def test_bad_setting_is_one_clear_line(override: str, message: str, data: Path) -> None:
    with pytest.raises(UserError, match=message):
        task, _ = make_task(data, override)
        task.load_dataset("train")


def test_a_task_from_a_checkpoint_needs_no_data() -> None:
    assert setup_task(composed("debug", "task.data=nowhere", "common.fp16=true").task, from_checkpoint=True)


def test_a_loss_that_is_not_finite_names_update_and_utterances(data: Path) -> None:
    task, cfg = make_task(data)
    task.last_batch = torch.arange(11)
    task.check_finite("the loss", torch.tensor(3.0), 5)
    with pytest.raises(FloatingPointError, match="stopped at update 5: the loss is nan .*utterances 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"):
        task.check_finite("the loss", torch.tensor(math.nan), 5)


# -- patches -------------------------------------------------------------------------------------------------------------


def test_a_copy_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    source.write_text("new"), target.write_text("old")

    def killed(src: Any, dst: Any) -> None:
        Path(dst).write_bytes(b"n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.link", mock.Mock(side_effect=OSError))  # where the file system has no links
        patched.setattr("shutil.copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_text() == "old"
    assert PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_text() == "new" and not list(tmp_path.glob("*.tmp*"))


BAD_CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "text": (lambda p: p.write_text("no checkpoint\n"), "is no checkpoint"),
    "empty": (lambda p: p.write_bytes(b""), "is no checkpoint"),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), "is no checkpoint"),
    "other zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "is no checkpoint"),
    "tensor": (lambda p: torch.save(torch.zeros(3), p), "is no checkpoint"),
    "other content": (lambda p: torch.save({"weights": {"a": torch.zeros(3)}}, p), "is no checkpoint"),
    "truncated": (lambda p: (torch.save({"model": torch.zeros(9999)}, p), p.write_bytes(p.read_bytes()[:9999])), "is truncated"),
    "pickled code": (lambda p: torch.save({"model": os.getcwd}, p), "holds pickled code"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    write, message = BAD_CHECKPOINTS[case]
    write(tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match=f"checkpoint_last.pt .*{message}.*checkpoint.restore_file=FILE") as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_missing_or_unreadable_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "absent.pt"))


def _asked_by(number: int, answers: Any) -> None:
    stopping.listen()
    before = stopping.requested()
    os.kill(os.getpid(), number)
    answers.put((before, stopping.requested()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])  # SIGINT is how a spawned rank sees the death of its parent
def test_signals_only_ask_for_a_stop(number: int) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_asked_by, args=(number, answers))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and answers.get() == (0, number)
