import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .pages import ROOT


@dataclass(frozen=True)
class Site:
    folder: Path
    """English, with Chinese below it in zh/."""
    logs: dict[str, str]
    """What MkDocs said, by language; nothing if all is well."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Both sites, built as strictly as can be: with only a warning the build has failed."""
    pytest.importorskip("material", reason="the site needs the extra docs: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site") / "mini-infer"
    builds = {}
    for language, config in {"en": "mkdocs.yml", "zh": "mkdocs.zh.yml"}.items():
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config]
        builds[language] = subprocess.Popen(
            [*command, "--site-dir", folder.with_name(language)],
            cwd=ROOT,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
    logs = {language: build.communicate()[0] for language, build in builds.items()}
    logs = {language: "" if builds[language].returncode == 0 else log for language, log in logs.items()}
    if not any(logs.values()):
        folder.with_name("en").rename(folder)
        folder.with_name("zh").rename(folder / "zh")
    return Site(folder, logs)


@pytest.fixture(scope="session")
def address(site: Site) -> Iterator[str]:
    """Where the site is served, below a folder: it must not need a host to itself."""
    if any(site.logs.values()):
        pytest.skip("the site was not built")
    handler = functools.partial(Handler, directory=str(site.folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{site.folder.name}"
        server.shutdown()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
