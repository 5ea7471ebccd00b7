"""What S3PRL reads from the generated data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import superb_tasks
from superb_tasks.data.generators import librispeech, snips, voxceleb

pytest.importorskip("espeakng_loader")


# -- read by S3PRL ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3prl():
    """S3PRL's modules, patched to run offline; a network access fails."""
    pytest.importorskip("s3prl")
    superb_tasks.register()
    from s3prl import problem
    from s3prl.util import download

    def offline(*_, **__):
        raise AssertionError("S3PRL tried to download")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_download_url_to_file", offline)
        patch.setattr(download, "_download_url_to_file_requests", offline)
        yield problem


def batch_of(problem, dataset, mode: str, target: Path, **more) -> dict:
    """The first batch that a problem's sampler and collate function make of a data set."""
    sampler = problem.build_batch_sampler(
        problem.default_config()["build_batch_sampler"], target_dir=target, cache_dir=target, mode=mode, dataset=dataset, **more
    )
    return problem.build_collate_fn({}, mode)([dataset[index] for index in next(iter(sampler))])


def read_text_task(problem, target: Path, **prepare) -> tuple[list, dict]:
    """Prepare a task with transcripts as S3PRL does; the data frames of the three splits and a batch of validation."""
    import pandas as pd

    config = problem.default_config()
    train, valid, tests = problem.prepare_data({**config["prepare_data"], **prepare}, target, target)
    text = problem.prepare_tokenizer_data({}, target, target, train, valid, tests)
    tokenizer = problem.build_tokenizer(config["build_tokenizer"], target, target, text)
    dataset = problem.build_dataset({}, target, target, "valid", valid, tokenizer)
    return [pd.read_csv(path) for path in (train, valid, *tests)], batch_of(problem, dataset, "valid", target, data_csv=valid)


def test_s3prl_reads_asr(s3prl, data, tmp_path):
    frames, batch = read_text_task(s3prl.SuperbASR(), tmp_path, dataset_root=str(data / "LibriSpeech"), n_jobs=1)
    assert [len(frame) for frame in frames] == [len(list((data / "LibriSpeech" / split).rglob("*.flac"))) for split in librispeech.SPLITS]
    assert batch["x"].shape[1] > 16000 and batch["labels"][0] in frames[1]["transcription"].tolist()
    assert 2 not in batch["class_ids"]  # no unknown character


def test_s3prl_reads_pr(s3prl, data, tmp_path, monkeypatch):
    from s3prl.dataio.encoder import g2p

    monkeypatch.setattr(g2p, "_urls_to_filepaths", lambda *_: [data / "LibriSpeech" / librispeech.LEXICON])
    frames, batch = read_text_task(s3prl.SuperbPR(), tmp_path, dataset_root=str(data / "LibriSpeech"), n_jobs=1)
    assert all(re.fullmatch(r"([A-Z]{1,2}[012]? ?)+", text) for frame in frames for text in frame["transcription"])
    assert batch["class_ids"].shape[1] > 10


def test_s3prl_reads_sf(s3prl, data, tmp_path):
    frames, batch = read_text_task(s3prl.SuperbSF(), tmp_path, dataset_root=str(data / "SNIPS"))
    assert [len(frame) for frame in frames] == [len(list((data / "SNIPS" / split).glob("*.wav"))) for split in snips.SPLITS]
    assert re.search(r"B-(\w+) .+ E-\1", batch["labels"][0])
    from s3prl.downstream.ctc.text import CharacterTextSlotEncoder

    (tmp_path / "characters.txt").write_text("\n".join(" 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    encoder = CharacterTextSlotEncoder.load_from_file(tmp_path / "characters.txt", data / "SNIPS" / "slots.txt")
    assert len(encoder.slots) == 2 * len(snips.SLOTS)
    line = (data / "SNIPS" / "all.iob.snips.txt").read_text().splitlines()[0]
    assert encoder.unk_idx not in encoder.encode(line.split(" ", 1)[1])


def test_s3prl_reads_ic(s3prl, data, tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.setattr(pd.Series, "iteritems", pd.Series.items, raising=False)  # S3PRL's corpus class is written for pandas 1
    root = data / "fluent_speech_commands_dataset"
    problem = s3prl.SuperbIC()
    train, valid, tests = problem.prepare_data({"dataset_root": str(root)}, tmp_path, tmp_path)
    problem.build_encoder({}, tmp_path, tmp_path, train, valid, tests)
    encoder = problem.build_encoder({}, tmp_path, tmp_path, train, valid, tests, get_path_only=True)
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "train", train, encoder, 320)
    batch = batch_of(problem, dataset, "train", tmp_path, data_csv=train)
    assert batch["class_ids"].shape == (31, 3)  # an utterance for each intent
    from s3prl.downstream.fluent_commands.expert import DownstreamExpert

    expert = SimpleNamespace(datarc={"file_path": str(root)})
    DownstreamExpert.get_dataset(expert)
    assert expert.values_per_slot == [6, 14, 4]
    from s3prl.downstream.fluent_commands.dataset import FluentCommandsDataset

    wav, labels, _ = FluentCommandsDataset(expert.test_df, expert.base_path, expert.Sy_intent)[0]
    assert len(wav) > 8000 and labels.shape == (3,)


def test_s3prl_reads_sid(s3prl, data, tmp_path, monkeypatch):
    from s3prl.dataio.corpus.voxceleb1sid import VoxCeleb1SID
    from s3prl.downstream.voxceleb1 import dataset

    root = data / "VoxCeleb1"
    train, valid, test = VoxCeleb1SID(root, n_jobs=1, cache_root=root).data_split
    assert len(train) == 2 * len(valid) == 2 * len(test) == 48
    assert {item["label"] for item in train.values()} == {item["label"] for item in test.values()}
    monkeypatch.setattr(dataset, "CACHE_PATH", str(tmp_path))
    recordings = dataset.SpeakerClassifiDataset("dev", root, root / voxceleb.SPLIT_LIST, 128000)
    wav, label, name = recordings[0]
    assert len(recordings) == 24 and 32000 < len(wav) <= 128000 and 0 <= label < 1251
    assert set(recordings.label) == {int(item["label"].split("_")[1]) for item in train.values()}


def test_s3prl_reads_asv(s3prl, data, tmp_path):
    import pandas as pd

    root = data / "VoxCeleb1"
    lists = tmp_path / "lists"  # S3PRL leaves locks beside them
    lists.mkdir()
    for name in (voxceleb.SPLIT_LIST, voxceleb.TRIAL_LIST):
        shutil.copy(root / name, lists)
    problem = s3prl.SuperbASV()
    train, (trials,) = problem.prepare_data({"dataset_root": str(root)}, tmp_path, lists, False)
    assert len(set(pd.read_csv(train)["spk"])) == voxceleb.TRAIN_SPEAKERS
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "test", trials, None)
    assert len(dataset) == 4 * voxceleb.TEST_SPEAKERS
    assert batch_of(problem, dataset, "test", tmp_path, data_csv=trials)["x"].shape[1] > 2.5 * 16000
    from s3prl.downstream.sv_voxceleb1.dataset import SpeakerVerifi_test

    assert len(SpeakerVerifi_test({}, root / "test" / "wav", root / voxceleb.TRIAL_LIST).pair_table) == len(pd.read_csv(trials))


def test_s3prl_reads_sd(s3prl, data, tmp_path):
    from s3prl.downstream.diarization.dataset import DiarizationDataset
    from s3prl.problem.diarization.util import csv_to_kaldi_dir

    root = data / "diarization"
    problem = s3prl.SuperbSD()
    train, valid, _ = problem.prepare_data({"data_dir": str(root)}, tmp_path, tmp_path)
    csv_to_kaldi_dir(train, tmp_path / "kaldi")
    settings = problem.default_config()["build_dataset"]
    dataset = problem.build_dataset(settings, tmp_path, tmp_path, "train", train, tmp_path / "kaldi", 2, 320)
    batch = batch_of(problem, dataset, "train", tmp_path, data_csv=train, data_dir=tmp_path / "kaldi")
    assert batch["label"].shape[2] == 2 and batch["label"].any(1).all()
    wav, label = DiarizationDataset("dev", str(root / "dev"), frame_shift=320, num_speakers=2)[0]
    assert abs(len(wav) / 320 - len(label)) < 1 and label.any(0).all()


def test_s3prl_reads_qbe(s3prl, data):
    from s3prl.downstream.quesst14_dtw.dataset import QUESST14Dataset

    for split in ("dev", "eval"):
        dataset = QUESST14Dataset(split, dataset_root=str(data / "quesst14Database"))
        assert (dataset.n_queries, dataset.n_docs) == (2, len(list((data / "quesst14Database" / "Audio").iterdir())))
        wavs, names = dataset.collate_fn([dataset[0], dataset[dataset.n_queries]])
        assert len(wavs[0]) > 4000 and names == (f"quesst14_{split}_0001", "quesst14_00001")


def test_s3prl_reads_er(s3prl, data, tmp_path):
    root = data / "IEMOCAP"
    for part in ("train", "test"):
        shutil.copy(root / "meta_data" / "Session2" / f"{part}_meta_data.json", tmp_path / f"test_session2_{part}_metadata.json")
    problem = s3prl.SuperbER()
    train, valid, tests = problem.prepare_data({"iemocap": str(root), "test_fold": 1}, tmp_path, tmp_path)
    encoder = problem.build_encoder({}, tmp_path, tmp_path, train, valid, tests)
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "test", tests[0], encoder, 320)
    assert len(dataset) == 16
    assert batch_of(problem, dataset, "test", tmp_path, data_csv=tests[0])["x"].shape[0] == 4
    from s3prl.downstream.emotion import IEMOCAP_preprocess
    from s3prl.downstream.emotion.dataset import IEMOCAPDataset

    meta = root / "meta_data" / "Session2" / "test_meta_data.json"
    recordings = IEMOCAPDataset(str(root), meta, pre_load=False)
    assert len(recordings) == 16 and recordings[0][1] in range(4)
    IEMOCAP_preprocess.preprocess(str(root), ["Session2"], tmp_path / "made.json")
    made, ours = (json.loads(path.read_text()) for path in (tmp_path / "made.json", meta))
    assert made["labels"] == ours["labels"] and sorted(made["meta_data"], key=str) == sorted(ours["meta_data"], key=str)
