"""The manual that goes with the file: every command in it is run with nothing but oqc.pyz, and all
that can be asked of the program stands in it."""
import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_readme import NOT_RUN, Reader, blocks

from oqc import api, cli, client, commands, config, jobs, manual, qubit
from oqc.messages import STATUSES

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
    ours, childs = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "oqc", "help", "keys"], cwd=ROOT, check=False,
                          stdin=childs, stdout=childs, stderr=subprocess.PIPE, timeout=60,
                          env={**os.environ, "PAGER": "head -n 1", "MANPAGER": "", "TERM": "xterm"})
    os.close(childs)
    written = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert written.splitlines()[-1] == TEXTS["keys"].splitlines()[0]


# All that can be asked of the program stands in the manual, and nothing else

EVERYTHING = "\n".join(TEXTS.values())
# Flags of other programs that the manual's sentences name.
FOREIGN = {"--cacert", "--no-install-recommends", "--quiet", "--wait"}
# What openapi.json describes of every request that needs a key, and the manual once, in Problems.
WITH_A_KEY = {"400", "401", "503"}


def flags_of(*command):
    """The flags that the help of a command names."""
    usage = subprocess.run([sys.executable, "-m", "oqc", *command, "--help"], cwd=ROOT, check=True,
                           capture_output=True, text=True, encoding="utf-8").stdout
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", usage))


def known_flags():
    """The flags of all commands."""
    flags = flags_of()
    for name in (*commands.COMMANDS, *cli.COMMANDS):
        flags |= flags_of(name)
    return flags


def test_every_flag_is_in_the_manual_and_no_other():
    known = known_flags()
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", EVERYTHING))
    assert known <= named
    assert named <= known | FOREIGN


def test_every_flag_of_the_server_has_its_row():
    for name, default, *_ in [*config.FLAGS, ("runtime", None)]:
        shown = default
        if default is None:
            shown = "none"
        elif isinstance(default, float):
            shown = f"{default:g}"
        variable = "OQC_" + name.upper().replace("-", "_")
        assert f"| `--{name}` | `{variable}` | {shown} |" in TEXTS["configuration"], name
    for name, default in qubit.Device()._asdict().items():
        assert f"| `--{name.replace('_', '-')}` | {default:g} |" in TEXTS["runtimes"], name


def test_every_environment_variable_is_in_the_manual_and_no_other():
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "oqc").glob("*.py"))
    known = set(re.findall(r"\b(OQC_[A-Z_]*[A-Z])\b", sources))
    known |= {"OQC_" + name.upper().replace("-", "_") for name, *_ in config.FLAGS}
    known |= {f"OQC_{name}" for name in ("MODE", "SHOTS", "SEED", "RETURN_CODE")}
    named = set(re.findall(r"\b(OQC_[A-Z_]*[A-Z])\b", EVERYTHING))
    assert named == known
    for name in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "JOURNAL_STREAM",
                 "QRMI_JOB_QPU_RESOURCES"):
        assert name in EVERYTHING, name


def test_every_key_of_a_section_is_in_the_manual_and_no_other():
    for key in config.READERS:
        assert f"| `{key}` |" in TEXTS["configuration"], key
    for section in re.findall(r"(?m)^\[runtime [^\]]+\]\n((?:.+\n)*)", EVERYTHING):
        for key in re.findall(r"(?m)^([a-z_]+) *=", section):
            assert key in config.READERS, key


def test_every_endpoint_is_in_the_manual_and_no_other():
    endpoints = set()
    for pattern, methods in api.ROUTES:
        path = pattern.pattern.replace("/?", "/").replace("\\", "")
        path = path.replace("jobs/([^/]+)", "jobs/{id}").replace("help/([^/]+)", "help/{topic}")
        path = path.replace("([^/]+)", "{name}")
        endpoints |= {f"{method} {path}" for method in methods}
    assert set(re.findall("(?m)^## ([A-Z]+ /.*)$", TEXTS["http"])) == endpoints


def test_every_status_that_the_server_can_answer_is_in_the_manual():
    statuses = {status for _, status in STATUSES}
    for path in (ROOT / "oqc").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "")
            if called in ("Problem", "Response") and node.args:
                leaves = ast.walk(node.args[0])
                statuses |= {leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)}
    assert {200, 201, 204, 400, 401, 404, 405, 409, 413, 500, 503, 507} <= statuses
    for status in statuses:
        assert re.search(rf"(?m)^\| ([0-9, ]*\b)?{status}\b", TEXTS["http"]), status


def status_table(heading):
    """The statuses in the first column of the table below a heading."""
    section = TEXTS["http"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| ([0-9, ]+) +\|", section)
    return {status for row in rows for status in row.strip().split(", ")}


def test_openapi_describes_the_statuses_that_the_manual_names_and_no_other():
    document = json.loads((ROOT / "oqc" / "openapi.json").read_text("utf-8"))
    of_any_request = document["components"]["responses"]["AnyRequest"]["description"]
    assert set(re.findall("[0-9]{3}", of_any_request)) == status_table("Problems")
    assert WITH_A_KEY <= status_table("Problems")
    headings = set()
    for path, methods in document["paths"].items():
        for method in methods.keys() - {"parameters"}:
            heading = f"{method.upper()} {path}"
            headings.add(heading)
            described = methods[method]["responses"]
            assert described.pop("default") == {"$ref": "#/components/responses/AnyRequest"}
            named = status_table(heading)
            if methods[method].get("security") != []:
                named |= WITH_A_KEY
            assert set(described) == named, heading
    assert headings == set(re.findall("(?m)^## ([A-Z]+ /.*)$", TEXTS["http"]))


def test_every_return_code_with_a_meaning_is_in_the_manual():
    for code in (0, jobs.TEMPFAIL, jobs.PROTOCOL, jobs.SOFTWARE, jobs.TIMED_OUT,
                 jobs.NOT_EXECUTABLE, jobs.NOT_FOUND, jobs.CANCELLED, jobs.KILLED):
        assert re.search(rf"(?m)^\| {code}\b", TEXTS["jobs"]), code
    assert re.search(rf"\b{jobs.DATAERR}\b", TEXTS["runtimes"])


@pytest.mark.parametrize("names", [
    jobs.Job._fields, jobs.Submission._fields, jobs.MODES, jobs.STATUSES])
def test_every_member_mode_and_status_is_in_the_manual(names):
    for name in names:
        assert f"`{name}`" in TEXTS["jobs"] or f"| {name} " in TEXTS["jobs"], name


def test_every_exit_status_is_in_the_manual():
    for status in (cli.EX_FAILED, cli.EX_USAGE, cli.EX_CONFIG):
        assert re.search(rf"(?m)^\| {status} ", TEXTS["operations"]), status
    for status in (client.Unreachable.exit_status, client.KeyRefused.exit_status):
        assert re.search(rf"\b{status}\b", EVERYTHING), status
