"""Small devices: log-mel fronts, half precision that stays finite, the channels-first form of a trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hubert_eff
from hubert_eff.config import MEL_FRONTS
from hubert_eff.edge import conditional_softmax, half_precision, mad_layer_norm, rewrite
from hubert_eff.edge.numerics import UNIT, largest_deviation, mad_normalize, naive_layer_norm
from hubert_eff.errors import UserError
from hubert_eff.models.logmel import LogMel
from hubert_eff.profiling import profile
from hubert_eff.streaming.stream import StreamingModel

from ..helpers.streams import fed, reference, streaming_model

# -- log-mel fronts ------------------------------------------------------------------------------------------------------


def test_log_mel_equals_torchaudio() -> None:
    torchaudio = pytest.importorskip("torchaudio")
    wav = torch.randn(2, 16_000) * torch.linspace(0, 1, 16_000)
    theirs = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=400, hop_length=160, n_mels=80, center=False, mel_scale="htk", norm=None
    )
    power = theirs(F.pad(wav, (56, 56))).mT  # torchaudio centers the window of 400 in its 512 samples
    torch.testing.assert_close(LogMel()(wav), (power.clamp(min=1e-10).log10() + 4) / 4, rtol=1e-4, atol=1e-4)
    assert torch.equal(LogMel()(torch.zeros(1, 800)), torch.full((1, 3, 80), -1.5))


@pytest.mark.parametrize("front", MEL_FRONTS)
def test_a_mel_front_keeps_the_rules_of_frames(front: str) -> None:
    """The frames of HuBERT's extractor, a batch row equals the utterance alone, nothing in the padding matters."""
    model = hubert_eff.build("conformer-debug", conv_feature_layers=front).eval()
    wav, padding = torch.randn(2, 12_000), torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_123:] = True
    with torch.no_grad():
        states, frames = model.hidden_states(wav, padding)
        alone, _ = model.hidden_states(wav[1:, :7_123])
        noisy, _ = model.hidden_states(torch.where(padding, 9.0, wav), padding)
        shortest, _ = model.hidden_states(wav[:, :400])
    assert states[-1].shape == (2, 37, 64) and shortest[-1].shape == (2, 1, 64)
    assert int((~frames[1]).sum()) == (7_123 - 400) // 320 + 1 == alone[-1].size(1)
    torch.testing.assert_close(states[-1][1, : alone[-1].size(1)], alone[-1][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(states[-1], noisy[-1])


@pytest.mark.parametrize("front", MEL_FRONTS)
def test_a_frame_of_a_mel_front_is_where_its_audio_is(front: str) -> None:
    """What sounds at the center of frame t's 400 samples moves frame t most."""
    extractor = hubert_eff.build("conformer-debug", conv_feature_layers=front).eval().feature_extractor
    wav = torch.zeros(1, 16_000)
    click = wav.clone()
    click[0, 24 * 320 + 150 : 24 * 320 + 250] = torch.randn(100)
    with torch.no_grad():
        moved = (extractor(click) - extractor(wav)).norm(dim=-1)[0]
    center = (moved * torch.arange(len(moved))).sum() / moved.sum()
    assert abs(float(center) - 24) < 0.6 and moved.argmax() in (23, 24, 25)


@pytest.mark.parametrize("front", MEL_FRONTS)
def test_a_mel_front_streams(front: str) -> None:
    model = streaming_model("fusionformer-debug", conv_feature_layers=front)
    wav = torch.randn(1, 14_321)
    pieces = list(wav.split([3_000, 1, 7_000, 4_000, 320], 1))
    stream = StreamingModel(model, 8, 2)
    torch.testing.assert_close(fed(stream, pieces), reference(model, wav, 8, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("front", MEL_FRONTS)
def test_a_mel_front_learns_is_saved_and_counted(front: str, tmp_path) -> None:
    model = hubert_eff.build("transformer-debug", num_classes=(9,), conv_feature_layers=front)
    out = model(torch.randn(2, 8_000), [torch.randint(0, 9, (2, 24))])
    (F.cross_entropy(out["logits_m"][0], out["targets_m"][0]) + out["features_pen"]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.feature_extractor.parameters())
    hubert_eff.export(model, tmp_path / "model.safetensors")
    loaded, wav = hubert_eff.load(tmp_path / "model.safetensors"), torch.randn(1, 8_000)
    assert torch.equal(loaded.hidden_states(wav)[0][-1], model.eval().hidden_states(wav)[0][-1])
    half = copy.deepcopy(model).bfloat16().hidden_states(wav.bfloat16())[0][-1]
    assert F.cosine_similarity(half.float().flatten(), loaded.hidden_states(wav)[0][-1].flatten(), 0) > 0.99
    assert profile(model, 1.0).macs > 0


def test_separable_subsampling_saves_what_the_formula_says() -> None:
    macs = {}
    for front in ("logmel-conv", "logmel-dws"):
        tree = profile(hubert_eff.build("conformer-debug", conv_feature_layers=front), 1.0).modules
        macs[front] = {module.name.removeprefix("feature_extractor.front."): module.macs for module in tree.walk()}
    frames, rows, dim = 49, 20, 64
    full, separable = macs["logmel-conv"], macs["logmel-dws"]
    assert full["conv2"] == frames * rows * 9 * dim * dim
    assert separable["depthwise"] + separable["conv2"] == frames * rows * (9 * dim + dim * dim)
    assert (separable["depthwise"] + separable["conv2"]) / full["conv2"] == pytest.approx((9 + dim) / (9 * dim))
    assert full["conv1"] == separable["conv1"] and full["linear"] == separable["linear"] == frames * rows * dim * dim


# -- half precision ------------------------------------------------------------------------------------------------------


def adversarial(channels: int, rows: int = 50) -> Iterator[tuple[str, Tensor]]:
    """Vectors (rows, channels) in the range of float16 that are hard for a norm."""
    noise, place = torch.randn(rows, channels), torch.randint(0, channels, (rows,))
    yield "large", noise * 1.2e4
    yield "one outlier", noise.index_fill(1, torch.tensor([0]), 3e4)
    yield "one spike", torch.zeros(rows, channels).index_put((torch.arange(rows), place), torch.tensor(65_504.0))
    yield "two opposite spikes", torch.zeros(rows, channels).index_fill(1, torch.tensor([0]), 3e4).index_fill(1, torch.tensor([1]), -3e4)
    yield "one against all", torch.full((rows, channels), 65_504.0).index_fill(1, torch.tensor([0]), -65_504.0)
    yield "two values", torch.where(noise > 0, 65_504.0, -65_504.0)
    yield "heavy tails", (noise / torch.randn(rows, channels).abs().clamp(min=1e-3)).clamp(-6e4, 6e4)
    yield "all magnitudes", noise.sign() * (torch.rand(rows, channels) * 20 - 9).exp().clamp(max=6e4)
    yield "far from zero", noise * 50 + 1_000
    yield "small", noise * 1e-3
    yield "smallest", noise * 1e-6
    yield "constant", torch.full((rows, channels), 123.0)
    yield "zero", torch.zeros(rows, channels)


@pytest.mark.parametrize("channels", [64, 361, 768, 2048])
def test_mad_layer_norm_in_half_precision_is_near_the_exact_one(channels: int) -> None:
    for name, x in adversarial(channels):
        exact = x.half().double()
        expected = F.layer_norm(exact, (channels,))
        deviation = (exact.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        bound = 4 * UNIT * (1 + expected.abs() + exact.mean(-1, keepdim=True).abs() / deviation)
        y = mad_layer_norm(x.half())
        assert y.dtype == torch.float16 and torch.isfinite(y).all(), name
        assert ((y.double() - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("channels", [64, 361, 768, 2048])
def test_bounds_of_the_pre_normalizer_hold(channels: int) -> None:
    """|z| <= C / 2 and sum z^2 <= C^2 / 2, attained by two opposite spikes; with D: |z| <= D and 2 D^2, which float16 holds."""
    tightest = 0.0
    for name, x in adversarial(channels):
        z, _ = mad_normalize(x.double())
        assert (z.abs() <= channels / 2 * (1 + 1e-9)).all() and (z.square().sum(-1) <= channels**2 / 2 * (1 + 1e-9)).all(), name
        tightest = max(tightest, float(z.square().sum(-1).amax() / (channels**2 / 2)))
        deviation = largest_deviation(channels)
        z, factor = mad_normalize(x.half(), deviation)
        assert (z.abs() <= deviation * (1 + 8 * UNIT)).all(), name
        assert ((z * z).sum(-1, dtype=torch.float64) <= 65_504).all() and torch.isfinite(factor).all(), name
    assert tightest == pytest.approx(1.0, abs=2 / channels)


def test_what_the_bound_is_for() -> None:
    """A vector of magnitude 3e4: as written the squares overflow; MAD alone overflows beyond 361 channels."""
    x = torch.randn(8, 768)
    x[:, 0] = 3e4
    expected = F.layer_norm(x.half().double(), (768,))

    def error(y: Tensor) -> float:
        return float((y.double() - expected)[:, 0].abs().nan_to_num(torch.inf).amin())

    assert error(naive_layer_norm(x.half())) > 1
    assert error(mad_layer_norm(x.half(), bounded=False)) > 1
    assert float((mad_layer_norm(x.half()).double() - expected).abs().amax()) < 0.05


def test_mad_layer_norm_is_layer_norm() -> None:
    x, weight, bias = torch.randn(4, 5, 48), torch.randn(48), torch.randn(48)
    for scale in (1e-4, 1.0, 1e3):
        expected = F.layer_norm(x * scale, (48,), weight, bias)
        torch.testing.assert_close(mad_layer_norm(x * scale, weight, bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0, 100.0, 20_000.0])
@pytest.mark.parametrize("keys", [1, 80, 4096])
def test_conditional_softmax(spread: float, keys: int) -> None:
    scores = torch.randn(64, keys) * spread
    scores[0], scores[1] = min(spread, 9.99), -spread  # all alike, where sums are the largest and the smallest
    scores = scores.clamp(-65_000, 65_000)
    torch.testing.assert_close(conditional_softmax(scores), torch.softmax(scores, -1), rtol=1e-5, atol=1e-6)
    half = conditional_softmax(scores.half())
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.double(), torch.softmax(scores.half().double(), -1), rtol=8e-3, atol=4e-4)


def test_half_precision_keeps_a_model_that_is_loud() -> None:
    """Activations of 3e4 in front of its norms: a plain half-precision model is wrong, one with the pre-normalizer is not."""
    encoder = hubert_eff.build("transformer-debug", encoder_embed_dim=128, layer_norm_first=True).eval().encoder
    x = torch.randn(1, 20, 128) * 1e4
    with torch.no_grad():
        exact = encoder.double()(x.double())
        half = half_precision(encoder)(x.half())
    assert half.dtype == torch.float16 and torch.isfinite(half).all()
    assert F.cosine_similarity(half.double().flatten(), exact.flatten(), 0) > 0.999


# -- channels first ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, keys",
    [
        ("transformer-debug", {}),
        ("transformer-debug", {"layer_norm_first": True}),
        ("conformer-debug", {}),
        ("conformer-debug", {"pos_enc_type": "abs", "streaming": True, "conv_context": "causal"}),
        ("conformer-debug", {"block_norm": "batch_norm"}),
        ("fusionformer-debug", {"conv_module_expansion": 2, "conv_module_relu": "pointwise"}),
    ],
)
def test_a_rewritten_model_is_equal(preset: str, keys: dict) -> None:
    model = hubert_eff.build(preset, **keys).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    wav = torch.randn(2, 9_000)
    before = copy.deepcopy(model.state_dict())
    states = model.hidden_states(wav)[0]
    rewritten, half = rewrite(model), rewrite(model, half=True)
    for a, b, c in zip(states, rewritten.hidden_states(wav)[0], half.hidden_states(wav)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c.float(), rtol=0, atol=0.05)
    x = torch.randn(1, 25, 64)
    torch.testing.assert_close(rewrite(model.encoder)(x), model.encoder(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    operations = {type(module).__name__ for module in rewritten.encoder.modules()}
    assert "Conv2d" in operations and not {"LayerNorm", "FrameNorm", "DepthwiseConv"} & operations


STREAMING = [
    ("conformer-debug", {"conv_feature_layers": "logmel-dws"}),
    ("conformer-debug", {"pos_enc_type": "abs", "conv_context": "causal"}),
    ("transformer-debug", {"layer_norm_first": True}),
    ("fusionformer-debug", {}),
]
FORMS_OF = [({}, 1e-4), ({"stable": True}, 1e-4), ({"half": True}, 0.05)]


@pytest.mark.parametrize("form, tolerance", FORMS_OF)
@pytest.mark.parametrize("preset, keys", STREAMING)
@torch.no_grad()
def test_a_rewritten_model_takes_padding_and_chunks_and_streams(preset: str, keys: dict, form: dict, tolerance: float) -> None:
    """Padding and chunks as the source takes them; a stream equals the masked pass, in float16 as far as float16 goes."""
    model = streaming_model(preset, **keys)
    rewritten, wav = rewrite(model, **form), torch.randn(2, 14_321)
    padding = torch.zeros(2, 14_321, dtype=torch.bool)
    padding[1, 7_000:] = True
    for chunks in ((None, -1), (8, 2), (4, -1)):
        expected, frames = model.hidden_states(wav, padding, *chunks)
        states, found = rewritten.hidden_states(wav, padding, *chunks)
        assert torch.equal(frames, found)
        for a, b in zip(expected, states, strict=True):
            torch.testing.assert_close(b.float(), a, rtol=0, atol=tolerance)
            assert not b[frames].any()
    pieces = list(wav[:1].split([3_000, 1, 7_000, 4_000, 320], 1))
    stream = StreamingModel(rewritten, 8, 2)
    streamed = fed(stream, pieces)
    assert streamed.dtype == (torch.float16 if "half" in form else torch.float32)
    torch.testing.assert_close(streamed.float(), reference(rewritten, wav[:1], 8, 2).float(), rtol=0, atol=tolerance)
    begun = stream.feed(wav[:1, :6_000])
    other = StreamingModel(rewrite(model, **form), 8, 2)
    other.restore(stream.state())
    assert begun is not None and torch.equal(torch.cat((begun, fed(other, [wav[:1, 6_000:]])), 1), streamed)


@pytest.mark.parametrize("form", [form for form, _ in FORMS_OF])
@pytest.mark.parametrize("front", ["logmel-dws", "fastconv"])
@torch.no_grad()
def test_a_rewritten_model_is_exported_and_loaded(front: str, form: dict, tmp_path) -> None:
    """With its form: the same functions, and in float16 the same dtypes."""
    keys = {} if front == "fastconv" else {"conv_feature_layers": front}
    model, path, wav = hubert_eff.build("conformer-debug", **keys), tmp_path / "model.safetensors", torch.randn(1, 9_000)
    rewritten = rewrite(model, **form)
    hubert_eff.export(rewritten, path)
    loaded = hubert_eff.load(path)
    assert loaded.edge == rewritten.edge != "" and loaded.fused
    for a, b in zip(rewritten.hidden_states(wav)[0], loaded.hidden_states(wav)[0], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.01 if "half" in form else 1e-6)
    hubert_eff.export(loaded, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    damaged = path.read_bytes().replace(b'"edge":"' + loaded.edge.encode(), b'"edge":"' + b"x" * len(loaded.edge))
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="form for accelerators"):
        hubert_eff.load(path)


def test_what_cannot_be_rewritten_is_refused() -> None:
    for preset in ("zipformer-debug", "squeezeformer-debug"):
        with pytest.raises(UserError, match="cannot be rewritten: it changes the frame rate"):
            rewrite(hubert_eff.build(preset))
    with pytest.raises(UserError, match="sparse attention cannot be rewritten"):
        rewrite(hubert_eff.build("sparseformer-debug"))
    with pytest.raises(UserError, match="binarized model cannot be fused"):
        rewrite(hubert_eff.build("conformer-debug+w1a1"))
    model = rewrite(hubert_eff.build("conformer-debug"))
    with pytest.raises(UserError, match="not rewritten yet"):
        rewrite(model)
    with pytest.raises(UserError, match="cannot stream: its .* build and train it with streaming=true"):
        StreamingModel(model)


@pytest.mark.long
def test_a_rewritten_encoder_runs_in_onnxruntime(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder = rewrite(hubert_eff.build("conformer-debug").eval().encoder)
    x = torch.randn(1, 30, 64)
    path = str(tmp_path / "encoder.onnx")
    torch.onnx.export(encoder, (x,), path, dynamo=True, input_names=["x"], output_names=["y"])
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), encoder(x), rtol=1e-3, atol=1e-4)
