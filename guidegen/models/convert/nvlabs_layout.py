"""From what a network of EDM or EDM2 was made with to our network: its class, its config, and its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from guidegen.errors import CheckpointError
from guidegen.models.persistent import Record
from guidegen.models.python_ref import MOST_LABELS, Channels, Edge
from guidegen.schema import convert

if TYPE_CHECKING:
    from torch import Tensor

_Count = Annotated[int, Meta(ge=1, le=64)]
_Counts = Annotated[list[_Count], Meta(min_length=1, max_length=12)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Positive = Annotated[float, Meta(gt=0, le=1e6)]
_LEAST, _MOST = 0.002, 80.0
"""The range of sigma that EDM's sampler takes where the network knows more."""
_PRECONDITIONS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
_TRAINING_ALONE = ("use_fp16", "dropout", "augment_dim", "epsilon_t", "logvar_channels")


class _Common(Struct, forbid_unknown_fields=True, kw_only=True):
    img_resolution: Edge
    img_channels: Annotated[int, Meta(ge=1, le=64)]
    label_dim: Annotated[int, Meta(ge=0, le=MOST_LABELS)] = 0
    sigma_data: _Positive = 0.5
    channel_mult: _Counts | None = None
    num_blocks: _Count | None = None
    attn_resolutions: Annotated[list[int], Meta(max_length=12)] | None = None
    model_channels: Channels | None = None
    channel_mult_noise: _Count | None = None
    channel_mult_emb: _Count | None = None


class _Edm(_Common):
    sigma_min: float | None = None
    sigma_max: float | None = None
    beta_d: _Positive = 19.9
    beta_min: _Positive = 0.1
    M: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    C_1: _Positive = 0.001
    C_2: _Positive = 0.008
    model_type: str | None = None
    label_dropout: _Share = 0.0
    embedding_type: str = "positional"
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[_Count, ...] = (1, 1)


class _Edm2(_Common):
    label_balance: _Share = 0.5
    concat_balance: _Share = 0.5
    res_balance: _Share = 0.3
    attn_balance: _Share = 0.3
    channels_per_head: _Count = 64
    clip_act: _Positive | None = 256.0
    resample_filter: tuple[_Count, ...] = (1, 1)


class Design(NamedTuple):
    """A network of ours.

    Attributes:
        network: `SongUNet`, `DhariwalUNet` or `Edm2UNet`.
        config: what it is made with.
        sigmas: the least and the largest noise level to sample at.
        prefix: what the names of its tensors begin with in the file.
    """

    network: str
    config: dict[str, Any]
    sigmas: tuple[float, float]
    prefix: str


def design(network: Record, label_dropout: bool = False) -> Design:
    """The network of ours that a preconditioned one of EDM or EDM2 is.

    Args:
        network: as the pickle has it.
        label_dropout: whether it was trained with dropped labels, where it does not say so itself.

    Raises:
        CheckpointError: it is another network, or one that guidegen does not know.
    """
    if network.name != "Precond" and network.name not in _PRECONDITIONS:
        raise CheckpointError(f"its network is a {network.name[:80]}, none of EDM or EDM2.")
    given = {key: value for key, value in network.arguments().items() if key not in _TRAINING_ALONE}
    where = f"its {network.name} was made with arguments that"
    if network.name == "Precond":
        return _edm2(convert(given, _Edm2, where, CheckpointError), label_dropout)
    return _edm(_PRECONDITIONS[network.name], convert(given, _Edm, where, CheckpointError), label_dropout)


def _edm(precondition: str, made: _Edm, label_dropout: bool) -> Design:
    usual = "SongUNet" if precondition in ("vp", "ve") else "DhariwalUNet"
    name, song = made.model_type or usual, (made.model_type or usual) == "SongUNet"
    served = {
        "model_type": (name, ("SongUNet", "DhariwalUNet")),
        "embedding_type": (made.embedding_type, ("positional", "fourier") if song else ("positional",)),
        "encoder_type": (made.encoder_type, ("standard", "residual") if song else ("standard",)),
        "decoder_type": (made.decoder_type, ("standard",)),
        "precondition": (precondition, ("edm", "vp", "ve") if song else tuple(_PRECONDITIONS.values())),
    }
    for key, (found, fit) in served.items():
        if found not in fit:
            raise CheckpointError(f"its {key} is {found[:40]}; guidegen knows {' and '.join(fit)} there.")
    channels = made.model_channels or (128 if song else 192)
    config = _shared(made, channels, made.channel_mult or ([1, 2, 2, 2] if song else [1, 2, 3, 4]))
    config |= _labels(made.label_dim, label_dropout or made.label_dropout > 0)
    config |= {
        "model_channels": channels,
        "emb_channels": channels * (made.channel_mult_emb or 4),
        "layers_per_block": made.num_blocks or (4 if song else 3),
        "attn_resolutions": _or(made.attn_resolutions, [16] if song else [32, 16, 8]),
        "precondition": precondition,
        "beta_d": made.beta_d,
        "beta_min": made.beta_min,
        "train_steps": made.M,
        "c_1": made.C_1,
        "c_2": made.C_2,
    }
    if song:
        config |= {
            "noise_channels": channels * (made.channel_mult_noise or 1),
            "embedding": made.embedding_type,
            "encoder": made.encoder_type,
            "resample_filter": made.resample_filter,
        }
    else:
        config["learned_variance"] = precondition == "iddpm"
    return Design(name, config, _sigmas(precondition, made), "model.")


def _edm2(made: _Edm2, label_dropout: bool) -> Design:
    if made.resample_filter != (1, 1):
        raise CheckpointError("its resample_filter is another than EDM2's 1, 1.")
    channels = made.model_channels or 192
    config = _shared(made, channels, made.channel_mult or [1, 2, 3, 4])
    widths = config["block_out_channels"]
    config |= _labels(made.label_dim, label_dropout)
    config |= {key: getattr(made, key) for key in ("label_balance", "concat_balance", "res_balance", "attn_balance")}
    config |= {
        "noise_channels": channels * made.channel_mult_noise if made.channel_mult_noise else widths[0],
        "emb_channels": channels * made.channel_mult_emb if made.channel_mult_emb else max(widths),
        "layers_per_block": made.num_blocks or 3,
        "attn_resolutions": _or(made.attn_resolutions, [16, 8]),
        "attention_head_dim": made.channels_per_head,
        "clip_act": made.clip_act,
    }
    return Design("Edm2UNet", config, (_LEAST, _MOST), "unet.")


def _shared(made: _Common, channels: int, multipliers: list[int]) -> dict[str, Any]:
    return {
        "sample_size": made.img_resolution,
        "in_channels": made.img_channels,
        "out_channels": made.img_channels,
        "block_out_channels": [channels * multiplier for multiplier in multipliers],
        "sigma_data": made.sigma_data,
    }


def _labels(count: int, dropped: bool) -> dict[str, int | None]:
    """Labels, and the null one after them where a vector of zeros was trained to mean none."""
    if not count:
        return {"num_class_embeds": None, "null_label": None}
    return {"num_class_embeds": count + dropped, "null_label": count if dropped else None}


def _or(value: list[int] | None, usual: list[int]) -> list[int]:
    return usual if value is None else value


def _sigmas(precondition: str, made: _Edm) -> tuple[float, float]:
    """The part of 0.002 to 80 that the network knows, as EDM's sampler takes it."""
    from guidegen.models.edm_preconditioning import iddpm_sigmas, vp_sigma

    least, most = {"ve": (0.02, 100.0)}.get(precondition, (0.0, math.inf))
    if precondition == "vp":
        least, most = (vp_sigma(time, made.beta_d, made.beta_min) for time in (1e-5, 1.0))
    elif precondition == "iddpm":
        known = iddpm_sigmas(made.M, made.C_1, made.C_2)
        least, most = known[-2], known[0]
    else:
        least = least if made.sigma_min is None else made.sigma_min
        most = most if made.sigma_max is None else made.sigma_max
    least, most = max(_LEAST, least), min(_MOST, most)
    if not least < most:
        raise CheckpointError(f"its noise levels, from {least:g} to {most:g}, leave none to sample at.")
    return least, most


def weights_of(tensors: Mapping[str, Tensor], made: Design) -> dict[str, Tensor]:
    """The state dict of our network, fp32, from the tensors of a file."""
    inside = {name.removeprefix(made.prefix): value for name, value in tensors.items() if name.startswith(made.prefix)}
    if made.network == "Edm2UNet":
        return _normalized(inside)
    dropped = ("map_augment.weight", "resample_filter")  # of training alone; of the config
    return {name: value.float() for name, value in inside.items() if not name.endswith(dropped)}


def _normalized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as EDM2 has them in a call: normalised, scaled, and with the gains in them.

    A gain is divided in the precision that the file has it in, as EDM2's own code does it.
    """
    from guidegen.models.edm2_unet import normalize

    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.ndim == 0:  # a gain
            continue
        if not name.endswith(".weight"):
            found[name] = value.float()
            continue
        gain = {"emb_linear": "emb_gain", "out_conv": "out_gain"}.get(name.split(".")[-2])
        scale = math.sqrt(value[0].numel())
        normal = normalize(value.float(), range(1, value.ndim))
        if gain is None:
            found[name] = normal / scale
            continue
        owner = name.rpartition(".emb_linear")[0]
        key = f"{owner}.{gain}" if owner else gain
        if key not in tensors:
            raise CheckpointError(f"it lacks {key}: it is incomplete.")
        found[name] = normal * (tensors[key] / scale).float()
    return found
