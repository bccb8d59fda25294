"""Finding models: directories, and names on a stand-in for the Hub."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mini_infer.exceptions import ModelNotFoundError
from mini_infer.models import read_config, resolve_model, resolve_tokenizer

from .checkpoints import make_checkpoint
from .hub_server import COMMIT, Hub

TOKEN = "hf_token_of_the_test"


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("org/model") == Path("org/model"), "before the Hub's model of that name"
    assert resolve_model("~/org") == resolve_tokenizer("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name",
    ["./model", "../model", "/no/model", "~/model", "~nobody-here/model", "a/b/model", Path("org/model"), "a\\model"],
)
def test_a_path_to_nowhere_is_a_missing_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    for resolve in (resolve_model, resolve_tokenizer):
        with pytest.raises(ModelNotFoundError, match="model does not exist; give a directory"):
            resolve(name)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelNotFoundError, match=r"model\.bin is not a directory"):
        resolve_model(tmp_path / "model.bin")


def test_one_of_the_gguf_files_of_a_directory(tmp_path: Path) -> None:
    def put(*names: str) -> Path:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        for name in names:
            (directory / name).touch()
        return directory

    only = put("m-Q8_0.gguf", "mmproj-m.gguf", "README.md")
    assert resolve_model(only) == resolve_model(f"{only}:q8_0") == only / "m-Q8_0.gguf"
    assert resolve_model(only / "m-Q8_0.gguf") == only / "m-Q8_0.gguf"
    several = put(
        "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q4_K.gguf", "m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf"
    )
    assert resolve_model(several) == several / "m-Q4_K_M.gguf", "as llama.cpp chooses"
    assert resolve_model(f"{several}:Q4_K") == several / "m-Q4_K.gguf"
    assert resolve_model(f"{several}:F16") == several / "m-f16-00001-of-00002.gguf"
    with pytest.raises(ModelNotFoundError, match=r"no single GGUF file called Q6_K.*m-Q4_K\.gguf"):
        resolve_model(f"{several}:Q6_K")
    with pytest.raises(ModelNotFoundError, match=r"several GGUF files; choose with NAME:Q4_K_M"):
        resolve_model(put("a.gguf", "b.gguf"))
    other = put("model.safetensors", "m-Q8_0.gguf")
    assert resolve_model(other) == other, "safetensors go first"
    assert resolve_model(f"{other}:Q8_0") == other / "m-Q8_0.gguf"


@pytest.mark.parametrize("name", ["", "two words", "org/", "a--b", "-x"])
def test_an_impossible_name(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither a directory here nor a possible Hub name"):
        resolve_model(name)


def ask(cache: Path, endpoint: str, calls: list[dict[str, Any]], **environment: str) -> list[dict[str, str]]:
    """Resolve each of `calls` in a new process, for huggingface_hub reads its environment once, on import.

    Each result is {"path": ...} or {"error": the message}.
    """
    program = """
        import json, sys
        from mini_infer.exceptions import ModelNotFoundError
        from mini_infer.models import resolve_model, resolve_tokenizer

        results = []
        for call in json.loads(sys.argv[1]):
            resolve = {"model": resolve_model, "tokenizer": resolve_tokenizer}[call.pop("kind", "model")]
            try:
                results.append({"path": str(resolve(**call))})
            except ModelNotFoundError as error:
                results.append({"error": str(error)})
        print(json.dumps(results))
    """
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGINGFACE_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), json.dumps(calls)],
        env={
            **kept,
            "HF_HOME": str(cache),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        },
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    results: list[dict[str, str]] = json.loads(output.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's repository, with much in it that the engine never reads."""
    path = make_checkpoint(tmp_path_factory.mktemp("repository"), "qwen3", 0, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "vocab.json"):
        (path / name).write_text("{}")
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "model.onnx", "modeling_trap.py"):
        (path / name).write_text("unwanted")
    return path


def test_the_hub_from_download_to_offline_use(tmp_path: Path, checkpoint: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_text("unwanted")
    models = {"org/model": checkpoint, "org/gated": checkpoint, "org/pickled": pickled}
    hub = Hub(models, gated={"org/gated"}, broken={"org/broken"}, rejected_token="hf_expired")
    with hub.running():
        downloaded, branch, tokenizer, pinned, absent, revision, gated, broken, only_pickles = ask(
            tmp_path / "cache",
            hub.endpoint,
            [
                {"model": "org/model", "revision": "v1.0"},
                {"model": "org/model"},
                {"kind": "tokenizer", "tokenizer": "org/model", "cache_dir": str(tmp_path / "elsewhere")},
                {"model": "org/model", "revision": COMMIT},
                {"model": "org/absent"},
                {"model": "org/model", "revision": "v9"},
                {"model": "org/gated"},
                {"model": "org/broken"},
                {"model": "org/pickled"},
            ],
            HF_TOKEN=TOKEN,
        )
        (expired,) = ask(tmp_path / "cache", hub.endpoint, [{"model": "org/gated"}], HF_TOKEN="hf_expired")
    asked = list(hub.requests)

    snapshot = Path(downloaded["path"])
    assert snapshot.is_relative_to(tmp_path / "cache")
    assert snapshot == Path(branch["path"]) == Path(pinned["path"])
    assert read_config(snapshot) == read_config(checkpoint)
    tokenizer_files = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    tokenizer_files |= {"merges.txt", "vocab.json"}
    assert {file.name for file in snapshot.iterdir()} == {
        *tokenizer_files,
        "generation_config.json",
        "model.safetensors",
    }
    assert Path(tokenizer["path"]).is_relative_to(tmp_path / "elsewhere")
    assert {file.name for file in Path(tokenizer["path"]).iterdir()} == tokenizer_files
    for unwanted in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "model.onnx", "modeling_trap.py"):
        assert not any(unwanted in path for _, path, _ in asked)
    assert any(path == "/api/models/org/model/revision/v1.0" for _, path, _ in asked)
    assert {token for _, _, token in asked} == {f"Bearer {TOKEN}", "Bearer hf_expired"}

    assert f"org/absent is neither a directory here nor on {hub.endpoint}" in absent["error"]
    assert "HF_TOKEN" in absent["error"]
    assert f"org/model at revision v9 is not on {hub.endpoint}" in revision["error"]
    assert f"org/gated is gated: accept its terms at {hub.endpoint}/org/gated" in gated["error"]
    assert "org/broken could not be fetched" in broken["error"] and "500" in broken["error"]
    assert "org/pickled has no usable weights" in only_pickles["error"]
    assert "denies access to org/gated" in expired["error"] and "hf auth login" in expired["error"]

    # From here on nobody answers at the Hub's address.
    calls = [
        {"model": "org/model"},
        {"model": "org/model", "revision": "v1.0"},
        {"model": "org/absent"},
        {"model": "org/model", "cache_dir": str(tmp_path / "elsewhere")},
    ]
    cached, tagged, offline, half = ask(tmp_path / "cache", hub.endpoint, calls, HF_HUB_OFFLINE="1")
    assert Path(cached["path"]) == Path(tagged["path"]) == snapshot
    assert "org/absent is not, or not completely, in the local cache" in offline["error"]
    assert "HF_HUB_OFFLINE" in offline["error"]
    assert "org/model" in half["error"], "only the tokenizer is cached there"

    cached, _, unreachable, _ = ask(tmp_path / "cache", hub.endpoint, calls)
    assert Path(cached["path"]) == snapshot, "what is cached works without a connection"
    assert f"{hub.endpoint} cannot be reached" in unreachable["error"]
    assert hub.requests == asked
