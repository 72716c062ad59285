"""The command line as a user meets it: help, version, and what is wrong: a line and its status."""
import ast
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Server

import oqc
from oqc import config
from oqc.clock import Clock
from oqc.store import Store

PYTHON = (sys.executable, "-m", "oqc")


def run(folder, *arguments, command=PYTHON, **environment):
    """Run the program to its end; what came of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
    return subprocess.run([*command, *map(str, arguments)], cwd=folder, check=False,
                          capture_output=True, text=True, timeout=60,
                          env={**kept, "PYTHONPATH": str(ROOT), **environment})


def one_line(ended, status):
    """The one line on standard error with which a program ended that could not start."""
    assert ended.returncode == status, (ended.returncode, ended.stderr)
    assert ended.stderr.endswith("\n") and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stdout == "" and ended.stderr.startswith("oqc: ")
    return ended.stderr[len("oqc: "):-1]


# Help, version, keys

def test_the_help_names_every_flag_with_its_environment_variable_and_its_default(tmp_path):
    ended = run(tmp_path, "--help", COLUMNS="100")
    assert (ended.returncode, ended.stderr) == (0, "")
    text = re.sub(r"\s+", " ", ended.stdout)
    for flag in config.FLAGS:
        variable = "OQC_" + flag.name.upper().replace("-", "_")
        default = "none" if flag.default is None else re.sub(r"\.0$", "", str(flag.default))
        shown = f"--{flag.name} {flag.metavar} {flag.meaning} [{variable}; default: {default}]"
        assert shown in text
    assert "--runtime NAME=COMMAND" in text and "OQC_RUNTIME" in text
    assert "default: the bundled emulator" in text
    assert "127.0.0.1:12021" in text and "curl" in text
    assert all(len(line) <= 120 for line in ended.stdout.splitlines())


def test_the_help_shows_the_default_and_not_what_the_environment_says(tmp_path):
    text = run(tmp_path, "--help", COLUMNS="100", OQC_PORT="7").stdout
    assert "default: 12021]" in re.sub(r"\s+", " ", text)


def test_the_version_is_that_of_oqc_python_and_sqlite(tmp_path):
    ended = run(tmp_path, "--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (f"oqc {oqc.__version__}, Python {platform.python_version()}, "
                            f"SQLite {sqlite3.sqlite_version}\n")


@pytest.mark.parametrize("runtime", ["emulator", "simulator"])
def test_a_built_in_runtime_explains_itself(tmp_path, runtime):
    ended = run(tmp_path, runtime, "--help")
    assert (ended.returncode, ended.stderr) == (0, "") and f"oqc {runtime}" in ended.stdout


def test_key_prints_a_new_line_for_the_keys_file_each_time(tmp_path):
    lines = [run(tmp_path, "key", "alice").stdout for _ in range(2)]
    assert all(re.fullmatch(r"alice:user:[A-Za-z0-9_-]{43}\n", line) for line in lines)
    assert lines[0] != lines[1]
    for role in ("reader", "user", "operator"):
        assert run(tmp_path, "key", "alice", "--role", role).stdout.startswith(f"alice:{role}:")
    for wrong in ([], ["a b"], ["me"], ["oqc"], ["alice", "--role", "admin"]):
        assert run(tmp_path, "key", *wrong).returncode == 2


@pytest.mark.parametrize("arguments", [["--nothing"], ["--port"], ["--port", "x"], ["--por", "0"],
                                       ["--log-level", "loud"], ["emulator", "--nothing"]])
def test_wrong_usage_ends_with_2_and_without_a_traceback(tmp_path, arguments):
    ended = run(tmp_path, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: oqc") and "Traceback" not in ended.stderr
    assert ": error: " in ended.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["serve", "stauts", ""])
def test_a_command_that_is_unknown_is_2_and_one_line(tmp_path, word):
    ended = run(tmp_path, word, "--port", "0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"oqc: no command is called {word}; without a command the server starts; "
        "--help lists the commands\n")


def test_a_wrong_environment_variable_ends_with_2_and_without_a_traceback(tmp_path):
    for variable in ("OQC_PORT", "OQC_DRAIN", "OQC_LOG_LEVEL"):
        ended = run(tmp_path, **{variable: "wrong"})
        flag = "--" + variable[4:].lower().replace("_", "-")
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
        assert f"argument {flag}: expected " in ended.stderr.splitlines()[-1]


def test_ctrl_c_in_the_emulator_is_130_without_a_traceback(tmp_path):
    with subprocess.Popen([*PYTHON, "emulator"], cwd=tmp_path, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as program:
        program.stdin.write('{"job": "X(90)"}\n')
        program.stdin.flush()
        assert program.stdout.readline()        # it listens
        program.send_signal(signal.SIGINT)
        assert (program.wait(60), program.stderr.read()) == (130, "")


# What keeps the server from starting

def test_a_port_that_is_in_use_is_one_line_and_leaves_the_database_as_it_was(tmp_path, serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = one_line(run(tmp_path, "--port", port), 1)
    assert line.startswith(f"127.0.0.1:{port}: Address already in use") and "--port" in line
    server = serve()
    job = server.wait(server.add())
    assert server.stop() == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one_line(run(tmp_path, "--port", taken.getsockname()[1]), 1)
    assert serve().get(job) == job


@pytest.mark.parametrize("host, reason", [
    ("192.0.2.1", "Cannot assign requested address"), ("a..b", ""), ("a" * 64, ""),
    ("::1%nothing", "")])
def test_an_address_that_this_machine_does_not_have_is_one_line(tmp_path, host, reason):
    ended = run(tmp_path, "--host", host, "--port", 0, OQC_API_KEY="x")
    assert one_line(ended, 1).startswith(f"{host}:0: {reason}")


def test_a_host_that_is_no_text_is_one_line(tmp_path):
    host = os.fsdecode(b"h\xff")
    ended = run(tmp_path, "--host", host, "--port", 0, OQC_API_KEY="x")
    assert one_line(ended, 1).startswith("h\\udcff:0: ")


def test_more_slots_than_there_are_descriptors_are_one_line_and_leave_the_database_as_it_was(
        tmp_path, serve):
    (tmp_path / "oqc.ini").write_text("[runtime qpu]\ncommand = cat\nslots = 50\n",
                                      encoding="ascii")
    limited = ("sh", "-c", 'ulimit -n 64; exec "$0" "$@"', *PYTHON)
    said = one_line(run(tmp_path, "--port", 0, "--config", "oqc.ini", command=limited), 1)
    assert said.startswith("too many slots: Too many open files; ")
    assert "ulimit -n" in said
    assert serve().add()["id"] == 1


def database(path, application=None, version=0, table="CREATE TABLE t (x)"):
    """A SQLite file of somebody."""
    connection = sqlite3.connect(path)
    connection.execute(table)
    if application is not None:
        connection.execute(f"PRAGMA application_id = {application}")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


def application_of_oqc(folder):
    """The application_id that oqc gives its databases, as a real one has it."""
    server = Server(folder, "--db", "real.db")
    assert server.stop() == 0
    connection = sqlite3.connect(folder / "real.db")
    found = [connection.execute(f"PRAGMA {name}").fetchone()[0]
             for name in ("application_id", "user_version")]
    connection.close()
    return found


@pytest.mark.parametrize("content, reason", [
    (b"hello, world\n", "is not a database"), (b"x" * 5000, "is not a database"),
    (b"SQLite format 3\0", "is not a"), (b"\0" * 100, "is not a database"),
    (b"SQLite format 3\0" + b"\0" * 4080, "is another program's database")],
    ids=["text", "long", "magic", "zeros", "empty header"])
def test_a_file_that_is_no_database_is_one_line_and_stays_as_it_is(tmp_path, content, reason):
    path = tmp_path / "file"
    path.write_bytes(content)
    line = one_line(run(tmp_path, "--db", "file", "--port", 0), 1)
    assert line.startswith(f"file: {reason}") and "--db" in line
    assert path.read_bytes() == content


@pytest.mark.parametrize("application", [None, 0, 1, 0x0F055112])
def test_a_database_of_another_program_is_one_line_and_stays_as_it_is(tmp_path, application):
    path = tmp_path / "theirs.db"
    database(path, application)
    content = path.read_bytes()
    line = one_line(run(tmp_path, "--db", path, "--port", 0), 1)
    assert line.startswith(f"{path}: is another program's database")
    assert path.read_bytes() == content


def test_a_database_of_a_newer_version_is_one_line_that_says_so_and_stays_as_it_is(tmp_path):
    application, version = application_of_oqc(tmp_path)
    path = tmp_path / "newer.db"
    database(path, application, version + 1)
    content = path.read_bytes()
    line = one_line(run(tmp_path, "--db", path, "--port", 0), 1)
    assert line.startswith(f"{path}: was written by a newer oqc (version {version + 1} ")
    assert path.read_bytes() == content


def test_a_database_without_the_tables_of_its_version_is_named_and_no_traceback(tmp_path):
    application, version = application_of_oqc(tmp_path)
    database(tmp_path / "hollow.db", application, version)
    ended = run(tmp_path, "--db", "hollow.db", "--port", 0)
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("oqc: hollow.db: no such table: ")


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling.db").symlink_to(tmp_path / "none" / "oqc.db")
    (tmp_path / "loop.db").symlink_to("loop.db")
    for path in ("folder", "folder/", "none/oqc.db", "dangling.db", "loop.db", "a\nb/oqc.db",
                 "/dev/null/oqc.db", "x" * 300):
        line = one_line(run(tmp_path, "--db", path, "--port", 0), 1)
        named = {"dangling.db": str(tmp_path / "none" / "oqc.db"),
                 "loop.db": str(tmp_path / "loop.db")}.get(path, path)
        assert line.startswith(named.replace("\n", "\\n")) and "Errno" not in line, line


def test_a_database_by_the_name_of_sqlites_memory_is_a_file_all_the_same(tmp_path, serve):
    server = serve("--db", ":memory:")
    job = server.wait(server.add())
    assert server.stop() == 0
    assert (tmp_path / ":memory:").stat().st_size > 0
    assert serve("--db", ":memory:").get(job) == job


def test_a_database_that_lost_its_end_is_one_line(tmp_path):
    application_of_oqc(tmp_path)
    os.truncate(tmp_path / "real.db", 4096)
    line = one_line(run(tmp_path, "--db", "real.db", "--port", 0), 1)
    assert line.startswith("real.db: is truncated, 4096 bytes of ")


def test_an_empty_file_becomes_a_database(tmp_path, serve):
    (tmp_path / "oqc.db").touch()
    assert serve().add()["id"] == 1


def test_a_second_server_on_the_same_database_is_refused_by_a_lock_that_dies_with_its_process(
        tmp_path, serve):
    first = serve()
    job = first.wait(first.add())
    for path in ("oqc.db", tmp_path / "oqc.db", "./oqc.db"):
        assert one_line(run(tmp_path, "--db", path, "--port", 0), 1) == (
            f"{path}: another oqc uses this database; stop it, or name another file with --db")
    assert first.get(job) == job
    first.process.kill()
    first.process.wait()
    assert serve().get(job) == job


def test_a_certificate_that_cannot_be_read_is_one_line_that_names_it(tmp_path):
    (tmp_path / "text.pem").write_text("no certificate\n", encoding="utf-8")
    for path in ("none.pem", "text.pem"):
        line = one_line(run(tmp_path, "--tls-cert", path, "--port", 0), 1)
        assert line.startswith(f"{path}: ") and "another server" not in line


# What Python has to have

def old_pythons():
    """The interpreters older than 3.9 that pyenv has here, if any."""
    pyenv = shutil.which("pyenv")
    if not pyenv:
        return []
    done = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True)
    found = sorted(Path(done.stdout.strip()).glob("versions/*/bin/python"))
    return [path for path in found
            if tuple(map(int, re.findall(r"\d+", path.parts[-3])[:2])) < (3, 9)]


# What an old Python sees of sys, for machines that have none
PRETEND = """
import runpy, sys
sys.version_info = (3, 8, 18, "final", 0)
runpy.run_module("oqc", run_name="__main__", alter_sys=True)
"""


def test_a_python_older_than_3_9_gets_one_line(tmp_path):
    pretended = run(tmp_path, command=(sys.executable, "-c", PRETEND))
    assert one_line(pretended, 1) == "needs Python 3.9 or later, and this is Python 3.8"
    for python in old_pythons():
        version = ".".join(re.findall(r"\d+", python.parts[-3])[:2])
        for arguments in ([], ["--help"]):
            ended = run(tmp_path, *arguments, command=(str(python), "-m", "oqc"),
                        PYTHONDONTWRITEBYTECODE="1")
            assert one_line(ended, 1) == f"needs Python 3.9 or later, and this is Python {version}"


def test_what_an_old_python_reads_before_that_line_is_in_a_syntax_that_it_knows():
    for name in ("__init__.py", "__main__.py"):
        tree = ast.parse((ROOT / "oqc" / name).read_text(encoding="ascii"), feature_version=(3, 4))
        newer = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.AsyncFunctionDef, ast.Starred)
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, newer)]


def test_a_python_without_sqlite3_gets_one_line(tmp_path):
    for missing in ("sqlite3", "_sqlite3"):
        (tmp_path / "sqlite3.py").write_text(f"raise ImportError('none', name={missing!r})\n",
                                             encoding="utf-8")
        for arguments in ([], ["--help"], ["--version"]):
            ended = run(tmp_path, *arguments, PYTHONPATH=f"{tmp_path}:{ROOT}",
                        PYTHONDONTWRITEBYTECODE="1")
            line = one_line(ended, 1)
            assert line == f"this Python lacks {missing}; install it, or use another Python"


@pytest.mark.parametrize("arguments, status", [
    (["--nothing"], 2), (["--config", "none"], 78), (["--db", "."], 1)])
def test_a_closed_standard_error_changes_no_status(tmp_path, arguments, status):
    ended = run(tmp_path, "-c", 'exec "$@" 2>&-', "sh", *PYTHON, *arguments, command=("sh",))
    assert (ended.returncode, ended.stderr) == (status, "")


COMMANDS = (["key", "alice"], ["--help"], ["--version"], ["help", "keys"], ["list", "--help"],
            ["check", "--help"], ["restore", "backup.db"], ["compact"])


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_output_that_nobody_reads_or_that_has_no_room_is_one_line_at_most(tmp_path, arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)       # argparse would keep the error to itself
    if arguments[0] in ("restore", "compact"):
        for name in ("oqc.db", "backup.db"):
            Store(str(tmp_path / name), Clock()).close()
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*PYTHON, *arguments], cwd=tmp_path, env=environment, check=False,
                               stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (
        1, "oqc: standard output: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        ended = subprocess.run([*PYTHON, *arguments], cwd=tmp_path, env=environment, check=False,
                               stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("text, line", [
    ("[runtime a] x\ncommand = cat\n", 1), ("[runtime a]]\ncommand = cat\n", 1),
    ("[runtime a]\ncommand = cat\n  [runtime b]\ncommand = cat\n", 3)])
def test_a_section_that_is_not_alone_on_its_line_is_one_line(tmp_path, text, line):
    (tmp_path / "oqc.ini").write_text(text, encoding="ascii")
    said = one_line(run(tmp_path, "--port", 0, "--config", "oqc.ini"), 78)
    assert f"oqc.ini: line {line}: expected [runtime NAME] alone" in said


def test_an_ini_file_may_begin_with_a_byte_order_mark(tmp_path, serve):
    (tmp_path / "oqc.ini").write_bytes(b"\xef\xbb\xbf[runtime a] ; b\r\ncommand = cat\r\n")
    serve("--config", "oqc.ini").line("verbatim on a;")


@pytest.mark.parametrize("flag", ["--keys-file", "--config"])
def test_a_fifo_in_place_of_a_file_is_one_line(tmp_path, flag):
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert "fifo: is a pipe" in one_line(run(tmp_path, "--port", 0, flag, "fifo"), 78)


@pytest.mark.parametrize("kib", [60_000, 80_000, 120_000, 200_000])
def test_too_little_memory_is_one_line(tmp_path, kib):
    limited = ("sh", "-c", f'ulimit -v {kib}; exec timeout 5 "$0" "$@"', *PYTHON)
    ended = run(tmp_path, "--port", 0, command=limited)
    assert "Traceback" not in ended.stderr
    if ended.returncode == 1:       # it may have said before that it listens
        assert ended.stderr.count("oqc: ") == 1
        assert ended.stderr.splitlines()[-1].startswith("oqc: ")


def test_a_backup_that_is_told_to_end_leaves_no_part(tmp_path, serve):
    serve().stop()
    program = ("import os, signal, sys\nfrom oqc import cli, database\n"
               "opened = database.open_observer\n"
               "def told(path):\n"
               "    os.kill(os.getpid(), signal.SIGTERM)\n"
               "    return opened(path)\n"
               "database.open_observer = told\nsys.exit(cli.main(['backup', 'copy.db']))")
    ended = run(tmp_path, command=(sys.executable, "-c", program))
    assert (ended.returncode, ended.stderr) == (143, "")
    assert not list(tmp_path.glob("copy.db*"))


@pytest.mark.parametrize("arguments", [["backup", "copy.db"], ["restore", "full.db"]])
def test_a_copy_that_is_told_to_end_does_so_before_it_is_done_and_leaves_no_part(
        tmp_path, serve, arguments):
    server = serve()
    server.add(", ".join(["X(90)"] * 10_000))
    assert server.stop() == 0
    assert run(tmp_path, "backup", "full.db").returncode == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    program = ("import os, signal, sqlite3, sys\n"
               "from oqc import cli\n"
               "connect = sqlite3.connect\n"
               "class Connection(sqlite3.Connection):\n"
               "    def backup(self, target, *, pages=-1, progress=None):\n"
               "        def step(status, remaining, total):\n"
               "            if remaining:\n"
               "                os.kill(os.getpid(), signal.SIGTERM)\n"
               "            if progress:\n"
               "                progress(status, remaining, total)\n"
               "        super().backup(target, pages=min(pages, 5), progress=step)\n"
               "sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)\n"
               f"sys.exit(cli.main({arguments}))")
    ended = run(tmp_path, command=(sys.executable, "-c", program))
    assert (ended.returncode, ended.stderr) == (143, "")
    assert {path.name for path in tmp_path.iterdir()} - {"oqc.db.lock"} == {
        *before} - {"oqc.db.lock"}
