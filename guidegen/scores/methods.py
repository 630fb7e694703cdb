"""The methods of `--guidance`: an unconditional u and a conditional c become a guided prediction. One function each.

Every function has the form `(unconditional, conditional, w, step, *, option=default) -> guided`:
tensors (B, *) fp32 of one prediction type, such as (B, C, H, W) or packed tokens (B, L, C), w (B, 1, ...), each sample
apart from the others. A formula that needs the layout of an image refuses any other.
w = 0 means u and w = 1 means c; `Method` sees to it where a formula alone does not. Where nothing else
is stated a formula holds in the prediction type of the network, as in diffusers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from guidegen.scores.guidance import classifier_free
from guidegen.scores.interfaces import Step
from guidegen.scores.method import METHODS as METHODS
from guidegen.scores.method import PARTS as PARTS
from guidegen.scores.method import SYMBOLS as SYMBOLS
from guidegen.scores.method import Combine as Combine
from guidegen.scores.method import Method as Method
from guidegen.scores.method import choices as choices
from guidegen.scores.method import find_method as find_method
from guidegen.scores.method import method
from guidegen.scores.noise import Level

Space = Literal["x0", "native"]
_TINY = 1e-12
"""Below any norm that means something; keeps quotients of zero difference finite."""


def renoising_gain(level: Level, following: Level) -> float:
    """What CFG++ multiplies w by: rho / (rho - rho'), rho = sigma / alpha now and rho' after the step.

    CFG++ (Chung et al. 2024, arXiv 2406.08070, algorithm 2) guides the denoised estimate, with a weight
    w from 0 to 1, and renoises it with the unconditional prediction. In x = x_t / alpha, and for
    predictions of noise, DDIM goes from x to x0 + rho' eps with x0 = x - rho eps:

        CFG:    x' = x - (rho - rho') (u + w (c - u))
        CFG++:  x' = x - rho (u + w (c - u)) + rho' u  =  x - (rho - rho') (u + w rho / (rho - rho') (c - u))

    So CFG++ is CFG with this w, exact for deterministic first-order samplers: DDIM with eta 0, and
    Euler, where they do not clip the denoised estimate. Written without quotients of zero, it is 1 where a step
    takes all noise away (sigma' = 0) and from pure noise (alpha = 0).

    Args:
        level: of the step's input.
        following: of what the scheduler makes of it, with less noise.
    """
    return level.sigma * following.alpha / (level.sigma * following.alpha - following.sigma * level.alpha)


method(
    "cfg",
    "u + w (c - u)",
    "Ho & Salimans 2022, arXiv 2207.12598, eq. 6; Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2",
    linear=True,
    line="the plain one: along the difference of the two predictions",
)(classifier_free)
method(
    "cfg++",
    "u + w r / (r - r') d",
    "Chung et al. 2024, arXiv 2406.08070, algorithm 2",
    changes="w",
    linear=True,
    gain=renoising_gain,
    line="guided image, unguided noise; w from 0 to 1; for ddim and euler",
)(classifier_free)


def _dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions but that of the batch."""
    return tuple(range(1, x.ndim))


def norm(x: Tensor) -> Tensor:
    """Euclidean length of each sample (B, 1, ...)."""
    length: Tensor = torch.linalg.vector_norm(x, dim=_dims(x), keepdim=True)
    return length


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each sample (B, 1, ...)."""
    return (x * y).sum(_dims(x), keepdim=True)


@method(
    "rescale",
    "phi g std(c) / std(g) + (1 - phi) g",
    "Lin et al. 2023, arXiv 2305.08891, eq. 15-16",
    changes="result",
)
def rescale(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, *, phi: float = 0.7) -> Tensor:
    """Gives the guided prediction the spread of the conditional one.

    Lin et al. 2023 (arXiv 2305.08891, eq. 15 and 16), against the overexposure of a large w.

    Args:
        phi: how much of it, 0 to 1. Neutral: 0.
    """
    guided = classifier_free(unconditional, conditional, w)
    spread = guided.std(_dims(guided), correction=0, keepdim=True)
    of_conditional = conditional.std(_dims(guided), correction=0, keepdim=True)
    ratio = torch.where(spread > 0, of_conditional / spread.clamp(min=_TINY), 1)
    return phi * (guided * ratio) + (1 - phi) * guided


@method(
    "renorm",
    "g min(1, limit |c| / |g|)",
    "Qin et al. 2025, arXiv 2503.21758; Deng et al. 2025, arXiv 2505.14683",
    changes="result",
)
def renorm(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, *, limit: float = 1.0) -> Tensor:
    """Holds the guided prediction to the length of the conditional one.

    CFG-Renorm of Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758) and BAGEL (Deng et al. 2025,
    arXiv 2505.14683), over the whole image as in diffusers' Z-Image pipeline.

    Args:
        limit: the longest g, in lengths of c. Neutral: a large one.
    """
    guided = classifier_free(unconditional, conditional, w)
    return guided * (limit * norm(conditional) / norm(guided).clamp(min=_TINY)).clamp(max=1)


@method(
    "threshold",
    "clip(x0(g), -s, s) limit / s",
    "Saharia et al. 2022, arXiv 2205.11487, section 2.3",
    changes="result",
)
def threshold(
    unconditional: Tensor,
    conditional: Tensor,
    w: Tensor,
    step: Step,
    *,
    percentile: float = 0.995,
    limit: float = 1.0,
    maximum: float = 0.0,
) -> Tensor:
    """Dynamic thresholding: draws the denoised image back into range.

    s is a percentile of |x0| in each image, at least `limit`. Dynamic thresholding of Imagen
    (Saharia et al. 2022, arXiv 2205.11487, section 2.3); diffusers' schedulers have it for pixels.

    Args:
        percentile: 0 to 1.
        limit: the largest value of the data: 1 for pixels, about 4 for latents. Neutral: a large one.
        maximum: the largest s; 0 for any. The same as `limit` makes it a plain clip, as diffusers'
            `sample_max_value` of 1 does.
    """
    guided = classifier_free(unconditional, conditional, w)
    if not step.has_x0:
        return guided
    x0 = step.to_x0(guided)
    # image by image: torch.quantile refuses more than 16 million numbers at once
    s = torch.stack([torch.quantile(image, percentile) for image in x0.abs().flatten(1)])
    s = s.view(-1, *[1] * (x0.ndim - 1))
    s = (s.clamp(max=maximum) if maximum else s).clamp(min=limit)
    inside = torch.maximum(torch.minimum(x0, s), -s)
    # by the change of x0, so that what is in range stays as it is to the last bit
    change = inside * torch.where(s > limit, limit / s, 1) - x0
    return torch.where(change == 0, guided, step.from_x0(x0 + change))


@method(
    "apg",
    "c + (w - 1) (d_orth + eta d_par)",
    "Sadat et al. 2024, arXiv 2410.02416, algorithm 1",
    changes="difference",
)
def apg(
    unconditional: Tensor,
    conditional: Tensor,
    w: Tensor,
    step: Step,
    *,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    momentum: float = -0.5,
    space: Space = "x0",
) -> Tensor:
    """Takes out what lies along c and saturates; bounded, with momentum.

    d is c - u plus `momentum` times the d of the step before, shortened to `norm_threshold`, and split
    into what is orthogonal and parallel to c. Sadat et al. 2024 (arXiv 2410.02416, algorithm 1).
    Neutral: eta = 1, norm_threshold = 0, momentum = 0.

    Args:
        eta: how much of the parallel part stays, 0 to 1.
        norm_threshold: the longest d over the whole image; 0 for any.
        momentum: negative pushes away from where the steps before went; 0 for none.
        space: x0 splits denoised estimates, as the paper; native splits predictions, as diffusers.
    """
    denoised = space == "x0" and step.has_x0
    u, c = (step.to_x0(unconditional), step.to_x0(conditional)) if denoised else (unconditional, conditional)
    d = c - u
    if momentum:
        d = step.memory["apg"] = d + momentum * step.memory.get("apg", 0)
    if norm_threshold > 0:
        d = d * (norm_threshold / norm(d).clamp(min=_TINY)).clamp(max=1)
    direction = c / norm(c).clamp(min=_TINY)
    parallel = dot(d, direction) * direction
    guided = c + (w - 1) * (d - parallel + eta * parallel)
    return step.from_x0(guided) if denoised else guided


@method(
    "apg-mix",
    "u + (1 + early (w - 1)) d, then apg",
    "HunyuanImage 2.1, Tencent 2025; Sadat et al. 2024, arXiv 2410.02416",
    changes="difference",
)
def apg_mix(
    unconditional: Tensor,
    conditional: Tensor,
    w: Tensor,
    step: Step,
    *,
    start: int = 5,
    early: float = 0.28,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    momentum: float = -0.5,
    space: Space = "native",
) -> Tensor:
    """Weak plain guidance in the first steps, apg in the others.

    u + w' (c - u) with w' = 1 + early (w - 1) up to step `start`.

    The momentum gathers from the first step on. HunyuanImage 2.1 (Tencent 2025), which goes from a
    scale of 3.5 to one of 10: early = 2.5 / 9. Over Sadat et al. 2024 (arXiv 2410.02416).

    Args:
        start: the last step of the plain kind, counted from 0; -1 for none.
        early: how much of w - 1 it has. Neutral: 1, with the neutral setting of `apg`.
        eta: as in `apg`.
        norm_threshold: as in `apg`.
        momentum: as in `apg`.
        space: as in `apg`.
    """
    options = {"eta": eta, "norm_threshold": norm_threshold, "momentum": momentum}
    guided = apg(unconditional, conditional, w, step, space=space, **options)  # at every step: it has a memory
    return guided if step.index > start else classifier_free(unconditional, conditional, 1 + early * (w - 1))


@method(
    "cfg-zero",
    "f u + w (c - f u), f = <c, u> / |u|^2",
    "Fan et al. 2025, arXiv 2503.18886, section 4",
    changes="u",
)
def cfg_zero(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, *, zero_init: int = 1) -> Tensor:
    """Fits u to c first; stands still in the first steps of a flow.

    CFG-Zero* (Fan et al. 2025, arXiv 2503.18886, section 4). It also stands still in the first steps,
    where a learned velocity is worse than none: only in flow matching, as zero is no standstill
    in the other prediction types.

    Args:
        zero_init: how many first steps are zero. Neutral: 0 and c = u; the fit has no switch.
    """
    if step.kind == "flow" and step.index < zero_init:
        return torch.zeros_like(conditional)
    fit = dot(conditional, unconditional) / (dot(unconditional, unconditional) + 1e-8)
    return classifier_free(fit * unconditional, conditional, w)


@method(
    "tangential",
    "u' + w (c - u'), u' = <u, v> v",
    "Kwon et al. 2025, arXiv 2503.18137",
    changes="u",
)
def tangential(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step) -> Tensor:
    """Keeps of u what lies along the main direction v of u and c.

    v is the first right singular vector of the two. TCFG (Kwon et al. 2025, arXiv 2503.18137).
    The 2x2 Gram matrix gives it without an SVD: with cos and sin of twice the angle of its main axis,
    u' = (sin c + (1 - cos) u) / 2. Neutral: none; u along c.
    """
    cosine = dot(conditional - unconditional, conditional + unconditional)  # |c|^2 - |u|^2, without the cancellation
    sine = 2 * dot(conditional, unconditional)
    radius = torch.hypot(cosine, sine)
    along = (sine * conditional + (radius - cosine) * unconditional) / (2 * radius).clamp(min=_TINY)
    return classifier_free(torch.where(radius > 0, along, unconditional), conditional, w)


@method(
    "frequency",
    "c + (w - 1) (d - (1 - low) lowpass(d))",
    "Sadat et al. 2025, arXiv 2506.19713, algorithm 2",
    changes="difference",
    images=True,
)
def frequency(
    unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, *, low: float = 0.5, halvings: int = 1
) -> Tensor:
    """Guides low frequencies less: detail without saturation.

    Frequency-decoupled guidance (Sadat et al. 2025, arXiv 2506.19713, algorithm 2): w is their w_high
    and 1 + low (w - 1) their w_low, over a Laplacian pyramid (Burt & Adelson 1983).

    Args:
        low: how much of w - 1 the low frequencies have, 0 to 1. Neutral: 1.
        halvings: how often the size is halved down to what counts as low.
    """
    d = conditional - unconditional
    if d.ndim != 4:
        raise ValueError(f"frequency takes images (B, C, H, W), found {tuple(d.shape)}: packed tokens have no frequencies.")
    coarse, sizes = d, []
    for _ in range(halvings):
        sizes.append(coarse.shape[-2:])
        half = [(side + 1) // 2 for side in sizes[-1]]
        coarse = F.interpolate(_blur(coarse), half, mode="bilinear", align_corners=False)
    for size in reversed(sizes):
        coarse = _blur(F.interpolate(coarse, size, mode="bilinear", align_corners=False))
    return conditional + (w - 1) * (d - (1 - low) * coarse)


def _blur(x: Tensor) -> Tensor:
    """The 5x5 binomial kernel of Burt & Adelson over each channel, mirrored at the edges where they are that far."""
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16
    mirrored = min(x.shape[-2:]) > 2
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect" if mirrored else "replicate").flatten(0, 1)[:, None]
    return F.conv2d(padded, torch.outer(taps, taps)[None, None])[:, 0].view_as(x)


@method(
    "magnitude",
    "c + (w - 1) exp(-alpha |d| / |u|) d",
    "Zhu et al. 2025, arXiv 2508.03442",
    changes="w",
)
def magnitude(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, *, alpha: float = 8.0) -> Tensor:
    """Weakens where the difference is large, so most at first.

    MAMBO-G (Zhu et al. 2025, arXiv 2508.03442): most at the first steps, where a large w throws far.

    Args:
        alpha: how fast, at least 0. Neutral: 0.
    """
    d = conditional - unconditional
    ratio = norm(d) / norm(unconditional).clamp(min=_TINY)
    return conditional + (w - 1) * torch.exp(-alpha * ratio) * d


@method(
    "power",
    "c + (w - 1) |x0(c) - x0(u)|^exponent d",
    "Pavasovic et al. 2025, arXiv 2502.07849",
    changes="w",
)
def power(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, *, exponent: float = 0.9) -> Tensor:
    """Strengthens where the difference is large, so least at the end.

    Power-law guidance (Pavasovic et al. 2025, arXiv 2502.07849) in its rescaled form, on the
    length between the denoised estimates, which is the same in every prediction type. Tune w anew
    for every exponent and image size. A negative exponent divides by the length, as the normalisation
    in beta-CFG (Malarz et al. 2025, arXiv 2502.10574) does.

    Args:
        exponent: above -1. Neutral: 0.
    """
    d = conditional - unconditional
    apart = step.to_x0(conditional) - step.to_x0(unconditional) if step.has_x0 else d
    return conditional + (w - 1) * norm(apart).clamp(min=_TINY) ** exponent * d
