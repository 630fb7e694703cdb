"""EDM and EDM2 of NVlabs (Karras et al. 2022, arXiv 2206.00364; 2024, 2312.02696): network snapshots, `.pkl`."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.convert.format import Format, Labels, read_label_names
from guidegen.models.convert.latents import Extras, Vae, fill, find_vae, save_pipeline
from guidegen.models.convert.nvlabs_layout import Design, design, weights_of
from guidegen.models.persistent import Record, is_persistent, read_persistent
from guidegen.models.presets import presets_of
from guidegen.models.weight_files import refuse_pointer

_PANEL = "EDM and EDM2"
_STEPS = 32


@dataclass(frozen=True)
class Options:
    """The flags for EDM and EDM2."""

    vae: Vae = None
    label_dropout: Annotated[
        bool,
        typer.Option(
            "--label-dropout",
            help="It was trained with dropped labels: zeros for a label are its null label.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    labels: Labels = None


@dataclass(frozen=True)
class Conversion:
    """A converted network, not yet written.

    Attributes:
        made: its class and config.
        network: with its weights.
        latents: mean and standard deviation of each channel of the latents that it draws; None where it draws images.
        extras: VAE, names of labels, and published settings.
    """

    made: Design
    network: Any
    latents: Mapping[str, Any] | None
    extras: Extras

    def describe(self) -> str:
        """Kind, sizes and what is published of it, a line each."""
        config = self.made.config
        count, null = config["num_class_embeds"], config["null_label"]
        labels = "unconditional" if count is None else f"{count - (null is not None)} labels"
        what = "images" if self.latents is None else "latents"
        words = [
            f"{self.made.network} of {config['sample_size']}x{config['sample_size']} {what}",
            labels if count is None else f"{labels}, {'no ' if null is None else ''}null label",
            f"levels of {', '.join(map(str, config['block_out_channels']))}",
            f"sigma from {self.made.sigmas[0]:g} to {self.made.sigmas[1]:g}",
        ]
        if self.latents is not None and self.extras.vae is None:
            words.append("no --vae: it can only guide another (--guide-model)")
        return "\n".join(["; ".join(words), *self.extras.lines()])

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder."""
        import diffusers

        least, most = self.made.sigmas
        scheduler = diffusers.EDMEulerScheduler(
            sigma_min=least, sigma_max=most, sigma_data=self.made.config["sigma_data"], rho=7.0
        )
        latents = {} if self.latents is None else {"latents": self.latents}
        more = {"default_steps": _STEPS, **latents}
        save_pipeline(folder, "EDMPipeline", "unet", self.network, scheduler, self.extras, more)


class Nvlabs(Format):
    """Network snapshots of EDM and EDM2."""

    name = "EDM and EDM2"
    expected = "a .pkl of EDM or EDM2"
    help = """Of NVlabs' EDM and EDM2: their .pkl files, of which tensors and arguments are read and no code is run.
Published file names bring the published settings, which inspect prints and `guidegen presets` lists. EDM2's networks of
512x512 draw latents, and --vae names what decodes them; to guide another network they need none.

- guidegen convert edm2-img512-s-2147483-0.130.pkl edm2-s --vae stabilityai/sd-vae-ft-mse

- guidegen convert edm2-img512-xs-uncond-2147483-0.025.pkl edm2-xs-uncond

- guidegen sample -m edm2-s --mode autoguidance --guide-model edm2-xs-uncond --w 1.4 --label 207"""
    options = Options
    written = frozenset({"unet", "scheduler", "vae", "model_index.json"})

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path.suffix in (".pkl", ".pickle") and not zipfile.is_zipfile(path)) or is_persistent(path)

    @classmethod
    def convert(cls, path: Path, options: Any) -> Conversion:
        o: Options = options
        if not path.is_file():
            raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}. Name a .pkl of EDM or EDM2.")
        refuse_pointer(path)
        data = read_persistent(path)
        names = read_label_names(o.labels) if o.labels else None
        try:
            made = design(data["ema"], o.label_dropout)
            latents = _latents(data.get("encoder"))
            network = fill(_class_of(made.network), made.config, weights_of(data["ema"].tensors(), made))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        _check_names(names, made)
        if o.label_dropout and made.config["null_label"] is None:
            raise UsageError("--label-dropout: the network is unconditional, it has no labels.")
        if o.vae is not None and latents is None:
            raise UsageError("--vae: the network draws images, it has no latents to decode.")
        vae = find_vae(o.vae, made.config["in_channels"]) if o.vae else None
        return Conversion(made, network, latents, Extras(vae, names, presets_of(path.name)))


def _class_of(name: str) -> Any:
    from guidegen.models import edm2_unet, edm_unet

    return getattr(edm_unet, name, None) or getattr(edm2_unet, name)


def _latents(encoder: Any) -> dict[str, Any] | None:
    """Statistics of the latents that the encoder beside a network makes; None for one of images.

    Raises:
        CheckpointError: an unknown encoder.
    """
    if encoder is None or (isinstance(encoder, Record) and encoder.name == "StandardRGBEncoder"):
        return None
    if not isinstance(encoder, Record) or encoder.name != "StabilityVAEEncoder":
        found = encoder.name if isinstance(encoder, Record) else type(encoder).__name__
        raise CheckpointError(f"its encoder is a {found[:80]}; guidegen knows StandardRGBEncoder and StabilityVAEEncoder.")
    scale, bias = (getattr(encoder.state.get(key), "values", []) for key in ("scale", "bias"))
    if not scale or len(scale) != len(bias) or not all(0 < value < 1e6 for value in scale):
        raise CheckpointError("its encoder has no scale and bias of the latents.")
    # final latents are raw ones times scale plus bias, and raw ones those of images in [0, 1]
    return {
        "mean": [-b / s for s, b in zip(scale, bias, strict=True)],
        "std": [1 / s for s in scale],
        "image_range": [0, 1],
    }


def _check_names(names: Mapping[int, str] | None, made: Design) -> None:
    count = (made.config["num_class_embeds"] or 0) - (made.config["null_label"] is not None)
    if names is not None and not count:
        raise UsageError("--labels: the model is unconditional, it has no labels to name.")
    if names is not None and set(names) != set(range(count)):
        raise UsageError(f"--labels names {len(names)} labels; the model has {count}, from 0 to {count - 1}.")
