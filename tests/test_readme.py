"""The README is the manual: every command in it is run here, in order, and must answer what stands
below it.

A block ```sh is what a reader pastes into bash; a block ```text right below it is all that it then
writes. One that starts a server goes on running, as in a terminal of its own, until the next one
starts: then it gets a Ctrl-C. A block without a name is a picture or a format, and no command.
There is no other kind of block.
"""
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, Server

from oqc import config

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN_PORT = "12021"

# Blocks that cannot be run here, and why. The program they name must be there all the same.
NOT_RUN = {
    "./scripts/run_tests_and_linting.sh": "runs this very test",
    "./scripts/test.sh": "runs this very test",
    "./scripts/lint.sh": "takes longer than all tests of the README, and is run beside them anyway",
    "./scripts/bench.py": "takes half a minute, and is run by test_bench.py",
    "./scripts/size.py 5000": "takes ten seconds, and is run by test_bench.py",
    "./scripts/compare.py": "takes minutes, and needs wrk and a network; test_compare.py tries it",
    "./scripts/slurm_demo.sh": "needs Slurm and root, and is run by test_growing.py",
    "./scripts/torture.sh 20": "takes long, and is run by test_torture.py",
    "./scripts/test.sh tests/test_wire.py": "runs tests, which are run anyway",
    "./scripts/test.sh tests/test_life.py": "runs tests, which are run anyway",
    "./scripts/test.sh tests/test_qubit.py": "runs tests, which are run anyway",
    "./scripts/test.sh -k two_hundred_clients tests/test_wire.py": "runs a test, run anyway",
    "pip install -r requirements.txt": "needs a network",
}
STARTS_A_SERVER = re.compile(
    r"(\./scripts/start_server\.sh|python3 (-m oqc|oqc\.pyz))( --(?!help|version)[^\n]*)?")
COMMAND = re.compile(r"(\./scripts/|python3? |curl -|pip |bash |sh |sed |cat |chmod |kill )")
MASKS = (                           # what is another on every run
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", "TIME"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "TIME"),
    (r'"seed": \d{10,}', '"seed": SEED'),       # one that the server chose; a chosen 7 is compared
    (r"(?m)^Date: .*$", "Date: DATE"),
    (r'"ended_per_minute": \[[0-9, ]+\]', '"ended_per_minute": [N]'),  # a minute may just begin
    # sines and cosines differ in their last digit from one C library to the next
    (r"-?\b\d+(\.\d+(e-\d+)?|e-\d+)\b", lambda number: f"{round(float(number[0]), 9) + 0.0:g}"),
)


class Block(NamedTuple):
    """A command of the README and its answer."""

    line: int
    text: str
    answer: str


def blocks(readme):
    """The commands in order; an answer that belongs to none fails, and a block of another kind."""
    found = []
    end = 0                         # of the command before, if this block follows one
    for fence in re.finditer(r"(?ms)^```(.*?)\n(.*?)^```$", readme):
        kind, text = fence.groups()
        line = readme.count("\n", 0, fence.start()) + 1
        assert kind in ("sh", "text", ""), f"README line {line}: ```{kind} is not run"
        if kind == "text":
            between = readme[end:fence.start()].strip()
            assert found and not between, f"README line {line}: an answer without its command"
            found[-1] = found[-1]._replace(answer=text)
        end = 0
        if kind == "sh":
            end = fence.end()
            found.append(Block(line, text.rstrip("\n"), ""))
    return found


def masked(text):
    """Text without what is another on every run."""
    for pattern, word in MASKS:
        text = re.sub(pattern, word, text)
    return text.replace("\r", "").rstrip("\n")


class Reader:
    """Somebody with a terminal for the server and one for all else, in a copy of the tree."""

    shown_folder = "/home/you/oqc"

    def __init__(self, folder):
        self.folder = folder / "oqc"
        self.server = None
        self.servers = []
        self.unpack()
        home = folder / "home"
        home.mkdir()
        curlrc = home / ".curlrc"
        curlrc.write_text("silent\nshow-error\n", encoding="utf-8")     # no progress meter
        python = home / "python3"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        self.environment = {
            "PATH": f"{home}:{os.environ['PATH']}", "HOME": str(home), "CURL_HOME": str(home),
            "PYTHON": "", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "OQC_PORT": "0",
            "no_proxy": "*", "JOURNAL_STREAM": "", "CREDENTIALS_DIRECTORY": ""}

    def unpack(self):
        """Make the folder in which all is done."""
        compiled = shutil.ignore_patterns("__pycache__")
        for name in ("oqc", "scripts"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=compiled)

    def run(self, block):
        """What a block wrote, as the README would show it; and what it shows."""
        if STARTS_A_SERVER.fullmatch(block.text):
            written = self._start(block)
        else:
            text = block.text
            if self.server:
                text = text.replace(f"localhost:{SHOWN_PORT}", f"localhost:{self.server.port}")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, timeout=60, check=False,
                env={**os.environ, **self.environment, **self._default_server()},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            written = done.stdout.decode()
            assert done.returncode == 0, (block.line, done.returncode, written)
        if self.server:
            written = written.replace(f":{self.server.port}", f":{SHOWN_PORT}")
        return masked(written.replace(str(self.folder), self.shown_folder)), masked(block.answer)

    def _default_server(self):
        """What makes the commands ask the server that runs, which is not at the default port."""
        if not self.server:
            return {}
        return {"OQC_SERVER": f"http://127.0.0.1:{self.server.port}"}

    def _start(self, block):
        """Start a server after the one before was stopped; give as many lines of its log as the
        README shows."""
        self.stop()
        self.server = Server(self.folder, environment=self.environment,
                             command=("bash", "-c", "exec " + block.text))
        self.servers.append(self.server)
        shown = block.answer.splitlines()
        if shown:
            last = shown[-1].replace(f":{SHOWN_PORT}", f":{self.server.port}")
            self.server.line(last.split(" ", 2)[-1], timeout=5)
        return "\n".join(self.server.lines[:len(shown)])

    def stop(self):
        """Ctrl-C in the server's terminal."""
        if self.server:
            assert self.server.stop(signal.SIGINT) == 0, self.server.log
            self.server = None


@pytest.fixture
def reader(tmp_path):
    """A reader who has just unpacked oqc."""
    somebody = Reader(tmp_path)
    yield somebody
    for server in somebody.servers:
        if server.process.poll() is None:
            server.process.kill()
        server.stop()


def test_every_command_of_the_readme_answers_what_stands_below_it(reader):
    for block in blocks(README):
        if block.text not in NOT_RUN:
            written, shown = reader.run(block)
            assert written == shown, f"README line {block.line}: {block.text}"
    reader.stop()


def test_what_cannot_be_run_here_is_in_the_readme_and_is_there():
    commands = [block.text for block in blocks(README)]
    for command in NOT_RUN:
        assert command in commands
        programs = [ROOT / word for word in command.split() if (ROOT / word).is_file()]
        assert programs, command
        for program in programs:
            assert program.suffix != ".sh" or program.stat().st_mode & stat.S_IXUSR


def test_a_command_within_a_sentence_is_also_in_a_block():
    in_blocks = "\n".join(block.text for block in blocks(README))
    prose = re.sub(r"(?ms)^```.*?^```$", "", README)
    indented = re.findall(r"(?m)^(?: {4}|\t)(?![^\n]*\|)\S.*", prose)
    assert not indented, "an indented block is not run"
    for span in re.findall(r"`([^`\n]+)`", prose):
        assert not COMMAND.match(span) or span in in_blocks, f"{span!r} is not run"


def test_every_module_has_its_line_in_the_layout():
    for path in Path(ROOT, "oqc").glob("*.py"):
        assert path.name == "__init__.py" or f"| `{path.name}` |" in README, path.name


def test_the_documented_key_is_the_one_in_the_readme():
    assert README.count(config.DOCUMENTED_KEY.decode()) >= 2
