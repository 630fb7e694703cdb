"""From what a person wrote after `-m` to a folder on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from guidegen.checkpoints.files import Access, weight_names
from guidegen.errors import CheckpointError, first_line

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SMALL = ["*.json", "*.txt", "*.model", "*.py"]


def locate(ref: str, offline: bool = False) -> tuple[Path, str | None]:
    """The folder of a checkpoint, configuration only, and the commit it is at (None for a plain folder).

    A folder wins over a hub id of the same spelling. Hub ids are `owner/name` or
    `owner/name@revision`; token, cache and offline mode are huggingface_hub's own
    (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`).

    Raises:
        CheckpointError: no such folder, or the hub has or gives nothing.
    """
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise CheckpointError(
            f"{ref} is a file. A checkpoint is a folder with config.json or model_index.json; "
            "`guidegen convert` makes one of a guided-diffusion .pt file."
        )
    if not _REPO.fullmatch(ref) or ref.startswith((".", "/")):
        raise CheckpointError(
            f"No checkpoint at {ref}: no such folder, and not a hub id (owner/name or owner/name@revision)."
        )
    return _download(ref, _SMALL, offline)


def download_weights(ref: str, revision: str, parts: Iterable[str], access: Access) -> None:
    """Brings the weights of some sub-folders ("" for the top) of a hub id into the cache.

    The variant asked for, and the plain files for parts that do not have it: never all that a
    repository holds.

    Raises:
        CheckpointError: the hub has or gives nothing.
    """
    pinned = f"{ref.partition('@')[0]}@{revision}"
    missing = list(parts)
    for variant in dict.fromkeys((access.variant, None)):
        patterns = [f"{part}/{name}".lstrip("/") for part in missing for name in weight_names(variant, access.allow_pickle)]
        folder, _ = _download(pinned, _SMALL + patterns, access.offline)
        missing = [part for part in missing if not any((folder / part).glob("*.safetensors"))]
        if not missing:
            return


def _download(ref: str, patterns: list[str], offline: bool) -> tuple[Path, str | None]:
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # standard error has one bar, the drawing's
    repo, _, revision = ref.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=patterns, local_files_only=offline
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{ref} is gated: accept its terms on the hub and set HF_TOKEN.") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"No folder and no hub repository {repo} (a private one needs HF_TOKEN).") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{ref} is neither a folder nor in the hub's cache, and the hub cannot be reached (offline?)."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"{ref} could not be downloaded: {first_line(error)}") from error
    except Exception as error:  # the HTTP client's own errors have no common base
        if type(error).__module__.split(".")[0] in ("httpx", "httpcore", "requests", "urllib3"):
            raise CheckpointError(f"{ref}: the hub cannot be reached: {first_line(error)}") from error
        raise
    return Path(path), Path(path).name
