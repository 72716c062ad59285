"""The page in a real browser: Debian's chromium, spoken to over a pipe in its DevTools protocol."""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest
from conftest import KEY, Server

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--mute-audio",
         "--disable-background-networking", "--disable-extensions", "--remote-debugging-pipe")
# a promise of the first value of %s that counts as true, looked at whenever something on the page has changed
UNTIL = """new Promise((done, fail) => {
  const look = () => { const value = (%s); if (value) { observer.disconnect(); done(value); } };
  const observer = new MutationObserver(look);
  observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  setTimeout(() => fail(new Error("not within 10 s; the page says: " + document.body.innerText)), 10000);
  look();
})"""


class Browser:
    """A headless chromium. Messages are JSON with a NUL behind it, on its descriptors 3 and 4."""

    def __init__(self, folder):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self._number, self._buffer, self.events = 0, b"", []

    def call(self, method, session=None, **parameters):
        """The result of a command; what happens meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters,
                   **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def wait(self, session, method):
        """Return when an event of a session has come."""
        while not any((event["method"], event.get("sessionId")) == (method, session) for event in self.events):
            self.events.append(self._read())

    def _read(self):
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 20)[0], "the browser says nothing"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def close(self):
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self._in)
        os.close(self._out)


class Tab:
    """A page in a browser context of its own."""

    def __init__(self, browser, url, width=1280, theme="light"):
        self.browser = browser
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.url = url
        self.call("Page.navigate", url=url)
        browser.wait(self.session, "Page.loadEventFired")

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def ask(self, expression):
        """The value of an expression in the page, or what its promise gives."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, expression):
        """Its value as soon as that counts as true."""
        return self.ask(UNTIL % expression)

    def text(self, selector):
        return self.ask(f"document.querySelector({json.dumps(selector)}).textContent")

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, **more):
        """A key and its release."""
        text = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
        code = {"Enter": 13, "Tab": 9, " ": 32, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                "ArrowDown": 40}[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code, **more)

    def open(self):
        """Type the key."""
        self.until("document.activeElement.id === 'key'")
        self.type(KEY)
        self.press("Enter")
        self.until("document.querySelector('#runtimes tr')")

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self):
        """What the browser complained about: errors, exceptions, what the Content-Security-Policy forbade."""
        return [event for event in self.browser.events if event.get("sessionId") == self.session and (
            event["method"] == "Runtime.exceptionThrown" or
            (event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"))]

    def close(self):
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)
