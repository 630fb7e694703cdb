"""The gradient of a classifier of images in a pipeline that draws latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guidegen.diffusers.networks import Call
from guidegen.scores.gradient import DenoisedScore, DetachedScore
from guidegen.scores.interfaces import Step


class _Null:
    """The unconditional call of a step at another x_t, as a `Denoiser` whose labels say nothing.

    Args:
        call: that was made.
        prediction: what the pipeline made of its output: Z-Image turns the sign.
        kind: what it predicts.
    """

    def __init__(self, call: Call, prediction: Tensor, kind: Any):
        self._call, self._prediction, self.prediction_type = call, prediction, kind

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        caches = self._call.kwargs.get("kv_cache") is not None  # which a second call would change
        output = self._prediction if caches else self._call.again(x_t).float()
        if not caches and output.shape == self._prediction.shape:
            size = self._prediction.abs().max()
            for sign in (1, -1):
                if (sign * output.detach() - self._prediction).abs().max() <= 0.01 * size:
                    return sign * output
        raise ValueError(
            "The pipeline's prediction is not the output of its network, so that nothing is known of its derivative: "
            "set classifier_gradient='detached'."
        )


def gradient(
    classifier: Callable[[Tensor], Tensor],
    labels: Sequence[int],
    decode: Callable[[Tensor], Tensor],
    step: Step,
    null: Tensor,
    call: Call | None,
) -> Tensor:
    """grad log p(label | x0(x_t)) with respect to x_t, (B, *) fp32.

    Args:
        classifier: from images (B, 3, H, W) in [-1, 1] to logits (B, K).
        labels: the column of each sample (B).
        decode: from latents to images.
        step: its x_t (B, *), level and prediction type.
        null: the unconditional prediction (B, *) fp32.
        call: that it comes from, which is made once more for its derivative; None leaves that out.
    """
    dtype = None if call is None or call.x_t.dtype == torch.float32 else call.x_t.dtype

    def logits_of(x0: Tensor) -> Tensor:
        logits: Any = classifier(decode(x0))
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"classifier gives a {type(logits).__name__} and not logits: guidegen.load_classifier loads one that does."
            )
        if logits.ndim == 2 and max(labels) >= logits.shape[1]:
            raise ValueError(f"classifier_labels: there is no column {max(labels)} in logits of {logits.shape[1]}.")
        return logits

    columns, asked = {label: label for label in labels}, torch.tensor(list(labels), device=null.device)
    if call is not None:
        exact = DenoisedScore(logits_of, columns, _Null(call, null, step.kind), dtype)
        return exact(step.x_t, torch.zeros(()), asked, step.level)
    detached = DetachedScore(logits_of, columns, step.kind)
    some = zip(step.x_t.split(1), asked.split(1), null.split(1), strict=True)  # one at a time: a decoder needs much memory
    return torch.cat([detached(x_t, torch.zeros(()), label, step.level, u) for x_t, label, u in some])
