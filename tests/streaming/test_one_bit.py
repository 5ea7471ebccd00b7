"""One-bit models in chunks: masked, as a stream, simulated and from bits; what a stream of bits keeps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.config import FRAME_STRIDE
from hubert_eff.errors import UserError
from hubert_eff.kernels import loader
from hubert_eff.layers.chunks import Chunks
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import BinaryConv1d, pack
from hubert_eff.quant.attention import BinaryAttention
from hubert_eff.quant.runtime import ops
from hubert_eff.quant.runtime.modules import PackedConv1d
from hubert_eff.streaming.stream import StreamingModel

from ..helpers.packed import debug, differing
from ..helpers.streams import cut_at_random, fed, reference

ENCODERS = hubert_eff.list_encoders()


def streamed(model: HubertModel, wav: Tensor, size: int, left: int, longest: int = 9_000) -> Tensor:
    return fed(StreamingModel(model, size, left), cut_at_random(wav, longest))


# -- simulated ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "context"), [("default", "chunk"), ("paper", "causal"), ("paper", "chunk")])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_stream_equals_the_masked_full_pass(encoder: str, policy: str, context: str) -> None:
    """In float64, where no bit is so near to its threshold that the order of a sum decides it."""
    model = debug(encoder, policy, streaming=True, conv_context=context).double()
    wav = torch.randn(1, 16_077).double()
    seen = [reference(model, wav, *chunks) for chunks in ((16, 1), (8, -1))]
    assert not torch.allclose(*seen, atol=1e-3)
    for chunks, states in zip(((16, 1), (8, -1)), seen, strict=True):
        torch.testing.assert_close(streamed(model, wav, *chunks), states, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_every_sparse_pattern_streams(kind: str) -> None:
    model = debug("sparseformer", streaming=True, sparse_pattern=kind, sparse_stride=32, sparse_expressivity=5, sparse_window=20)
    wav, packed = torch.randn(1, 40_000), pack(model)
    double, precise = model.double(), wav.double()
    for chunks in ((16, 4), (8, -1), (64, 1)):
        torch.testing.assert_close(streamed(double, precise, *chunks), reference(double, precise, *chunks), rtol=0, atol=1e-9)
    double.float()
    for chunks in ((16, 4), (64, 1)):
        assert differing([streamed(packed, wav, *chunks)], [streamed(model, wav, *chunks)]) == 0
        assert differing([reference(packed, wav, *chunks)], [reference(model, wav, *chunks)]) == 0


@pytest.mark.parametrize("encoder", ["transformer", "squeezeformer"])
def test_two_bits_stream(encoder: str) -> None:
    torch.manual_seed(0)
    model = hubert_eff.build(f"{encoder}-debug", streaming=True, quant="w1a2").double()
    with torch.no_grad():
        model(torch.randn(2, 16_000, dtype=torch.float64), mask=False, features_only=True)
    wav = torch.randn(1, 12_000).double()
    model.eval()
    torch.testing.assert_close(streamed(model, wav, 8, 1), reference(model, wav, 8, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing_in_chunks(encoder: str, training: bool) -> None:
    keys = {"dropout": 0.0, "attention_dropout": 0.0, "required_seq_len_multiple": 6}
    model = debug(encoder, "paper", streaming=True, **keys).train(training)
    wav, padding = torch.randn(2, 14_000), torch.zeros(2, 14_000, dtype=torch.bool)
    padding[1, 6_000:] = True
    rows = []
    for audio in (wav, torch.where(padding, 100.0, wav)):
        torch.manual_seed(1)  # what an encoder draws in training must not differ
        states, frames = model.hidden_states(audio, padding, chunk_size=8, left_chunks=1)
        sum(s.square().sum() for s in states).backward()
        rows.append((states, [p.grad for p in model.parameters()]))
        model.zero_grad()
    for a, b in zip(rows[0][0], rows[1][0], strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all() and not a[frames].any()
    gradients = zip(*(row[1] for row in rows), strict=True)
    assert all(a is b is None or torch.equal(a, b) and torch.isfinite(a).all() for a, b in gradients)


def test_chunks_that_hide_nothing_train_as_no_chunks() -> None:
    torch.manual_seed(0)
    attention = BinaryAttention(1, {}).train()
    q, k, v = torch.randn(3, 2, 4, 50, 16).unbind(0)
    gradients = []
    for attend in (None, torch.ones(1, 1, 50, 50, dtype=torch.bool)):
        attention(q, k, v, attend, 0.0).square().sum().backward()
        gradients.append([p.grad for p in attention.parameters()])
        attention.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# -- from bits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["", "torch"])
def test_columns_grow_behind_and_shrink_before(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, kernel) if kernel else None
    x = torch.randn(1, 3, 900, 20)
    panels, begin, end = ops.pack_columns(x[:, :, :7]), 0, 7
    for _ in range(25):
        surplus, count = int(torch.randint(0, end - begin + 1, ())), int(torch.randint(0, 70, ()))
        more = ops.pack_columns(x[:, :, end : end + count])
        panels = ops.join_columns(panels, end - begin, surplus, more, more_count := min(count, 900 - end))
        begin, end = begin + surplus, end + more_count
        assert torch.equal(panels, ops.pack_columns(x[:, :, begin:end]))
    torch.library.opcheck(ops.join_columns, (panels, end - begin, 0, more, more_count), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="cannot be left out"):
        monkeypatch.delenv(loader.VARIABLE, raising=False)
        ops.join_columns(panels, end - begin, end - begin + 1, more, more_count)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [1, 7, 31, 65])
@torch.no_grad()
def test_a_depthwise_convolution_keeps_bits(kernel: int, causal: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 88, 20)
    for signed in (True, False):
        layer = BinaryConv1d(20, 20, kernel, groups=20, signed=signed, causal=causal).eval()
        nn.init.normal_(layer.input.move)
        layer.input.scale.fill_(0.4)
        packed = PackedConv1d.from_binary(layer)
        for size in (8, 33):
            masked = layer(x, Chunks(size, 1))
            assert torch.equal(packed(x, Chunks(size, 1)), masked)
            kept: dict[nn.Module, tuple[Tensor, ...]] = {}
            for start in range(0, 88, size):
                y = packed(x[:, start : start + size], Chunks(size, 1, kept, start=start))
                assert torch.equal(y, masked[:, start : start + size])
            assert all(part.dtype == torch.int32 for parts in kept.values() for part in parts)


@pytest.mark.parametrize(("policy", "context"), [("default", "causal"), ("paper", "chunk")])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_packed_stream_has_the_bits_of_the_simulated_one(encoder: str, policy: str, context: str) -> None:
    model = debug(encoder, policy, streaming=True, conv_context=context)
    wav, packed = torch.randn(1, 16_077), pack(model)
    for chunks in ((16, 1), (8, -1)):
        expected = streamed(model, wav, *chunks)
        assert differing([streamed(packed, wav, *chunks)], [expected]) == 0
        assert differing([streamed(packed, wav, *chunks, longest=300)], [expected]) == 0
        masked = reference(packed, wav, *chunks)
        assert differing([masked], [reference(model, wav, *chunks)]) == 0
        if encoder in ("transformer", "sparseformer"):
            assert differing([masked], [expected]) == 0
        # float layers in blocks, of a chunk's rows and of all, may differ in the last place, and a bit that is at its threshold with it
        assert ((masked - expected).abs().amax(-1) < 1e-4).float().mean() > 0.9


@torch.no_grad()
def test_padded_batches_in_chunks_are_the_simulated_ones() -> None:
    wav, padding = torch.randn(2, 12_000), torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 5_000:] = True
    for encoder in ENCODERS:
        model = debug(encoder, "paper", streaming=True)
        states = [m.hidden_states(wav, padding, chunk_size=8, left_chunks=1)[0] for m in (model, pack(model))]
        assert differing(*states) == 0


def test_projections_hand_over_bits_to_a_stream() -> None:
    for encoder in ("transformer", "sparseformer"):
        model = debug(encoder, streaming=True, encoder_attention_heads=2)
        wav = torch.randn(1, 12_000)
        assert differing([streamed(pack(model), wav, 16, 1)], [streamed(model, wav, 16, 1)]) == 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_memory_is_bits_and_constant_in_time(encoder: str) -> None:
    model = debug(encoder, "paper", streaming=True, conv_context="causal")
    stream, simulated = (StreamingModel(m, 8, 2) for m in (pack(model), model))
    sizes = []
    for _ in range(6):
        stream.feed(torch.randn(1, 8 * FRAME_STRIDE))
        kept = [part for name, parts in stream.state().kept.items() if not name.startswith("pos_conv") for part in parts if part.numel()]
        assert all(part.dtype == torch.int32 for part in kept)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in kept}
        sizes.append((stream.state().elements, sum(storages.values())))
    assert sizes[3] == sizes[4] == sizes[-1] > sizes[0]
    simulated.feed(torch.randn(1, 48 * FRAME_STRIDE))
    assert stream.state().elements < simulated.state().elements


def test_a_stream_of_bits_pauses_and_goes_on_elsewhere() -> None:
    packed = pack(debug("conformer", "paper", streaming=True))
    wav = torch.randn(1, 30_000)
    first, second = StreamingModel(packed, 8, -1), StreamingModel(packed, 8, -1)
    head = first.feed(wav[:, :17_000])
    state = first.state()
    first.feed(torch.randn(1, 9_000))  # which the state does not see
    second.restore(state)
    rest = fed(second, [wav[:, 17_000:]])
    assert head is not None and torch.equal(torch.cat((head, rest), 1), streamed(packed, wav, 8, -1))


# -- commands and refusals ------------------------------------------------------------------------------------------------------


def test_the_command_streams_packed_and_simulated_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = debug("sparseformer", streaming=True)
    pcm = (torch.randn(1, 16_000) * 3_000).to(torch.int16)
    for packed in (True, False):
        name = tmp_path / f"{packed}.safetensors"
        hubert_eff.export(model, name, packed=packed)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pcm.numpy().astype("<i2").tobytes())))
        assert main(["run", str(name), "-", "--stream", "16-4", "--out", str(tmp_path / f"{packed}.npy"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["frames"] == 49
    written = [torch.from_numpy(np.load(tmp_path / f"{packed}.npy")) for packed in (True, False)]
    assert torch.equal(*written)
    assert torch.equal(written[0], streamed(hubert_eff.load(tmp_path / "True.safetensors"), pcm.float() / 32_768, 16, 4)[0])
    hubert_eff.export(debug("sparseformer"), tmp_path / "whole.safetensors")
    for name, mode, message in (
        ("whole", "16-4", "this model cannot stream: its convolutions over time see beyond the end of a chunk; build and train it with"),
        ("True", "48-4", "chunk_size=48 does not fit the blocks of 128 frames"),
        ("True", "0-4", "chunk_size=0 must be"),
    ):
        assert main(["run", str(tmp_path / f"{name}.safetensors"), "-", "--stream", mode]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_chunks_that_a_one_bit_encoder_cannot_take_are_refused() -> None:
    with pytest.raises(UserError, match="chunk_size=24 does not fit the blocks of 128 frames"):
        hubert_eff.build("sparseformer-debug+w1a1", streaming=True, chunk_sizes="16,24")
    with pytest.raises(UserError, match="chunk_size=6 must be a multiple of 4"):
        StreamingModel(debug("zipformer", streaming=True), 6)
    StreamingModel(debug("sparseformer", streaming=True, sparse_pattern="local"), 24)
    with pytest.raises(UserError, match="normalize=true needs the whole utterance"):
        hubert_eff.build("conformer-debug+w1a1", streaming=True, normalize=True)
