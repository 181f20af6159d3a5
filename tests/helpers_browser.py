"""Drive Debian's Chromium without a display, over the pipe of its debugging protocol."""

import base64
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from importlib.resources import files
from pathlib import Path


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60


class Browser:
    """`with Browser(folder) as page:`, one page; `folder` is for its profile and must be new.

    Attributes:
        events: every event of the page so far, as the protocol gives them.
    """

    def __init__(self, folder: Path, width: int = 1400, height: int = 1000):
        self.folder, self.size = folder, (width, height)
        self.events: list[dict] = []
        self._answers: dict[int, queue.Queue] = {}
        self._number = 0
        self._session: str | None = None

    def __enter__(self) -> "Browser":
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={self.folder}",
            "--window-size={},{}".format(*self.size),
        ]
        # The protocol's places are the descriptors 3 and 4.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exception) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()
        os.close(self._to)

    def _listen(self) -> None:
        rest = b""
        with open(self._from, "rb", buffering=0) as file:
            while part := file.read(1 << 16):
                *whole, rest = (rest + part).split(b"\0")
                for text in whole:
                    message = json.loads(text)
                    if "id" in message:
                        self._answers[message["id"]].put(message)
                    else:
                        self.events.append(message)

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        answer = self._answers[self._number] = queue.Queue()
        os.write(self._to, json.dumps(message).encode() + b"\0")
        found = answer.get(timeout=SECONDS)
        assert "error" not in found, found
        return found["result"]

    def open(self, path: Path, fragment: str = "") -> None:
        if fragment:
            self._go("about:blank")  # else the page that is there is not loaded again
        self._go(path.resolve().as_uri() + fragment)
        # Once it is laid out and drawn, what observes sizes has seen them.
        self.evaluate(
            "new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))).then(() => 0)"
        )

    def _go(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        end = time.monotonic() + SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, which JSON must be able to hold."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        codes = {
            "Enter": 13,
            "Tab": 9,
            "Escape": 27,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        what = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        if key == "Enter":
            what["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def emulate(self, media: str = "", **features: str) -> None:
        """A medium, `print` or the screen, and its features, `prefers-color-scheme` written with `_`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=media, features=named)

    def resize(self, width: int, height: int = 1000) -> None:
        """Lay the page out for a window of this size, or with width 0 for the browser's own."""
        phone = 0 < width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height if width else 0,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def violations(self) -> list[str]:
        """What axe-core, as a package of the test extra brings it, finds wrong with the page for readers."""
        script = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
        self.evaluate(script + "; 0")
        found = self.evaluate(
            "axe.run(document, { resultTypes: ['violations'] }).then(({ violations }) =>"
            " violations.map((rule) => `${rule.id}: ${rule.nodes.map((node) => node.html.slice(0, 120)).join(' ')}`))"
        )
        return found

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the console shows: errors, warnings, violations of the page's policy, exceptions."""
        found = []
        for event in self.events:
            if event["method"] == "Log.entryAdded":
                found.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(json.dumps(event["params"]["args"]))
        return found

    def screenshot(self, path: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
