"""The page in a real browser: Debian's chromium, spoken to over a pipe in its DevTools protocol."""
import base64
import fcntl
import hashlib
import itertools
import json
import os
import queue
import re
import select
import shutil
import subprocess
import threading

import pytest
from conftest import KEY, Server

from oqc import bloch, jobs, qubit

pytestmark = pytest.mark.slow       # ten seconds, most of them the browser's
CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio",
         "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions",
         "--remote-debugging-pipe")
# A promise of the first value of %s that counts as true; it looks at each change of the page.
UNTIL = """new Promise((done, fail) => {
  const look = () => { const value = (%s); if (value) { observer.disconnect(); done(value); } };
  const observer = new MutationObserver(look);
  observer.observe(
    document, {subtree: true, childList: true, attributes: true, characterData: true});
  const late = () => new Error("not within 10 s; the page says: " + document.body.innerText);
  setTimeout(() => fail(late()), 10000);
  look();
})"""
KEY_CODES = {"Enter": 13, "Tab": 9, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
             "ArrowDown": 40, "a": 65}

HOSTILE = "<img src=x onerror=window.caught=1>"
DRAWN = "[...$('sphere').querySelectorAll('path')].map(path => path.getAttribute('d'))"


class Browser:
    """A headless chromium. Messages are JSON with a NUL behind it, on its descriptors 3 and 4."""

    def __init__(self, folder):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash",
             CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=ends, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self._number = 0
        self._buffer = b""
        self.events = []

    def call(self, method, session=None, **parameters):
        """The result of a command; what happens meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def wait(self, session, method, seen=0):
        """Return when an event of a session has come that is not among the first `seen`."""
        while not any((event["method"], event.get("sessionId")) == (method, session)
                      for event in self.events[seen:]):
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
        """End it."""
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self._in)
        os.close(self._out)


class Tab:
    """A page in a browser context of its own."""

    def __init__(self, browser, url):
        self.browser = browser
        self.expected = []          # what the browser may complain about; None: anything
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call(
            "Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = browser.call(
            "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.look(1280, "light")
        self.go(url)

    def look(self, width, theme):
        """Be so wide, and light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, url):
        """Load a page."""
        self.url = url
        seen = len(self.browser.events)
        self.call("Page.navigate", url=url)
        self.browser.wait(self.session, "Page.loadEventFired", seen)

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def ask(self, expression):
        """The value of an expression in the page, or what its promise gives."""
        found = self.call("Runtime.evaluate", expression=expression,
                          awaitPromise=True, returnByValue=True)
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
        text = {"text": "\r"} if key == "Enter" else {}
        event = {"key": key, "windowsVirtualKeyCode": KEY_CODES[key], **more}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def open(self, key=KEY):
        """Type the key."""
        self.until("document.activeElement.id === 'key'")
        self.type(key)
        self.press("Enter")
        self.until("document.querySelector('#runtimes tr')")

    def complaints(self):
        """What the browser complained about: errors, exceptions, what the page's policy forbade."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event)
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event)
        return found

    def close(self):
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One chromium for all tests here."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("OQC_CI") else pytest.skip)("chromium is not installed")
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server whose verbatim runtime fails, and puts HTML into its result and its error."""
    folder = tmp_path_factory.mktemp("lab")
    program = folder / "hostile"
    program.write_text(
        f"#!/bin/sh\necho '{HOSTILE}'\necho '{HOSTILE}' >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    running = Server(folder, "--runtime", f"qpu={program}", "--drain", "1")
    yield running
    assert running.stop() == 0


@pytest.fixture
def visit(browser):
    """visit(server): a tab with the page of a server, and the key typed.

    In the end the browser must not have complained."""
    tabs = []

    def go(server, key=True):
        tabs.append(Tab(browser, f"http://127.0.0.1:{server.port}/"))
        if key:
            tabs[-1].open()
        return tabs[-1]

    yield go
    for tab in tabs:
        assert tab.expected is None or tab.complaints() == tab.expected
        tab.close()


def luminance(color):
    """The relative luminance of a CSS color such as rgb(1, 2, 3) (WCAG 2.1)."""
    red, green, blue = (float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3])
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4
                        for part in (red, green, blue))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# As it is served

def policy_hash(page, name):
    """How a policy names the text of the page's one element of this name (CSP level 3, 2.3.1)."""
    text = re.findall(f"(?s)<{name}>(.*?)</{name}>", page)[0]
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def test_to_a_browser_the_sheet_is_a_page_that_may_do_only_what_it_needs(server):
    accepts = {"Accept": "text/html,application/xml;q=0.9,*/*;q=0.8"}
    answer = server.request("GET", "/", key=None, headers=accepts)
    page = answer.body.decode()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(answer.body) < 60_000
    parts = answer.headers["Content-Security-Policy"].split(";")
    assert dict(part.strip().split(" ", 1) for part in parts) == {
        "default-src": "'none'",
        "script-src": policy_hash(page, "script"),
        "style-src": policy_hash(page, "style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Set-Cookie" not in answer.headers
    assert page.count("<script") == page.count("<style") == 1
    assert re.findall(r"""(?i)\s(?:style|src|on\w+)=["'\w]""", page) == []
    assert re.findall(r"""(?i)\shref=["']?([^"'>]*)""", page) == ["help/"], "the manual alone"
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write", page) == []
    assert re.findall(r"\beval\b|DOMParser|localStorage", page) == []


def test_to_everybody_else_it_stays_the_sheet(server):
    for accept in ("*/*", "text/plain, text/html", ""):
        answer = server.request("GET", "/", key=None, headers={"Accept": accept})
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert b"curl" in answer.body


# Waiting for a change

def changed(server, since):
    """The count of changes, as soon as it is not `since`."""
    found = server.request("GET", f"/status/?wait=30&since={since}").json["change"]
    assert found != since, "nothing has changed in 30 s"
    return found


def test_a_status_that_waits_is_answered_by_whatever_happens_next(serve):
    server = serve()
    answers = queue.Queue()
    thread = threading.Thread(
        target=lambda: answers.put(server.request("GET", "/status/?wait=300", timeout=20).status))
    thread.start()
    while thread.is_alive():
        server.add()
        thread.join(0.1)            # it may begin to wait only after the first of them
    assert answers.get_nowait() == 200


def test_every_kind_of_change_is_one(serve):
    server = serve()
    since = server.request("GET", "/status/").json["change"]
    pause = ("POST", "/runtimes/emulator/pause/", None)
    resume = ("POST", "/runtimes/emulator/resume/", None)
    add = ("POST", "/jobs/add/", {"job": "X(1)", "mode": "verbatim"})
    cancel = ("DELETE", "/jobs/1/", None)
    for change in (pause, resume, pause, add, cancel):
        assert server.request("GET", f"/status/?wait=0&since={since}").json["change"] == since
        assert server.request(*change).status in (200, 201)
        since = changed(server, since)
    long_ago = server.request("GET", "/status/?wait=30&since=0")        # is answered at once
    assert long_ago.json["change"] >= since
    for wrong in ("wait=301", "wait=x", "since=-1", "sinc=1"):
        assert server.request("GET", f"/status/?{wrong}").status == 400


# In the browser

def test_a_physicist_with_a_keyboard_alone_types_a_job_and_sees_what_comes_of_it(lab, visit):
    tab = visit(lab)
    assert tab.ask("document.activeElement.id") == "pulses"
    tab.press("a", modifiers=2, commands=["selectAll"])
    tab.type("X(90), Y(45); Z(3)")
    wrong = {"job": "X(90), Y(45); Z(3)", "mode": "echo"}
    problem = lab.request("POST", "/jobs/add/", wrong).detail
    assert tab.text("#verdict").lower() == "✗ " + problem.replace("job: ", "").lower()
    assert tab.text("#place mark") == ";"
    assert tab.ask("$('pulses').getAttribute('aria-invalid')") == "true"
    tab.press("Enter")                          # is not sent, and the place is selected
    assert tab.ask("[$('pulses').selectionStart, $('pulses').selectionEnd]") == [12, 13]
    tab.type(",")
    assert tab.text("#verdict") == "✓ 3 pulses" and tab.ask("$('place').hidden")
    tab.press("Tab")                            # mode
    tab.press("Tab")                            # shots
    tab.press("a", modifiers=2, commands=["selectAll"])
    tab.type("250")
    tab.press("Enter")
    tab.until("$('story').textContent.includes('Success') && !$('counts').hidden")
    counts = tab.ask("[...$('counts').tBodies[0].rows]"
                     ".map(row => [...row.cells].map(cell => cell.textContent))")
    number = int(tab.text("#h-result").split()[1])
    result = lab.result(number).json
    expected = [[name, str(count)] for name, count in result["counts"].items()]
    assert [row[:2] for row in counts] == expected
    assert sum(result["counts"].values()) == 250
    assert tab.text("#counts caption") == "Counts of 250 shots"
    widths = tab.ask("[...document.querySelectorAll('.bar rect')]"
                     ".map(bar => bar.getAttribute('width'))")
    assert widths == [f"{100 * count / 250:g}%" for count in result["counts"].values()]
    assert f"Job {number}." in tab.text("#what")
    tab.ask("HTMLAnchorElement.prototype.click = function () {"
            " window.saved = [this.download, this.protocol] }")
    tab.ask("$('save').click()")
    tab.until("$('said').textContent.includes('is saved')")
    assert tab.ask("window.saved") == [f"job-{number}.svg", "blob:"]


def coordinates(path):
    """The numbers in an attribute d."""
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_the_sphere_turns_and_its_path_is_that_of_the_server(lab, visit):
    job = "X(90), Z(100), Y(405), Z(7), X(359)"
    tab = visit(lab)
    tab.ask(f"path({json.dumps(job)}, 'a job')")
    numbers = tab.ask("[...$('numbers').rows]"
                      ".flatMap(row => [2, 3, 4].map(at => Number(row.cells[at].textContent)))")
    expected = [value for vector in qubit.path(job) for value in vector]
    assert numbers == pytest.approx(expected, abs=1e-4)
    first = tab.ask(DRAWN)
    served = re.findall(r' d="([^"]*)"', bloch.picture("", job))
    assert len(first) == len(served) == 5
    for here, there in zip(first, served):
        assert coordinates(here) == pytest.approx(coordinates(there), abs=0.11)
    tab.ask("$('sphere').focus()")
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
        before = tab.ask(DRAWN)
        tab.press(key)
        assert tab.ask(DRAWN) != before
    assert tab.ask(DRAWN) == first              # all four, and it is where it was
    tab.press("ArrowLeft")
    tab.press("Home")
    assert tab.ask(DRAWN) == first
    x, y = tab.ask("(box => [box.x + box.width / 2, box.y + box.height / 2])"
                   "($('sphere').getBoundingClientRect())")
    for kind, off in (("mousePressed", 0), ("mouseMoved", 20), ("mouseReleased", 20)):
        tab.call("Input.dispatchMouseEvent", type=kind, x=x + off, y=y + off,
                 button="left", buttons=1, clickCount=1)
    turned = tab.ask(DRAWN)
    assert turned != first
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert tab.ask(DRAWN) == turned             # the button is up
    for kind, off in (("touchStart", 0), ("touchMove", 30), ("touchEnd", None)):
        at = [] if off is None else [{"x": x + off, "y": y + off}]
        tab.call("Input.dispatchTouchEvent", type=kind, touchPoints=at)
    assert tab.ask(DRAWN) != turned


def test_the_page_finds_the_mistakes_that_the_server_finds(lab, visit):
    tab = visit(lab, key=False)
    good = ["X(90)", "X(0), Y(999), Z(007)", "X(1), " * 1000 + "Z(1)"]
    bad = ["", " ", "x(1)", "X", "X(", "X()", "X(1", "X(1234)", "X(-1)", "X(1.5)", "X(1),Y(2)",
           "X(1), ", "X(1) , Y(2)", "X(1), Y", "X(1)\t", "X(٣)", "X(1)😀", "😀", 'X"', "X(1), \\"]
    assert tab.ask(f"{json.dumps(good)}.map(check)") == [None] * len(good)
    found = tab.ask(f"{json.dumps(bad)}.map(job => check(job).message)")
    for job, text in zip(bad, found):
        here, _, here_found = text.partition(", found ")
        there, _, there_found = jobs.explain(job)[len("job: "):].partition(", found ")
        assert here.lower() == there.lower()
        assert here_found == there_found or json.loads(here_found) == json.loads(there_found)


def test_the_key_is_kept_in_the_tab_and_nowhere_else(lab, visit):
    tab = visit(lab, key=False)
    assert tab.ask("$('key').type") == "password"
    assert tab.ask("$('main').hidden && $('key') === document.activeElement")
    tab.type("wrong")
    tab.press("Enter")
    tab.until("$('said').textContent.includes('does not know this key')")
    assert tab.ask("[sessionStorage.length, $('main').hidden, $('key').value]") == [0, True, ""]
    tab.expected = tab.complaints()             # the browser's own line about the 401
    tab.open()
    assert tab.ask("sessionStorage.getItem('key')") == KEY and tab.ask("localStorage.length") == 0
    assert tab.call("Network.getAllCookies")["cookies"] == []
    tab.go(tab.url)
    tab.until("document.querySelector('#runtimes tr')")         # without typing it again
    tab.ask("$('forget').click()")
    assert tab.ask("[sessionStorage.length, $('main').hidden, key]") == [0, True, ""]


def test_an_operator_sees_what_happens_and_steps_in(serve, visit):
    server = serve()
    tab = visit(server)
    tab.until("$('health').textContent === '✓ All is well'")
    server.request("POST", "/runtimes/emulator/pause/", {"reason": "cable"})
    tab.until("$('health').textContent === '! Mind: emulator is paused (cable)'")
    tab.until("document.querySelector('#runtimes tr').textContent.includes('paused')")
    job = server.add("X(90)", "verbatim")
    tab.until("document.querySelector('#modes tr').textContent === 'verbatim100'")
    tab.until("document.querySelector('#jobs button').textContent === '1'")
    tab.ask("window.confirm = () => true")
    tab.ask("document.querySelector('#jobs .act button').click()")
    tab.until("$('said').textContent === 'Job 1 is cancelled.'")
    tab.until("document.querySelector('#jobs tr').textContent.includes('Runtime Error')")
    assert server.get(job)["return_code"] == 130
    assert tab.ask("document.querySelector('#jobs .act button').hidden")
    tab.ask("document.querySelector('#runtimes button').click()")
    tab.until("$('health').textContent === '✓ All is well'")
    assert server.runtime("emulator")["state"] == "idle"
    tab.ask("window.prompt = () => 'cold'; document.querySelector('#runtimes button').click()")
    tab.until("$('health').textContent === '! Mind: emulator is paused (cold)'")
    assert server.runtime("emulator")["reason"] == "cold"


# Which buttons are offered: those of the jobs by their ids, of the runtimes, and Run
OFFERED = """JSON.stringify([
  [...document.querySelectorAll("#jobs tr")].filter(row => !row.querySelector(".act button").hidden)
    .map(row => row.dataset.name),
  [...document.querySelectorAll("#runtimes button")].filter(one => !one.hidden).length,
  !$("run").hidden])"""


@pytest.mark.parametrize("name, offered", [
    ("rita", [[], 0, False]), ("bob", [["2"], 0, True]), ("ann", [["2", "1"], 3, True])])
def test_only_what_a_key_may_do_is_offered_and_a_refusal_is_shown(
        serve, visit, tmp_path, name, offered):
    (tmp_path / "lab-keys").write_text(
        "ann:operator:ann-key\nbob:user:bob-key\nrita:reader:rita-key\n", encoding="ascii")
    (tmp_path / "lab-keys").chmod(0o600)
    server = serve("--keys-file", "lab-keys")
    server.request("POST", "/runtimes/emulator/pause/", key="ann-key")
    for adds in ("ann-key", "bob-key"):
        server.request("POST", "/jobs/add/", {"job": "X(1)", "mode": "verbatim"}, key=adds)
    tab = visit(server, key=None)
    tab.open(f"{name}-key")
    tab.until("document.querySelectorAll('#jobs tr').length === 2")
    assert json.loads(tab.ask(OFFERED)) == offered
    if name == "rita":
        tab.expected = None
        tab.ask("$('new').requestSubmit()")
        tab.until("$('said').textContent === 'rita is a reader: only a user or an operator may "
                  "do this'")


def test_the_newest_jobs_are_filtered_and_older_ones_shown_on_demand(serve, visit):
    server = serve()
    server.request("POST", "/jobs/add/?wait=30", [
        {"job": f"X({number})", "mode": "echo", "return_code": int(number < 2)}
        for number in range(20)])
    server.wait(server.add("Y(1)", "simulation"))
    tab = visit(server)
    shown = ("[...document.querySelectorAll('#jobs th button')]"
             ".map(button => Number(button.textContent)).join()")
    tab.until(f"{shown} === '{','.join(map(str, range(21, 6, -1)))}'")
    tab.ask("$('older').click()")
    tab.until(f"{shown} === '{','.join(map(str, range(21, 0, -1)))}'")
    assert tab.ask("$('older').hidden")
    tab.ask("$('by-mode').value = 'simulation'; $('by-mode').dispatchEvent(new Event('change'))")
    tab.until(f"{shown} === '21'")
    tab.ask("$('by-mode').value = ''; $('by-status').value = 'Runtime Error'; "
            "$('by-status').dispatchEvent(new Event('change'))")
    tab.until(f"{shown} === '2,1'")
    tab.ask("document.querySelector('#jobs th button').click()")
    tab.until("$('story').textContent.includes('echo of return code 1')")


def test_it_waits_for_changes_and_rows_that_stay_keep_the_focus(lab, visit, browser):
    lab.wait(lab.add("X(1)", "echo"))
    tab = visit(lab)
    tab.until("document.querySelector('#jobs th button')")
    number = tab.ask("(button => (button.focus(), Number(button.textContent)))"
                     "(document.querySelector('#jobs th button'))")
    newer = lab.add("X(2)", "echo")["id"]
    tab.until(f"document.querySelector('#jobs th button')?.textContent === '{newer}'")
    assert tab.ask("Number(document.activeElement.textContent)") == number
    asked = [event["params"]["request"]["url"] for event in browser.events
             if event["method"] == "Network.requestWillBeSent"
             and event.get("sessionId") == tab.session]
    assert all(url.startswith(tab.url) for url in asked)
    first, *then = [url for url in asked if "/status/" in url]
    assert first.endswith("/status/") and then
    assert all(re.search(r"/status/\?wait=25&since=\d+$", url) for url in then)


def test_it_goes_on_by_itself_after_a_restart_of_the_server(serve, visit):
    server = serve()
    tab = visit(server)
    tab.until("$('health').textContent === '✓ All is well'")
    server.stop()
    tab.until("$('health').textContent.includes('does not answer')")
    tab.expected = None                         # the browser says that it was refused, some times
    again = serve("--port", server.port)
    tab.until("$('health').textContent === '✓ All is well'")
    job = again.add("X(9)", "echo")["id"]
    tab.until(f"document.querySelector('#jobs th button')?.textContent === '{job}'")


def test_what_a_runtime_says_stays_text(lab, visit):
    tab = visit(lab)
    job = lab.wait(lab.add("X(90)", "verbatim"))["id"]
    tab.until(f"document.querySelector('#jobs th button')?.textContent === '{job}'")
    tab.ask("document.querySelector('#jobs th button').click()")
    tab.until("!$('output').hidden")
    assert HOSTILE in tab.text("#story") and tab.text("#output pre") == HOSTILE + "\n"
    assert "as an ideal qubit would go (verbatim)" in tab.text("#what")
    assert tab.ask("document.images.length") == 0 and tab.ask("window.caught") is None


# What is wider than the window, or than the place that it has.
TOO_WIDE = """[...document.querySelectorAll('button, input, select')]
  .filter(one => one.offsetParent)
  .filter(one => one.getBoundingClientRect().right > innerWidth ||
    one.scrollWidth > one.offsetWidth + 1)
  .map(one => one.outerHTML)"""
# The color of a button of class %s, and the one behind it.
COLORS = """(() => {
  const one = document.createElement('button');
  one.className = %s;
  document.querySelector('section').append(one);
  const behind = one.className === 'main' ? one : one.parentNode;
  const found = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
  one.remove();
  return found;
})()"""


def test_it_fits_and_can_be_read_on_a_phone_and_a_desk_in_dark_and_light(lab, visit):
    lab.wait(lab.add("X(90), " * 99 + "X(90)", "echo"))
    tab = visit(lab)
    tab.press("Enter")
    tab.until("!$('counts').hidden")
    for width, theme in itertools.product((390, 1280), ("light", "dark")):
        tab.look(width, theme)
        assert tab.ask("document.documentElement.scrollWidth") <= width
        assert tab.ask(TOO_WIDE) == []
        papers = []
        for look in ("", "ok", "bad", "warn", "soft", "main"):
            ink, paper = tab.ask(COLORS % json.dumps(look))
            darker, brighter = sorted((luminance(ink), luminance(paper)))
            contrast = (brighter + 0.05) / (darker + 0.05)
            assert contrast >= 4.5, (theme, look, ink, paper)       # WCAG 2.1, 1.4.3
            papers.append(luminance(paper))
        assert (papers[0] < 0.1) is (theme == "dark")


def test_whoever_cannot_see_it_is_told_what_everything_is(lab, visit):
    tab = visit(lab)
    tab.press("Enter")
    tab.until("!$('counts').hidden")
    roles = {}
    for node in tab.call("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            names = roles.setdefault(node["role"]["value"], [])
            names.append(node.get("name", {}).get("value", ""))
    for role in ("button", "textbox", "spinbutton", "combobox", "table", "image", "region",
                 "heading"):
        assert roles.get(role) and all(roles[role]), (role, roles.get(role))
    assert {"Pause qpu", "Pause simulator", "Run"} <= set(roles["button"])
    assert len(set(roles["button"])) == len(roles["button"])    # no two that sound the same
    assert "Path on the Bloch sphere. Job" in roles["image"][0]
    assert "X(90) to (0, -1, 0)" in roles["image"][0]
    assert {"Jobs that have not ended", "What runs the jobs", "The newest first",
            "Counts of 1000 shots"} <= set(roles["table"])
    assert len(roles["status"]) == 3 and roles["alert"]


def test_the_picture_file_opens_in_a_browser(lab, visit, tmp_path):
    job = lab.add("X(90), Z(90)", "simulation")["id"]
    (tmp_path / "job.svg").write_bytes(lab.request("GET", f"/jobs/{job}/bloch.svg").body)
    tab = visit(lab, key=False)
    tab.go((tmp_path / "job.svg").as_uri())
    assert tab.ask("document.documentElement.tagName") == "svg"
    assert tab.ask("document.title") == f"Job {job} on the Bloch sphere"
    assert tab.ask("document.querySelectorAll('path').length") == 5
