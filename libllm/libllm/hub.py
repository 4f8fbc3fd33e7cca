"""Models from the Hugging Face hub, fetched by its own library into its own cache.

Owns which files of a repository make a model here, and what each way to fail means for a person.
HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are the library's, which reads them itself. Never
fetches code or pickles, and never adds anything to a system: the caller does that.
"""

import errno
import shutil
from pathlib import Path
from typing import Final

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # of an HTTP library that varies
    HTTPError as TransportError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
from llmproto.errors import ErrorKind, RemoteError, invalid

FILES: Final = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
"""What serving reads; weights in safetensors only."""
NOT_FILES: Final = ("*/*", "consolidated*", "*.py", "*.bin", "*.pt", "*.pth", "*.ckpt")
"""Folders hold other formats of the same weights, and so does `consolidated`."""


def fetch(name: str, *, revision: str | None = None, progress: bool = False) -> Path:
    """The folder of the repository's files, downloaded where they are not in the cache yet.

    Progress bars go to standard error. RemoteError INVALID for what is not there or is no model,
    DENIED for what needs a login, UNAVAILABLE without a way to the hub, EXHAUSTED without room.
    """
    if progress:
        enable_progress_bars()
    else:
        disable_progress_bars()
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(FILES),
            ignore_patterns=list(NOT_FILES),
            library_name="llmos",
        )
    except (TransportError, HFValidationError, OSError) as error:
        raise refusal(name, error) from error
    return _complete(name, Path(folder))


def refusal(name: str, error: Exception) -> RemoteError:
    """What a failed fetch is, for people."""
    match error:
        case HFValidationError():
            return invalid(f"{name!r} is not a name on the hub: those read ORG/NAME")
        case GatedRepoError():
            return RemoteError(
                ErrorKind.DENIED,
                f"{name} is gated: accept its conditions at {constants.ENDPOINT}/{name}, then give "
                "your token in HF_TOKEN (or run `hf auth login`)",
            )
        case RepositoryNotFoundError():
            return invalid(
                f"{constants.ENDPOINT} has no model {name}, or it is private: check the name, or "
                "give your token in HF_TOKEN"
            )
        case RevisionNotFoundError():
            return invalid(f"{name} has no such revision")
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return _unavailable(
                f"{name} is not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
                "is set: unset it to fetch the model"
            )
        case LocalEntryNotFoundError():
            return _unavailable(
                f"{constants.ENDPOINT} cannot be reached and {name} is not complete in the cache "
                f"{constants.HF_HUB_CACHE} ({_cause(error)}): check the network"
            )
        case HfHubHTTPError():
            return _unavailable(
                f"{constants.ENDPOINT} refused {name} ({_first_line(error)}): try again later"
            )
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RemoteError(
                ErrorKind.EXHAUSTED,
                f"no room for {name} in {constants.HF_HUB_CACHE} ({_free_bytes()} bytes are free): "
                "make room, or name another place in HF_HOME",
            )
        case OSError() if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return RemoteError(
                ErrorKind.DENIED,
                f"{error.filename or constants.HF_HUB_CACHE} cannot be written "
                f"({error.strerror}): name another place in HF_HOME",
            )
        case _:
            return _unavailable(
                f"the download of {name} broke off ({_first_line(error)}): the same command "
                "goes on with it"
            )


def _complete(name: str, folder: Path) -> Path:
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "*.safetensors file")):
        if not any(folder.glob(pattern)):
            raise invalid(f"{name} on the hub has no {what}: it is no model that can run here")
    return folder


def _unavailable(detail: str) -> RemoteError:
    return RemoteError(ErrorKind.UNAVAILABLE, detail)


def _cause(error: BaseException) -> str:
    return _first_line(error.__cause__ or error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _free_bytes() -> int:
    """Of the file system that holds the cache, or will."""
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
