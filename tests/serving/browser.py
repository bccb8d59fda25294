"""A real Chromium without a window, and the page in it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .running import wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="the page is driven with selenium, which is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,900",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver of a fresh Chromium, which keeps its files in ``profile``; the test is skipped where there is none."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    driver_binary = shutil.which("chromedriver")
    if binary is None or driver_binary is None:
        pytest.skip("no Chromium with chromedriver on the PATH; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_binary))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page of one server, as somebody sees it who opens it for the first time.

    Args:
        driver: a browser.
        url: the server's.
        language: what the browser asks for.
        width: of the window, in CSS pixels.
        scheme: which colours the system asks for, "light" or "dark".
    """

    def __init__(
        self, driver: Any, url: str, *, language: str = "en-US", width: int = 1280, scheme: str = "light"
    ) -> None:
        self.driver = driver
        self.url = url
        agent = driver.execute_script("return navigator.userAgent")
        self.devtools("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.devtools("Storage.clearDataForOrigin", origin=url, storageTypes="all")
        self.console()  # what was there before is not this page's
        self.requests()
        driver.get(url)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, expression: str, *arguments: Any) -> Any:
        """The value of an expression; ``$`` is querySelector, ``$$`` all that match as an array."""
        helpers = "const $ = (s) => document.querySelector(s), $$ = (s) => [...document.querySelectorAll(s)];"
        return self.driver.execute_script(f"{helpers} return ({expression})", *arguments)

    def wait(self, condition: str | Callable[[], bool]) -> None:
        """Until an expression, or a function, is true."""
        wait_until(condition if callable(condition) else lambda: bool(self.js(condition)))

    def wait_until_live(self) -> None:
        self.wait("$('#connection').dataset.state === 'connection_live' && $('#picture').dataset.total")

    def press(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def press_with_shift(self, key: str) -> None:
        shift = webdriver.Keys.SHIFT
        webdriver.ActionChains(self.driver).key_down(shift).send_keys(key).key_up(shift).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def ask(self, question: str) -> None:
        self.js("$('#prompt').focus()")
        self.press(question, "\n")

    def blocks(self) -> dict[str, int]:
        """How many the picture shows as used, mine, shared, cached, free, and in total."""
        names = ("used", "mine", "shared", "cached", "free", "total")
        shown = self.js("({...$('#picture').dataset})")
        return {name: int(shown[name]) for name in names}

    def remember_most(self) -> None:
        """From now on keep the largest number of each kind of blocks and sequences, for ``most``."""
        self.driver.execute_script("""
            const most = (window.most = {});
            const look = () => {
                for (const element of [document.querySelector("#picture"), document.querySelector("#engine")])
                    for (const [name, value] of Object.entries(element.dataset))
                        most[name] = Math.max(most[name] ?? 0, Number(value) || 0);
            };
            const observer = new MutationObserver(look);
            for (const id of ["picture", "engine"])
                observer.observe(document.getElementById(id), { attributes: true });
        """)

    def most(self, name: str) -> int:
        return self.js("window.most[arguments[0]] ?? 0", name)

    def console(self) -> list[str]:
        """What the browser complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that this tab asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
