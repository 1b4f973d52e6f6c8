"""Headless Chromium over a pipe, in the DevTools protocol: needs the browser and nothing else."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root may not have one, and all that is visited is our own
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--window-size=1400,1600",
    "--remote-debugging-pipe",
)
PATIENCE_S = 60.0  # a guard against hanging
# The browser reads commands from descriptor 3 and writes answers to 4; both ends here have numbers above those.
START = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'


class Page:
    """One tab. `login`: user and password for the browser's log-in dialog; None cancels it, as a second try does.

    What the page complains of in its console gathers in `complaints`, the statuses of its requests in `statuses`.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.login: tuple[str, str] | None = None
        self.complaints: list[str] = []
        self.statuses: dict[str, int] = {}
        self._commands, self._answers, self._received = commands, answers, b""
        self._number, self._session = 0, None
        self._dialogs: set[str] = set()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", handleAuthRequests=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are noted. Raises RuntimeError."""
        number = self._send(method, **params)
        while (message := self._next()).get("id") != number:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def open(self, url: str, login: tuple[str, str] | None = None) -> None:
        """Begin to load a page; `until` waits for what it shows."""
        self.login = login
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until the expression is true; its value."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(RuntimeError):  # of a page that gives way to the next
                if value := self.evaluate(script):
                    return value
            assert time.monotonic() < deadline, f"never true: {script}; the page shows: {self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """All that the page shows, as text."""
        shown: str = self.evaluate("document.body?.innerText ?? ''")
        return shown

    def shows(self, text: str) -> None:
        """Wait until the page shows the text."""
        self.until(f"document.body?.innerText.includes({json.dumps(text)})")

    def click(self, kind: str, text: str) -> None:
        """Wait for an element of that kind which shows the text, and click it."""
        found = f"[...document.querySelectorAll({kind!r})].find(e => e.innerText.includes({json.dumps(text)}))"
        self.until(f"{found} != null")
        self.evaluate(f"{found}.click()")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _send(self, method: str, **params: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._number

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "the browser is silent"
            piece = os.read(self._answers, 2**20)
            assert piece, "the browser has ended"
            self._received += piece
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Fetch.requestPaused":
                self._send("Fetch.continueRequest", requestId=params["requestId"])
            case "Fetch.authRequired":
                self._log_in(params["requestId"])
            case "Network.responseReceived":
                self.statuses[params["response"]["url"]] = params["response"]["status"]
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.complaints.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(f"{params['entry']['text']} ({params['entry'].get('url')})")

    def _log_in(self, request: str) -> None:
        again = request in self._dialogs
        self._dialogs.add(request)
        answer = {"response": "CancelAuth"}
        if self.login is not None and not again:
            answer = {"response": "ProvideCredentials", "username": self.login[0], "password": self.login[1]}
        self._send("Fetch.continueWithAuth", requestId=request, authChallengeResponse=answer)


@contextmanager
def page(chromium: str, profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own, with a fresh profile; ended with the block."""
    (read_commands, commands), (answers, write_answers) = (map(_above, os.pipe()) for _ in range(2))
    theirs = (read_commands, write_answers)
    browser = [chromium, *FLAGS, f"--user-data-dir={profile}"]
    with (profile.parent / f"{profile.name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", START, "bash", *map(str, theirs), *browser], pass_fds=theirs, stdout=log, stderr=log
        )
    for descriptor in theirs:
        os.close(descriptor)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)  # ends the browser
        try:
            process.wait(20)
        finally:
            process.kill()
            os.close(answers)


def _above(descriptor: int) -> int:
    """A copy whose number is none that the browser uses."""
    copied = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copied
