"""The S3PRL upstream: what S3PRL gets from a model, and the patches it needs."""

from __future__ import annotations

import argparse
import importlib.util
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import hubert_eff
from hubert_eff.checkpoints.load import read_fairseq
from hubert_eff.checkpoints.open import open_model
from hubert_eff.errors import UserError
from hubert_eff.exporting.safetensors import export
from superb_tasks import patches, register
from superb_tasks.upstream.expert import UpstreamExpert

from ..helpers.pages import BLOCK, page

LENGTHS = [16000, 15999, 8000, 719, 250, 31999, 12345]  # samples


@pytest.fixture(scope="module")
def upstream() -> UpstreamExpert:
    return UpstreamExpert("conformer-debug").eval()


@pytest.fixture(scope="module")
def wavs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in LENGTHS]


def test_states_are_the_models_own_every_20_ms(upstream, wavs):
    result = upstream(wavs[:1])
    with torch.no_grad():
        expected, _ = upstream.model.hidden_states(wavs[0][None])
    assert upstream.get_downsample_rates("hidden_states") == 320
    assert len(result["hidden_states"]) == upstream.model.config.encoder_layers + 1
    for index, (state, reference) in enumerate(zip(result["hidden_states"], expected, strict=True)):
        assert state.shape == (1, 49, 64)
        assert torch.equal(state, result[f"hidden_state_{index}"])
        torch.testing.assert_close(state, reference)
    assert torch.equal(result["last_hidden_state"], result["hidden_states"][-1])


def test_features_do_not_depend_on_the_batch(upstream, wavs):
    with torch.no_grad():
        batch = upstream(wavs)["hidden_states"]
        assert {state.shape for state in batch} == {(len(wavs), 99, 64)}
        for row, wav in enumerate(wavs):
            alone = upstream([wav])["hidden_states"]
            frames, taken = alone[0].shape[1], min(99, math.ceil(len(wav) / 320))
            for single, state in zip(alone, batch):
                torch.testing.assert_close(state[row, :frames], single[0], atol=1e-4, rtol=0)
                # S3PRL takes a frame for every 320 samples begun: the last frame is repeated, and zeros follow
                assert torch.equal(state[row, frames:taken], state[row, frames - 1].expand(max(0, taken - frames), -1))
                assert not state[row, max(frames, taken) :].any()


def test_gradients_reach_the_model_and_masks_stay_off(wavs):
    expert = UpstreamExpert("transformer-debug").train()
    expert(wavs[:2])["last_hidden_state"].square().sum().backward()
    assert all(p.grad is not None for p in expert.model.encoder.layers.parameters())
    assert expert.model.mask_emb.grad is None


def test_untrained_models_are_seeded_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    names = ("conformer-debug", "conformer-debug@0", "conformer-debug@1")
    weights = [open_model(name).state_dict()["final_proj.weight"] for name in names]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_checkpoint_gives_the_features_of_its_model(tmp_path, wavs):
    model = hubert_eff.build("conformer-debug").eval()
    export(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected, _ = model.hidden_states(wavs[0][None])
        states = UpstreamExpert(str(tmp_path / "model.safetensors"))(wavs[:1])["hidden_states"]
    for state, reference in zip(states, expected, strict=True):
        torch.testing.assert_close(state, reference)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no model is named"),
        ("conformer-debgu", "did you mean 'conformer-debug'"),
        ("conformer-debug@x", "must be a number"),
        ("models/absent.pt", "no checkpoint at models/absent.pt"),
    ],
)
def test_a_source_that_is_none_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        open_model(source)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint"):
        UpstreamExpert(str(file))
    with pytest.raises(UserError, match="holds its own"):
        UpstreamExpert("conformer-debug", model_config="config.yaml")


def test_s3prl_finds_the_upstream_and_reads_its_features(wavs):
    pytest.importorskip("s3prl")
    register()
    from s3prl import hub
    from s3prl.nn import S3PRLUpstream

    assert "hubert_eff" in hub.options()
    upstream = S3PRLUpstream("hubert_eff", "conformer-debug").eval()
    assert (upstream.num_layers, upstream.hidden_sizes, upstream.downsample_rates) == (3, [64] * 3, [320] * 3)
    lengths = torch.tensor(LENGTHS[:3])
    with torch.no_grad():
        states, frames = upstream(torch.nn.utils.rnn.pad_sequence(wavs[:3], batch_first=True), lengths)
        assert frames[0].tolist() == [50, 50, 25]
        for row, wav in enumerate(wavs[:3]):
            single, count = upstream(wav[None], lengths[row : row + 1])
            for state, alone in zip(states, single):
                torch.testing.assert_close(state[row, : int(count[0])], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", [("superb_tasks", "s3prl"), ("s3prl.hub", "superb_tasks")])
def test_importing_the_bridge_is_enough(order):
    pytest.importorskip("s3prl")
    code = (
        "\n".join(f"import {name}" for name in order)
        + """
from s3prl.nn import S3PRLUpstream
import s3prl.hub
assert s3prl.hub.hubert_eff.__module__ == "superb_tasks.upstream.hubconf"
print(S3PRLUpstream("hubert_eff", path_or_url="conformer-debug@0").num_layers)
"""
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3", done.stderr
    assert order[0] != "superb_tasks" or "ESPnet" not in done.stderr  # S3PRL remarks on it where it is imported first


def test_the_python_lines_of_the_page_run(capsys):
    pytest.importorskip("s3prl")
    [lines] = [body for run, language, body in BLOCK.findall(page("superb")) if run and language == "python"]
    exec(lines.replace("runs/digits/pretrain/checkpoint_best.pt", "conformer-debug"), {})
    assert capsys.readouterr().out.splitlines()[-2:] == ["3 torch.Size([2, 100, 64]) tensor([100,  50])", "torch.Size([1, 99, 64])"]


def test_troubleshooting_quotes_what_s3prl_says_without_the_import(monkeypatch):
    pytest.importorskip("s3prl")
    register()
    from s3prl import hub
    from s3prl.nn import S3PRLUpstream

    monkeypatch.delattr(hub, "hubert_eff")  # as before `import superb_tasks`
    with pytest.raises(AttributeError) as error:
        S3PRLUpstream("hubert_eff", path_or_url="conformer-debug")
    assert f"| `{error.value}` |" in page("troubleshooting")


def test_a_missing_s3prl_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hubert-eff\[superb\]'"):
        register()


def test_effects_are_those_of_sox(tmp_path):
    generator = np.random.default_rng(0)
    stereo = generator.uniform(-0.5, 0.5, (8000, 2)).astype(np.float32)
    sf.write(tmp_path / "a.wav", stereo, 8000, subtype="FLOAT")
    wav, rate = patches.apply_effects_file(tmp_path / "a.wav", [["channels", "1"], ["gain", "-3.0"]])
    assert rate == 8000
    np.testing.assert_allclose(wav.numpy(), stereo.mean(1)[None] * 10 ** (-3 / 20), atol=1e-7)
    loud, _ = patches.apply_effects_tensor(wav, rate, [["gain", "40"]])
    assert loud.abs().max() == 1  # clipped at full scale

    tone = torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 8000)[None]
    resampled, rate = patches.apply_effects_tensor(tone, 8000, [["rate", "16000"]])
    assert (rate, resampled.shape) == (16000, (1, 16000))
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    torch.testing.assert_close(resampled[0, 1000:-1000], expected[1000:-1000], atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="'silence 1 0.1' needs libsox"):
        patches.apply_effects_tensor(tone, 8000, [["silence", "1", "0.1"]])


def test_processes_share_what_a_sampler_draws():
    class Drawn(torch.utils.data.Sampler):
        def __init__(self):
            self.indices = [5, 3, 3, 8, 1, 7, 0]

        def __iter__(self):
            return iter(self.indices)

        def __len__(self):
            return len(self.indices)

    shares = [list(patches.DistributedSamplerWrapper(Drawn(), num_replicas=2, rank=rank)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert shares[0] == [5, 3, 1, 0]  # every second one
    assert shares[1] == [3, 8, 7, 5]  # filled up from the start


def test_upstreams_that_need_transformers_are_imported_when_built(tmp_path, monkeypatch):
    (tmp_path / "late_expert.py").write_text("class UpstreamExpert:\n    def __init__(self, ckpt):\n        self.ckpt = ckpt\n")
    monkeypatch.syspath_prepend(tmp_path)
    stand_in = types.ModuleType("late_expert")
    monkeypatch.setitem(sys.modules, "late_expert", stand_in)
    built = patches._build_expert(stand_in, "file.pt")
    assert built.ckpt == "file.pt" and type(built).__module__ == "late_expert" and sys.modules["late_expert"] is not stand_in
    assert patches._build_expert(stand_in, ckpt="again").ckpt == "again"


def test_checkpoints_of_run_downstream_can_be_read_back(tmp_path):
    patches.apply()
    torch.save({"Args": argparse.Namespace(mode="train"), "Step": 3}, tmp_path / "states-3.ckpt")
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    read_fairseq(tmp_path / "checkpoint.pt")  # an upstream loaded in between
    assert torch.load(tmp_path / "states-3.ckpt")["Args"].mode == "train"


@pytest.mark.parametrize("keys", [{}, {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}], ids=["base", "large"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weighted_sum_is_that_of_s3prls_hubert_for_a_stock_checkpoint(tmp_path, keys, normalize):
    """The same file of random weights, through S3PRL's own upstream and ours, and S3PRL's featurizer with weights that differ."""
    pytest.importorskip("s3prl")
    pytest.importorskip("fairseq")
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
    from omegaconf import OmegaConf

    dictionary = Dictionary()
    for symbol in range(9):
        dictionary.add_symbol(str(symbol))
    cfg = OmegaConf.structured(
        HubertConfig(
            label_rate=50.0, encoder_layers=3, encoder_embed_dim=32, encoder_ffn_embed_dim=64, encoder_attention_heads=4, final_dim=8,
            encoder_layerdrop=0.5, conv_feature_layers="[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2", **keys,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    model = HubertModel(cfg, HubertPretrainingConfig(sample_rate=16_000), [dictionary])
    model_cfg = {**OmegaConf.to_container(cfg, resolve=True, enum_to_str=True), "_name": "hubert"}
    stock, converted = tmp_path / "stock.pt", tmp_path / "converted.pt"
    states = {"dictionaries": [dictionary]}
    torch.save({"cfg": {"model": model_cfg, "task": {"normalize": normalize}}, "model": model.state_dict(), "task_state": states}, stock)
    # S3PRL reads this form, which its convert.py makes of the other
    parts = {"task_cfg": {"normalize": normalize}, "model_cfg": model_cfg, "model_weight": model.state_dict()}
    torch.save({**parts, "dictionaries_symbols": [dictionary.symbols]}, converted)

    register()
    from s3prl import hub
    from s3prl.upstream.interfaces import Featurizer

    upstreams = [hub.hubert_custom(str(converted)), hub.hubert_eff(str(stock))]
    weights = torch.randn(4)
    features = []
    wavs = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (16000, 12345, 31999)]
    for upstream in upstreams:
        featurizer = Featurizer(upstream.eval(), upstream_device="cpu")
        featurizer.weights.data.copy_(weights)
        assert (featurizer.layer_num, featurizer.downsample_rate) == (4, 320)
        with torch.no_grad():
            features.append([*featurizer(wavs, upstream(wavs)), *(featurizer([wav], upstream([wav]))[0] for wav in wavs)])
    for theirs, ours in zip(*features, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
