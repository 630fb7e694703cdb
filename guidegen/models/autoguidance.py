"""The guiding model of autoguidance: what `--guide-model` names, without its weights.

Autoguidance (Karras et al. 2024, arXiv 2406.02507) weighs a model against a worse version of itself:
a checkpoint with fewer parameters or of an earlier training step, or the model's own network with
some layers disturbed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.checkpoint import Checkpoint, open_checkpoint
from guidegen.models.hub import download_weights, locate
from guidegen.models.labels import Labels
from guidegen.models.noise_schedule import noise_schedule
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.python_file import split_python_ref
from guidegen.spec.parse import parse_weight

if TYPE_CHECKING:
    from guidegen.models.networks import Condition, LoadOptions, Networks

BUNDLED_GUIDE = "bundled"
"""The word for the guiding network in the checkpoint's own folder."""
DISTURBED = "tsg"
"""The word for the model's own network at disturbed timesteps: `guidegen.scores.independent.disturbed_times`."""
WEAKENINGS = ("pag", "skip", DISTURBED)
"""The words for a guiding network that is made of the model's own, the first two by `guidegen.models.weaken`."""
NAME_ONE = "Name one: --guide-model ID|DIR, or pag, skip or tsg, which make one of the model's own network"
_SPREAD = 0.1
_CONDITION = (
    *("cross_attention_dim", "addition_embed_type", "num_class_embeds", "num_embeds_ada_norm", "class_embed_type"),
    *("joint_attention_dim", "pooled_projection_dim", "cap_feat_dim", "text_hidden_dim", "num_text_layers"),
    *("text_in_dim", "in_channels", "patch_size"),
)
"""What of a network's config says which condition and which latents it reads."""


@dataclass(frozen=True)
class GuideModel:
    """What a model is weighed against.

    Attributes:
        ref: as the person named it.
        name: a short name for settings and grids.
        checkpoint: where the guiding network is; None where it is made of the model's own.
        shares: whether labels, prompts and null condition are those of the model.
        weakening: one of `WEAKENINGS`; None with a checkpoint.
        layers: which layers it disturbs, as the person named them; empty for the usual ones.
        spread: of `disturbed_times`; None where the timesteps are those of the model.
    """

    ref: str
    name: str
    checkpoint: Checkpoint | None = None
    shares: bool = False
    weakening: str | None = None
    layers: tuple[str, ...] = ()
    spread: float | None = None

    @property
    def parts(self) -> list[str]:
        """The parts that it loads: its network and what reads prompts, without what decodes latents."""
        if self.checkpoint is None:
            return []
        if self.shares:
            return [self.checkpoint.network]
        return [part for part in self.checkpoint.part_folders if part != self.checkpoint.decoder]

    @property
    def folders(self) -> list[Path]:
        """Where its weights are."""
        return [self.checkpoint.part_folders[part] for part in self.parts] if self.checkpoint else []

    def sha256(self, access: Access = DEFAULT_ACCESS) -> str | None:
        """Identity of its weights; None where they are the model's."""
        return self.checkpoint.sha256(access, self.parts) if self.checkpoint else None

    def download(self, access: Access = DEFAULT_ACCESS) -> None:
        """Brings its weights into the hub's cache, from the commit that was opened; a plain folder has its own."""
        if self.checkpoint is not None:
            download_weights(self.checkpoint.ref, self.checkpoint.revision, self.folders, access)

    def check_network(self, model: Checkpoint) -> None:
        """Refuses, before any weights are read, a config that makes no network, and layers that the model does not have.

        Raises:
            CheckpointError: the config makes no network.
            UsageError: there are no such layers.
        """
        if self.checkpoint is not None:
            self.checkpoint.check_networks()
        if self.weakening is not None and self.spread is None:
            from guidegen.models.loading import empty_part
            from guidegen.models.weaken import pick_layers

            pick_layers(empty_part(model, model.network), self.weakening, self.layers)

    def load(self, model: Checkpoint, networks: Networks, options: LoadOptions) -> Condition:
        """The guiding network, with the conditions of the model's.

        Args:
            model: what it is weighed against.
            networks: the model's.
            options: what these were loaded with.

        Raises:
            CheckpointError: the weights do not load.
        """
        from guidegen.models.loading import ready_network
        from guidegen.models.weaken import weakened

        if self.spread is not None:
            return networks.condition
        if self.checkpoint is not None and not self.shares:
            return self.checkpoint.load(replace(options, decodes=False)).condition
        assert networks.condition_on is not None  # the kinds that share have it
        if self.checkpoint is not None:
            return networks.condition_on(ready_network(self.checkpoint, options), self.checkpoint.null_label)
        return networks.condition_on(weakened(networks.network, self.weakening or "", self.layers), model.null_label)

    def check_labels(self, labels: Iterable[int], model: Checkpoint, needs_null: bool) -> None:
        """Refuses labels that the guiding model does not know as the model does.

        Args:
            labels: that are asked for.
            model: what it is weighed against.
            needs_null: whether it is asked without a label too.

        Raises:
            UsageError: it does not know one, or knows something else by it.
        """
        guiding = self.checkpoint
        if guiding is None or not guiding.class_conditional:
            return
        for label in labels:
            wanted = model.labels.name(label)
            if label not in guiding.labels:
                raise UsageError(f"--guide-model {self.ref} does not know label {label} {wanted}".rstrip() + ".")
            found = guiding.labels.name(label)
            if wanted and found and wanted.casefold() != found.casefold():
                raise UsageError(f"--guide-model {self.ref}: label {label} is {found!r} there, and {wanted!r} in the model.")
        if needs_null and not guiding.has_null:
            raise UsageError(
                f"--guide-model {self.ref} has no null label, and these weights ask it without a label. "
                "--mode autoguidance does not, nor does --mode cfg without a weight of 0."
            )


def open_guide(
    ref: str,
    model: Checkpoint,
    size: tuple[int, int] | None = None,
    access: Access = DEFAULT_ACCESS,
) -> GuideModel:
    """Reads what a guiding model says of itself, and holds it against the model.

    Args:
        ref: what `open_checkpoint` takes; a folder or hub id of a network alone, which shares labels,
            prompts, null condition and noise schedule with the model; `bundled`; `pag` or `skip`, perhaps
            with layers: `skip:mid_block,up_blocks.1`; or `tsg`, perhaps with a spread: `tsg:0.2`.
        model: what it is weighed against.
        size: (height, width) that was asked for; None for the checkpoint's own.
        access: how it may be read.

    Raises:
        UsageError: it does not fit the model.
        CheckpointError: it is missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
    """
    word, colon, layers = ref.partition(":")
    if word in WEAKENINGS:
        if not model.has_layers:
            why = "a custom model takes one timestep" if word == DISTURBED else "the layers of a custom model are not known"
            why = "a pipeline's own loop calls its network as it is" if model.own_loop else why
            raise UsageError(f"--guide-model {ref}: {why}; name a second model.")
        if word == DISTURBED:
            spread = parse_weight(layers, f"--guide-model {ref}") if colon else _SPREAD
            if not 0 < spread <= 1:
                raise UsageError(f"--guide-model {ref}: the spread of the timesteps is above 0 and at most 1.")
            return GuideModel(ref, f"{word}:{spread:g}" if colon else word, None, True, word, spread=spread)
        names = tuple(filter(None, (name.strip() for name in layers.split(","))))
        if colon and not names:
            raise UsageError(f"--guide-model {ref}: name layers after the colon, such as {word}:mid_block, or leave it out.")
        return GuideModel(ref, f"{word}:{','.join(names)}" if names else word, None, True, word, names)
    guiding, shares = _open_guiding(ref, model, size, access)
    if differences := _differences(guiding, model, shares):
        raise UsageError(f"--guide-model {ref} does not fit the model: {'; '.join(differences)}.")
    return GuideModel(ref, guiding.name, guiding, shares)


def _open_guiding(ref: str, model: Checkpoint, size: tuple[int, int] | None, access: Access) -> tuple[Checkpoint, bool]:
    if ref == BUNDLED_GUIDE:
        folder = model.guiding_folder
        if folder is None:
            raise UsageError(f"--guide-model {ref}: {model.ref} has no guiding network in its folder. {NAME_ONE}.")
        alone = model.with_network(f"{model.ref.partition('@')[0]}/{folder.name}", folder, model.revision)
        if alone is None:
            raise CheckpointError(f"{folder} holds no network like that of {model.ref}.")
        return alone, True
    pinned = ref
    if split_python_ref(ref) is None:
        folder, revision = locate(ref, access.offline)
        pinned = f"{ref.partition('@')[0]}@{revision}" if revision else ref
        if alone := model.with_network(ref, folder, revision):
            return alone, True
    guiding = replace(open_checkpoint(pinned, None, size if split_python_ref(ref) is None else None, access=access), ref=ref)
    null = model.null_label
    unsaid = guiding.null_label is None and guiding.classes == model.classes
    if null is not None and unsaid and null in guiding.labels and not guiding.labels.name(null):
        names = {label: name for label, name in guiding.labels.names.items() if label != null}
        guiding = replace(guiding, null_label=null, labels=Labels(names))  # the model says what it does not
    return guiding, guiding.own_loop  # of a pipeline the network alone


def _differences(guiding: Checkpoint, model: Checkpoint, shares: bool) -> list[str]:
    """What of a guiding model is not as in the model and has to be; a sentence each."""
    unconditional = model.guided_by_unconditional and not guiding.conditional
    pairs: list[tuple[str, Any, Any]] = [
        ("condition", _takes(model) if unconditional else _takes(guiding), _takes(model)),
        ("shape", "x".join(map(str, guiding.shape)), "x".join(map(str, model.shape))),
        ("prediction type", guiding.prediction_type, model.prediction_type),
    ]
    its_noise, model_noise = (noise_schedule(c.scheduler_config) for c in (guiding, model))
    pairs += [(key, its_noise.get(key), model_noise.get(key)) for key in {**model_noise, **its_noise}]
    if shares and not unconditional:
        pairs += [(key, guiding.config.get(key), model.config.get(key)) for key in _CONDITION]
    elif model.latent and guiding.latent:
        theirs, ours = (c.decoder_config.get("scaling_factor") for c in (guiding, model))
        pairs.append(("scaling_factor of the VAE", theirs, ours))
    return [f"{what} {_said(its)} where the model's is {_said(own)}" for what, its, own in pairs if its != own]


def _takes(checkpoint: Checkpoint) -> str:
    return "prompts" if checkpoint.reads_prompts else "labels" if checkpoint.class_conditional else "none"


def _said(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:40]}..."
