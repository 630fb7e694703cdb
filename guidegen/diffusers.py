"""A guider for the modular pipelines of diffusers: guidegen's methods, with a weight for each sample of a batch.

    pipe.update_components(guider=Guidance(method="apg", w=[1, 3, 7]))
    pipe(prompt="a red fox", negative_prompt="", num_images_per_prompt=3)

All contact with the guiders' API, which diffusers calls experimental, is in this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from guidegen.arguments import finite, instance, several
from guidegen.errors import GuidegenError
from guidegen.models.noise_schedule import convention_of
from guidegen.python_file import split_python_ref
from guidegen.sampling.schedulers import levels_after, noise_levels
from guidegen.scores.interfaces import Step, Weights
from guidegen.scores.methods import Method, find_method
from guidegen.scores.noise import PREDICTION_TYPES, Level
from guidegen.scores.schedule import GuidanceSchedule, interval_factors, make_schedule

_API = {
    "set_state": ["self", "step", "num_inference_steps", "timestep"],
    "prepare_models": ["self", "denoiser"],
    "cleanup_models": ["self", "denoiser"],
    "prepare_inputs": ["self", "data"],
    "prepare_inputs_from_block_state": ["self", "data", "input_fields"],
    "_prepare_batch": ["data", "tuple_index", "identifier"],
    "_prepare_batch_from_block_state": ["input_fields", "data", "tuple_index", "identifier"],
}
"""What this file overrides and calls, as diffusers 0.42 has it."""
_RENORMALISED = ("QwenImageTransformer2DModel",)
"""Networks whose pipelines give each guided token the length of the conditional one, which is then needed at any weight."""
_FLAGS = {"--guidance-opt": "options", "--guidance": "method", "--w-schedule": "w_schedule", "--interval": "interval"}
"""The arguments of `Guidance` by the flags that messages name."""


def _check_api() -> None:
    for name, expected in _API.items():
        if list(inspect.signature(getattr(BaseGuidance, name, _check_api)).parameters) != expected:
            raise ImportError(
                f"guidegen.diffusers fits the guiders of diffusers 0.42, and those of {diffusers.__version__} differ "
                f"({name}). Install diffusers 0.42."
            )


_check_api()


class _Noise(NamedTuple):
    """What a scheduler knows of the steps of one run: levels before and after each, and the prediction type."""

    levels: list[Level]
    after: list[Level] | None
    kind: Any


class _Unknown:
    """Stands for what a method may read and a pipeline does not tell: any use is refused with the reason."""

    def __init__(self, reason: str):
        self._reason = reason

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(self._reason)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # as copies and pickles look for
            raise AttributeError(name)
        self._refuse()

    __eq__ = __sub__ = __rmul__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Guidance(BaseGuidance):
    """A guidance method of guidegen in a modular pipeline of diffusers.

    w = 0 is the unconditional prediction and w = 1 the conditional one: w is the `guidance_scale` of
    `ClassifierFreeGuidance`, and one more than that of its `use_original_formulation` (Krea 2). At steps where all
    weights are 0 or all are 1, the network is called once; not so at 0 in Qwen-Image, whose pipeline then gives each
    token the length of the conditional one. Formulas are computed in fp32, one sample apart from the others, and
    rounded to the dtype of the predictions.

    Args:
        w: one weight for all samples, or one for each sample of the batch, in its order.
        method: a name that `guidegen guidances` lists.
        options: of the method, by name.
        interval: where guidance is on: LOW:HIGH in sigma / alpha, or 10%:60% of the steps.
        w_schedule: how the weight goes over the steps, as `--w-schedule` takes it.

    Raises:
        TypeError, ValueError: an argument that cannot be, by its name.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        *,  # `new` of diffusers forgets what was given by position
        w: float | Sequence[float],
        method: str = "cfg",
        options: Mapping[str, Any] | None = None,
        interval: str | None = None,
        w_schedule: str | None = None,
    ):
        super().__init__()
        single = not hasattr(w, "__iter__") or isinstance(w, str) or getattr(w, "ndim", 1) == 0
        self._w = [finite("w", each) for each in ([w] if single else several("w", w, of="sample"))]
        self.register_to_config(w=self._w[0] if single else self._w, options=dict(options or {}))
        self._broadcast = single
        self._interval, self._w_schedule = interval, w_schedule
        self._method = _method_of(method, options or {})
        _argument(make_schedule, [Level(1.0, 1.0)] * 10, None, w_schedule, replace(self._method, gain=None))
        _argument(interval_factors, [], interval)
        self.scheduler: Any = None
        """That of the pipeline; None takes it from the block that calls, whose argument is named `components`."""
        self._noise: Any = _Unknown("the pipeline has not run yet")
        self._schedule: GuidanceSchedule | None = None
        self._weights: list[float] = self._w
        self._renormalised = self._reads_conditional = True
        self._batch: list[str] = []
        self._memory: list[dict[str, Any]] = []
        self._x_t: Tensor | None = None
        self._hook: Any = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Called by the pipeline at each step; a step that is not after the last one begins a new run."""
        begins = self._step is None or step <= self._step or num_inference_steps != self._num_inference_steps
        super().set_state(step, num_inference_steps, timestep)
        if begins:
            self._begin(_calling_pipeline(self))
        assert self._schedule is not None
        if step >= len(self._schedule.factors):
            raise ValueError(
                f"Step {step} of {len(self._schedule.factors)}: the pipeline takes more steps than it announces. "
                "Set the guider's scheduler to that of the pipeline."
            )
        self._weights = [self._schedule.weights(step, Weights(w)).w for w in self._w]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self._method.linear or self._x_t is not None:  # both calls of a step have one input
            return
        self._hook = denoiser.register_forward_pre_hook(self._keep_input, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        pairs = [value for value in data.values() if isinstance(value, tuple)]
        return self._batches(pairs, partial(self._prepare_batch, data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        names = [value for value in input_fields.values() if isinstance(value, tuple)]
        pairs = [tuple(getattr(data, name, None) for name in pair) for pair in names]
        return self._batches(pairs, partial(self._prepare_batch_from_block_state, input_fields, data))

    def __call__(self, data: list[Any]) -> Any:
        return self.forward(**{getattr(each, self._identifier_key): each.noise_pred for each in data})

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> Any:
        """The guided prediction (B, *) of the dtype of the predictions, of which one is enough where all weights are."""
        some = pred_uncond if pred_cond is None else pred_cond
        assert some is not None
        if not self._broadcast and self._enabled and len(self._w) != len(some):
            raise ValueError(
                f"w has {len(self._w)} weights and the batch {len(some)} samples: give one weight, or one for each sample "
                "(prompts times num_images_per_prompt)."
            )
        pred = some
        if pred_cond is not None and pred_uncond is not None and self._enabled:
            weights = self._weights * len(some) if self._broadcast else self._weights
            pred = self._combined(pred_uncond.float(), pred_cond.float(), weights).to(some.dtype)
        self._x_t = None
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the call that is prepared is the conditional one."""
        return self._batch[self._count_prepared - 1] == "pred_cond"

    @property
    def num_conditions(self) -> int:
        """2 where any step may need the unconditional prediction: by this, encoders encode the negative prompt."""
        return 2 if self._enabled and (self._method.gain is not None or any(w != 1 for w in self._w)) else 1

    @property
    def guidance_scale(self) -> float:
        """Read by SDXL's blocks alone, for a network that embeds it."""
        raise ValueError("The UNet has guidance distilled into it (time_cond_proj_dim): there is no score left to guide.")

    def _begin(self, pipeline: Any) -> None:
        self._memory, self._x_t = [], None
        scheduler = getattr(pipeline, "scheduler", None) if self.scheduler is None else self.scheduler
        network = type(getattr(pipeline, "transformer", None)).__name__
        self._renormalised = network in _RENORMALISED
        self._reads_conditional = pipeline is None or self._renormalised
        self._noise = _noise_of(scheduler, self._step, self._timestep)
        noise, count = self._noise, self._num_inference_steps
        if isinstance(noise, _Unknown) and self._method.gain is None and "%" in (self._interval or "%"):
            levels, after = [Level(1.0, 1.0)] * (self._step + count), None  # of which only the number is read
        else:
            levels, after = noise.levels, noise.after
        if self._method.gain is not None and after is None:
            found = type(scheduler).__name__
            raise ValueError(f"{self._method.name} is exact only with the steps of DDIM and Euler; this is {found}.")
        self._schedule = _argument(make_schedule, levels, self._interval, self._w_schedule, self._method, after)

    def _batches(self, pairs: list[Any], prepare: Callable[[int, str], Any]) -> list[Any]:
        """The calls of this step: those whose weight is not zero for the whole batch."""
        needed = [0] if any(w != 0 for w in self._weights) or self._reads_conditional or not self._enabled else []
        if self._enabled and any(w != 1 for w in self._weights):
            needed.append(1)
            if all(null is None or null is conditional for conditional, null in pairs):
                raise ValueError('There is no unconditional prediction: give the pipeline negative_prompt="" or another.')
        self._batch = [self._input_predictions[i] for i in needed]
        return [prepare(i, self._input_predictions[i]) for i in needed]

    def _keep_input(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps x_t, the first of the network's inputs; a list of images (C, 1, H, W) as (B, C, H, W)."""
        names = inspect.signature(module.forward).parameters
        x_t = args[0] if args else next(kwargs[name] for name in names if name in kwargs)
        self._x_t = torch.stack(x_t).squeeze(2) if isinstance(x_t, list) else x_t
        self.cleanup_models(module)  # also where the network then fails

    def _combined(self, null: Tensor, conditional: Tensor, weights: list[float]) -> Tensor:
        w = torch.tensor(weights, dtype=torch.float32, device=null.device).view(-1, *[1] * (null.ndim - 1))
        if self._method.linear:
            return self._method(null, conditional, w, self._step_of(null, 0))
        if len(self._memory) != len(weights):
            self._memory = [{} for _ in weights]
        made = []
        for i, each in enumerate(weights):
            u, c = null[i : i + 1], conditional[i : i + 1]
            alone = u if each == 0 else c if each == 1 else None
            made.append(self._method(u, c, w[i : i + 1], self._step_of(null, i)) if alone is None else alone)
            if self._renormalised and not made[-1].any():
                raise ValueError(
                    f"{self._method.name} predicts zero at step {self._step}, and the pipeline divides by its length: "
                    "set options={'zero_init': 0} or take another method."
                )
        return torch.cat(made)

    def _step_of(self, predictions: Tensor, i: int) -> Step:
        """What the method may read besides the predictions, for sample i."""
        noise, x_t, known = self._noise, self._x_t, not isinstance(self._noise, _Unknown)
        if x_t is None or x_t.shape != predictions.shape:
            found = "nothing" if x_t is None else tuple(x_t.shape)
            reason = f"{self._method.name} reads x_t {tuple(predictions.shape)}, and the network's input is {found}."
            sample: Any = _Unknown(reason)
        else:
            sample = x_t[i : i + 1].float()
        return Step(
            x_t=sample,
            level=noise.levels[self._step] if known else noise,
            kind=noise.kind if known else noise,
            index=self._step,
            count=len(self._schedule.factors) if self._schedule else 1,
            memory=self._memory[i] if i < len(self._memory) else {},
        )


def _argument(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of the command line; its errors name the arguments of `Guidance` and not flags."""
    try:
        return function(*args)
    except GuidegenError as error:
        text = str(error)
        for flag, name in _FLAGS.items():
            text = text.replace(flag, name)
        raise ValueError(text) from None


def _method_of(name: str, options: Mapping[str, Any]) -> Method:
    instance("method", name, str)
    instance("options", options, Mapping, "a dict")
    if split_python_ref(name):  # a guider_config.json may come from anybody
        raise ValueError(f"method {name}: a file would be run. Give one of the methods that `guidegen guidances` lists.")
    method, values = _argument(find_method, name, {key: str(value) for key, value in options.items()})
    bound: Method = replace(method, combine=partial(method.combine, **values)) if values else method
    return bound


def _calling_pipeline(guider: Guidance) -> Any:
    """The pipeline whose block called the guider; None where none is found.

    Guiders are told the step and the timestep, not the scheduler. Every block of diffusers has the pipeline as
    its argument `components`.
    """
    frame = inspect.currentframe()
    while frame := frame and frame.f_back:
        found = frame.f_locals.get("components")
        if found is not None and any(each is guider for each in getattr(found, "__dict__", {}).values()):
            return found
    return None


def _noise_of(scheduler: Any, step: int, timestep: Tensor) -> Any:
    """The `_Noise` of a run from its step on, or why it is not known."""
    if scheduler is None:
        return _Unknown("the noise levels are not known: set the guider's scheduler to that of the pipeline.")
    name = type(scheduler).__name__
    convention = convention_of({**scheduler.config, "_class_name": name})
    kind = "flow" if convention == "flow" else scheduler.config.get("prediction_type")
    if convention not in ("vp", "flow") or kind not in PREDICTION_TYPES:
        return _Unknown(f"what the network predicts under {name} is not known: take another scheduler or method.")
    try:
        levels = noise_levels(scheduler)
        after = None if scheduler.config.get("stochastic_sampling") else levels_after(scheduler)
    except GuidegenError as error:
        return _Unknown(str(error))
    # image-to-image starts at a later timestep of the scheduler
    same = [i for i, t in enumerate(scheduler.timesteps.tolist()) if i >= step and t == float(timestep)]
    if not same:
        return _Unknown(f"{name} has no timestep {float(timestep):g}, so that its noise level is not known.")
    first = same[0] - step
    return _Noise(levels[first:], after and after[first:], kind)
