"""guidegen: guided samples from pretrained diffusion checkpoints.

The names below are loaded on first use, so that `import guidegen` stays light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BUNDLED": "guidegen.zoo",
    "Model": "guidegen.model",
    "ClassifierModel": "guidegen.model",
    "Access": "guidegen.checkpoints",
    "open_checkpoint": "guidegen.checkpoints",
    "open_classifier": "guidegen.checkpoints",
    "Checkpoint": "guidegen.checkpoints",
    "load_network": "guidegen.checkpoints.loading",
    "load_classifier": "guidegen.checkpoints.loading",
    "NoisyClassifier": "guidegen.checkpoints.noisy_classifier",
    "UNetDenoiser": "guidegen.scores.denoiser",
    "DiTDenoiser": "guidegen.scores.denoiser",
    "TextDenoiser": "guidegen.scores.denoiser",
    "NoisyScore": "guidegen.scores.classifier",
    "DenoisedScore": "guidegen.scores.classifier",
    "CheapScore": "guidegen.scores.classifier",
    "NULL": "guidegen.scores.guidance",
    "Guide": "guidegen.scores.guidance",
    "sample": "guidegen.sampling",
    "make_scheduler": "guidegen.schedulers",
    "to_uint8": "guidegen.sampling",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'guidegen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
