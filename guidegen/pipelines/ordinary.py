"""Ordinary pipelines of diffusers, guided through the argument that is their guidance weight.

They all compute `u + guidance_scale * (c - u)`, so that a number whose product with c - u is (guided - u) guides them with
any method. It does not guess: a pipeline that multiplies anything else than c - u is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from guidegen.diffusers import Guidance
from guidegen.errors import GuidegenError
from guidegen.models.kinds.pipeline import TextPipeline
from guidegen.pipelines.loading import CACHED


class Scale(float):
    """A guidance_scale of 2, whose product with c - u (B, *) is what a `Guidance` adds to u.

    Args:
        guidance: with a weight for each sample, and the scheduler of the pipeline.
        network: the one that is called; hooked until `close`.
        scheduler: that of the pipeline.
        sign: -1 where the pipeline turns the sign of the prediction after guidance.
    """

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls, 2.0)

    def __init__(self, guidance: Guidance, network: torch.nn.Module, scheduler: Any, sign: int):
        self._guidance, self._scheduler, self._sign = guidance, scheduler, sign
        self._name = type(network).__name__
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._step = 0
        self._hook = network.register_forward_hook(self._keep, with_kwargs=True)

    def close(self) -> None:
        """Leaves the network as it was."""
        self._hook.remove()

    def _keep(self, network: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._calls.append((args[0] if args else kwargs["hidden_states"], output[0]))

    def __mul__(self, difference: Any) -> Any:
        if not isinstance(difference, Tensor):
            return float(self) * difference
        x_t, null, conditional = self._predictions(difference)
        timesteps = self._scheduler.timesteps
        self._guidance.set_state(self._step, len(timesteps), timesteps[self._step])
        self._guidance._x_t = x_t
        drawn = x_t.shape[1]  # a learned variance, which is cut off after guidance, is left alone
        u, c = self._sign * null[:, :drawn], self._sign * conditional[:, :drawn]
        guided = self._sign * self._guidance.forward(c, u).pred
        self._step += 1
        self._calls.clear()
        return torch.cat([guided - null[:, :drawn], torch.zeros_like(difference[:, drawn:])], dim=1)

    __rmul__ = __mul__

    def _predictions(self, difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (B, *), and u and c (B, *), which the network was called for at once or one after the other."""
        x_t, last = self._calls[-1] if self._calls else (difference, difference)
        if len(last) == 2 * len(difference):
            x_t, pair = x_t[: len(difference)], tuple(last.chunk(2))
        else:
            pair = (last, self._calls[-2][1]) if len(self._calls) > 1 else (last, last)
        # a pipeline may cut a learned variance before guidance
        null, conditional = (each[:, : difference.shape[1]].to(difference.dtype) for each in pair)
        if null.shape != difference.shape or not torch.equal(conditional - null, difference):
            raise GuidegenError(f"The pipeline of {self._name} multiplies its weight with something else than c - u.")
        return x_t, null, conditional


class OrdinaryLoop:
    """An ordinary pipeline, whose text encoders are called once a prompt; its arguments are those of `ModularLoop`."""

    def __init__(
        self,
        checkpoint: TextPipeline,
        parts: Mapping[str, Any],
        negative_prompt: str | None,
        offload_to: torch.device | None = None,
    ):
        import diffusers

        cls = getattr(diffusers, checkpoint.index["_class_name"])
        taken = {name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")}
        options = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
        given = dict.fromkeys(taken - options.keys()) | {name: part for name, part in parts.items() if name in taken}
        self.pipeline = cls(**given, **options)
        self.pipeline.set_progress_bar_config(disable=True)
        if offload_to is not None:
            self.pipeline.enable_model_cpu_offload(device=offload_to)
        self.pipeline.encode_prompt = _Once(self.pipeline.encode_prompt)
        self._family, self._network = checkpoint.family, parts[checkpoint.network]
        self._negative = negative_prompt or ""

    @property
    def scheduler(self) -> Any:
        """That of the pipeline."""
        return self.pipeline.scheduler

    def __call__(
        self, prompt: str, guidance: Guidance, generators: Sequence[torch.Generator], conditional: bool, **how: Any
    ) -> Tensor:
        """As `ModularLoop`; with `conditional`, the pipeline draws without guidance."""
        scale = None if conditional else Scale(guidance, self._network, self.scheduler, self._family.sign)
        try:
            images: Tensor = self.pipeline(
                prompt=prompt,
                negative_prompt=self._negative,
                num_images_per_prompt=len(generators),
                generator=list(generators),
                output_type="pt",
                **{self._family.scale: 1.0 if scale is None else scale},
                **self._family.call,
                **how,
            ).images
        finally:
            if scale is not None:
                scale.close()
        return images


class _Once:
    """`encode_prompt` of a pipeline, called once for each of its arguments but the number of images; `CACHED` are kept."""

    def __init__(self, encode: Any):
        self._encode, self._signature = encode, inspect.signature(encode)
        self._kept: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        count = given.pop("num_images_per_prompt", 1)
        if "do_classifier_free_guidance" in given:
            given["do_classifier_free_guidance"] = True  # what is not needed is left alone
        key = repr(sorted(given.items()))
        if key not in self._kept:
            if len(self._kept) == CACHED:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._encode(**given, num_images_per_prompt=1)
        return tuple(_repeated(each, count) for each in self._kept[key])


def _repeated(value: Any, count: int) -> Any:
    """What belongs to one prompt, for `count` images."""
    return value.repeat_interleave(count, dim=0) if isinstance(value, Tensor) and len(value) == 1 else value
