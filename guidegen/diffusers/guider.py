"""A guider for the modular pipelines of diffusers: guidegen's methods, with a weight for each sample of a batch.

    pipe.update_components(guider=Guidance(method="apg", w=[1, 3, 7]))
    pipe(prompt="a red fox", negative_prompt="", num_images_per_prompt=3)

All contact with the guiders' API, which diffusers calls experimental, is in this file.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from guidegen.arguments import one_of, whole
from guidegen.diffusers.arguments import Each, argument, check_network, count_of, method_of
from guidegen.diffusers.gradients import gradient
from guidegen.diffusers.networks import Call, swapped
from guidegen.diffusers.pipelines import Caller, Noise, Unknown, noise_of
from guidegen.scores.calls import needs_of
from guidegen.scores.guidance import autoguided, jointly
from guidegen.scores.interfaces import Step, Weights
from guidegen.scores.noise import Level, score_shift
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
_LABEL = ((0, 1.0),)
_NETWORKS = ("classifier", "guide_model")


def _check_api() -> None:
    for name, expected in _API.items():
        if list(inspect.signature(getattr(BaseGuidance, name, _check_api)).parameters) != expected:
            raise ImportError(
                f"guidegen.diffusers fits the guiders of diffusers 0.42, and those of {diffusers.__version__} differ "
                f"({name}). Install diffusers 0.42."
            )


_check_api()


class Guidance(BaseGuidance):
    """A guidance method of guidegen in a modular pipeline of diffusers.

    w = 0 is the unconditional prediction and w = 1 the conditional one: w is the `guidance_scale` of
    `ClassifierFreeGuidance`, and one more than that of its `use_original_formulation` (Krea 2). At steps where all
    weights are 0 or all are 1, the network is called once; not so at 0 in Qwen-Image, whose pipeline then gives each
    token the length of the conditional one. Formulas are computed in fp32, one sample apart from the others, and
    rounded to the dtype of the predictions.

    Networks are not saved with a guider: give them to `from_pretrained` again. cfg++ with DDIM is refused where the
    call of the pipeline gives an eta above 0; in a loop without a pipeline eta is not seen, and should be 0.

    Args:
        w: one weight for all samples, or one for each sample of the batch, in its order.
        method: a name that `guidegen guidances` lists.
        options: of the method, by name.
        interval: where guidance is on: LOW:HIGH in sigma / alpha, or 10%:60% of the steps.
        w_schedule: how the weight goes over the steps, as `--w-schedule` takes it.
        classifier: a network from images (B, 3, H, W) in [-1, 1] to logits (B, K), as `guidegen.load_classifier` loads
            it. It reads what the pipeline's VAE decodes of the denoised estimate of the unconditional prediction.
        w_classifier: of its gradient, as `w`. w = 0 beside it is classifier guidance alone.
        classifier_labels: columns of its logits, one for all samples or one for each.
        classifier_gradient: exact, through the pipeline's network, which is called once more for it; or detached,
            without its derivative, for less memory and for offloaded networks.
        guide_model: the guiding network of autoguidance, of the class of the pipeline's own, on its device.
        w_guide: of autoguidance, as `w`: 0 is the guiding network, 1 the pipeline's own.

    Raises:
        TypeError, ValueError: an argument that cannot be, by its name.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond", "pred_guide", "pred_guide_uncond"]

    @register_to_config
    def __init__(
        self,
        *,  # `new` of diffusers forgets what was given by position
        w: float | Sequence[float],
        method: str = "cfg",
        options: Mapping[str, Any] | None = None,
        interval: str | None = None,
        w_schedule: str | None = None,
        classifier: torch.nn.Module | None = None,
        w_classifier: float | Sequence[float] | None = None,
        classifier_labels: int | Sequence[int] = 0,
        classifier_gradient: str = "exact",
        guide_model: torch.nn.Module | None = None,
        w_guide: float | Sequence[float] | None = None,
    ):
        super().__init__()
        each = {
            "w": Each("w", w),
            "w_classifier": Each("w_classifier", 0.0 if w_classifier is None else w_classifier),
            "w_guide": Each("w_guide", 1.0 if w_guide is None else w_guide),
            "classifier_labels": Each("classifier_labels", classifier_labels, whole),
        }
        self._count = count_of(list(each.values()))
        """Samples in a batch; None where all that is given is for any number."""
        lists = [one.over(self._count or 1) for one in each.values()]
        self._asked = [Weights(*weights) for weights in zip(*lists[:3], strict=True)]
        self._labels: list[int] = lists[3]
        one_of("classifier_gradient", classifier_gradient, ("exact", "detached"))
        check_network("classifier", classifier, "w_classifier", w_classifier, each["w_classifier"].others(0))
        check_network("guide_model", guide_model, "w_guide", w_guide, each["w_guide"].others(1))
        self._classifier: Any = classifier
        self._guide_model: Any = guide_model
        self._exact = classifier_gradient == "exact"
        config = {name: one.config for name, one in each.items()}
        config |= {name: None for name, given in (("w_classifier", w_classifier), ("w_guide", w_guide)) if given is None}
        self.register_to_config(**config, options=dict(options or {}), classifier=None, guide_model=None)
        self._interval, self._w_schedule = interval, w_schedule
        self._method = method_of(method, options or {})
        argument(make_schedule, [Level(1.0, 1.0)] * 10, None, w_schedule, replace(self._method, gain=None))
        argument(interval_factors, [], interval)
        self.scheduler: Any = None
        """That of the pipeline; None takes it from the block that calls, whose argument is named `components`."""
        self._caller = Caller()
        self._renormalised = self._reads_conditional = self._latents_first = True
        self._tokens: int | None = None
        self._noise: Any = Unknown("the pipeline has not run yet")
        self._schedule: GuidanceSchedule | None = None
        self._weights = self._asked
        self._batch: list[str] = []
        self._memory: list[dict[str, Any]] = []
        self._call: Call | None = None
        self._x_t: Tensor | None = None
        self._layout: Tensor | None = None
        self._decode: Callable[[Tensor], Tensor] | None = None
        self._undo: Callable[[], None] | None = None

    def new(self, **kwargs: Any) -> Any:
        """A copy with other arguments, and with the same networks."""
        return super().new(**{name: getattr(self, f"_{name}") for name in _NETWORKS}, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes guider_config.json, which has the arguments but the networks."""
        if given := [name for name in _NETWORKS if getattr(self, f"_{name}") is not None]:
            missing = " and ".join(given)
            warnings.warn(f"A guider is saved without networks: give {missing} to from_pretrained again.", stacklevel=2)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Called by the pipeline at each step; a step that is not after the last one begins a new run."""
        begins = self._step is None or step <= self._step or num_inference_steps != self._num_inference_steps
        super().set_state(step, num_inference_steps, timestep)
        self._restore()
        if begins:
            self._begin(Caller.of(self))
        assert self._schedule is not None
        if step >= len(self._schedule.factors):
            raise ValueError(
                f"Step {step} of {len(self._schedule.factors)}: the pipeline takes more steps than it announces. "
                "Set the guider's scheduler to that of the pipeline."
            )
        self._weights = [self._schedule.weights(step, weights) for weights in self._asked]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        self._restore()
        if self._prepared.startswith("pred_guide"):
            self._undo = swapped(denoiser, self._guide_model, self._restore)
        elif not self._method.linear or self._classifier is not None:
            self._undo = denoiser.register_forward_pre_hook(self._keep_call, with_kwargs=True).remove

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._undo is not None and self._prepared.startswith("pred_guide"):
            self._restore()
            raise ValueError("guide_model was not called: the pipeline's network is compiled. Compile neither.")
        self._restore()

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        pairs = [value for value in data.values() if isinstance(value, tuple)]
        return self._batches(pairs, partial(self._prepare_batch, data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        names = [value for value in input_fields.values() if isinstance(value, tuple)]
        pairs = [tuple(getattr(data, name, None) for name in pair) for pair in names]
        return self._batches(pairs, partial(self._prepare_batch_from_block_state, input_fields, data))

    def __call__(self, data: list[Any]) -> Any:
        return self.forward(**{getattr(each, self._identifier_key): each.noise_pred for each in data})

    def forward(
        self,
        pred_cond: Tensor | None = None,
        pred_uncond: Tensor | None = None,
        pred_guide: Tensor | None = None,
        pred_guide_uncond: Tensor | None = None,
    ) -> Any:
        """The guided prediction (B, *) of the dtype of the predictions, of which one is enough where all weights are."""
        given = zip(self._input_predictions, (pred_cond, pred_uncond, pred_guide, pred_guide_uncond), strict=True)
        predictions = {name: each for name, each in given if each is not None}
        pred = next(iter(predictions.values()))
        if self._count not in (None, len(pred)) and self._enabled:
            raise ValueError(
                f"w has {self._count} weights and the batch {len(pred)} samples: give one weight, or one for each sample "
                "(prompts times num_images_per_prompt)."
            )
        if self._enabled and (len(predictions) > 1 or any(weights.w_classifier for weights in self._weights)):
            cut = self._tokens if self._latents_first and pred.ndim == 3 else None  # the rest are of images to edit
            guided = self._combined({name: each[:, :cut].float() for name, each in predictions.items()}).to(pred.dtype)
            pred = guided if cut is None else torch.cat([guided, pred[:, cut:]], dim=1)
        self._call = self._x_t = None
        if self._schedule is not None and self._step == len(self._schedule.factors) - 1:
            self._caller, self._decode = Caller(), None  # which hold the latents and texts of the run
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the call that is prepared is with the condition."""
        return self._prepared in ("pred_cond", "pred_guide")

    @property
    def num_conditions(self) -> int:
        """2 where any step may need the unconditional prediction: by this, encoders encode the negative prompt."""
        null = self._method.gain is not None or any(each.w != 1 or each.w_classifier for each in self._asked)
        return 2 if self._enabled and null else 1

    @property
    def guidance_scale(self) -> float:
        """Read by SDXL's blocks alone, for a network that embeds it."""
        raise ValueError("The UNet has guidance distilled into it (time_cond_proj_dim): there is no score left to guide.")

    @property
    def _prepared(self) -> str:
        """The call that is prepared; nothing before the first."""
        return "".join(self._batch[max(self._count_prepared - 1, 0) :][:1])

    def _begin(self, caller: Caller) -> None:
        self._caller, self._memory, self._layout, self._decode = caller, [], None, None
        self._call = self._x_t = None
        self._renormalised, self._latents_first, self._tokens = caller.renormalises, caller.latents_first, caller.tokens
        self._reads_conditional = caller.pipeline is None or self._renormalised
        scheduler = getattr(caller.pipeline, "scheduler", None) if self.scheduler is None else self.scheduler
        self._noise = noise_of(scheduler, self._step, self._timestep)
        noise, count, gain = self._noise, self._num_inference_steps, self._method.gain
        if isinstance(noise, Unknown) and gain is None and "%" in (self._interval or "%"):
            levels, after = [Level(1.0, 1.0)] * (self._step + count), None  # of which only the number is read
        else:
            levels, after = noise.levels, noise.after
        eta = 0.0 if gain is None else caller.eta(scheduler)
        if gain is not None and (after is None or eta):
            found = f"eta {eta:g}" if eta else type(scheduler).__name__
            exact = "exact only with the steps of Euler, and of DDIM with eta 0"
            raise ValueError(f"{self._method.name} is {exact}; this is {found}.")
        if any(weights.w_classifier for weights in self._asked):
            if clips := [key for key in ("clip_sample", "thresholding") if getattr(scheduler, "config", {}).get(key)]:
                raise ValueError(f"{clips[0]} of the scheduler undoes the gradient of a classifier: set it to False.")
            self._decode = caller.decoder()
        self._schedule = argument(make_schedule, levels, self._interval, self._w_schedule, self._method, after)

    def _restore(self) -> None:
        """Gives the network back its forward, or takes the hook off it."""
        if (undo := self._undo) is not None:
            self._undo = None
            undo()

    def _batches(self, pairs: list[Any], prepare: Callable[[int, str], Any]) -> list[Any]:
        """The calls of this step: those that any sample of the batch needs."""
        needed = {name for weights in self._weights for name in _needed(weights)} if self._enabled else {"pred_cond"}
        if self._reads_conditional:
            needed.add("pred_cond")
        self._batch = [name for name in self._input_predictions if name in needed]
        without = any(name.endswith("_uncond") for name in needed)
        if without and all(null is None or null is conditional for conditional, null, *_ in pairs):
            raise ValueError('There is no unconditional prediction: give the pipeline negative_prompt="" or another.')
        return [prepare(int(name.endswith("_uncond")), name) for name in self._batch]

    def _keep_call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = Call(module, args, kwargs)  # the last of the network's own is the unconditional one
        self._x_t = self._call.x_t
        self._restore()  # also where the network then fails

    def _combined(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """The guided prediction, of fp32 ones."""
        count = len(next(iter(predictions.values())))
        weights = self._weights * count if self._count is None else self._weights
        if len(self._memory) != count:
            self._memory = [{} for _ in weights]
        shift = self._shift(predictions.get("pred_uncond"), weights)
        made = []
        for i, each in enumerate(weights):
            needed = _needed(each)
            own = {name: rows[i : i + 1] for name, rows in predictions.items() if name in needed}
            c = own.get("pred_cond", next(iter(own.values())))
            pred = c
            if "pred_uncond" in own:
                added = shift[i : i + 1] if shift is not None and each.w_classifier else None
                pred = self._guided(i, own["pred_uncond"], c, each, added)
            if each.w_guide != 1:
                weak = own["pred_guide" if "pred_guide" in own else "pred_guide_uncond"]
                pred = autoguided(pred, c, weak, torch.tensor(each.w_guide))
            made.append(pred)
            if self._renormalised and not pred.any():
                raise ValueError(
                    f"{self._method.name} predicts zero at step {self._step}, and the pipeline divides by its length: "
                    "set options={'zero_init': 0} or take another method."
                )
        return torch.cat(made)

    def _guided(self, i: int, u: Tensor, c: Tensor, weights: Weights, shift: Tensor | None) -> Tensor:
        """Sample i by the method, with what the classifier adds."""
        method, combine = self._method, cast(Callable[..., Tensor], self._method)
        shape = (1,) * u.ndim
        w, w_classifier = (torch.tensor(each, device=u.device).view(shape) for each in weights[:2])
        if method.linear:
            guided = combine(u, c, w, None)
            return guided if shift is None else guided + w_classifier * shift
        if shift is None and c is u:
            return u
        if self._tokens not in (None, u.shape[1]):
            raise ValueError(
                f"{method.name} reads all tokens of a prediction, {u.shape[1]}, of which {self._tokens} are the image's: "
                "only cfg and cfg++ are exact in this pipeline."
            )
        if shift is not None:
            u, c, w = jointly(u, c, shift, w, w_classifier)
            if weights.w != 0:  # a sum of 0 or 1 is then neither of the two models
                combine = method.combine
        if method.images and u.ndim == 3:
            return self._on_images(combine, u, c, w)
        return combine(u, c, w, self._step_of(u, i))

    def _on_images(self, combine: Callable[..., Tensor], u: Tensor, c: Tensor, w: Tensor) -> Tensor:
        """A method that reads the layout of images, on packed tokens (1, L, C)."""
        if self._layout is None:
            self._layout = self._caller.layout(u.shape[1:], u.device)
        images = [each.flatten()[self._layout][None] for each in (u, c)]
        reason = f"{self._method.name} reads x_t, which is packed here"
        guided = combine(*images, w[..., None], replace(self._step_of(u, 0), x_t=cast(Tensor, Unknown(reason))))
        return torch.empty_like(u).flatten().scatter(0, self._layout.flatten(), guided.flatten()).view_as(u)

    def _shift(self, null: Tensor | None, weights: Sequence[Weights]) -> Tensor | None:
        """What the gradient of the classifier adds to a prediction at a weight of one (B, *); None where none asks."""
        if null is None or not any(each.w_classifier for each in weights):
            return None
        if self._decode is None:
            raise ValueError("A classifier reads what a pipeline decodes, and none has begun a run with this guider.")
        step = self._step_of(null)
        labels = self._labels * len(null) if self._count is None else self._labels
        call = self._call if self._exact else None
        found = gradient(self._classifier, labels, self._decode, step, null, call)
        return score_shift(found, step.level, step.kind)

    def _step_of(self, predictions: Tensor, i: int | None = None) -> Step:
        """What the method may read besides the predictions, for sample i; for all where it is None."""
        x_t, shape = self._x_t, tuple(predictions.shape[1:])
        if x_t is not None and self._latents_first and x_t.ndim == 3:
            x_t = x_t[:, : self._tokens]
        if x_t is None or tuple(x_t.shape[1:]) != shape:
            found = "nothing" if x_t is None else tuple(x_t.shape[1:])
            what = self._method.name if self._method.name != "cfg" else "a classifier"
            sample: Any = Unknown(f"{what} reads x_t {shape} of each sample, and the network's input is {found}.")
        else:
            sample = (x_t if i is None else x_t[i : i + 1]).float()
        noise, known = self._noise, isinstance(self._noise, Noise)
        return Step(
            x_t=sample,
            level=noise.levels[self._step] if known else noise,
            kind=noise.kind if known else noise,
            index=self._step,
            count=len(self._schedule.factors) if self._schedule else 1,
            memory={} if i is None or i >= len(self._memory) else self._memory[i],
        )


def _needed(weights: Weights) -> list[str]:
    """The names of the predictions that a sample needs."""
    need = needs_of(weights, _LABEL, _LABEL, needs_null=True)
    weak = "pred_guide" if need.guiding == _LABEL else "pred_guide_uncond"
    each = (("pred_cond", need.conditional), ("pred_uncond", need.null), (weak, need.guiding))
    return [name for name, mixture in each if mixture]
