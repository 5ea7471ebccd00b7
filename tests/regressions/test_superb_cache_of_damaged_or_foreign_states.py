"""Damaged files of the SUPERB cache were used, and neither it nor a finished result knew which weights and code they are of."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import HubertModel
from superb_tasks.data import layouts
from superb_tasks.results import tables as results
from superb_tasks.running import fingerprints, settings
from superb_tasks.running.cache import CachedUpstream
from superb_tasks.tasks import TASKS
from superb_tasks.upstream.expert import UpstreamExpert

LIMIT = 10**9


@pytest.fixture(scope="module")
def expert() -> UpstreamExpert:
    return UpstreamExpert("conformer-debug").eval()


def save(file: Path, states: np.ndarray) -> None:
    np.save(file, states)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "cut by a digest": lambda file: file.write_bytes(file.read_bytes()[:-16]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a tail of zeros": lambda file: file.write_bytes(file.read_bytes()[:4096] + bytes(file.stat().st_size - 4096)),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:5000] + b"\x01" + file.read_bytes()[5001:]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "huge": lambda file: os.truncate(file, 1 << 40),
    "a plain array": lambda file: save(file, np.load(file)),
    "another shape": lambda file: save(file, np.load(file)[:, :10]),
    "no number": lambda file: save(file, np.full_like(np.load(file), np.nan)),
    "text": lambda file: file.write_text("no array"),
    "pickled": lambda file: np.save(file, np.array([{}], dtype=object), allow_pickle=True),
    "another recording's": lambda file: shutil.copy(next(f for f in file.parents[1].rglob("*.npy") if f != file), file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file)),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_once_and_made_anew(what: str, expert: UpstreamExpert, tmp_path: Path, capsys) -> None:
    wavs = [0.1 * torch.randn(4000), 0.1 * torch.randn(4000)]
    [first, _] = CachedUpstream(expert, tmp_path, LIMIT)(wavs)["last_hidden_state"]
    file = CachedUpstream(expert, tmp_path, LIMIT)._file(wavs[0])
    sound = file.read_bytes()
    DAMAGE[what](file)
    again = CachedUpstream(expert, tmp_path, LIMIT)
    for _ in range(2):
        assert torch.equal(again(wavs)["last_hidden_state"][0], first)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and "made anew" in said
    assert file.read_bytes() == sound and again.left >= LIMIT - 2 * len(sound)


def test_a_cache_that_cannot_be_written_stops_nothing(expert: UpstreamExpert, tmp_path: Path, capsys) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cached = CachedUpstream(expert, tmp_path / "cache" / "model", LIMIT)
    for _ in range(2):
        assert torch.isfinite(cached([0.1 * torch.randn(4000)])["last_hidden_state"]).all()
    assert capsys.readouterr().err.count("\n") == 1


def test_states_of_other_code_are_not_used(expert: UpstreamExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    wavs = [0.1 * torch.randn(4000)]
    CachedUpstream(expert, tmp_path, LIMIT).verify()
    before = CachedUpstream(expert, tmp_path, LIMIT)(wavs)["last_hidden_state"]
    hidden_states = HubertModel.hidden_states
    monkeypatch.setattr(HubertModel, "hidden_states", lambda self, wav, *more, **others: hidden_states(self, wav * 0, *more, **others))
    changed = CachedUpstream(expert, tmp_path, LIMIT)
    changed.verify()
    assert "made anew" in capsys.readouterr().err
    expected = expert(wavs)["last_hidden_state"]
    torch.testing.assert_close(changed(wavs)["last_hidden_state"], expected, atol=2e-3, rtol=2e-3)
    assert (before - expected).norm() > 0.1 * expected.norm()
    again = CachedUpstream(expert, tmp_path, LIMIT)
    again.verify()
    assert capsys.readouterr().err == ""


def test_code_has_a_fingerprint_that_comments_do_not_change(tmp_path: Path) -> None:
    for package in ("hubert_eff", "superb_tasks"):
        shutil.copytree(fingerprints.ROOT / package, tmp_path / "a" / package, ignore=shutil.ignore_patterns("__pycache__", "configs"))
    found = fingerprints.of_code(tmp_path / "a")
    assert found == fingerprints.of_code()

    def changed(file: str, old: str, new: str) -> bool:
        fingerprints.of_code.cache_clear()
        path = tmp_path / "a" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        try:
            return fingerprints.of_code(tmp_path / "a") != found
        finally:
            path.write_text(text)

    model = str(Path(str(inspect.getsourcefile(HubertModel))).relative_to(fingerprints.ROOT))
    states = "features, frames = self._extract(wav, padding_mask)"
    assert changed(model, states, states.replace("wav", "wav * 0"))
    assert not changed(model, '"""HuBERT in plain torch', '# a remark\n"""HuBERT in torch alone')
    assert not changed("hubert_eff/cli.py", "import", "import os\nimport")


def test_a_model_is_known_by_its_weights_and_configuration() -> None:
    torch.manual_seed(1)
    model = hubert_eff.build("conformer-debug").eval()
    ours = fingerprints.of_model(model)
    other = hubert_eff.build("conformer-debug", normalize=True).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    assert fingerprints.of_model(hubert_eff.build("conformer-debug").eval()) == ours
    halves = fingerprints.of_model(hubert_eff.build("conformer-debug").bfloat16())
    assert len({ours, fingerprints.of_model(other), halves}) == 3
    with torch.no_grad():
        model.layer_norm.bias[0] += 1e-3
    assert fingerprints.of_model(model) != ours


def test_a_result_is_found_by_content_and_a_run_goes_on_at_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "copy"):
        for folder in ("speech_commands_v0.01", "speech_commands_test_set_v0.01"):
            (tmp_path / name / folder).mkdir(parents=True)
            sf.write(tmp_path / name / folder / "yes.wav", np.full(16_000, 0.1), 16_000)
    monkeypatch.chdir(tmp_path)
    task, out = TASKS["ks"], tmp_path / "out"

    def of(upstream: str, data: str) -> dict:
        request = settings.Request(upstream, Path(data), device="cpu")
        return settings.of_result(task, request, settings.of_upstream(request.upstream))

    first = of("conformer-debug", "data")
    out.mkdir()
    (out / settings.SETTINGS).write_text(json.dumps({**first, "paths": settings.paths_of(first, out)}))
    assert settings.goes_on(task, of("conformer-debug", "../" + tmp_path.name + "/data/."), out)
    assert not settings.goes_on(task, of("conformer-debug@0", "copy"), out)  # S3PRL's checkpoints name the first paths
    (out / settings.RESULT).write_text(json.dumps({**first, "task": "ks", "accuracy": 0.5}))
    assert settings.goes_on(task, of("conformer-debug@0", "copy"), out) and not settings.goes_on(task, of("conformer-debug@1", "data"), out)
    assert not settings.goes_on(task, {**first, "code": "other"}, out)
    # as many bytes, other content
    sf.write(tmp_path / "copy" / "speech_commands_v0.01" / "yes.wav", np.full(16_000, 0.2), 16_000)
    assert not settings.goes_on(task, of("conformer-debug@0", "copy"), out)
    assert "begun anew; what it found stands in earlier.jsonl" in settings.begin(task, {**first, "seed": 2}, out)
    assert sorted(path.name for path in out.iterdir()) == [settings.EARLIER, settings.SETTINGS]
    assert json.loads((out / settings.EARLIER).read_text())["accuracy"] == 0.5


def test_recordings_that_are_none_are_refused_before_work_starts(tmp_path: Path) -> None:
    sf.write(tmp_path / "sound.wav", np.zeros(800), 16_000)
    (tmp_path / "._sound.wav").write_bytes(b"of macOS")
    (tmp_path / "again").symlink_to(tmp_path)
    layouts.check_recordings([tmp_path])
    os.mkfifo(tmp_path / "pipe.wav")
    sf.write(tmp_path / "nan.wav", np.full(800, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "empty.flac").touch()
    with pytest.raises(UserError, match=r"empty\.flac \(.*nan\.wav \(.*pipe\.wav \(no regular file") as said:
        layouts.check_recordings([tmp_path])
    assert "\n" not in str(said.value)


def test_a_report_says_which_data_a_result_is_of(tmp_path: Path) -> None:
    common = {"task": "ks", "sha256": None, "steps": 3, "checkpoints": ["lr/states.ckpt"], "utterances": 30}
    for name, data, value in (("a", settings.GENERATED, 0.5), ("b", "Speech Commands v1", 0.75)):
        (tmp_path / name).mkdir()
        values = {**common, "upstream": f"conformer-debug@{value}", "accuracy": value, "data_set": data, "data_sha256": 64 * name}
        (tmp_path / name / "result.json").write_text(json.dumps(values))
    table = results.report([tmp_path / "a", tmp_path / "b"])
    _, rows = results.cells(table)
    column = [row for row in rows if row[1] == results.OURS]
    assert ["50.00°" in row for row in column] == [True, False] and ["75.00" in row for row in column] == [False, True]
    text = results.markdown(table)
    assert "ks generated data (aaaaaaaa, 30 utterances), Speech Commands v1 (bbbbbbbb, 30 utterances)" in text
