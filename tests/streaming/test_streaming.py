"""Running in chunks: a stream gives what the masked full pass gives, for every encoder and however the audio is cut."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.config import FRAME_STRIDE
from hubert_eff.encoders.transformer import TransformerEncoder
from hubert_eff.errors import UserError
from hubert_eff.layers.sparse import SparsePattern, sparse_attention
from hubert_eff.streaming.live import run_stream
from hubert_eff.streaming.stream import StreamingModel, parse_mode

from ..helpers.streams import cut_at_random, fed, reference, streaming_model

ENCODERS = [name for name in hubert_eff.list_encoders() if hubert_eff.build(f"{name}-debug").encoder.chunk_multiple is not None]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("context", ["chunk", "causal"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_stream_equals_the_masked_full_pass_for_any_cut(encoder: str, context: str, fused: bool) -> None:
    model = streaming_model(f"{encoder}-debug", conv_context=context)
    wav = torch.randn(1, 16_077)
    expected = {chunks: reference(model, wav, *chunks) for chunks in ((16, 1), (8, -1))}
    model = hubert_eff.fuse(model) if fused else model
    for chunks, states in expected.items():
        stream = StreamingModel(model, *chunks)
        for longest in (9_000, 300):
            torch.testing.assert_close(fed(stream, cut_at_random(wav, longest)), states, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", ["fixed", "fairseq", "local"])
def test_sparse_attention_streams_with_every_pattern(pattern: str) -> None:
    model = streaming_model(
        "sparseformer-debug", sparse_pattern=pattern, sparse_stride=24, sparse_expressivity=5, sparse_window=20, layer_norm_first=True
    )
    wav = torch.randn(1, 48_000)
    for chunks in ((16, 4), (8, -1)):
        torch.testing.assert_close(
            fed(StreamingModel(model, *chunks), cut_at_random(wav, 9_000)), reference(model, wav, *chunks), rtol=0, atol=1e-4
        )
    with torch.no_grad():  # one chunk that holds all: the pattern alone
        whole, chunked = (model.hidden_states(wav, chunk_size=size)[0][-1] for size in (None, 800))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 23, 24, 25, 77])
@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_a_pattern_as_a_mask_is_the_pattern(kind: str, frames: int) -> None:
    pattern = SparsePattern(kind, 12, 3, 7)
    q, k, v = torch.randn(3, 1, 2, frames, 8).unbind(0)
    place = torch.arange(frames)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pattern.sees(place, place))
    torch.testing.assert_close(sparse_attention(q, k, v, pattern), dense)


def test_sample_by_sample() -> None:
    model = streaming_model("conformer-debug")
    wav = torch.randn(1, 3_000)
    stream = StreamingModel(model, 2, 1)
    when, outputs = [], []
    for sample in range(wav.size(1)):
        y = stream.feed(wav[:, sample : sample + 1])
        if y is not None:
            when.append(sample + 1)
            outputs.append(y)
    assert when == [320 + 400 + 640 * n for n in range(len(when))]  # as soon as the last sample of the second frame is there
    assert stream.latency == 720 / 16_000
    outputs.append(stream.flush())
    torch.testing.assert_close(torch.cat(outputs, 1), reference(model, wav, 2, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_frame_sees_beyond_its_chunk_nor_too_far_back(encoder: str) -> None:
    model = streaming_model(f"{encoder}-debug", conv_pos=8)
    reach = 16 * (model.config.encoder_layers + 1)  # of convolutions, each into the next chunk, where the next block's attention spreads it
    wav = torch.randn(1, (reach + 16) * FRAME_STRIDE + 80)
    alone, all_left = (reference(model, wav, 16, left) for left in (0, -1))
    late, early = wav.clone(), wav.clone()
    late[:, 32 * FRAME_STRIDE + 80 :] += torch.randn(1, (reach - 16) * FRAME_STRIDE)  # what no frame of the first two chunks hears
    after = reference(model, late, 16, 0)
    assert torch.equal(after[:, :32], alone[:, :32]) and not torch.allclose(after[:, 32:48], alone[:, 32:48])
    early[:, :FRAME_STRIDE] += torch.randn(1, FRAME_STRIDE)
    assert torch.equal(reference(model, early, 16, 0)[:, reach:], alone[:, reach:])
    assert not torch.equal(reference(model, early, 16, -1)[:, reach:], all_left[:, reach:])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing_in_chunks(encoder: str, training: bool) -> None:
    keys = {"dropout": 0.0, "attention_dropout": 0.0, "required_seq_len_multiple": 6}
    model = streaming_model(f"{encoder}-debug", **keys).train(training)
    wav, padding = torch.randn(2, 20_000), torch.zeros(2, 20_000, dtype=torch.bool)
    padding[1, 9_000:] = True
    noisy = torch.where(padding, 100.0, wav)
    rows = []
    for audio in (wav, noisy):
        torch.manual_seed(1)  # what an encoder draws in training must not differ
        states, frames = model.hidden_states(audio, padding, chunk_size=8, left_chunks=1)
        sum(s.square().sum() for s in states).backward()
        rows.append((states, [p.grad for p in model.parameters()]))
        model.zero_grad()
    for a, b in zip(rows[0][0], rows[1][0]):
        assert torch.equal(a, b) and torch.isfinite(a).all() and not a[frames].any()
    assert all(torch.isfinite(g).all() for g in rows[0][1] if g is not None)
    if not training:
        alone = model.hidden_states(wav[1:, :9_000], chunk_size=8, left_chunks=1)[0][-1]
        torch.testing.assert_close(rows[0][0][-1][1, : alone.size(1)], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_one_chunk_of_all_frames_is_the_whole_utterance(encoder: str) -> None:
    model = streaming_model(f"{encoder}-debug", encoder_layerdrop=0.0)
    wav = torch.randn(2, 12_000)
    whole, chunked = (model.hidden_states(wav, chunk_size=size)[0] for size in (None, 48))
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_memory_is_constant_in_time(encoder: str) -> None:
    stream = StreamingModel(streaming_model(f"{encoder}-debug"), 8, 2)
    sizes = []
    for _ in range(6):
        stream.feed(torch.randn(1, 8 * FRAME_STRIDE))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(stream)}
        sizes.append((stream.state().elements, sum(storages.values())))
    assert sizes[3] == sizes[4] == sizes[-1] > sizes[0]


def _tensors(stream: StreamingModel) -> list[Tensor]:
    kept = [part for parts in stream.state().kept.values() for part in parts]
    return [stream.state().samples, *kept, *(t for _, t in stream._chunks.tables.values() if t is not None)]


def test_the_module_is_there_without_an_import_of_its_own() -> None:
    assert hubert_eff.__getattr__("streaming").StreamingModel is StreamingModel


def test_a_stream_pauses_and_goes_on_elsewhere() -> None:
    model = streaming_model("zipformer-debug")
    wav = torch.randn(1, 40_000)
    first, second = StreamingModel(model), StreamingModel(model)
    head = first.feed(wav[:, :17_000])
    state = first.state()
    first.feed(torch.randn(1, 30_000))  # which the state does not see
    second.feed(torch.randn(1, 5_000))
    second.restore(state)
    torch.testing.assert_close(torch.cat((head, fed(second, [wav[:, 17_000:]])), 1), reference(model, wav, 16, 4), rtol=0, atol=1e-4)
    second.restore(state)  # again, from where it was
    torch.testing.assert_close(fed(second, [wav[:, 17_000:]]), reference(model, wav, 16, 4)[:, 48:], rtol=0, atol=1e-4)
    for other in (StreamingModel(model, 16, 3), StreamingModel(streaming_model("zipformer-debug"))):
        with pytest.raises(UserError, match="state is of another model, or of other chunks"):
            other.restore(state)


def test_what_cannot_stream_is_refused_with_the_reason() -> None:
    model = streaming_model("conformer-debug")
    for size, left, message in (
        (0, 4, "chunk_size=0 must be a whole number, at least 1"),
        (2.5, 4, "chunk_size=2.5 must be"),
        (16, -2, "left_chunks=-2 must be"),
        (None, 4, "chunk_size=None is the whole utterance"),
    ):
        with pytest.raises(UserError, match=message):
            StreamingModel(model, size, left)
    with pytest.raises(UserError, match="chunk_size=0 must be"):
        model.hidden_states(torch.randn(1, 8_000), chunk_size=0)
    with pytest.raises(UserError, match="normalizes over the whole utterance.*streaming=true"):
        StreamingModel(hubert_eff.build("conformer-s"))
    with pytest.raises(UserError, match="see beyond the end of a chunk"):
        hubert_eff.build("conformer-debug").hidden_states(torch.randn(1, 8_000), chunk_size=16)
    with pytest.raises(UserError, match="chunk_size=6 must be a multiple of 4"):
        StreamingModel(streaming_model("zipformer-debug"), 6)
    with pytest.raises(UserError, match="normalize=true needs the whole utterance"):
        streaming_model("conformer-debug", normalize=True)
    with pytest.raises(UserError, match="cannot stream a Linear"):
        StreamingModel(torch.nn.Linear(2, 2))


def test_an_encoder_that_does_not_declare_chunks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerEncoder, "chunk_multiple", None)
    model = streaming_model("transformer-debug")
    with pytest.raises(UserError, match="a TransformerEncoder does not run in chunks"):
        StreamingModel(model)
    with pytest.raises(UserError, match="a TransformerEncoder does not run in chunks"):
        streaming_model("transformer-debug", chunk_sizes="16")


def test_bad_audio_is_refused_and_the_stream_goes_on() -> None:
    model = streaming_model("fusionformer-debug")
    wav = torch.randn(1, 20_000)
    stream = StreamingModel(model)
    head = stream.feed(wav[:, :9_000])
    broken = wav[:, 9_000:].clone()
    broken[0, 7], broken[0, 9] = float("nan"), float("inf")
    with pytest.raises(UserError, match=r"2 samples are not finite, the first \(sample 7 of this piece\) is nan"):
        stream.feed(broken)
    with pytest.raises(UserError, match=r"audio \(1, samples\), not \(9000,\)"):
        stream.feed(wav[0, :9_000])
    with pytest.raises(UserError, match="float samples"):
        stream.feed(torch.zeros(1, 10, dtype=torch.int16))
    rest = fed(stream, [wav[:, 9_000:]])
    torch.testing.assert_close(torch.cat((head, rest), 1), reference(model, wav, 16, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("text, mode", [("16-4", (16, 4)), ("16-inf", (16, -1)), ("full", (None, -1)), ("8-0", (8, 0))])
def test_modes(text: str, mode: tuple[int | None, int]) -> None:
    assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["16", "16-", "-4", "fast", "16-4-2", "\u00b2-4", ""])
def test_unknown_modes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="unknown mode"):
        parse_mode(text)


def test_chunks_of_training_are_drawn_by_seed_and_update() -> None:
    keys = {"streaming": True, "chunk_sizes": "8,16,0", "left_chunks": "4,-1,0"}

    def draws(seed: int) -> list[tuple[int | None, int]]:
        model = hubert_eff.build("conformer-debug", seed=seed, **keys)
        drawn = []
        for update in range(60):
            model.set_num_updates(update)
            drawn.append(model.draw_chunks())
            assert drawn[-1] == model.draw_chunks()
        return drawn

    assert draws(1) == draws(1) != draws(2)
    assert set(draws(1)) == set(itertools.product((8, 16, None), (4, -1, 0)))
    model = hubert_eff.build("conformer-debug", **keys)
    assert model.eval().draw_chunks() == (8, 4)  # the first ones
    assert hubert_eff.build("conformer-debug").draw_chunks() == (None, -1)


def test_training_runs_in_the_chunks_that_are_drawn() -> None:
    """The same batch in train mode, twice: chunks of one frame alone cannot give what the whole utterance gives."""
    wav = torch.randn(1, 8_000)
    torch.manual_seed(3)
    keys = {"dropout": 0.0, "attention_dropout": 0.0, "streaming": True}
    model = hubert_eff.build("fusionformer-debug", chunk_sizes="4", left_chunks="1", **keys)
    whole = hubert_eff.build("fusionformer-debug", **keys)
    whole.load_state_dict(model.state_dict())
    x, y = (m(wav, features_only=True, mask=False)["x"] for m in (model, whole))
    expected = whole.hidden_states(wav, chunk_size=4, left_chunks=1)[0][-1]
    torch.testing.assert_close(x, expected)
    assert not torch.allclose(x, y, atol=1e-2)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"chunk_sizes": "16"}, "chunk_sizes='16' needs streaming=true"),
        ({"streaming": True, "chunk_sizes": "a"}, "chunk_sizes='a' must be whole numbers"),
        ({"streaming": True, "chunk_sizes": "-4"}, "chunk_sizes='-4' must be whole numbers, at least 0"),
        ({"left_chunks": "-2"}, "left_chunks='-2' must be whole numbers, at least -1"),
        ({"left_chunks": ""}, "left_chunks='' must be whole numbers"),
        ({"conv_context": "future"}, "unknown value of conv_context"),
    ],
)
def test_impossible_chunks_in_a_configuration_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hubert_eff.build("conformer-debug", **keys)


def test_chunks_that_the_encoder_cannot_take_are_refused_before_training() -> None:
    with pytest.raises(UserError, match="chunk_size=6 must be a multiple of 4"):
        hubert_eff.build("zipformer-debug", streaming=True, chunk_sizes="16,6")


def test_a_file_or_a_pipe_is_streamed_to_a_file(tmp_path: Path) -> None:
    model = streaming_model("conformer-debug")
    samples = (torch.rand(1, 21_000) * 30_000 - 15_000).to(torch.int16)
    expected = reference(model, samples.float() / 32_768, 16, 4)[0]
    soundfile.write(tmp_path / "a.wav", samples[0].numpy(), 16_000, subtype="PCM_16")
    for source, pipe in ((tmp_path / "a.wav", None), ("-", io.BytesIO(samples.numpy().astype("<i2").tobytes()))):
        report = run_stream(model, source, "16-4", tmp_path / "out.npy", pipe)
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, rtol=0, atol=1e-4)
        assert report.frames == 65 and report.chunks == 5
        assert report.seconds == 21_000 / 16_000 and report.rtf == report.compute_s / report.seconds > 0
        assert "RTF" in str(report) and report.plain()["rtf"] == report.rtf
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.wav", "out.npy"]


def test_the_command_streams_a_preset_or_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streaming_model("fusionformer-debug")
    wav = torch.randn(16_000) * 0.1
    soundfile.write(tmp_path / "a.wav", wav.numpy(), 16_000, subtype="FLOAT")
    hubert_eff.export(model, tmp_path / "model.safetensors")
    command = ["run", str(tmp_path / "model.safetensors"), str(tmp_path / "a.wav"), "--stream", "8-2", "--out", str(tmp_path / "out.npy")]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] == 49 and report["mode"] == "8-2" and report["rtf"] > 0
    assert report.keys() >= {"latency_s", "compute_s", "first_ms", "p50_ms", "p95_ms", "slowest_ms"}
    stream = StreamingModel(model, 8, 2)
    stream.feed(wav[None])
    assert report["state_bytes"] == stream.state().nbytes == 4 * stream.state().elements > 0  # float32
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), reference(model, wav[None], 8, 2)[0], rtol=0, atol=1e-4)
    pcm = (wav * 32_768).to(torch.int16).numpy().astype("<i2").tobytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pcm)))
    assert main(["run", "conformer-debug", "-", "--stream", "16-4"]) == 0
    said = capsys.readouterr().out
    assert (
        "s heard, 16 frames" in said.splitlines()[0]
        and "RTF" in said
        and "p95" in said
        and re.search(r"the stream keeps [\d,]+\.\d kB", said)
    )
    hubert_eff.export(hubert_eff.build("conformer-debug"), tmp_path / "other.safetensors")
    wave = str(tmp_path / "a.wav")
    wav[8_003] = torch.nan
    soundfile.write(tmp_path / "nan.wav", wav.numpy(), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "r8.wav", np.zeros(800), 8_000)
    for words, message in (
        (["conformer-debug", str(tmp_path / "r8.wav"), "--stream", "16-4"], "has 1 channel at 8000 Hz: a stream takes mono at 16000 Hz"),
        (["conformer-debug", str(tmp_path / "r8.wav"), "--stream", "16-4"], "r8.wav -ar 16000 -ac 1 OUT.wav"),
        (["conformer-debug", wave, wave, "--stream", "16-4"], "takes one file, or - for standard input, not 2"),
        (["conformer-debug", wave, "--stream", "fast"], "unknown mode"),
        (["conformer-debug", wave, "--stream", "0-4"], "chunk_size=0 must be"),
        (["conformer-debug", wave, "--stream", "16-4", "--layer", "1"], "leave out --layer"),
        (["conformer-debug", wave, "--stream", "16-4", "--window", "30"], "leave out --window"),
        ([str(tmp_path / "other.safetensors"), wave, "--stream", "16-4"], "build and train it with streaming=true"),
        (["conformer-debug", str(tmp_path / "nan.wav"), "--stream", "16-4"], "nan.wav, from 0.5 s on: 1 samples are not finite"),
        (["conformer-debug", wave], "--out is missing"),
    ):
        assert main(["run", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_bad_streams_leave_no_file(tmp_path: Path) -> None:
    model = streaming_model("fusionformer-debug")
    soundfile.write(tmp_path / "slow.wav", np.zeros(9_000), 8_000)
    (tmp_path / "text.wav").write_text("no audio")
    out = tmp_path / "out.npy"
    for source, mode, pipe, message in (
        (tmp_path / "slow.wav", "16-4", None, "1 channel at 8000 Hz: a stream takes mono at 16000 Hz"),
        (tmp_path / "text.wav", "16-4", None, "cannot be read as audio"),
        (tmp_path / "none.wav", "16-4", None, "no audio file"),
        ("-", "16-4", io.BytesIO(bytes(700)), "350 samples are too few"),
        ("-", "16-4", io.BytesIO(bytes(9_001)), "middle of a sample"),
        ("-", "full", io.BytesIO(bytes(9_000)), "whole utterance at once"),
        ("-", "0-4", io.BytesIO(bytes(9_000)), "chunk_size=0 must be"),
    ):
        with pytest.raises(UserError, match=message):
            run_stream(model, source, mode, out, pipe)
    with pytest.raises(UserError, match=r"a stream writes a \.npy file"):
        run_stream(model, "-", "16-4", tmp_path / "out.pt", io.BytesIO(bytes(9_000)))
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
