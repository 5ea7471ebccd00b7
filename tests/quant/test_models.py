"""Binarized models: invariance, training, copies, compilation, policies."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.layers.convolution import DepthwiseConv
from hubert_eff.layers.kinds import BINARY_KINDS, Declared
from hubert_eff.layers.linear import Linear
from hubert_eff.quant import BinaryConv1d, BinaryLinear, quant_report
from hubert_eff.quant.attention import BinaryAttention

from ..helpers.simulated import ENCODERS, batch, debug

# -- every encoder ---------------------------------------------------------------------------------------------------------

FORMS = [(encoder, *form) for encoder in ENCODERS for form in (("w1a1", "default"), ("w1a2", "paper"))]


@pytest.mark.parametrize("encoder, spec, policy", FORMS)
def test_padding_and_batching_change_nothing(encoder: str, spec: str, policy: str) -> None:
    model = debug(encoder, spec, policy).double()  # in float32 another blocking of a product may turn a bit
    wav, padding = batch(torch.float64)
    noisy = torch.where(padding, torch.randn_like(wav) * 100, wav)
    other = copy.deepcopy(model)
    results = []
    for twin, audio in ((model, wav), (other, noisy)):
        torch.manual_seed(1)
        results.append(twin.train().hidden_states(audio, padding)[0])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    assert all(b for name, b in model.named_buffers() if name.endswith("initialized"))
    states, frames = model.eval().hidden_states(wav, padding)
    longer, _ = model.hidden_states(F.pad(wav, (0, 3_200), value=5.0), F.pad(padding, (0, 3_200), value=True))
    for row in range(3):
        length, valid = int((~padding[row]).sum()), int((~frames[row]).sum())
        alone, _ = model.hidden_states(wav[row : row + 1, :length])
        for state, single, long in zip(states, alone, longer):
            torch.testing.assert_close(state[row, :valid], single[0])
            torch.testing.assert_close(state[row], long[row, :49])
            assert not state[row, valid:].any()


@pytest.mark.parametrize("encoder, spec, policy", FORMS)
def test_every_parameter_learns_and_the_loss_falls(encoder: str, spec: str, policy: str) -> None:
    model = debug(encoder, spec, policy).train()
    wav, padding = batch()
    target = [torch.randint(0, 20, (3, 50))]
    model.set_num_updates(50_000)  # past what an encoder skips early in training
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        out = model(wav, target, padding)
        loss = F.cross_entropy(out["logits_m"][0], out["targets_m"][0])
        optimizer.zero_grad()
        (loss + out["features_pen"] if step == 0 else loss).backward()
        if step == 0:
            silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert silent == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_copies_states_and_exports_are_the_same_model(encoder: str, tmp_path: Path) -> None:
    model = debug(encoder, "w1a1")
    wav, padding = batch()
    model.train().hidden_states(wav, padding)
    reference = model.eval().hidden_states(wav, padding)[0]
    fresh = type(model)(model.config, model.num_classes).eval()
    fresh.load_state_dict(model.state_dict())
    hubert_eff.export(model, tmp_path / "model.safetensors", packed=False)
    loaded = hubert_eff.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    for twin in (copy.deepcopy(model), fresh, loaded):
        assert all(torch.equal(a, b) for a, b in zip(reference, twin.hidden_states(wav, padding)[0]))
        scales = {n: p.clone() for n, p in twin.named_parameters() if n.endswith(".scale")}
        twin.train().hidden_states(10 * wav, padding)  # no second start of the scales
        assert scales and all(torch.equal(p, scales[n]) for n, p in twin.named_parameters() if n in scales)


@pytest.mark.parametrize(
    "encoder", [e if e in ("transformer", "sparseformer") else pytest.param(e, marks=pytest.mark.long) for e in ENCODERS]
)
def test_compiles(encoder: str) -> None:
    """Each kind of block once; that deeper float encoders compile is shown in test_encoders."""
    torch.compiler.reset()
    keys: dict[str, object] = {"encoder_layers": 1}
    if encoder == "squeezeformer":
        keys = {"encoder_layers": 2, "time_reduce_idx": 0, "time_recover_idx": 1}
    if encoder == "zipformer":
        two = {"layers": "1,1", "dims": "48,64", "ffn_dims": "96,128", "heads": "2,4", "kernels": "15,7", "rates": "1,2"}
        keys = {"encoder_layers": 2, **{f"zipformer_{key}": value for key, value in two.items()}}
    model = debug(encoder, "w1a1", **keys).double()
    x = torch.randn(2, 30, model.config.input_dim, dtype=torch.float64)
    padding = torch.arange(30) >= torch.tensor([[30], [20]])
    model.train().encoder(x, padding)
    model.eval()
    results = []
    for encode in (model.encoder, torch.compile(model.encoder, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = encode(leaf, padding)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in model.encoder.parameters())))
        model.zero_grad()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_scales_start_inside_a_compiled_model_too() -> None:
    torch.compiler.reset()
    plain, compiled = debug("transformer", "w1a1", encoder_layers=1), debug("transformer", "w1a1", encoder_layers=1)
    x, padding = torch.randn(2, 30, 64), torch.arange(30) >= torch.tensor([[30], [20]])
    expected = plain.encoder(x, padding)
    torch.testing.assert_close(torch.compile(compiled.encoder, backend="aot_eager")(x, padding), expected)
    for (name, a), b in zip(plain.state_dict().items(), compiled.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("encoder, spec, policy", FORMS)
def test_checkpointed_activations(encoder: str, spec: str, policy: str) -> None:
    model = debug(encoder, spec, policy).double()
    wav, padding = batch(torch.float64)
    runs = []
    for recompute in (False, True):
        twin = copy.deepcopy(model).train()
        twin.encoder.checkpoint_activations = recompute
        torch.manual_seed(1)
        x = twin(wav, padding_mask=padding, features_only=True)["x"]
        x.square().sum().backward()
        runs.append([*(p.grad for p in twin.encoder.parameters()), *twin.buffers()])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_bfloat16_and_long_audio(encoder: str) -> None:
    model = debug(encoder, "w1a1")
    wav, padding = batch()
    model.train().hidden_states(wav, padding)
    model.eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.hidden_states(wav, padding)[0][-1]
        half = copy.deepcopy(model).bfloat16().hidden_states(wav.bfloat16(), padding)[0][-1]
        long = model.hidden_states(torch.randn(1, 30 * 16_000))[0][-1]
        short = model.hidden_states(torch.randn(1, 400))[0][-1]
    assert half.dtype == torch.bfloat16 and short.shape[1] == 1
    assert all(torch.isfinite(x).all() for x in (rough, half, long, short))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_product_of_the_blocks_is_declared(encoder: str) -> None:
    model = hubert_eff.build(f"{encoder}-debug")
    declared = [getattr(m, name) for m in model.modules() if isinstance(m, Declared) for name in m.kinds()]
    parts = {id(part) for whole in declared if whole is not None for part in whole.modules()}
    products = [name for name, m in model.named_modules() if isinstance(m, (Linear, DepthwiseConv)) and id(m) not in parts]
    assert products == []
    binary = hubert_eff.binarize(model, "w1a1", "paper")
    left = [n for n, m in binary.encoder.layers.named_modules() if isinstance(m, (Linear, DepthwiseConv)) and not n.endswith("linear_pos")]
    assert left == []
    assert not any(isinstance(m, BinaryConv1d) for m in hubert_eff.binarize(model, "w1a1").modules())


def test_source_is_kept_and_its_weights_are_the_copys() -> None:
    model = hubert_eff.build("conformer-debug")
    before = copy.deepcopy(model.state_dict())
    binary = hubert_eff.binarize(model, "w1a1")
    assert model.config.quant == "none" and binary.config.quant == "w1a1"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) and torch.equal(weight, binary.state_dict()[name])
    block = binary.encoder.layers[0]
    assert isinstance(block.ffn1.w_1, BinaryLinear) and block.ffn1.w_1.weight.dtype == torch.float32
    assert isinstance(block.conv_module.depthwise_conv, DepthwiseConv)


def test_one_bit_inherits_the_scales_of_two() -> None:
    two = debug("conformer", "w1a2")
    two.train().hidden_states(*batch())
    one = hubert_eff.binarize(two, "w1a1")
    assert one.config == dataclasses.replace(two.config, quant="w1a1") and one.training
    for name, value in two.state_dict().items():
        assert torch.equal(value, one.state_dict()[name])
    assert one.encoder.layers[0].ffn1.w_2.operand_bits == (1, 1)


def _start_on_half(rank: int, port_file: str, results: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = torch.randn(2, 10, 64)
    model = hubert_eff.build("transformer-debug+w1a1", encoder_layers=1, dropout=0.0, attention_dropout=0.0)
    model.encoder(x[rank : rank + 1], (torch.arange(10) >= torch.tensor([[10], [4]]))[rank : rank + 1])
    results[rank] = model.encoder.layers[0].self_attn.qkv_input.scale.item()
    dist.destroy_process_group()


@pytest.mark.long
def test_scales_start_alike_in_two_processes(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_start_on_half, (str(tmp_path / "port"), results), nprocs=2)
        scales = [results[rank] for rank in range(2)]
    torch.manual_seed(0)
    x = torch.randn(2, 10, 64)
    model = hubert_eff.build("transformer-debug+w1a1", encoder_layers=1, dropout=0.0, attention_dropout=0.0)
    model.encoder(x, torch.arange(10) >= torch.tensor([[10], [4]]))
    assert scales[0] == scales[1] == pytest.approx(model.encoder.layers[0].self_attn.qkv_input.scale.item(), rel=1e-5)


# -- policies, reports, errors ---------------------------------------------------------------------------------------------


def test_policy_by_kind_and_by_module(tmp_path: Path) -> None:
    policy = {"base": "paper", "feed_forward": "float", "weight_scale": "channel", "modules": {"encoder.layers.1.*": "float"}}
    file = tmp_path / "policy.yaml"
    file.write_text("base: paper\nfeed_forward: float\nweight_scale: channel\nmodules:\n  encoder.layers.1.*: float\n")
    models = [hubert_eff.binarize(hubert_eff.build("conformer-debug"), "w1a1", given) for given in (policy, file)]
    models.append(hubert_eff.build("conformer-debug+w1a1", quant_policy=str(file)))
    file.unlink()  # the configuration holds what it said
    models.append(hubert_eff.build("conformer-debug", **{k: getattr(models[1].config, k) for k in ("quant", "quant_policy")}))
    for model in models:
        assert json.loads(model.config.quant_policy) == policy
        binary = [n for n, m in model.named_modules() if isinstance(m, (BinaryLinear, BinaryConv1d, BinaryAttention))]
        inside = ["conv_module.pointwise_conv1", "conv_module.depthwise_conv", "conv_module.pointwise_conv2"]
        inside = [*(f"self_attn.{n}" for n in ("k_proj", "v_proj", "q_proj", "out_proj", "products")), *inside]
        assert sorted(binary) == sorted(f"encoder.layers.0.{name}" for name in inside)


@pytest.mark.parametrize("policy", ["paper", {"base": "paper"}, "{base: paper}"])
def test_a_policy_stands_for_w1a1(policy: object) -> None:
    model = hubert_eff.binarize(hubert_eff.build("conformer-debug"), policy)
    assert model.config.quant == "w1a1" and isinstance(model.encoder.layers[0].conv_module.depthwise_conv, BinaryConv1d)


def test_an_encoder_that_declares_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hubert_eff.build("transformer-debug")
    for module in model.modules():
        if isinstance(module, Declared):
            monkeypatch.setattr(type(module), "kinds", lambda self: {})
    with pytest.raises(UserError, match="nothing of this TransformerEncoder would be binarized: its blocks have no method kinds"):
        hubert_eff.binarize(model)


def test_activations_become_relu_only_in_front_of_binary_layers() -> None:
    model = hubert_eff.binarize(hubert_eff.build("squeezeformer-debug"), "w1a1", {"pointwise_conv": "float"})
    block = model.encoder.layers[0]
    x = torch.tensor([-1.0, 2.0])
    assert block.ffn1.activation(x.clone()).tolist() == [0.0, 2.0] and not block.ffn1.w_2.input.signed and block.ffn1.w_1.input.signed
    assert block.conv_module.activation_1(x.clone())[0] < 0 and block.conv_module.activation_2(x.clone())[0] < 0


def test_report_says_what_became_of_each_part() -> None:
    model = hubert_eff.build("squeezeformer-debug+w1a1")
    rows = {row["path"]: row for row in quant_report(model)}
    assert rows["encoder.layers.*.ffn1.w_2"]["becomes"] == "1 x 1 bit, unsigned input" and rows["encoder.layers.*.ffn1.w_2"]["parts"] == 4
    assert rows["encoder.layers.*.conv_module.depthwise_conv"]["becomes"] == "float"
    assert rows["encoder.time_recovery"]["becomes"] == "float" and all(row["reason"] for row in rows.values())
    assert sum(row["weights"] for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert quant_report(hubert_eff.build("squeezeformer-debug")) == []


@pytest.mark.parametrize(
    "spec, policy, message",
    [
        ("w1a11", "default", "unknown quantization 'w1a11' - did you mean 'w1a1'"),
        ("w1a1", "papers", "unknown policy 'papers' - did you mean 'paper'"),
        ("w1a1", "nowhere.yaml", "path of a YAML file, which is not there"),
        ("w1a1", {"feed_forwards": "float"}, "did you mean 'feed_forward'"),
        ("w1a1", {"feed_forward": "binry"}, "did you mean 'binary'"),
        ("w1a1", {"extractor": "binary"}, "extractor always stays float"),
        ("w1a1", {"moves": "some"}, "unknown value of moves"),
        ("w1a1", {"modules": {"encoder.layers.7.ffn1.w_1": "float"}}, "unknown module in the policy 'encoder.layers.7.ffn1.w_1' - did you"),
        ("w1a1", {"modules": {"encoder.pos_conv": "binary"}}, "'encoder.pos_conv', which has to stay float"),
        ("w1a1", {"modules": {"encoder.layers.0.self_attn.q_proj": "float"}}, "share the input"),
        ("w1a1", "{base: [}", "not valid YAML"),
        ("w1a1", {"base": ["paper"]}, "unknown policy"),
        ({"base": "papers"}, "default", "unknown policy 'papers'"),
        (
            dict.fromkeys(BINARY_KINDS, "float"),
            "default",
            "nothing of this ConformerEncoder would be binarized: its policy leaves everything float",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(spec: str, policy: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        hubert_eff.binarize(hubert_eff.build("conformer-debug"), spec, policy)
    assert "\n" not in str(caught.value)


def test_wrong_forms_are_refused() -> None:
    model = hubert_eff.build("conformer-debug")
    binary = hubert_eff.binarize(model, "w1a1")
    for spec in ("w1a1", "w1a2"):
        with pytest.raises(UserError, match="binarized already \\(w1a1\\)"):
            hubert_eff.binarize(binary, spec)
    with pytest.raises(UserError, match="fused"):
        hubert_eff.binarize(hubert_eff.fuse(model), "w1a1")
    with pytest.raises(UserError, match="cannot be fused"):
        hubert_eff.fuse(binary)
    with pytest.raises(UserError, match="weights of a binarized model"):
        model.load_state_dict(binary.state_dict())
    with pytest.raises(UserError, match="weights of a float model"):
        binary.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="expected a HubertModel"):
        hubert_eff.binarize(nn.Linear(2, 2), "w1a1")
    with pytest.raises(UserError, match="unknown value of quant 'w2a2'"):
        hubert_eff.build("conformer-debug+w2a2")
