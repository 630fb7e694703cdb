"""`guidegen evaluate` by a protocol, of a part of the images, and of the networks alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.cli import console
from guidegen.cli.evaluate_flags import EvaluateFlags
from guidegen.cli.lines import print_line
from guidegen.errors import CheckpointError, UsageError
from guidegen.models.checkpoint import Access

if TYPE_CHECKING:
    from guidegen.evaluate.features import Reader
    from guidegen.evaluate.measure import Drawn
    from guidegen.evaluate.protocols import Protocol
    from guidegen.evaluate.published import PublishedReader

    Pairs = Sequence[tuple[Drawn, Sequence[dict[str, Any]]]]


def _protocol(name: str) -> Protocol:
    from guidegen.evaluate.protocols import PROTOCOLS

    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name}: choose {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def fewest_images(protocol: str | None) -> int:
    """How many images can be measured at each weight: by a protocol, or in the free form."""
    from guidegen.evaluate.neighbourhoods import MIN_IMAGES

    return _protocol(protocol).fewest if protocol else MIN_IMAGES


def check_protocol(flags: EvaluateFlags) -> None:
    """Refuses, before a network is opened, flags and a reference that do not go with the protocol.

    Raises:
        UsageError: with the flag that is right.
    """
    from guidegen.evaluate.protocols import check_kind
    from guidegen.evaluate.statistics import read_statistics

    protocol = _protocol(str(flags.protocol))
    free = {"--features": flags.features, "--judge": flags.judge, "--per-class": flags.per_class or None}
    if given := [flag for flag, value in free.items() if value is not None]:
        raise UsageError(f"{given[0]} is of the free form: --protocol {protocol.name} has its networks.")
    if flags.reference_labels not in ("run", "all"):
        raise UsageError(f"--reference-labels: --protocol {protocol.name} measures against the whole reference.")
    if flags.vit is not None and not {"dinov2", "clip"} & {*protocol.networks}:
        raise UsageError(f"--vit: --protocol {protocol.name} has no such network.")
    if flags.inception is not None and "inception" not in protocol.networks:
        raise UsageError(f"--inception: --protocol {protocol.name} has no such network.")
    if flags.reference is not None and flags.reference.exists():
        check_kind(protocol, flags.reference, read_statistics(flags.reference), False)


def check_before_protocol(flags: EvaluateFlags) -> bool:
    """Opens the networks, and returns whether images of the reference will be read, which then must be of the right size.

    Raises:
        CheckpointError, UsageError: a network cannot be opened.
    """
    from guidegen.evaluate.targets import needs_images

    protocol = _protocol(str(flags.protocol))
    open_networks_of(protocol, flags)
    assert flags.reference is not None
    return needs_images(flags.reference, protocol)


def check_free(flags: EvaluateFlags) -> None:
    """Refuses, in the free form, a reference whose statistics would be passed over.

    Raises:
        UsageError: with the protocol that measures against them.
    """
    from guidegen.evaluate.protocols import check_kind
    from guidegen.evaluate.reference import is_saved
    from guidegen.evaluate.statistics import read_statistics

    assert flags.reference is not None
    if not is_saved(flags.reference):
        found = read_statistics(flags.reference)
        check_kind(None, flags.reference, found, flags.features == "inception")
        if found and not flags.quiet:
            console.note(f"note: mu and sigma of {flags.reference} are Inception's, and are not used: its images are")


def open_networks_of(protocol: Protocol, flags: EvaluateFlags) -> list[PublishedReader]:
    """The networks of a protocol, as the flags name them."""
    from guidegen.evaluate.protocols import open_networks
    from guidegen.sampling.device import pick_device

    access = Access(flags.offline, flags.allow_pickle)
    return open_networks(protocol, flags.inception, flags.vit, pick_device(flags.device), access)


def measure_by_protocol(drawn: Sequence[Drawn], flags: EvaluateFlags) -> tuple[Pairs, str] | None:
    """The rows of a protocol, and a line about them; None of a shard."""
    from guidegen.evaluate.measuring import measure_protocol
    from guidegen.evaluate.targets import read_target, save_target

    protocol = _protocol(str(flags.protocol))
    readers = open_networks_of(protocol, flags)
    if flags.shard is not None:
        make_features(drawn, readers, flags)
        return None
    assert flags.reference is not None
    size, batch = drawn[0].size, flags.batch_size
    with counter(drawn, len(readers), flags.quiet) as on_image:
        target = read_target(flags.reference, protocol, readers, size, flags.resize, batch, lambda _: None)
        if flags.save_reference:
            save_target(flags.save_reference, target, protocol, readers, flags.reference, size, flags.resize)
        pairs = [
            (run, measure_protocol(run, protocol, readers, target, flags.halves, batch, on_image, flags.extrapolate))
            for run in drawn
        ]
    if not flags.quiet:
        _notes(protocol, readers, pairs)
        if resized := target.sizes - {size}:
            found = "{1}x{0}".format(*next(iter(resized))) if len(resized) == 1 else "other sizes"
            own = f"the run of {size[1]}x{size[0]}"
            console.note(f"note: {target.source} has images of {found}, {own}: the protocol resizes each")
        missing = [layer for layer in protocol.layers if layer not in target.distances]
        for layer in missing:
            console.note(f"note: {flags.reference} has no statistics of {layer}, so that distance is left out")
    count = f"{target.count:,} images" if target.count else "a number of images that it does not say"
    parts = [f"statistics of {count}"] * bool(target.distances) + [f"{target.images:,} images"] * bool(target.images)
    return pairs, f"--protocol {protocol.name}, as {protocol.about}; {target.source}: {', and '.join(parts)}"


def _notes(protocol: Protocol, readers: Sequence[PublishedReader], pairs: Pairs) -> None:
    for reader in readers:
        if not reader.inception:
            console.note(
                f"warning: weights of {reader.name} are not known to be the published ones: the numbers have other names"
            )
    counts = {row["images"] for _, rows in pairs for row in rows}
    if protocol.layers and counts - {50_000}:
        console.note(f"note: published numbers are of 50,000 images, these of {', '.join(f'{n:,}' for n in sorted(counts))}")
    if any(row["distinct"] < row["images"] for _, rows in pairs for row in rows):
        console.note("warning: some images are equal (a seed without its label is one image), and all of them are counted")


def make_features(drawn: Sequence[Drawn], readers: Sequence[Reader], flags: EvaluateFlags) -> None:
    """The features of one shard of each run."""
    from guidegen.evaluate.measuring import read_features
    from guidegen.spec.shard import parse_shard

    shard = parse_shard(str(flags.shard), os.environ)
    if any(not run.axes for run in drawn):
        raise UsageError("--shard keeps features in run directories, and these are images of a file or folder.")
    with counter(drawn, len(readers), flags.quiet, shard.count) as on_image:
        for run in drawn:
            read_features(run, readers, flags.batch_size, on_image, shard)
    for run in drawn:
        if flags.json_rows:
            print_line("features", run.features, run.folder, {"shard": str(shard)})
        else:
            console.result(str(run.features))


def check_networks(flags: EvaluateFlags) -> None:
    """Prints what the networks of a protocol make of a test picture, and whether their weights are the published ones.

    Raises:
        CheckpointError: they are not, or not known to be.
    """
    from guidegen.evaluate.published import check

    found = [check(reader) for reader in open_networks_of(_protocol(flags.protocol or "adm"), flags)]
    for one in found:
        if flags.json_rows:
            print_line("check", Path("."), Path("."), one)
            continue
        weights = "the published weights" if one["published"] else "not known to be the published weights"
        console.result(f"{one['network']}: {weights}, sha256 {one['sha256']}; {one['preprocessing']}")
        for name, features in one["features"].items():
            first = ", ".join(f"{value:.5f}" for value in features["first"])
            console.result(f"  {name}: norm {features['norm']:.4f}, first {first}")
    if other := [one["network"] for one in found if not (one["published"] and one["finite"])]:
        raise CheckpointError(f"{', '.join(other)}: numbers of these features have other names than published ones.")


@contextmanager
def counter(drawn: Sequence[Drawn], networks: int, quiet: bool, shards: int = 1) -> Iterator[Callable[[int], None]]:
    """Shows how many images were read, and how long the rest will take."""
    total = networks * sum(-(-len(run.rows) // shards) for run in drawn)
    with console.progress(total, total, quiet, "reading") as shown:
        yield shown.images


def require_matplotlib() -> None:
    """Raises UsageError where curves could not be drawn."""
    from guidegen.evaluate.metrics import require

    require("matplotlib", "Drawing curves (--no-curves leaves them out)")


def write(folder: Path, rows: Sequence[Mapping[str, Any]], name: str | None = None) -> None:
    """Rows into a run: metrics.jsonl, or a file of another name."""
    from guidegen.evaluate.measure import METRICS_FILE, write_metrics

    write_metrics(folder, rows, name or METRICS_FILE)
