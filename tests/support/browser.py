"""A real browser without a window: what a page has become when its scripts have run, and how it answers a person."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
WITHOUT = "no chromium is installed (Debian: apt-get install chromium)"
SWITCHES = ["--headless=new", "--no-sandbox", "--disable-3d-apis"]
SECONDS = 60.0
"""As long an answer may take on a machine that has other things to do."""


def dom(url: str, profile: Path, seconds: int = 10) -> str:
    """The page's HTML after so many seconds of its own clock, which runs as fast as it can."""
    assert CHROMIUM is not None
    switches = [*SWITCHES, f"--user-data-dir={profile}", f"--virtual-time-budget={1000 * seconds}"]
    ended = subprocess.run([CHROMIUM, *switches, "--dump-dom", url], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


class Refused(Exception):
    """The browser did not do what it was told to."""


class Browser(contextlib.ExitStack):
    """Chromium, told what to do by its DevTools protocol over a pipe: JSON that ends in a zero byte.

    Args:
        profile: an empty folder, for what it keeps.
    """

    def __init__(self, profile: Path) -> None:
        super().__init__()
        assert CHROMIUM is not None
        (its_in, self._out), (self._in, its_out) = _pipe(), _pipe()
        for end in (self._out, self._in):
            self.callback(os.close, end)
        command = [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "bash", *command],
            pass_fds=(its_in, its_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self._left, self._number = b"", 0

    def __exit__(self, *error: Any) -> bool:
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return bool(super().__exit__(*error))

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """What a method of the protocol returns; events that come meanwhile are passed over."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(asked | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise Refused(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._in], [], [], SECONDS)[0], "the browser says nothing"
            more = os.read(self._in, 1 << 16)
            if not more:
                raise BrokenPipeError("the browser has ended")
            self._left += more
        message, self._left = self._left.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, url: str, width: int = 1200, first: str = "") -> "Page":
        """A page in a window of its own.

        Args:
            first: a script that runs before those of the page.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        page.resize(width)
        page.call("Page.enable")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=first)
        page.call("Page.navigate", url=url)
        return page


def _pipe() -> tuple[int, int]:
    """Both ends of a new pipe, by numbers that are none of 3 and 4, which are the browser's own for its pipes."""
    low = os.pipe()
    high = fcntl.fcntl(low[0], fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(low[1], fcntl.F_DUPFD_CLOEXEC, 10)
    for end in low:
        os.close(end)
    return high


class Page:
    """One that is open in a Browser; closed at the end of a `with`."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser, self.target, self.session = browser, target, session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a method of the protocol returns, of this page."""
        return self.browser.call(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression as soon as that is a true one, if need be of the next page."""
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(Refused):  # as this page is being left
                if found := self.run(script):
                    return found
            assert time.monotonic() < end, f"{script} is never true: {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def resize(self, width: int, height: int = 900) -> None:
        """Give the window another size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def click(self, selector: str) -> None:
        """As by a mouse."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def enter(self, selector: str, value: str) -> None:
        """Write into a field, or choose from a list."""
        element = f"document.querySelector({json.dumps(selector)})"
        events = "input", "change"
        said = "".join(f"{element}.dispatchEvent(new Event('{event}', {{bubbles: true}}));" for event in events)
        self.run(f"{element}.value = {json.dumps(value)}; {said}")

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
