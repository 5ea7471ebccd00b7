"""fairseq's HuBERT training step, restated in plain torch from its formulas, for a machine on which fairseq is not installed.

What decides speed and memory is kept as fairseq has it: audio as (B, C, T) convolutions, blocks on (T, B, D), every codeword expanded
over all frames before the cosine (`compute_nce`), logits of masked and of unmasked frames, relative scores shifted through a padded
(T, 2T) tensor, LayerNorm and GroupNorm in float32 where fairseq casts, figures that are logged through `.item()`, Adam tensor by tensor
in Python, and half-precision weights with float32 copies. Parameter names are fairseq's. tests/benchmarks/test_train_gpu.py holds
loss, gradients and updates equal to those of the real classes. Dropout of features, GLU on targets,
masks over channels and LayerDrop are left out.
"""

# B batch, S samples, T frames, D model dim, H heads, d = D / H, N frames of one kind, C codewords

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PENALTY = 10.0  # weight of the feature penalty in HuBERT-base's recipe


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.new(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class GroupNorm32(nn.GroupNorm):
    """GroupNorm in float32 whatever the weights are in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).type_as(input)


class LayerNorm32(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T), in float32."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.transpose(-2, -1)
        x = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).type_as(input)
        return x.transpose(-2, -1)


class Extractor(nn.Module):
    """Waveform (B, S) -> (B, C, T): convolution, norm (of the first one only, or of each), GELU."""

    def __init__(self, layers: Iterable[tuple[int, int, int]], mode: str, bias: bool) -> None:
        super().__init__()
        blocks, before = [], 1
        for channels, kernel, stride in layers:
            parts: list[nn.Module] = [nn.Conv1d(before, channels, kernel, stride, bias=bias), nn.Dropout(0.0)]
            if mode == "layer_norm":  # a sequence of three in fairseq, of which the second has the parameters
                parts.append(nn.Sequential(nn.Identity(), LayerNorm32(channels)))
            elif not blocks:
                parts.append(GroupNorm32(channels, channels))
            blocks.append(nn.Sequential(*parts, nn.GELU()))
            before = channels
        self.conv_layers = nn.ModuleList(blocks)

    def forward(self, source: Tensor) -> Tensor:
        x = source.unsqueeze(1)
        for block in self.conv_layers:
            x = block(x)
        return x


class CutOne(nn.Module):
    """Drops the last frame, which an even kernel with symmetric padding adds."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.cut = kernel % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-1] if self.cut else x


def positional_conv(dim: int, kernel: int, groups: int) -> nn.Sequential:
    """Grouped convolution over time with weight normalization per tap, then GELU, on (B, D, T)."""
    conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
    with warnings.catch_warnings():  # the older form, whose parameters are weight_g and weight_v
        warnings.simplefilter("ignore")
        conv = nn.utils.weight_norm(conv, name="weight", dim=2)
    return nn.Sequential(conv, CutOne(kernel), nn.GELU())


class Attention(nn.Module):
    """Dense attention on (T, B, D) through torch's own function for it, as in fairseq. `hidden` (T, T) bool: pairs that may not meet."""

    hidden: Tensor | None = None

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        mixed, _ = F.multi_head_attention_forward(
            x, x, x, x.size(-1), self.heads, torch.empty([0]),
            torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)), None, None, False, self.dropout,
            self.out_proj.weight, self.out_proj.bias, self.training, padding, False, self.hidden,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return mixed


class TransformerLayer(nn.Module):
    """Post-LN block of HuBERT-base on (T, B, D)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, inner = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.self_attn = Attention(dim, config.encoder_attention_heads, config.attention_dropout)
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(p) for p in (config.dropout, config.activation_dropout, config.dropout))
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor, padding: Tensor | None, positions: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(x + self.dropout1(self.self_attn(x, padding)))
        inner = self.dropout2(F.gelu(self.fc1(x).float()).type_as(x))
        return self.final_layer_norm(x + self.dropout3(self.fc2(inner)))


def sinusoids(frames: int, dim: int, like: Tensor) -> Tensor:
    """Of the offsets T-1 ... -(T-1), (1, 2T - 1, D): sines at even channels, cosines at odd ones (Transformer-XL, section 3.3)."""
    offsets = torch.arange(frames - 1, -frames, -1.0, device=like.device)
    angles = offsets[:, None] * torch.exp(torch.arange(0.0, dim, 2, device=like.device) * -(math.log(10_000.0) / dim))
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)[None].to(like.dtype)


def shifted(scores: Tensor) -> Tensor:
    """(B, H, T, 2T - 1) by offset -> (B, H, T, T) by key, by padding a column and reading the rows one element later."""
    batch, heads, frames, offsets = scores.shape
    padded = torch.cat((scores.new_zeros(batch, heads, frames, 1), scores), -1).view(batch, heads, offsets + 1, frames)
    return padded[:, :, 1:].reshape(batch, heads, frames, offsets)[..., :frames]


class RelativeAttention(nn.Module):
    """Attention with relative positions on (T, B, D): both score tensors in full, summed, scaled (Transformer-XL, section 3.3)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(dim, dim) for _ in range(4))
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, dim // heads))) for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor | None, positions: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        q, k, v, p = (
            projection(y).unflatten(-1, (self.heads, -1))
            for projection, y in ((self.linear_q, x), (self.linear_k, x), (self.linear_v, x), (self.linear_pos, positions))
        )
        k, v, p = (y.transpose(1, 2) for y in (k, v, p))
        content = (q + self.pos_bias_u).transpose(1, 2) @ k.transpose(-2, -1)
        position = shifted((q + self.pos_bias_v).transpose(1, 2) @ p.transpose(-2, -1))
        scores = (content + position) / math.sqrt(q.size(-1))
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        mixed = self.dropout(torch.softmax(scores, -1)) @ v
        return self.linear_out(mixed.transpose(1, 2).contiguous().flatten(2)).transpose(0, 1)


class FeedForward(nn.Module):
    """LayerNorm, linear, swish, linear."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.w_1, self.w_2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.w_2(self.dropout1(F.silu(self.w_1(self.layer_norm(x))))))


class Convolution(nn.Module):
    """LayerNorm, pointwise, GLU, depthwise, BatchNorm, swish, pointwise, on (B, T, D), convolutions on (B, D, T)."""

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * dim, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.batch_norm = nn.BatchNorm1d(dim)
        self.pointwise_conv2 = nn.Conv1d(dim, dim, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.pointwise_conv1(self.layer_norm(x).transpose(1, 2)), dim=1)
        y = F.silu(self.batch_norm(self.depthwise_conv(y)))
        return self.dropout(self.pointwise_conv2(y)).transpose(1, 2)


class ConformerLayer(nn.Module):
    """Macaron block on (T, B, D) (Conformer, equation 1). fairseq has one dropout for everything."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, inner, dropout = config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.dropout
        self.ffn1, self.ffn2 = FeedForward(dim, inner, dropout), FeedForward(dim, inner, dropout)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = RelativeAttention(dim, config.encoder_attention_heads, dropout)
        self.self_attn_dropout = nn.Dropout(dropout)
        self.conv_module = Convolution(dim, config.depthwise_conv_kernel_size, dropout)

    def forward(self, x: Tensor, padding: Tensor | None, positions: Tensor | None) -> Tensor:
        x = self.ffn1(x) * 0.5 + x
        assert positions is not None
        x = self.self_attn_dropout(self.self_attn(self.self_attn_layer_norm(x), padding, positions)) + x
        x = x + self.conv_module(x.transpose(0, 1)).transpose(0, 1)
        return self.final_layer_norm(self.ffn2(x) * 0.5 + x)


class Stack(nn.Module):
    """Positions, LayerNorm, dropout and blocks. `run(block, x (T, B, D), padding, positions)` calls a block."""

    def __init__(
        self, parts: dict[str, nn.Module], relative: bool, dropout: float, multiple: int,
        run: Callable[..., Tensor] = lambda block, *inputs: block(*inputs),
    ) -> None:  # fmt: skip
        super().__init__()
        self.pos_conv, self.layers, self.layer_norm = parts["pos_conv"], parts["layers"], parts["layer_norm"]
        self.relative, self.dropout, self.multiple, self.run = relative, dropout, multiple, run

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, layer: None = None) -> tuple[Tensor, None]:
        length, padding = x.size(1), padding_mask
        if padding is not None:
            x = x.clone()
            x[padding] = 0
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        excess = -length % self.multiple
        if excess:
            x = F.pad(x, (0, 0, 0, excess))
            padding = F.pad(padding if padding is not None else x.new_zeros(len(x), length, dtype=torch.bool), (0, excess), value=True)
        x = F.dropout(x, self.dropout, self.training).transpose(0, 1)
        positions = sinusoids(x.size(0), x.size(2), x) if self.relative else None
        for block in self.layers:
            x = self.run(block, x, padding, positions)
        return x.transpose(0, 1)[:, :length], None


class RestatedHubert(nn.Module):
    """HuBERT with one codebook and a Transformer or Conformer (relative positions) of the sizes of one of our configurations."""

    def __init__(self, config: Any, classes: int, conformer: bool) -> None:
        super().__init__()
        dim, channels = config.encoder_embed_dim, config.conv_layers[-1][0]
        self.config, self.masks = config, None  # masks: the frames to mask, (B, T) bool
        self.feature_extractor = Extractor(config.conv_layers, config.extractor_mode, config.conv_bias)
        self.post_extract_proj = nn.Linear(channels, dim) if channels != dim else None
        self.dropout_input = nn.Dropout(config.dropout_input)
        self.mask_emb = nn.Parameter(torch.rand(dim))
        layer = ConformerLayer if conformer else TransformerLayer
        parts = {
            "pos_conv": positional_conv(dim, config.conv_pos, config.conv_pos_groups),
            "layers": nn.ModuleList(layer(config) for _ in range(config.encoder_layers)),
            "layer_norm": nn.LayerNorm(dim),
        }
        self.encoder = Stack(parts, conformer, config.dropout, config.required_seq_len_multiple)
        self.layer_norm = nn.LayerNorm(channels)
        self.final_proj = nn.Linear(dim, config.codebook_dim)
        self.label_embs_concat = nn.Parameter(torch.rand(classes, config.codebook_dim))

    def compute_nce(self, x: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        """x, positive (N, F), negatives (C, N, F) -> (N, 1 + C): cosines over temperature, the positive first, its double at -inf."""
        double = (positive == negatives).all(-1)
        logits = torch.cosine_similarity(x.float(), torch.cat((positive[None], negatives)).float(), dim=-1).type_as(x)
        logits /= self.config.logit_temp
        if double.any():
            logits[1:][double] = float("-inf")
        return logits.transpose(0, 1)

    def forward(self, source: Tensor, padding_mask: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits (N, 1 + C) of masked and of unmasked frames, and the mean square of the features."""
        features = self.feature_extractor(source)
        if self.config.feature_grad_mult != 1.0:
            features = _ScaledGradient.apply(features, self.config.feature_grad_mult)
        features = features[..., : targets.size(1)]
        targets = targets[:, : features.size(2)]
        penalty = features.float().pow(2).mean()
        x = self.layer_norm(features.transpose(1, 2))
        x.clone()  # the unmasked features, which HuBERT does not use
        padding = padding_mask[:, : padding_mask.size(1) // x.size(1) * x.size(1)].unflatten(1, (x.size(1), -1)).all(-1)
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        x = self.dropout_input(x)
        masks = self.masks.to(x.device)
        x[masks] = self.mask_emb.to(x.dtype)
        x, _ = self.encoder(x, padding)
        logits = []
        for chosen in (~padding & masks, ~padding & ~masks):
            projected = self.final_proj(x[chosen])
            positive = self.label_embs_concat.index_select(0, targets[chosen])
            logits.append(self.compute_nce(projected, positive, self.label_embs_concat.unsqueeze(1).expand(-1, len(projected), -1)))
        return logits, penalty


def restated_loss(model: RestatedHubert, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, float]]:
    """Cross entropy of masked frames, summed, plus the penalty; the number of frames; what is logged."""
    (target,) = sample["target_list"]
    (masked, unmasked), penalty = model(sample["net_input"]["source"], sample["net_input"]["padding_mask"], target)
    logs: dict[str, float] = {}
    losses = []
    for name, logits in (("m", masked), ("u", unmasked)):
        losses.append(F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum"))
        logs[f"loss_{name}"] = losses[-1].detach().item()
    size = len(masked)
    penalty = PENALTY * penalty.float() * size
    loss = losses[0] + penalty
    logs |= {"loss_features_pen": penalty.item(), "loss": loss.item()}
    with torch.no_grad():
        for name, logits in (("m", masked), ("u", unmasked)):
            top, bottom = logits.argmax(-1) == 0, logits.argmin(-1) == 0
            logs[f"correct_{name}"] = top.long().sum().item() - (top & bottom).long().sum().item()
    return loss, size, logs


class RestatedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, tensor by tensor in Python; eps is added to the root before the correction of its bias."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (first, second), rate = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                state["mean"].mul_(first).add_(p.grad, alpha=1 - first)
                state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                root = state["square"].sqrt().add_(group["eps"])
                size = rate * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["weight_decay"] * rate)
                p.addcdiv_(state["mean"], root, value=-size)


class Update:
    """fairseq's trainer around an optimizer: gradients per frame, clipped to `clip` in norm, one step.

    Half-precision weights (`common.bf16`) have float32 copies, which the optimizer steps on, and which are copied back.
    """

    def __init__(self, model: nn.Module, make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], clip: float = 10.0) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.half = self.weights[0].dtype != torch.float32
        self.stepped = [nn.Parameter(p.detach().float()) for p in self.weights] if self.half else self.weights
        self.optimizer, self.clip = make_optimizer(self.stepped), clip

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.weights:
            p.grad = None

    def step(self, size: int) -> None:
        """One update with the gradients of a loss that is a sum over `size` frames."""
        if self.half:
            for p, copy in zip(self.weights, self.stepped, strict=True):
                if p.grad is None:
                    copy.grad = torch.zeros_like(copy)
                elif copy.grad is None:
                    copy.grad = p.grad.float()
                else:
                    copy.grad.copy_(p.grad)
        grads = [p.grad for p in self.stepped if p.grad is not None]
        norm = torch.norm(torch.stack([torch.norm(g, p=2, dtype=torch.float32) for g in grads])) / size
        factor = (self.clip / (norm + 1e-6)).clamp_(max=1) / size
        for g in grads:
            g.mul_(factor)
        self.optimizer.step()
        if self.half:
            for p, copy in zip(self.weights, self.stepped, strict=True):
                p.data.copy_(copy.data)
