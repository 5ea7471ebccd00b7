"""What `forward` returns: typed fields, a dict view for fairseq, and a pytree in which torch finds the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

import hubert_eff
from hubert_eff.models.hubert import HubertModel
from hubert_eff.models.output import HubertOutput, RecognizerOutput

ALWAYS = ["x", "padding_mask", "mask_indices", "masks", "chunks", "features", "features_pen"]
CLASSES = 7


def build(**keys: Any) -> HubertModel:
    return hubert_eff.build("conformer-debug", (CLASSES,), **keys)


def batch() -> dict[str, Any]:
    """Two rows of noise with labels, the second padded."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    labels = torch.randint(0, CLASSES, (2, 37), generator=generator)
    return {"source": torch.randn(2, 12_000, generator=generator), "padding_mask": padding, "target_list": [labels]}


def test_the_dict_view_has_what_was_computed() -> None:
    model = build()
    plain = model(batch()["source"], mask=False)
    assert isinstance(plain, Mapping) and list(plain) == ALWAYS and len(plain) == len(ALWAYS)
    assert plain["padding_mask"] is None is plain["mask_indices"] and plain["x"] is plain.x
    assert "states" not in plain and plain["states"] is None and plain.get("states", 1) == 1
    with pytest.raises(KeyError, match="stats"):
        plain["stats"]
    output = model.eval()(**batch(), return_states=True)
    assert list(output) == [*ALWAYS, "features_square", "states", "logits_m", "logits_u", "targets_m", "targets_u"]
    assert set(dict(output)) == set(output.keys()) and output.get("padding_mask") is output.padding_mask
    skipped = build(skip_nomask=True)(**batch())
    assert skipped["logits_u"] is None and skipped["targets_u"] is None and "logits_m" in skipped and "logits_u" not in skipped


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("trained", [True, False])
def test_a_pytree_keeps_every_field(trained: bool) -> None:
    output = build().train(trained)(**batch(), return_states=True)
    leaves, spec = _pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == sum(isinstance(leaf, torch.Tensor) for leaf in _pytree.tree_leaves(dict(output)))
    again = _pytree.tree_unflatten(leaves, _pytree.treespec_loads(_pytree.treespec_dumps(spec)))
    assert type(again) is HubertOutput and list(again) == list(output)
    assert all(same(a, b) for a, b in zip(_pytree.tree_leaves(again), leaves, strict=True))
    moved = _pytree.tree_map_only(torch.Tensor, torch.zeros_like, RecognizerOutput(torch.ones(()), lengths=torch.ones(2)))
    assert isinstance(moved, RecognizerOutput) and not moved.loss and moved.log_probs is None and moved["lengths"].shape == (2,)


def test_torch_export_returns_it(tmp_path: Path) -> None:
    model, wav = build().eval(), torch.randn(1, 16_000)
    torch.export.save(torch.export.export(model, (wav,), {"mask": False, "return_states": True}, strict=False), tmp_path / "model.pt2")
    output = torch.export.load(tmp_path / "model.pt2").module()(wav, mask=False, return_states=True)
    expected = model(wav, mask=False, return_states=True)
    assert isinstance(output, HubertOutput) and list(output) == list(expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(output.states or (), expected.states or (), strict=True))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Opaque:
    """A result in which torch finds nothing."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Hidden(nn.Module):
    """A model whose result is opaque."""

    def __init__(self, model: HubertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **keys: Any) -> Opaque:
        return Opaque(self.model(*args, **keys).x)


def test_data_parallel_training_finds_the_tensors(alone: None) -> None:
    """Where not all parameters are used, here the codebook head, it walks back from the tensors of the output."""
    model, source = build(dropout_input=0.0), batch()["source"]
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):  # what is left over from an update shows in the next
        parallel(source, features_only=True).x.square().sum().backward()
    assert model.post_extract_proj is not None and model.post_extract_proj.weight.grad is not None and model.final_proj.weight.grad is None
    blind = DistributedDataParallel(Hidden(model), find_unused_parameters=True)
    with pytest.raises(RuntimeError, match="marked as ready twice|marked ready twice"):
        for _ in range(2):
            blind(source, features_only=True).x.square().sum().backward()
