"""The networks of Dhariwal & Nichol 2021 (arXiv 2105.05233), written from the paper and from the names
and shapes of the published state dicts, and their sampler, from Song et al. 2021 (arXiv 2010.02502, eq. 12)
and algorithm 2 of the paper. What `guidegen convert` makes is compared with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Options:
    """The flags of guided-diffusion that shape a network."""

    width: int = 32
    mult: tuple[float, ...] = (1, 2)
    res_blocks: int = 1
    attention: tuple[int, ...] = (2,)  # downsampling factors with attention
    heads: int | None = None
    head_channels: int | None = 16
    new_order: bool = False
    resample: str = "resnet"  # resnet, conv, none
    scale_shift: bool = True
    classes: int | None = None
    learned_variance: bool = True
    size: int = 8
    channels: int = 3
    pool: str = "attention"

    def heads_of(self, channels: int) -> int:
        return self.heads or channels // (self.head_channels or channels)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """cos then sin of t at frequencies 10000^(-i / half)."""
    half = dim // 2
    angles = t[:, None].float() * torch.exp(-math.log(10000) / half * torch.arange(half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Res(nn.Module):
    def __init__(self, a: int, b: int, temb: int, scale_shift: bool, resize: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize or (lambda x: x)
        self.in_layers = nn.Sequential(norm(a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(temb, b * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(norm(b), nn.SiLU(), nn.Identity(), nn.Conv2d(b, b, 3, padding=1))
        if a != b:
            self.skip_connection = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resize(F.silu(self.in_layers[0](x))))
        x = self.resize(x)
        embedded = self.emb_layers(temb)[:, :, None, None]
        if self.scale_shift:  # AdaGN, eq. 3 of section 3.1
            scale, shift = embedded.tensor_split(2, dim=1)
            h = self.out_layers[3](F.silu(self.out_layers[0](h) * (1 + scale) + shift))
        else:
            h = self.out_layers(h + embedded)
        return h + (self.skip_connection(x) if hasattr(self, "skip_connection") else x)


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, 3 C, T), head by head."""
    blocks = list(qkv.chunk(3 * heads, dim=1))
    results = []
    for head in range(heads):
        places = [part * heads + head for part in range(3)] if new_order else [3 * head + part for part in range(3)]
        q, k, v = (blocks[place] for place in places)
        weight = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
        results.append(v @ weight.transpose(1, 2))
    return torch.cat(results, dim=1)


class Attention(nn.Module):
    def __init__(self, channels: int, o: Options):
        super().__init__()
        self.heads, self.new_order = o.heads_of(channels), o.new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        flat = x.flatten(2)
        return (flat + self.proj_out(attend(self.qkv(self.norm(flat)), self.heads, self.new_order))).view_as(x)


class Resize(nn.Module):
    """Halves with `op`, or doubles and then `conv`."""

    def __init__(self, way: str, channels: int, learned: bool):
        super().__init__()
        self.way = way
        if learned and way == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        elif learned:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if self.way == "down":
            return self.op(x) if hasattr(self, "op") else halve(x)
        return self.conv(double(x)) if hasattr(self, "conv") else double(x)


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Chain(nn.Sequential):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        for part in self:
            x = part(x) if isinstance(part, nn.Conv2d) else part(x, temb)
        return x


class Encoder(nn.Module):
    """What UNet and classifier share: the way down and the middle."""

    def __init__(self, o: Options):
        super().__init__()
        self.o, self.temb = o, 4 * o.width
        self.time_embed = nn.Sequential(nn.Linear(o.width, self.temb), nn.SiLU(), nn.Linear(self.temb, self.temb))
        self.widths = [int(o.width * factor) for factor in o.mult]
        channels = self.widths[0]
        self.skips, blocks = [channels], [Chain(nn.Conv2d(o.channels, channels, 3, padding=1))]
        for level, wide in enumerate(self.widths):
            for _ in range(o.res_blocks):
                blocks.append(self.layer(level, channels, wide))
                channels = wide
                self.skips.append(channels)
            if level < len(self.widths) - 1:
                blocks.append(Chain(self.resize("down", channels)))
                self.skips.append(channels)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = Chain(self.res(channels, channels), Attention(channels, o), self.res(channels, channels))

    def res(self, a: int, b: int, resize: Callable[[Tensor], Tensor] | None = None) -> Res:
        return Res(a, b, self.temb, self.o.scale_shift, resize)

    def resize(self, way: str, channels: int) -> nn.Module:
        if self.o.resample == "resnet":
            return self.res(channels, channels, {"down": halve, "up": double}[way])
        return Resize(way, channels, self.o.resample == "conv")

    def layer(self, level: int, a: int, b: int, *more: nn.Module) -> Chain:
        attention = [Attention(b, self.o)] if 2**level in self.o.attention else []
        return Chain(self.res(a, b), *attention, *more)

    def encode(self, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        passed = []
        for block in self.input_blocks:
            x = block(x, temb)
            passed.append(x)
        return self.middle_block(x, temb), passed


class UNet(Encoder):
    """`UNetModel`: x (B, C, H, W), t (B,), labels (B,) or None -> eps, and the variance's share."""

    def __init__(self, o: Options):
        super().__init__(o)
        if o.classes:
            self.label_emb = nn.Embedding(o.classes, self.temb)
        channels, skips, blocks = self.widths[-1], list(self.skips), []
        for level, wide in reversed(list(enumerate(self.widths))):
            for i in range(o.res_blocks + 1):
                up = [self.resize("up", wide)] if level and i == o.res_blocks else []
                blocks.append(self.layer(level, channels + skips.pop(), wide, *up))
                channels = wide
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            norm(channels), nn.SiLU(), nn.Conv2d(channels, o.channels * (2 if o.learned_variance else 1), 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        temb = self.time_embed(sinusoids(t, self.o.width).to(x))
        if self.o.classes:
            temb = temb + self.label_emb(labels)
        h, passed = self.encode(x, temb)
        for block in self.output_blocks:
            h = block(torch.cat([h, passed.pop()], dim=1), temb)
        return self.out(h)


class Pool(nn.Module):
    """CLIP's attention pool (Radford et al. 2021, arXiv 2103.00020, section 2.4)."""

    def __init__(self, side: int, channels: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(channels, side * side + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding
        return self.c_proj(attend(self.qkv_proj(x), self.heads, True))[:, :, 0]


class Classifier(Encoder):
    """`EncoderUNetModel`: x (B, C, H, W), t (B,) -> logits (B, classes)."""

    def __init__(self, o: Options):
        super().__init__(o)
        channels, classes = self.widths[-1], o.classes or 5
        side = o.size >> (len(o.mult) - 1)
        if o.pool == "attention":
            head: list[nn.Module] = [Pool(side, channels, o.heads_of(channels), classes)]
        else:
            head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, classes, 1), nn.Flatten()]
        self.out = nn.Sequential(norm(channels), nn.SiLU(), *head)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, _ = self.encode(x, self.time_embed(sinusoids(t, self.o.width).to(x)))
        return self.out(h)


def randomise(network: nn.Module, seed: int) -> Any:
    """Every weight at random: the original starts some of them at zero, where a wrong conversion would not show."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(generator=draw)
            if weight.ndim == 1:  # biases, and the weights of norms
                weight.mul_(0.2).add_(0.0 if name.endswith("bias") else 1.0)
            elif "qkv" in name:
                weight.mul_(1.5 / weight[0].numel() ** 0.5)  # attention that is not nearly even
            elif name != "label_emb.weight":
                weight.mul_(1 / weight[0].numel() ** 0.5)
    return network.eval()


def cumulative_alphas(schedule: str, steps: int = 1000) -> Tensor:
    """alpha-bar in fp64: Ho et al. 2020's linear betas, or Nichol & Dhariwal 2021's cosine (arXiv 2102.09672, eq. 17)."""
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    else:
        place = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


def ddim_times(count: int, steps: int = 1000) -> list[int]:
    """The timesteps of `--timestep_respacing ddimN`: the smallest whole stride that gives N of them, from 0."""
    stride = next(i for i in range(1, steps) if math.ceil(steps / i) == count)
    return list(range(0, steps, stride))[::-1]


def guided_ddim(
    unet: Any,
    classifier: Any,
    x: Tensor,
    labels: Tensor,
    scale: Sequence[float],
    schedule: str,
    count: int,
    clip: bool = False,
) -> Tensor:
    """Algorithm 2, eta 0. With `clip`, as the published scripts do it: x0 is clipped *before* the gradient is added."""
    bars, times = cumulative_alphas(schedule), ddim_times(count)
    s = torch.tensor(scale)[:, None, None, None]
    for place, time in enumerate(times):
        bar = bars[time].item()
        before = bars[times[place + 1]].item() if place + 1 < len(times) else 1.0
        t = torch.full((len(x),), time)
        with torch.no_grad():
            eps = unet(x, t, labels if unet.o.classes else None)[:, : x.shape[1]]
        if clip:
            eps = (x - bar**0.5 * ((x - (1 - bar) ** 0.5 * eps) / bar**0.5).clamp(-1, 1)) / (1 - bar) ** 0.5
        leaf = x.detach().requires_grad_()
        log_p = classifier(leaf, t).log_softmax(dim=1).gather(1, labels[:, None]).sum()
        eps = eps - (1 - bar) ** 0.5 * s * torch.autograd.grad(log_p, leaf)[0]
        x = before**0.5 * (x - (1 - bar) ** 0.5 * eps) / bar**0.5 + (1 - before) ** 0.5 * eps
    return x
