"""How files name the networks that they were drawn with, so that `guidegen again` finds them from anywhere."""

from __future__ import annotations

from pathlib import Path

from guidegen.cli.flags import SampleOptions
from guidegen.python_file import split_python_ref
from guidegen.runs.carried import Source
from guidegen.sampling.models import Models


def source_of(flags: SampleOptions, models: Models) -> Source:
    """The options that name the networks: folders by their full path, hub ids with their commit."""
    checkpoint, classifier, guide = models
    parts = classifier.parts if classifier and flags.classifier else ()
    guiding = guide.checkpoint if guide and guide.checkpoint and flags.guide_model != "bundled" else None
    return Source(
        model=_pinned(checkpoint.ref, checkpoint.revision) if flags.model else None,
        classifier=[_pinned(part.ref, part.revision) + (f":{w}" if w != 1 else "") for part, w in parts] or None,
        classifier_input=flags.classifier_input,
        guide_model=_pinned(guiding.ref, guiding.revision) if guiding and flags.guide_model else flags.guide_model,
        null_label=flags.null_label,
        variant=flags.variant,
        size=flags.size,
        deterministic=flags.deterministic,
        batch_size=flags.batch_size if flags.deterministic else None,
    )


def _pinned(ref: str, revision: str | None) -> str:
    if revision:
        return f"{ref.partition('@')[0]}@{revision}"
    if python_ref := split_python_ref(ref):
        return f"{_full(python_ref[0])}:{python_ref[1]}"
    return _full(Path(ref))


def _full(path: Path) -> str:
    """`~/...` below the home directory, which says less of whose it is and holds on other machines."""
    full, home = path.expanduser().resolve(), Path("~").expanduser().resolve()
    return f"~/{full.relative_to(home)}" if full.is_relative_to(home) and full != home else str(full)
