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
import sys
import threading

import pytest
from conftest import KEY, Server

from oqc import bloch, jobs, manual, qubit

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

    def click(self, selector):
        """Click an element as a person would, who has to see it first."""
        name = json.dumps(selector)
        self.until(f"document.querySelector({name})?.checkVisibility()")
        self.ask(f"document.querySelector({name}).scrollIntoView({{block: 'center'}})")
        x, y = self.ask(f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
                        f"(document.querySelector({name}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                      buttons=1, clickCount=1)

    def click_twice(self, selector):
        """A double click, the second one as soon as what the first one did is over."""
        x, y = self.ask(f"""(box => [box.x + box.width / 2, box.y + box.height / 2])
                        (document.querySelector('{selector}').getBoundingClientRect())""")
        for count in (1, 2):
            seen = len(self.browser.events)
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                          buttons=1, clickCount=count)
            if count == 1:
                self.browser.wait(self.session, "Network.loadingFinished", seen)
                self.until(f"document.querySelector('{selector}').checkVisibility()")

    def fill(self, selector, text):
        """Replace what stands in a field."""
        self.ask("(field => (field.focus(), field.select()))"
                 f"(document.querySelector('{selector}'))")
        self.type(text)

    def choose(self, selector, value):
        """Choose an option as a person does: those who listen hear of it."""
        self.ask(f"""(field => {{
          field.value = {json.dumps(value)};
          field.dispatchEvent(new Event('change', {{bubbles: true}}));
        }})(document.querySelector('{selector}'))""")

    def answer(self, button, text=None):
        """Answer the question in the dialog, with a text if there is a field for it."""
        self.until("$('question').open")
        if text is not None:
            self.type(text)
        assert self.text("#question button") == button
        self.click("#question button")

    def asked(self, seen=0):
        """[(method, path)] of what the page has asked for, behind the first `seen` events."""
        requests = [event["params"]["request"] for event in self.browser.events[seen:]
                    if event["method"] == "Network.requestWillBeSent"
                    and event.get("sessionId") == self.session]
        return [(request["method"], request["url"][len(self.url.split("#")[0]) - 1:])
                for request in requests if not request["url"].startswith(("data:", "blob:"))]

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

    def go(server, key=KEY, at=""):
        tabs.append(Tab(browser, f"http://127.0.0.1:{server.port}/{at}"))
        if key:
            tabs[-1].open(key)
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
        "img-src": "data:",         # the icon of the tab
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Set-Cookie" not in answer.headers
    assert page.count("<script") == page.count("<style") == 1
    assert re.findall(r"""(?i)\s(?:style|src|on\w+)=["'\w]""", page) == []
    assert re.findall(r"""(?i)\shref=["']?([^"'>]*)""", page) == ["data:,"], "the icon alone"
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
    tab.press("Tab")                            # runtime
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
    assert len(first) == len(served) == 7       # the grid, the axes, the path, the arrow, its head
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
    tab = visit(lab, key=None)
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


def test_the_key_is_kept_in_the_tab_and_nowhere_else(lab, visit, browser):
    tab = visit(lab, key=None)
    assert tab.ask("$('key').type") == "password"
    assert tab.ask("$('main').hidden && $('key') === document.activeElement")
    tab.type("wrong")
    seen = len(browser.events)
    tab.press("Enter")
    browser.wait(tab.session, "Page.loadEventFired", seen)      # it begins anew
    tab.until("$('main').hidden && $('said').textContent.includes('does not know this key')")
    assert tab.ask("[sessionStorage.length, $('main').hidden, $('key').value]") == [0, True, ""]
    tab.expected = tab.complaints()             # the browser's own line about the 401
    tab.open()
    assert tab.ask("sessionStorage.getItem('key')") == KEY and tab.ask("localStorage.length") == 0
    assert tab.call("Network.getAllCookies")["cookies"] == []
    tab.go(tab.url)
    tab.until("document.querySelector('#runtimes tr')")         # without typing it again
    lab.wait(lab.add("X(77)", "simulation", tag="secret-tag"))
    tab.until("document.querySelector('#jobs .tag')?.textContent === 'secret-tag'")
    tab.click("#jobs th button")
    tab.click("#its-sweep")
    tab.until("!$('plot').hidden && location.hash.includes('secret-tag')")
    seen = len(browser.events)
    tab.click("#forget")
    browser.wait(tab.session, "Page.loadEventFired", seen)      # all that was shown is gone
    tab.until("$('said').textContent === 'The key is forgotten.'")
    assert tab.ask("[sessionStorage.length, $('main').hidden, key]") == [0, True, ""]
    assert tab.ask("location.hash") == ""
    seen = len(browser.events)
    tab.ask("new Promise(done => { addEventListener('popstate', done); history.back() })")
    assert tab.asked(seen) == [] and tab.text("#said") == "The key is forgotten."
    for gone in ("secret-tag", "X(77)"):
        assert gone not in tab.ask("document.body.textContent.split('use strict')[0]")


def test_an_operator_sees_what_happens_and_steps_in(serve, visit):
    server = serve()
    tab = visit(server)
    tab.until("$('health').textContent === '✓ All is well'")
    server.request("POST", "/runtimes/emulator/pause/", {"reason": "cable"})
    tab.until("$('health').textContent === '! Mind: emulator is paused (cable)'")
    tab.until("document.querySelector('#runtimes tr').textContent.includes('cable, by documented')")
    job = server.add("X(90)", "verbatim")
    tab.until("document.querySelector('#modes tr').textContent === 'verbatim100'")
    tab.until("document.querySelector('#jobs button').textContent === '1'")
    tab.click("#jobs .act button")
    tab.answer("Cancel the job")
    tab.until("$('said').textContent === 'Job 1 is cancelled.'")
    tab.until("document.querySelector('#jobs tr').textContent.includes('Runtime Error')")
    assert server.get(job)["return_code"] == 130
    assert tab.ask("document.querySelector('#jobs .act button').hidden")
    tab.click("#runtimes .act button")
    tab.until("$('health').textContent === '✓ All is well'")
    assert server.runtime("emulator")["state"] == "idle"
    tab.click("#runtimes .act button")
    tab.answer("Pause", "cold")
    tab.until("$('health').textContent === '! Mind: emulator is paused (cold)'")
    assert server.runtime("emulator")["reason"] == "cold"
    tab.until("document.querySelector('#runtimes .act button').textContent === 'Resume'")
    tab.ask("document.querySelectorAll('#runtimes .act button')[1].click()")
    tab.until("$('question').open")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", windowsVirtualKeyCode=27)
    tab.until("!$('question').open")
    assert server.runtime("simulator")["state"] == "idle"       # no answer is none


SHOWN = """[...document.querySelectorAll('#jobs th button')]
  .map(button => Number(button.textContent)).join()"""


def test_the_newest_jobs_are_filtered_and_older_ones_shown_on_demand(serve, visit):
    server = serve()
    server.request("POST", "/jobs/add/?wait=30", [
        {"job": f"X({number})", "mode": "echo", "return_code": int(number < 2)}
        for number in range(20)])
    server.wait(server.add("Y(1)", "simulation", tag="rabi-7"))
    tab = visit(server)
    tab.until(f"{SHOWN} === '{','.join(map(str, range(21, 6, -1)))}'")
    tab.click("#older")
    tab.until(f"{SHOWN} === '{','.join(map(str, range(21, 0, -1)))}'")
    assert tab.ask("$('older').hidden")
    tab.choose("#by-mode", "simulation")
    tab.until(f"{SHOWN} === '21'")
    tab.choose("#by-mode", "")
    tab.choose("#by-state", "status=Runtime Error")
    tab.until(f"{SHOWN} === '2,1'")
    assert tab.ask("location.hash") == "#state=status%3DRuntime+Error"
    tab.click("#jobs th button")
    tab.until("$('story').textContent.includes('echo of return code 1')")
    tab.ask("history.back()")                   # the job is closed, the filter stays
    tab.until("$('result').hidden")
    tab.ask("history.back()")
    tab.until(f"$('by-state').value === '' && {SHOWN}.startsWith('21,')")
    for field, value, found in (
            ("tag", "rabi-7", "21"), ("tag", "no-such", ""), ("since", "1h", "21"),
            ("runtime", "simulator", "21"), ("by", "me", "21")):
        tab.choose(f"#by-{field}", value)
        tab.until(f"{SHOWN}.startsWith('{found}') && {SHOWN}.length >= {len(found)}")
        if not found:
            tab.until("!$('none').hidden")
        tab.choose(f"#by-{field}", "")
    tab.fill("#number", "3")
    tab.press("Enter")
    tab.until("$('h-result').textContent === 'Job 3'")
    assert tab.ask("document.activeElement.id") == "h-result"
    seen = len(tab.browser.events)
    tab.call("Page.reload")
    tab.browser.wait(tab.session, "Page.loadEventFired", seen)
    tab.until("$('h-result').textContent === 'Job 3' && !$('result').hidden")
    tab.fill("#number", "99")
    tab.press("Enter")
    tab.until("$('said').textContent === 'Job 99: no such job'")


def test_long_jobs_do_not_hide_older_ones_nor_cost_what_they_weigh(serve, visit):
    server = serve("--max-waiting", "1000")
    long = "X(90), " * 30_000 + "X(90)"
    for _ in range(4):
        assert server.request("POST", "/jobs/add/?wait=60", [
            {"job": "X(1)", "mode": "echo"}] + 9 * [{"job": long, "mode": "echo"}]).status == 201
    tab = visit(server)
    tab.until(f"{SHOWN}.split(',').length === 15")
    size = tab.ask("ask('jobs/results/?order=desc&limit=16&cut=200').then(text => text.length)")
    assert size < 50_000
    tab.click("#older")
    tab.until(f"{SHOWN}.split(',').length === 30")
    tab.click("#older")
    tab.until(f"{SHOWN} === '{','.join(map(str, range(40, 0, -1)))}'")


def test_it_waits_for_changes_and_rows_that_stay_keep_the_focus(lab, visit, browser):
    lab.wait(lab.add("X(1)", "echo"))
    tab = visit(lab)
    tab.until("document.querySelector('#jobs th button')")
    number = tab.ask("(button => (button.focus(), Number(button.textContent)))"
                     "(document.querySelector('#jobs th button'))")
    newer = lab.add("X(2)", "echo")["id"]
    tab.until(f"document.querySelector('#jobs th button')?.textContent === '{newer}'")
    assert tab.ask("Number(document.activeElement.textContent)") == number
    assert len(browser.events) > 0
    first, *then = [path for _, path in tab.asked() if path.startswith("/status/")]
    assert first == "/status/" and then
    waits = [path for path in then if path != "/status/"]
    assert waits and all(re.search(r"^/status/\?wait=25&since=\d+$", path) for path in waits)


def test_it_goes_on_by_itself_after_a_restart_of_the_server(serve, visit):
    server = serve()
    tab = visit(server)
    tab.until("$('health').textContent === '✓ All is well'")
    server.stop()
    tab.until("$('health').textContent.includes('does not answer')")
    assert tab.ask("document.title").startswith("✗ The server does not answer")
    assert "d02018" in tab.ask("$('icon').href")
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
    tab.until("!$('output').hidden && !$('log').hidden")
    assert HOSTILE in tab.text("#story") and tab.text("#output pre") == HOSTILE + "\n"
    assert HOSTILE in tab.text("#log pre") and HOSTILE in tab.text("#runtimes")
    assert "as an ideal qubit would go (verbatim)" in tab.text("#what")
    assert tab.ask("document.images.length") == 0 and tab.ask("window.caught") is None


# A job is added once

def listed(server):
    return server.request("GET", "/jobs/list/").json


def test_a_double_click_and_a_held_enter_add_one_job(serve, visit):
    server = serve()
    tab = visit(server)
    tab.fill("#pulses", "X(12)")
    assert tab.ask("""(() => {
      for (let click = 0; click < 5; click++) $('run').click();
      return $('run').textContent;
    })()""") == "Sending…"
    tab.until("$('said').textContent === 'Job 1 is added.'")
    assert tab.text("#run") == "Run" and len(listed(server)) == 1
    tab.ask("$('pulses').focus()")
    tab.press("Enter")
    tab.until("$('said').textContent === 'Job 2 is added.'")
    tab.ask("$('pulses').focus()")
    for _ in range(5):                          # a key that is held repeats
        tab.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13,
                 text="\r", autoRepeat=True)
    tab.ask("refresh()")
    posts = [path for method, path in tab.asked() if method == "POST"]
    assert len(listed(server)) == len(posts) == 2


def test_a_double_click_that_is_slower_than_the_server_means_once(serve, visit):
    server = serve()
    tab = visit(server)
    tab.ask("$('said').style.position = 'fixed'")       # or it moves the button away
    tab.click_twice("#run")
    tab.until("$('h-result').textContent === 'Job 1' && !$('result').hidden")
    tab.ask("scrollTo(0, 0)")
    tab.click_twice("#again")
    tab.until("$('h-result').textContent === 'Job 2' && !$('result').hidden")
    tab.ask("($('again').click(), $('again').click())")
    tab.until("$('h-result').textContent === 'Job 3' && !$('result').hidden")
    tab.ask("refresh()")
    posts = [path for method, path in tab.asked() if method == "POST"]
    assert posts == ["/jobs/add/", "/jobs/1/rerun/", "/jobs/2/rerun/"]


def test_an_error_of_a_proxy_leaves_open_whether_the_job_was_added(serve, visit):
    """A proxy that waits too long for an answer says 504, whatever the server does then."""
    server = serve()
    tab = visit(server)
    lost = {"urlPattern": "*/jobs/add/", "requestStage": "Response"}
    tab.call("Fetch.enable", patterns=[lost])
    seen = len(tab.browser.events)
    tab.click("#run")
    tab.browser.wait(tab.session, "Fetch.requestPaused", seen)
    paused = [event for event in tab.browser.events[seen:]
              if event["method"] == "Fetch.requestPaused"]
    tab.call("Fetch.fulfillRequest", requestId=paused[0]["params"]["requestId"],
             responseCode=504, body=base64.b64encode(b"<h1>Gateway Time-out</h1>").decode())
    tab.call("Fetch.disable")
    tab.until("$('said').textContent.startsWith('No answer came (<h1>Gateway')")
    tab.fill("#shots", "999")                   # another job is not that one again
    assert tab.text("#run") == "Run"
    tab.fill("#shots", "1000")
    assert tab.text("#run") == "Send again"
    tab.click("#run")
    tab.until("$('said').textContent === 'Job 1 had been added.'")
    assert len(listed(server)) == 1
    tab.expected = None                         # the browser's own line about the 504


def test_after_a_lost_answer_the_same_job_is_not_added_twice(serve, visit):
    server = serve()
    tab = visit(server)
    tab.until("document.querySelector('#runtimes tr')")
    lost = {"urlPattern": "*/jobs/add/", "requestStage": "Response"}
    tab.call("Fetch.enable", patterns=[lost])
    seen = len(tab.browser.events)
    tab.click("#run")
    tab.browser.wait(tab.session, "Fetch.requestPaused", seen)
    paused = [event for event in tab.browser.events[seen:]
              if event["method"] == "Fetch.requestPaused"]
    tab.call("Fetch.failRequest", requestId=paused[0]["params"]["requestId"],
             errorReason="ConnectionReset")
    tab.call("Fetch.disable")
    tab.until("$('said').textContent.startsWith('No answer came')")
    assert tab.text("#run") == "Send again"
    tab.click("#run")
    tab.until("$('said').textContent === 'Job 1 had been added.'")
    assert tab.text("#run") == "Run" and len(listed(server)) == 1
    tab.expected = None                         # the browser's own line about the connection


def test_what_the_server_refuses_is_said_where_one_is(serve, visit):
    server = serve("--max-waiting", "1")
    server.request("POST", "/runtimes/simulator/pause/")
    server.add("X(1)", "simulation")
    tab = visit(server)
    tab.look(390, "light")
    tab.click("#run")
    tab.until("$('said').textContent.startsWith('Not added: ')")
    top, bottom = tab.ask("(box => [box.top, box.bottom])($('said').getBoundingClientRect())")
    assert 0 <= top < bottom <= 900
    tab.ask("scrollTo(0, 1e6)")                 # it stays in view, however far one is down
    tab.until("$('said').getBoundingClientRect().top >= 0")
    tab.expected = tab.complaints()             # the browser's own line about the 503


# Tabs

def test_a_hidden_tab_gives_its_connection_back_and_asks_now_and_then(serve, visit, browser):
    server = serve()
    tab = visit(server)
    while not any("wait=" in path for _, path in tab.asked()):
        browser.wait(tab.session, "Network.requestWillBeSent", len(browser.events))
    hide = ("Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))")
    seen = len(browser.events)
    tab.ask(hide % "true")
    browser.wait(tab.session, "Network.loadingFailed", seen)    # the wait is given up
    server.add("X(3)", "echo")
    assert not any("wait=" in path for _, path in tab.asked(seen))
    seen = len(browser.events)
    newest = server.add("X(4)", "echo")["id"]
    tab.ask(hide % "false")
    tab.until(f"document.querySelector('#jobs th button')?.textContent === '{newest}'")
    while not any("wait=" in path for _, path in tab.asked(seen)):
        browser.wait(tab.session, "Network.requestWillBeSent", len(browser.events))


def test_eight_windows_of_one_browser_do_not_block_each_other(serve, visit, browser):
    """A browser has six connections to a server: with a wait in each of them a job was shown after
    23 seconds."""
    server = serve()
    tab = visit(server)
    sessions = []
    for _ in range(7):
        target = browser.call("Target.createTarget", url="about:blank", newWindow=True,
                              browserContextId=tab.context)["targetId"]
        session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.call("Page.enable", session)
        browser.call("Network.enable", session)
        key = f"sessionStorage.setItem('key', {json.dumps(KEY)})"
        browser.call("Page.addScriptToEvaluateOnNewDocument", session, source=key)
        seen = len(browser.events)
        browser.call("Page.navigate", session, url=tab.url)
        browser.wait(session, "Page.loadEventFired", seen)
        sessions.append(session)
    for session in sessions:                    # until each of them waits, or has found no room
        tab.session = session
        while sum(path.startswith("/status/") for _, path in tab.asked()) < 2:
            browser.wait(tab.session, "Network.requestWillBeSent", len(browser.events))
    tab.until("document.querySelector('#runtimes tr')")
    tab.ask("$('run').click()")
    tab.until("$('story').textContent.includes('Success') && !$('counts').hidden")


def test_a_shown_job_costs_no_second_wait(serve, visit, browser):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/", {"reason": "cable"})
    first, second = [server.add("X(90)", "verbatim") for _ in range(2)]
    tab = visit(server, at=f"#job={second['id']}")
    tab.until("$('waits').textContent.includes("
              "'emulator is paused: cable. 1 would start before it')")
    server.request("DELETE", f"/jobs/{first['id']}/")
    tab.until("$('waits').textContent.includes('0 would start before it')")
    server.request("POST", "/runtimes/emulator/resume/")
    tab.until("$('story').textContent.includes('Success') && !$('counts').hidden")
    assert not any("wait=" in path and not path.startswith("/status/") for _, path in tab.asked())
    assert len(browser.events) > 0


# Foreign text

def test_nothing_hides_in_foreign_text(serve, visit, tmp_path):
    program = tmp_path / "odd"
    odd = "a\\033[31mb\\342\\200\\256c\\342\\200\\213d\\001e"     # ESC, RLO, a space of no width, 1
    program.write_text(
        f"#!/bin/sh\nprintf '{odd}'\nprintf '{odd}\\n' >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    server = serve("--runtime", f"a-name-of-20-letters={program}")
    job = server.wait(server.add("X(1)", "verbatim"))
    tab = visit(server, at=f"#job={job['id']}")
    shown = "a\\x1b[31mb\\u202ec\\u200bd\\x01e"
    tab.until("!$('output').hidden && !$('log').hidden")
    for place in ("#output pre", "#log pre", "#story", "#attempts tbody", "#jobs"):
        assert shown in tab.text(place), place
    tab.look(320, "light")
    assert tab.ask("document.documentElement.scrollWidth") <= 320
    assert tab.ask("[...document.querySelectorAll('#jobs small')]"
                   ".filter(one => one.scrollWidth > one.clientWidth).length") == 0


def test_a_long_output_is_shown_in_part_and_saved_whole(serve, visit, tmp_path):
    program = tmp_path / "long"
    program.write_text("#!/bin/sh\nhead -c 500000 /dev/zero | tr '\\0' x\n", encoding="utf-8")
    program.chmod(0o755)
    server = serve("--runtime", f"qpu={program}")
    server.wait(server.add("X(1)", "verbatim"))
    tab = visit(server, at="#job=1")
    tab.until("!$('output').hidden")
    tab.ask("$('output').open = true")
    assert re.match(r"The first 20,000 of 500,00[01] characters$", tab.text("#output p"))
    assert tab.ask("$('output').querySelector('pre').textContent.length") == 20_000
    tab.ask("HTMLAnchorElement.prototype.click = function () { window.saved = this.href }")
    tab.click("#output button")
    tab.until("$('said').textContent === 'job-1.result.txt is saved.'")
    assert tab.ask("$('said').textContent") and tab.ask("window.saved").startswith("blob:")


@pytest.mark.parametrize("counts, drawn", [
    ('{"0": 3, "1": 7}', True), ('{"0": -3, "1": 7}', False), ('{"0": "3", "1": 7}', False),
    ('{"0": 0.5}', False), ('{"0": 3, "<b>": {"x": 1}}', False)])
def test_counts_that_are_none_are_text(serve, visit, tmp_path, counts, drawn):
    program = tmp_path / "counts"
    program.write_text(f"#!/bin/sh\necho '{{\"counts\": {counts}}}'\n", encoding="utf-8")
    program.chmod(0o755)
    server = serve("--runtime", f"qpu={program}")
    server.wait(server.add("X(1)", "verbatim"))
    tab = visit(server, at="#job=1")
    tab.until("!$('counts').hidden")
    assert tab.ask("document.querySelectorAll('#counts rect').length") == (2 if drawn else 0)
    texts = tab.ask("[...$('counts').tBodies[0].rows].map(row => row.cells[1].textContent)")
    assert [json.loads(text) for text in texts] == list(json.loads(counts).values())
    assert tab.ask("document.querySelectorAll('#counts b').length") == 0


def test_a_seed_keeps_all_its_digits(serve, visit):
    """A number of JavaScript has 53 bits, a seed that the server chooses 63."""
    server = serve()
    seed = 2 ** 63 - 1
    server.wait(server.add("X(90)", "simulation", seed=seed))
    tab = visit(server, at="#job=1")
    tab.until("!$('result').hidden")
    assert f"1000, {seed}" in tab.text("#members")
    tab.ask("""(() => {
      HTMLAnchorElement.prototype.click = function () {};
      URL.createObjectURL = blob => { blob.text().then(text => window.saved = text); return ''; };
    })()""")
    tab.click("#keep")
    tab.until("$('said').textContent === 'job-1.json is saved.'")
    saved = json.loads(tab.until("window.saved"))
    assert saved["details"] == server.request("GET", "/jobs/1/details/").json
    assert saved["record"] == server.request("GET", "/jobs/results/").json[0]
    assert saved["record"]["result"]["seed"] == seed


def test_long_results_do_not_cost_what_they_weigh(serve, visit, tmp_path):
    program = tmp_path / "waves"
    program.write_text(f"""#!{sys.executable}
import json
print(json.dumps({{"wave": "w" * 500_000, "counts": {{"0": 400, "1": 600}}}}))
""", encoding="utf-8")
    program.chmod(0o755)
    server = serve("--runtime", f"qpu={program}")
    server.wait(server.add("X(1)", "verbatim"))
    tab = visit(server, at="#job=1")
    size = tab.ask("ask('jobs/results/?order=desc&limit=16&cut=200').then(text => text.length)")
    assert size < 1000
    tab.until("!$('counts').hidden")
    assert tab.text("#counts caption") == "Counts of 1000 shots"


# Who I am, and what I may

KEYS = "ann:operator:op-key\nbob:user:bob-key\neve:user:eve-key\nrita:reader:rita-key\n"


@pytest.fixture(scope="module", name="shared")
def a_server_of_several_people(tmp_path_factory):
    """Three roles; a runtime is paused, and bob and eve wait for it with a job each."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "keys").write_text(KEYS, encoding="ascii")
    (folder / "keys").chmod(0o600)
    running = Server(folder, "--keys-file", folder / "keys", "--drain", "0")
    assert running.request("POST", "/runtimes/emulator/pause/", key="op-key").status == 200
    for key in ("bob-key", "eve-key"):
        body = {"job": "X(90)", "mode": "verbatim", "tag": "rabi-7"}
        assert running.request("POST", "/jobs/add/", body, key=key).status == 201
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize("key, who, offers, cancels", [
    ("op-key", "ann (operator)", ["adding", "pause"], ["1", "2"]),
    ("bob-key", "bob (user)", ["adding"], ["1"]),
    ("rita-key", "rita (reader)", [], [])])
def test_what_a_role_may_not_do_is_not_offered(shared, visit, key, who, offers, cancels):
    tab = visit(shared, key=key)
    tab.until(f"$('you').textContent === '{who}'")
    tab.until(f"{SHOWN} === '2,1'")
    seen = tab.ask("""[
      $('adding').checkVisibility() && 'adding',
      document.querySelector('#runtimes .act button').checkVisibility() && 'pause',
    ].filter(Boolean)""")
    assert seen == offers
    offered = tab.ask("[...document.querySelectorAll('#jobs tr')]"
                      ".filter(row => row.querySelector('.act button').checkVisibility())"
                      ".map(row => row.querySelector('th button').textContent).sort()")
    assert offered == cancels
    tab.ask("show(2)")
    tab.until("!$('result').hidden")
    assert tab.ask("$('cancel').checkVisibility()") is ("2" in cancels)
    assert tab.ask("$('again').checkVisibility()") is ("adding" in offers)
    tab.ask("plot('rabi-7')")
    tab.until("!$('plot').hidden")
    assert tab.ask("$('cancel-rest').checkVisibility()") is bool(cancels)
    if key == "bob-key":                        # what has not ended is eve's
        tab.ask("""tellSweep(plotted, [...plotted.records.values()].map(
          job => job.id === 1 ? {...job, end_time: 'now'} : job))""")
        assert not tab.ask("$('cancel-rest').checkVisibility()")


def test_a_refusal_is_said_all_the_same(shared, visit):
    tab = visit(shared, key="rita-key")
    tab.until("$('you').textContent === 'rita (reader)'")
    tab.ask("turn('simulator', false)")
    tab.until("$('said').textContent === 'rita is a reader: only an operator may do this'")
    tab.expected = tab.complaints()


# The job's card

def test_a_job_that_runs_shows_its_log_and_what_it_came_to(serve, visit, tmp_path):
    program = tmp_path / "drive"
    steps = tmp_path / "steps"
    os.mkfifo(steps)
    program.write_text(f"""#!{sys.executable}
import json, sys
question = json.loads(sys.stdin.readline())
print(json.dumps({{"ready": True, "device": {{"name": "cold one"}}}}), flush=True)
for line in open({str(steps)!r}):
    sys.stderr.write(line)
    sys.stderr.flush()
result = {{"counts": {{"0": 40, "1": 60}}}}
print(json.dumps({{"id": question["id"], "return_code": 0, "result": result}}))
""", encoding="utf-8")
    program.chmod(0o755)
    config = tmp_path / "lab.ini"
    config.write_text(f"[runtime qpu]\ncommand = {program}\nprotocol = lines\nmodes = verbatim\n",
                      encoding="utf-8")
    server = serve("--config", config)
    server.add("X(90)", "verbatim", seed=7, tag="rabi-7", note={"sample": "B4"})
    tab = visit(server, at="#job=1")
    tab.until("$('story').textContent.includes('running')")
    tab.ask("$('log').open = true")
    with open(steps, "w", encoding="utf-8") as say:
        for step in ("cooling", "tuning"):
            print(step, file=say, flush=True)
            tab.until(f"$('log').textContent.includes('{step}')")
    tab.until("$('story').textContent.includes('Success')")
    card = tab.text("#members")
    for part in ("0.6 ± 0.0483; a perfect qubit gives 0.5", "1000, 7", "documented, rabi-7",
                 '{"sample":"B4"}', '{"name":"cold one"}', "all of it: SHA-256 "):
        assert part in card, (part, card)
    assert "qpu, return code 0" in tab.text("#attempts tbody")
    assert tab.ask("$('cancel').hidden") and tab.ask("$('last').hidden")
    tab.ask("HTMLAnchorElement.prototype.click = function () { window.saved = this.download }")
    tab.click("#keep")
    tab.until("$('said').textContent === 'job-1.json is saved.'")
    tab.until("document.querySelector('#runtimes pre').textContent.includes('cold one')")


def test_a_log_is_live_as_soon_as_it_is_opened_and_says_what_it_leaves_out(serve, visit, tmp_path):
    program = tmp_path / "drive"
    steps = tmp_path / "steps"
    os.mkfifo(steps)
    program.write_text(f"#!/bin/sh\ncat {steps} >&2\n", encoding="utf-8")
    program.chmod(0o755)
    server = serve("--runtime", f"qpu={program}")
    server.add("X(90)", "verbatim")
    tab = visit(server, at="#job=1")
    tab.until("$('story').textContent.includes('running')")
    seen = len(tab.browser.events)
    while not any("wait=25" in path for _, path in tab.asked(seen)):
        tab.browser.wait(tab.session, "Network.requestWillBeSent", len(tab.browser.events))
    with open(steps, "w", encoding="utf-8") as say:
        print("cold at last", file=say, flush=True)
        tab.ask("$('log').open = true")
        tab.until("$('log').textContent.includes('cold at last')")
        print("x" * 30_000, file=say, flush=True)
        tab.until("$('log').querySelector('p').textContent.startsWith('The last 20,000 of 30,')")
    tab.until("$('story').textContent.includes('Success')")
    tab.ask("HTMLAnchorElement.prototype.click = function () { window.saved = this.download }")
    tab.click("#log button")
    tab.until("$('said').textContent === 'job-1.log.txt is saved.'")
    assert tab.ask("window.saved") == "job-1.log.txt"


# The answer to the first request whose path holds a word is held back until free() is called.
HELD = """(word => {
  const real = window.fetch;
  const gate = new Promise(done => { window.free = done; });
  window.came = new Promise(done => {
    window.fetch = async (path, ...more) => {
      const answer = await real(path, ...more);
      if (!path.includes(word)) return answer;
      window.fetch = real;
      done();
      await gate;
      return answer;
    };
  });
})(%s)"""


@pytest.mark.parametrize("word, ask, place, news", [
    ("/details/", "renew(shown)", "#story", "Runtime Error: cancelled"),
    ("tag=rabi-7", "fill(plotted)", "#progress", "1 of 1 ended")])
def test_an_answer_that_was_overtaken_is_not_shown(serve, visit, word, ask, place, news):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    server.add("X(90)", "verbatim", tag="rabi-7")
    tab = visit(server, at="#job=1&plot=rabi-7")
    tab.until("$('progress').textContent === '0 of 1 ended, 0 failed' && !$('result').hidden")
    tab.ask("watching++")                       # nothing but what is asked for here
    tab.ask(HELD % json.dumps(word))
    tab.ask(f"window.late = {ask}, 0")
    tab.ask("window.came")
    server.request("DELETE", "/jobs/1/")
    tab.ask(ask)
    assert news in tab.text(place)
    tab.ask("free(), window.late")
    assert news in tab.text(place)


def test_a_server_that_stops_in_the_middle_of_an_update_is_noticed(serve, visit):
    server = serve()
    tab = visit(server, key=None)
    tab.call("Page.addScriptToEvaluateOnNewDocument", source="""
      const real = setTimeout;
      window.setTimeout = (what, after) => real(what, after === 40000 ? 500 : after)""")
    tab.go(tab.url)
    tab.call("Fetch.enable", patterns=[{"urlPattern": "*/runtimes/"}])     # never answered
    tab.type(KEY)
    tab.press("Enter")
    tab.until("$('health').textContent.includes('does not answer (nothing came for 40 s)')")
    tab.call("Fetch.disable")
    tab.until("$('health').textContent === '✓ All is well'")


def test_a_filter_by_a_runtime_that_is_gone_stays(serve, visit):
    server = serve()
    server.wait(server.add("X(1)", "echo"))
    tab = visit(server, at="#runtime=qpu-old")
    tab.until("!$('none').hidden")
    tab.ask("refresh()")
    tab.until("!$('none').hidden")
    assert tab.ask("$('by-runtime').value") == "qpu-old"
    tab.choose("#by-runtime", "")
    tab.until(f"{SHOWN} === '1'")
    tab.choose("#by-tag", "mode=echo")          # is no tag, and no other filter
    tab.until("$('said').textContent.includes('tag')")
    tab.expected = None                         # the browser's own line about the 400


def test_run_again_and_stop_the_queue_after_this_job(serve, visit, tmp_path):
    program = tmp_path / "drive"
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program.write_text(f"#!/bin/sh\nread line <{gate}\necho no >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    server = serve("--runtime", f"qpu={program}")
    server.add("X(90)", "verbatim")
    tab = visit(server, at="#job=1")
    tab.until("$('story').textContent.includes('running')")
    tab.click("#again")
    tab.until("$('h-result').textContent === 'Job 2'")
    tab.ask("show(1)")
    tab.until("$('h-result').textContent === 'Job 1'")
    tab.click("#last")
    tab.answer("Pause", "a look at the cable")
    tab.until("$('said').textContent === 'qpu is paused.'")
    gate.write_text("go\n", encoding="utf-8")
    tab.until("$('story').textContent.includes('Runtime Error: no (return code 3)')")
    tab.until("document.querySelector('#runtimes').textContent.includes('1 failed, 1 in a row; "
              "the last: job 1, return code 3: no')")
    tab.until("document.querySelector('#runtimes .hour path').getAttribute('d') !== ''")
    assert server.get({"id": 2})["start_time"] is None
    assert server.runtime("qpu")["reason"] == "a look at the cable"


# A sweep

def test_a_physicist_sees_the_curve_of_a_sweep(serve, visit):
    server = serve()
    tab = visit(server)
    tab.fill("#pulses", "X(90), X(90)")
    tab.click("#vary")
    assert tab.ask("$('pulses').value") == "X(90), X({a})"
    for field, value in (("from", "0"), ("to", "180"), ("step", "0")):
        tab.fill(f"#{field}", value)
    assert tab.text("#verdict").startswith("✗ Whole angles")
    tab.fill("#step", "30")
    assert tab.text("#verdict") == "✓ 2 pulses, 7 jobs, from 0° to 180°"
    tag = tab.ask("$('tag').value")
    assert re.match(r"sweep-\d{4}-\d{6}$", tag)
    tab.click("#run")
    tab.until("$('progress').textContent === '7 of 7 ended, 0 failed'")
    jobs_there = server.request("GET", f"/jobs/results/?tag={tag}").json
    assert [job["note"] for job in jobs_there] == [{"a": angle} for angle in range(0, 181, 30)]
    assert [job["job"] for job in jobs_there][:2] == ["X(90), X(0)", "X(90), X(30)"]
    points = tab.ask("[...$('points').rows]"
                     ".map(row => [...row.cells].map(cell => cell.textContent))")
    assert [point[1] for point in points] == ["0", "30", "60", "90", "120", "150", "180"]
    for point, job in zip(points, jobs_there):
        assert float(point[2]) == pytest.approx(job["p1"], abs=1e-4)
        assert float(point[3]) == pytest.approx(job["p1_error"], abs=1e-4)
        assert float(point[4]) == pytest.approx(job["p1_ideal"], abs=1e-4)
    dots = tab.ask("$('chart').querySelector('.dots').getAttribute('d')").split("M")[1:]
    heights = [float(dot.split(",")[1].split("h")[0]) for dot in dots]
    assert heights == pytest.approx([260 - 250 * job["p1"] for job in jobs_there], abs=0.06)
    tab.ask("$('chart').focus()")
    assert tab.text("#c-value").startswith("a 0: P(1) ")
    tab.press("ArrowRight")
    assert tab.text("#c-value").startswith("a 30: P(1) ") and "(job 2)" in tab.text("#c-value")
    assert tab.ask("[...$('against').options].map(option => option.value)") == [
        "a", "angle of pulse 2", "job"]
    tab.choose("#against", "job")
    assert tab.ask("$('points').rows[0].cells[1].textContent") == "1"
    tab.ask("HTMLAnchorElement.prototype.click = function () { window.saved = this.download }")
    for name, end in (("csv", "csv"), ("plot", "svg")):
        tab.click(f"#save-{name}")
        tab.until(f"$('said').textContent === '{tag}.{end} is saved.'")
        assert tab.ask("window.saved") == f"{tag}.{end}"
    assert tab.ask("location.hash") == f"#plot={tag}"
    tab.click("#close-plot")
    assert tab.ask("$('plot').hidden && location.hash === ''")
    tab.click("#jobs .tag")                     # any tag can be opened so
    tab.until("!$('plot').hidden && $('progress').textContent === '7 of 7 ended, 0 failed'")


def test_the_angles_of_a_sweep_are_checked_as_they_are_typed(lab, visit):
    tab = visit(lab)
    tab.fill("#pulses", "X({a})")
    for start, end, step, jobs in (
            ("0", "999", "1", 1000), ("5", "5", "1", 1), ("-10", "20", "10", 0),
            ("0.5", "3", "1", 0), ("", "20", "5", 0), ("0", "1000", "1", 0), ("10", "5", "1", 0),
            ("0", "20", "", 0), ("0", "20", "1.5", 0), ("0", "10", "5", 3)):
        for field, value in (("from", start), ("to", end), ("step", step)):
            tab.ask(f"$('{field}').value = '{value}'")
        tab.ask("typed()")
        verdict = tab.text("#verdict")
        assert verdict.startswith(f"✓ 1 pulse, {jobs} jobs" if jobs else "✗ Whole angles"), verdict
        assert tab.ask("$('new').checkValidity()") is bool(jobs)


def test_a_plot_begins_with_what_varies_and_follows_jobs_that_are_added(serve, visit):
    server = serve()
    server.wait(server.add("X(5)", "echo", tag="alike"))
    tab = visit(server, at="#plot=alike")
    tab.until("$('progress').textContent === '1 of 1 ended, 0 failed'")
    assert tab.ask("$('against').value") == "job"
    sweep = [{"job": f"X({a})", "mode": "echo", "tag": "alike", "note": {"a": a, "b": -a / 3}}
             for a in (10, 20)]
    server.request("POST", "/jobs/add/?wait=30", sweep)
    tab.until("$('progress').textContent === '3 of 3 ended, 0 failed'")
    assert tab.ask("$('against').value") == "a"
    tab.choose("#against", "b")                 # what was chosen stays
    server.request("POST", "/jobs/add/?wait=30", sweep)
    tab.until("$('progress').textContent === '5 of 5 ended, 0 failed'")
    assert tab.ask("$('against').value") == "b"


def test_a_plot_against_small_numbers_says_them(serve, visit):
    server = serve()
    server.request("POST", "/jobs/add/?wait=30", [
        {"job": "X(90)", "mode": "echo", "tag": "t1", "note": {"delay": delay}}
        for delay in (2.5e-7, 1e-9)])
    tab = visit(server, at="#plot=t1")
    tab.until("!$('plot').hidden")
    assert tab.ask("[...$('points').rows].map(row => row.cells[1].textContent)") == [
        "1e-9", "2.5e-7"]
    tab.ask("$('chart').focus()")
    assert tab.text("#c-value").startswith("delay 1e-9: ")


def test_a_plot_fills_marks_what_failed_and_the_rest_is_cancelled(serve, visit):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    body = [{"job": f"X({angle})", "mode": "verbatim", "tag": "rabi-7"} for angle in (0, 90, 180)]
    server.request("POST", "/jobs/add/", body)
    tab = visit(server, at="#plot=rabi-7")
    tab.until("$('progress').textContent === '0 of 3 ended, 0 failed'")
    assert tab.ask("$('against').value") == "angle of pulse 1"
    assert tab.ask("$('chart').querySelector('.ideal').getAttribute('d').split('L').length") == 3
    tab.ask("document.querySelector('#jobs .act button').focus()")
    for again in (False, True):                 # a held Enter asks, and does not answer
        tab.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13,
                 text="\r", autoRepeat=again)
    assert tab.ask("$('question').open")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", windowsVirtualKeyCode=27)
    server.request("DELETE", "/jobs/2/")
    tab.until("$('progress').textContent === '1 of 3 ended, 1 failed'")
    assert tab.ask("$('chart').querySelector('.crosses').getAttribute('d').split('m').length") == 3
    assert tab.ask("$('points').rows[1].cells[2].textContent") == "failed"
    tab.click("#cancel-rest")
    tab.answer("Cancel them")
    tab.until("$('said').textContent === '2 jobs are cancelled.'")
    tab.until("$('progress').textContent === '3 of 3 ended, 3 failed' && $('cancel-rest').hidden")


# What it costs

def test_the_manual_is_one_click_away(lab, visit):
    tab = visit(lab)
    topics = tab.ask("[...document.querySelectorAll('#help a')].map(link => link.pathname)")
    assert topics == [f"/help/{name}/" for name in manual.TOPICS]
    for path in topics:
        assert lab.request("GET", path).status == 200


def test_idle_it_asks_four_times_in_half_a_minute_at_most(serve, visit, browser):
    server = serve()
    tab = visit(server)
    tab.until("$('health').textContent === '✓ All is well'")
    tab.ask("new Promise(done => setTimeout(done, 2000))")
    seen = len(browser.events)
    tab.ask("new Promise(done => setTimeout(done, 15000))")
    tab.ask("new Promise(done => setTimeout(done, 15000))")
    assert len(tab.asked(seen)) <= 4, tab.asked(seen)


def test_many_updates_make_it_no_larger(serve, visit):
    server = serve()
    for _ in range(3):
        server.request("POST", "/jobs/add/?wait=30", 20 * [
            {"job": "X(90)", "mode": "simulation", "tag": "rabi-7"}])
    tab = visit(server, at="#plot=rabi-7")
    tab.until("!$('plot').hidden")
    update = """(async count => {
      for (let number = 0; number < count; number++) {
        plotted.open = true;
        await refresh();
      }
      return document.querySelectorAll('*').length;
    })(%d)"""

    def heap():
        tab.call("HeapProfiler.collectGarbage")
        return tab.call("Runtime.getHeapUsage")["usedSize"]

    nodes = tab.ask(update % 100)
    before = heap()
    assert tab.ask(update % 1000) == nodes
    assert heap() < before + 1_000_000


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


def test_it_fits_and_can_be_read_on_a_phone_and_a_desk_in_dark_and_light(lab, visit, tmp_path):
    lab.wait(lab.add("X(90), " * 99 + "X(90)", "echo"))
    tab = visit(lab)
    tab.press("Enter")
    tab.until("!$('counts').hidden")
    folder = os.environ.get("OQC_SCREENSHOTS", tmp_path)
    for width, theme in itertools.product((320, 390, 768, 1280, 1920), ("light", "dark")):
        tab.look(width, theme)
        picture = tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        name = os.path.join(folder, f"{width}-{theme}.png")
        with open(name, "wb") as file:
            file.write(base64.b64decode(picture["data"]))
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
    tab = visit(lab, key=None)
    tab.go((tmp_path / "job.svg").as_uri())
    assert tab.ask("document.documentElement.tagName") == "svg"
    assert tab.ask("document.title") == f"Job {job} on the Bloch sphere"
    assert tab.ask("document.querySelectorAll('path').length") == 7
