"""The page in Firefox: Debian's firefox-esr, spoken to over TCP in its Marionette protocol."""
import json
import os
import re
import shutil
import socket
import subprocess

import pytest
from conftest import KEY

pytestmark = pytest.mark.slow       # ten seconds, most of them the browser's start
FIREFOX = shutil.which("firefox-esr")
PORT = re.compile(rb"Marionette\s.*Listening on port ([0-9]+)")
ENTER = "\ue007"                    # (WebDriver, 17.4.2)
# Calls back with the first value of %s that counts as true; it looks at each change of the page.
UNTIL = """const done = arguments[arguments.length - 1];
const $ = id => document.getElementById(id);
const look = () => { const value = (%s); if (value) { observer.disconnect(); done(value); } };
const observer = new MutationObserver(look);
observer.observe(
  document, {subtree: true, childList: true, attributes: true, characterData: true});
look();"""


class Firefox:
    """A headless firefox. Messages are [type, number, what, ...] as JSON, their length and a colon
    before it (firefox-source-docs, Marionette, Protocol)."""

    def __init__(self, folder):
        (folder / "user.js").write_text('user_pref("marionette.port", 0);\n', encoding="ascii")
        self.process = subprocess.Popen(
            [FIREFOX, "--marionette", "--headless", "--profile", folder],
            env={**os.environ, "HOME": str(folder)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = (PORT.search(line) for line in self.process.stdout)
        port = next(filter(None, said))[1]
        self._socket = socket.create_connection(("127.0.0.1", int(port)), timeout=30)
        self._file = self._socket.makefile("rb")
        self._number = 0
        self._read()                # its greeting
        self.call("WebDriver:NewSession")

    def call(self, command, **parameters):
        """The result of a command."""
        self._number += 1
        message = json.dumps([0, self._number, command, parameters]).encode()
        self._socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self._read()
        assert error is None, (command, error)
        return result

    def _read(self):
        length = b""
        while not length.endswith(b":"):
            length += self._file.read(1)
        return json.loads(self._file.read(int(length[:-1])))

    def until(self, expression):
        """The value of an expression in the page as soon as that counts as true."""
        return self.call("WebDriver:ExecuteAsyncScript", script=UNTIL % expression,
                         args=[])["value"]

    def type(self, selector, text):
        """Type into a field, whatever stands there goes."""
        found = self.call("WebDriver:FindElement", using="css selector", value=selector)["value"]
        [element] = found.values()
        self.call("WebDriver:ElementClear", id=element)
        self.call("WebDriver:ElementSendKeys", id=element, text=text)

    def close(self):
        """End it."""
        self.call("Marionette:Quit", flags=["eForceQuit"])
        self.process.wait(20)
        self.process.stdout.close()
        self._file.close()
        self._socket.close()


@pytest.fixture
def firefox(tmp_path):
    """A firefox with a profile of its own."""
    if FIREFOX is None:
        (pytest.fail if os.environ.get("OQC_CI") else pytest.skip)("firefox-esr is not installed")
    (tmp_path / "firefox").mkdir()
    running = Firefox(tmp_path / "firefox")
    yield running
    running.close()


def test_a_physicist_with_firefox_types_a_job_and_sees_what_comes_of_it(serve, firefox):
    server = serve()
    firefox.call("WebDriver:Navigate", url=f"http://127.0.0.1:{server.port}/")
    firefox.type("#key", KEY + ENTER)
    firefox.until("$('health').textContent === '✓ All is well'")
    firefox.type("#pulses", "X(90), X(90)" + ENTER)
    firefox.until("$('h-result').textContent === 'Job 1' && $('story').textContent")
    firefox.until("$('story').textContent.includes('Success') && !$('counts').hidden")
    card = firefox.until("$('members').textContent")
    assert str(server.request("GET", "/jobs/1/details/").json["seed"]) in card
    assert server.get({"id": 1})["job"] == "X(90), X(90)"
    firefox.type("#pulses", "X({a})")
    firefox.type("#step", "90" + ENTER)
    firefox.until("$('progress').textContent === '3 of 3 ended, 0 failed'")
    firefox.until("document.activeElement.id === 'h-plot'")
    assert firefox.until("$('points').rows[2].cells[2].textContent") == "1"
