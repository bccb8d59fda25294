"""Finding a checkpoint: a directory on this machine, or a name on the Hugging Face Hub.

Access token, cache, offline mode and mirror are huggingface_hub's business: HF_TOKEN or ``hf auth login``, HF_HOME,
HF_HUB_OFFLINE and HF_ENDPOINT mean here what they mean there.
"""

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError
from mini_infer.models.weights import INDEX_FILE, SINGLE_FILE, weight_files

TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
MODEL_FILES = (*TOKENIZER_FILES, "generation_config.json", SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors")
"""Everything the engine reads, and nothing else: repositories often hold the same weights in several formats."""


def resolve_model(model: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The directory that holds `model`, fetched from the Hub unless it is a directory already.

    Args:
        model: a directory, or a Hub name such as ``Qwen/Qwen3-0.6B``.
        revision: branch, tag or commit on the Hub; means nothing for a directory.
        cache_dir: where downloads are kept; None is huggingface_hub's own place.

    Raises:
        ModelNotFoundError: no such directory, or the Hub does not have it, does not let us have it, or is out of
            reach and the cache does not have it either.
    """
    directory = _local_directory(model)
    if directory is not None:
        return directory
    directory = _fetch(str(model), revision, cache_dir, MODEL_FILES)
    try:
        weight_files(directory)
    except InvalidCheckpointError as error:
        raise ModelNotFoundError(f"{_described(str(model), revision)} has no usable weights: {error}") from error
    return directory


def resolve_tokenizer(tokenizer: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """As `resolve_model`, but without the weights."""
    directory = _local_directory(tokenizer)
    return directory if directory is not None else _fetch(str(tokenizer), revision, cache_dir, TOKENIZER_FILES)


def _local_directory(name: str | Path) -> Path | None:
    """The directory called `name`; None if there is none but `name` could be one on the Hub."""
    directory = Path(os.path.expanduser(name))  # unlike Path's own, leaves an unknown ~user as it is
    if name != "" and directory.is_dir():  # Path("") would be the current directory
        return directory
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise ModelNotFoundError(f"{directory} {problem}; give a directory, or a Hub name such as Qwen/Qwen3-0.6B")
    return None


def _described(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at revision {revision}"


def _fetch(name: str, revision: str | None, cache_dir: str | Path | None, files: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(files)))
    except Exception as error:  # a broken transfer raises whatever huggingface_hub's current HTTP library raises
        raise ModelNotFoundError(_explanation(error, name, revision)) from error


def _explanation(error: Exception, name: str, revision: str | None) -> str:
    what, hub, login = _described(name, revision), constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the Hub did answer, only huggingface_hub looked in the cache before it gave up
    match error:
        case HFValidationError():
            return f"{name!r} is neither a directory here nor a possible Hub name: {error}"
        case GatedRepoError():
            return f"{what} is gated: accept its terms at {hub}/{name}, then {login}"
        case RepositoryNotFoundError():
            return f"{what} is neither a directory here nor on {hub}; check the spelling; if it is private, {login}"
        case RevisionNotFoundError():
            return f"{what} is not on {hub}; check the branch, tag or commit"
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{what} is not, or not completely, in the local cache, and HF_HUB_OFFLINE forbids fetching it"
        case LocalEntryNotFoundError():
            return (
                f"{what} is not, or not completely, in the local cache, and {hub} cannot be reached "
                f"({error.__cause__ or error}); check the connection, and HF_ENDPOINT if you use a mirror"
            )
        case HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return f"{hub} denies access to {what} ({error}); {login}"
        case _:
            return f"{what} could not be fetched from {hub}: {type(error).__name__}: {error}; try again later"
