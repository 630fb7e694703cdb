"""From what a person wrote after `-m` to a folder on disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from pathlib import Path

from guidegen.errors import CheckpointError, first_line, quoted
from guidegen.models.weight_files import Access, weight_names

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SMALL = ["*.json", "*.txt", "*.model", "*.py", "*.jinja"]


def locate(ref: str, offline: bool = False) -> tuple[Path, str | None]:
    """The folder of a checkpoint, configuration only, and the commit it is at (None for a plain folder).

    A folder wins over a hub id of the same spelling. Hub ids are `owner/name` or
    `owner/name@revision`; token, cache and offline mode are huggingface_hub's own
    (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`).

    Raises:
        CheckpointError: no such folder, or the hub has or gives nothing.
    """
    try:
        folder = Path(ref).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, not allowed, no such user, a null byte
        raise CheckpointError(f"No checkpoint at {ref[:200]}: {getattr(error, 'strerror', None) or error}.") from error
    if is_folder:
        return folder, None
    if is_there:
        raise CheckpointError(
            f"{ref} is a file. A checkpoint is a folder with config.json or model_index.json; "
            "`guidegen convert` makes one of a file of guided-diffusion, EDM, EDM2 or SiT."
        )
    if not _REPO.fullmatch(ref) or ref.startswith((".", "/")):
        raise CheckpointError(
            f"No checkpoint at {quoted(ref)}: no such folder, and not a hub id (owner/name or owner/name@revision)."
        )
    return _download(ref, _SMALL, offline)


def download_weights(ref: str, revision: str | None, folders: Iterable[Path], access: Access) -> None:
    """Brings the weights of some folders of a hub id into the cache, from the commit that `locate` found.

    The variant asked for, and the plain files for folders that do not have it: never all that a
    repository holds.

    Args:
        ref: `owner/name`, perhaps with a revision or a folder after it.
        revision: that commit; None for a plain folder, which has nothing to bring.
        folders: inside the folder that `locate` gave.
        access: how they may be read.

    Raises:
        CheckpointError: the hub has or gives nothing.
    """
    if revision is None:
        return
    pinned = f"{'/'.join(ref.partition('@')[0].split('/')[:2])}@{revision}"
    missing = list(folders)
    for variant in dict.fromkeys((access.variant, None)):
        parts = ["".join(f"{name}/" for name in folder.parts[folder.parts.index(revision) + 1 :]) for folder in missing]
        patterns = [part + name for part in parts for name in weight_names(variant, access.allow_pickle)]
        _download(pinned, _SMALL + patterns, access.offline)
        missing = [folder for folder in missing if not any(folder.glob("*.safetensors"))]
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
    except Exception as error:  # the HTTP clients' own errors have no common base, and come and go with releases
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise CheckpointError(f"{ref} could not be downloaded: {type(error).__name__}: {first_line(error)}") from error
    return Path(path), Path(path).name
