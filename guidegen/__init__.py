"""guidegen: guided samples from pretrained diffusion checkpoints.

The names below are loaded on first use, so that `import guidegen` stays light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "BUNDLED": "guidegen.zoo",
    "Model": "guidegen.models.python_ref",
    "ClassifierModel": "guidegen.models.python_ref",
    "Access": "guidegen.models.checkpoint",
    "open_checkpoint": "guidegen.models.checkpoint",
    "open_classifier": "guidegen.models.classifiers.opening",
    "Checkpoint": "guidegen.models.checkpoint",
    "load_network": "guidegen.models.loading",
    "load_classifier": "guidegen.models.classifiers.opening",
    "NoisyClassifier": "guidegen.models.classifiers.noisy",
    "UNetDenoiser": "guidegen.models.denoisers",
    "DiTDenoiser": "guidegen.models.denoisers",
    "TextDenoiser": "guidegen.models.denoisers",
    "NoisyScore": "guidegen.scores.gradient",
    "DenoisedScore": "guidegen.scores.gradient",
    "DetachedScore": "guidegen.scores.gradient",
    "NULL": "guidegen.scores.interfaces",
    "Guide": "guidegen.scores.guided",
    "sample": "guidegen.sampling.loop",
    "make_scheduler": "guidegen.sampling.schedulers",
    "to_uint8": "guidegen.sampling.loop",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "diffusers":
        return import_module("guidegen.diffusers")
    raise AttributeError(f"module 'guidegen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
