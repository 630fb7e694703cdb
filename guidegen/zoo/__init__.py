"""The bundled checkpoint and the recipe that trained it (`python -m guidegen.zoo.train`)."""

from pathlib import Path

BUNDLED = Path(__file__).parent / "imagenet20-32"
