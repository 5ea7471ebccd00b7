"""HuBERT itself: masks, codebook head, loss, hidden states; parity with fairseq's HubertModel."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import normalize_waveform
from hubert_eff.models.masking import span_mask

SMALL = {"encoder_layers": 3, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 96, "encoder_attention_heads": 4}


def stock_pair(num_classes: tuple[int, ...] = (17,), **keys):
    """fairseq's HubertModel with random weights, and ours with the same."""
    pytest.importorskip("fairseq")
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    fields = {**SMALL, "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(48,2,2)] * 2", "final_dim": 24, **keys}
    dictionaries = []
    for size in num_classes:
        dictionary = Dictionary()
        for symbol in range(size - len(dictionary)):
            dictionary.add_symbol(str(symbol))
        dictionaries.append(dictionary)
    torch.manual_seed(1)
    theirs = HubertModel(HubertConfig(label_rate=50, **fields), HubertPretrainingConfig(sample_rate=16_000), dictionaries).eval()
    ours = hubert_eff.build("transformer-base", num_classes, **{"untie_final_proj": False, **fields, "valid_frames": "fairseq"}).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_fairseq_layer_by_layer(mode: str, pre_norm: bool, padded: bool) -> None:
    theirs, ours = stock_pair(extractor_mode=mode, layer_norm_first=pre_norm, conv_bias=mode == "layer_norm")
    wav = torch.randn(2, 16_000)
    padding = torch.zeros(2, 16_000, dtype=torch.bool)
    if padded:
        padding[1, 10_000:] = True
        wav[1, 10_000:] = 0
    with torch.no_grad():
        states, frames = ours.hidden_states(wav, padding if padded else None)
        for layer in range(1, 4):
            # fairseq applies the final LayerNorm of a pre-LN model only when no layer is named
            last = None if pre_norm and layer == 3 else layer
            expected, mask = theirs.extract_features(wav, padding if padded else None, output_layer=last)
            valid = torch.ones(expected.shape[:2], dtype=torch.bool) if mask is None else ~mask
            assert torch.equal(~frames, valid)
            torch.testing.assert_close(states[layer][valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_equals_fairseq_at_base_size() -> None:
    keys = {"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12}
    theirs, ours = stock_pair(**keys, conv_feature_layers="[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")
    wav = torch.randn(1, 16_000)
    with torch.no_grad():
        for layer, state in enumerate(ours.hidden_states(wav)[0][1:], start=1):
            torch.testing.assert_close(state, theirs.extract_features(wav, output_layer=layer)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("glu", [False, True])
def test_codebook_logits_equal_compute_nce(glu: bool) -> None:
    theirs, ours = stock_pair((17, 9), untie_final_proj=True, target_glu=glu)
    x, targets = torch.randn(40, 48), [torch.randint(0, 17, (40,)), torch.randint(0, 9, (40,))]
    logits = ours.logits(x)
    tables = theirs.label_embs_concat.split([17, 9])
    for logit, target, table, projected in zip(logits, targets, tables, theirs.final_proj(x).chunk(2, -1)):
        positive = table[target]
        negatives = table.unsqueeze(1).expand(-1, 40, -1)
        if glu:
            positive, negatives = theirs.target_glu(positive), theirs.target_glu(negatives)
        nce = theirs.compute_nce(projected, positive, negatives)  # (40, 1 + C), the positive first and -inf in its place
        torch.testing.assert_close(logit.gather(1, target[:, None])[:, 0], nce[:, 0], rtol=1e-5, atol=1e-5)
        others = F.one_hot(target, table.size(0)) == 0
        torch.testing.assert_close(logit[others], nce[:, 1:][others], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(F.cross_entropy(logit, target), F.cross_entropy(nce, torch.zeros_like(target)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_rate, ratio", [(50, 1), (100, 2)])
def test_targets_stand_at_their_frames(label_rate: int, ratio: int) -> None:
    model = hubert_eff.build("transformer-debug", (200,), label_rate=label_rate).eval()
    labels = torch.arange(49 * ratio).expand(2, -1)
    out = model(torch.randn(2, 16_000), [labels])
    frames = torch.arange(49).expand(2, -1)
    assert torch.equal(out["targets_m"][0], frames[out["mask_indices"]] * ratio)
    assert torch.equal(out["targets_u"][0], frames[~out["mask_indices"]] * ratio)
    assert out["logits_m"][0].shape == (int(out["mask_indices"].sum()), 200)
    short = model(torch.randn(2, 16_000), [labels[:, : 30 * ratio]])
    assert short["x"].size(1) == 30


def test_masks_depend_on_seed_update_and_utterance_only() -> None:
    model = hubert_eff.build("conformer-debug", seed=3).train()
    wav = torch.randn(4, 32_000)
    ids = torch.tensor([11, 5, 8, 2])

    def masks(rows: list[int]) -> torch.Tensor:
        return model(wav[rows], features_only=True, sample_ids=ids[rows])["mask_indices"]

    together = masks([0, 1, 2, 3])
    assert torch.equal(together[[2, 0]], masks([2, 0]))
    assert not torch.equal(together[0], together[1])
    model.set_num_updates(1)
    assert not torch.equal(together, masks([0, 1, 2, 3]))
    model.eval()
    valid = masks([0, 1])
    model.set_num_updates(2)
    assert torch.equal(valid, masks([0, 1]))


@pytest.mark.parametrize("selection, other", [("static", 0), ("uniform", 2), ("normal", 3), ("poisson", 0)])
def test_masked_share(selection: str, other: float) -> None:
    """Spans at random starts leave (1 - 1/T)^.. uncovered: about 1 - exp(-prob) is covered."""
    rng = np.random.default_rng(0)
    share = np.mean([span_mask(500, 0.8, 10, rng, selection, other).mean() for _ in range(200)])
    assert abs(share - (1 - np.exp(-0.8))) < 0.05


@pytest.mark.parametrize("length", [0, 1, 2, 9, 10, 11])
def test_masks_of_short_utterances(length: int) -> None:
    mask = span_mask(length, 0.8, 10, np.random.default_rng(0), min_spans=2)
    assert mask.shape == (length,) and mask.any() == (length > 0)


def test_mask_embedding_and_channel_mask_reach_the_encoder() -> None:
    model = hubert_eff.build("transformer-debug", mask_channel_prob=0.5, mask_channel_length=4).eval()
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    masked = model(torch.randn(1, 16_000), features_only=True)["mask_indices"]
    x = seen[0]
    off = ~x[0].abs().sum(0).bool()  # channels that are zero everywhere
    assert 0 < off.sum() < 64
    assert torch.equal(x[masked][:, ~off], model.mask_emb[~off].expand(int(masked.sum()), -1))


def test_normalize_over_valid_samples() -> None:
    wav = torch.randn(2, 1_000) * 3 + 1
    padding = torch.zeros(2, 1_000, dtype=torch.bool)
    padding[1, 600:] = True
    scaled = normalize_waveform(wav, padding)
    for row, length in ((0, 1_000), (1, 600)):
        torch.testing.assert_close(scaled[row, :length], F.layer_norm(wav[row, :length], (length,)))
    assert not scaled[1, 600:].any()
    model = hubert_eff.build("transformer-debug", normalize=True).eval()
    torch.testing.assert_close(model.hidden_states(wav * 9 + 4)[0][0], model.hidden_states(wav)[0][0], rtol=1e-3, atol=1e-4)


def test_gradient_scale_and_frozen_extractor() -> None:
    grads = []
    base = hubert_eff.build("transformer-debug").eval()
    wav = torch.randn(1, 8_000)
    direction = torch.randn(1, 24, 64)
    for factor in (1.0, 0.1, 0.0):
        model = copy.deepcopy(base)
        model.config.feature_grad_mult = factor
        (model(wav, mask=False)["x"] * direction).sum().backward()
        grads.append(model.feature_extractor.conv_layers[0][0].weight.grad)
    assert grads[0].abs().max() > 0.01
    torch.testing.assert_close(grads[1], grads[0] * 0.1, rtol=1e-3, atol=1e-6)
    assert grads[2] is None


def test_layerdrop_skips_blocks_in_training_only() -> None:
    model = hubert_eff.build("transformer-debug", encoder_layerdrop=1.0, dropout=0.0)
    x = torch.randn(1, 10, 64)
    assert torch.equal(model.encoder(x), model.encoder.hidden_states(x)[0])
    model.eval()
    assert torch.equal(model.encoder(x), model.encoder.hidden_states(x)[-1])


def test_layerdrop_depends_on_seed_and_update_only() -> None:
    """Not on what else was drawn: data-parallel processes with batches of other sizes must skip the same blocks."""
    kept = []
    for batch, seed in ((1, 4), (3, 4), (1, 5)):
        model = hubert_eff.build("conformer-debug", encoder_layers=8, encoder_layerdrop=0.5, seed=seed)
        calls: list[list[int]] = []
        for index, block in enumerate(model.encoder.layers):
            block.register_forward_hook(lambda *_, index=index, calls=calls: calls[-1].append(index))
        for update in range(3):
            model.set_num_updates(update)
            calls.append([])
            model(torch.randn(batch, 4_000 * batch), features_only=True)
        kept.append(calls)
    assert kept[0] == kept[1] != kept[2]
    assert 0 < sum(len(blocks) for blocks in kept[0]) < 24 and len({tuple(blocks) for blocks in kept[0]}) == 3


def test_bad_input_is_named() -> None:
    model = hubert_eff.build("transformer-debug").eval()
    with pytest.raises(UserError, match="399 samples are too few: one frame needs 400"):
        model.hidden_states(torch.randn(1, 399))
    with pytest.raises(UserError, match=r"audio must be \(batch, samples\)"):
        model.hidden_states(torch.randn(16_000))
    with pytest.raises(UserError, match="padding_mask"):
        model.hidden_states(torch.randn(1, 16_000), torch.zeros(1, 49, dtype=torch.bool))
    with pytest.raises(UserError, match="no codebooks"):
        model(torch.randn(1, 16_000), [torch.zeros(1, 49, dtype=torch.long)])


@pytest.mark.parametrize("preset, parameters", [("transformer-base", 92_212_096), ("conformer-s", 9_884_752 + 16 * (144**2 + 2 * 144))])
def test_parameters_of_presets(preset: str, parameters: int) -> None:
    """Counts without label embeddings; relative positions add linear_pos and two biases per block to Conformer-S."""
    model = hubert_eff.build(preset)
    assert sum(p.numel() for p in model.parameters()) == parameters
