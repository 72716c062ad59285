"""The manual that goes with the file: every command in it is run with nothing but oqc.pyz, and all
that can be asked of the program stands in it."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_readme import NOT_RUN, Reader, blocks

from oqc import manual

HELP = ROOT / "oqc" / "help"
TEXTS = manual.read()
WIDTH = 80


class Lab(Reader):
    """Somebody with nothing but oqc.pyz."""

    shown_folder = "/home/you/lab"
    file = None

    def unpack(self):
        """Make a folder with the file in it."""
        self.folder.mkdir()
        (self.folder / "oqc.pyz").write_bytes(self.file)


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    """The bytes of oqc.pyz."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, ROOT / "scripts" / "build.py", folder], check=True,
                   stdout=subprocess.DEVNULL)
    return (folder / "oqc.pyz").read_bytes()


@pytest.fixture
def lab(tmp_path, pyz):
    """A reader in a folder that holds nothing but oqc.pyz."""
    Lab.file = pyz
    somebody = Lab(tmp_path)
    yield somebody
    for server in somebody.servers:
        if server.process.poll() is None:
            server.process.kill()
        server.stop()


def test_every_file_is_a_topic():
    assert {path.name for path in HELP.iterdir()} == {f"{name}.md" for name in manual.TOPICS}


@pytest.mark.parametrize("name", manual.TOPICS)
def test_every_command_of_a_topic_answers_what_stands_below_it(lab, name):
    for block in blocks(TEXTS[name]):
        written, shown = lab.run(block)
        assert written == shown, f"{name}.md line {block.line}: {block.text}"
    lab.stop()


@pytest.mark.parametrize("name", manual.TOPICS)
def test_a_topic_reads_well_on_a_terminal(name):
    title, _, rest = TEXTS[name].partition("\n")
    assert re.fullmatch(f"# {name}: .{{10,70}}", title)
    prose = re.sub(r"(?ms)^```.*?^```$", "", rest)
    wide = [line for line in prose.splitlines() if len(line) > WIDTH]
    assert not wide


@pytest.mark.parametrize("name", manual.TOPICS)
def test_a_command_within_a_sentence_of_a_topic_is_also_in_a_block(name):
    in_blocks = "\n".join(re.findall(r"(?ms)^```.*?\n(.*?)^```$", TEXTS[name]))
    prose = re.sub(r"(?ms)^```.*?^```$", "", TEXTS[name])
    assert not re.findall(r"(?m)^(?: {4}|\t)(?![^\n]*\|)\S.*", prose), "indented code is not run"
    for span in re.findall(r"`((?:python3 oqc\.pyz|curl -)[^`\n]*)`", prose):
        assert span in NOT_RUN or span in in_blocks, f"{span!r} is not run"


@pytest.mark.parametrize("name", manual.TOPICS)
def test_topics_that_are_named_are_there(name):
    for topic in re.findall(r"`help ([a-z]+)`", TEXTS[name]):
        assert topic in manual.TOPICS


# What prints it and what serves it

def run(*arguments):
    """(exit status, standard output, standard error) of `oqc help`."""
    done = subprocess.run([sys.executable, "-m", "oqc", "help", *arguments], cwd=ROOT, check=False,
                          capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def test_help_lists_the_topics_with_a_line_each():
    status, out, error = run()
    assert (status, error) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(manual.TOPICS)
    assert all(len(line) <= WIDTH + 10 for line in out.splitlines())


def test_help_prints_a_topic():
    assert run("keys") == (0, TEXTS["keys"], "")


def test_help_shows_where_a_word_stands():
    status, out, _ = run("SIGHUP")
    assert status == 0 and out
    for line in out.splitlines():
        topic, number, text = line.split(":", 2)
        assert "sighup" in text.lower()
        assert TEXTS[topic].splitlines()[int(number) - 1].strip() == text.strip()


def test_help_says_that_a_word_stands_nowhere():
    status, out, error = run("flux-capacitor")
    assert (status, out) == (1, "") and "flux-capacitor" in error and error.count("\n") == 1


def test_the_server_serves_the_manual_without_a_key(server):
    answer = server.request("GET", "/help/", key=None)
    assert (answer.status, answer.body.decode()) == (200, run()[1])
    assert answer.headers["Content-Type"].startswith("text/plain")
    for name, text in TEXTS.items():
        for path in (f"/help/{name}/", f"/help/{name}"):
            answer = server.request("GET", path, key=None)
            assert (answer.status, answer.body.decode()) == (200, text)
    answer = server.request("GET", "/help/flux-capacitor/", key=None)
    assert answer.status == 404 and "GET /help/" in answer.detail


def test_a_topic_goes_through_the_pager_on_a_terminal():
    """As git does: PAGER names it."""
    pty = pytest.importorskip("pty")
    import os    # pylint: disable=import-outside-toplevel # only where there are terminals
    ours, childs = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "oqc", "help", "keys"], cwd=ROOT, check=False,
                          stdin=childs, stdout=childs, stderr=subprocess.PIPE, timeout=60,
                          env={**os.environ, "PAGER": "head -n 1", "MANPAGER": "", "TERM": "xterm"})
    os.close(childs)
    written = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert written.splitlines()[-1] == TEXTS["keys"].splitlines()[0]
