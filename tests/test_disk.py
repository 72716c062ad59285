"""The disk: full, read-only, damaged, missing, somebody else's; and a crash at the worst moment."""
import contextlib
import http.client
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import KEY, ROOT, Server, until
from test_wire import Wire

from oqc.database import backup, check, take_lock
from oqc.jobs import StoreError

# Stands on PYTHONPATH, so that the server's own connection does what a test asks for by a file in
# its directory: "full", "read-only", "no-locks", or "die" at a commit that ends a job, before it or
# after it.
SITECUSTOMIZE = """
import errno, fcntl, os, signal, sqlite3
connect, flock, statvfs = sqlite3.connect, fcntl.flock, os.statvfs
ENDS = "UPDATE jobs SET status = CASE status WHEN 'Starting' THEN 'Success'"

class Connection(sqlite3.Connection):
    ends = False
    def execute(self, statement, *values):
        if statement == "BEGIN IMMEDIATE" or statement.startswith("PRAGMA query_only"):
            pages = 1 if os.path.exists("full") else 1 << 30
            super().execute(f"PRAGMA max_page_count = {pages}").fetchall()
        if statement == "BEGIN IMMEDIATE":
            super().execute(f"PRAGMA query_only = {int(os.path.exists('read-only'))}")
        self.ends |= statement.startswith(ENDS)
        when = ""
        if statement == "COMMIT" and self.ends and os.path.exists("die"):
            when = open("die").read()
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = super().execute(statement, *values)
        if when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

def locks(*arguments):
    if os.path.exists("no-locks"):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    return flock(*arguments)

def room(path):
    if os.path.exists("full"):
        return os.statvfs_result((4096, 4096, 9, 2, 2, 9, 9, 9, 0, 255))
    return statvfs("/proc")

sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)
fcntl.flock, os.statvfs = locks, room
"""
BATCH = [{"job": "X(90)", "mode": "echo"}] * 5000
GATED = "echo >begun; read -r go <gate; exit 0"     # a runtime that ends when the test says so


@pytest.fixture
def rigged(tmp_path):
    """The environment of a server that does what files in its directory ask for."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


class Gate:
    """Attempts of the runtime GATED: one has begun, one is to end."""

    def __init__(self, folder):
        self._pipes = []
        for name in ("begun", "gate"):
            os.mkfifo(folder / name)
            self._pipes.append(os.open(folder / name, os.O_RDWR))

    def begun(self):
        """Return when another attempt has begun."""
        assert select.select(self._pipes[:1], (), (), 20)[0], "no attempt has begun"
        os.read(self._pipes[0], 1)

    def end(self):
        """Have one attempt end."""
        os.write(self._pipes[1], b"\n")

    def close(self):
        for pipe in self._pipes:
            os.close(pipe)


@pytest.fixture
def gate(tmp_path):
    """What attempts of the runtime GATED wait for."""
    with contextlib.closing(Gate(tmp_path)) as gate:
        yield gate


def add(server, body):
    return server.request("POST", "/jobs/add/", body)


def ids(server):
    return [job["id"] for job in server.request("GET", "/jobs/list/").json]


def lines(server, text):
    return [line for line in server.lines if text in line]


# No room, no writing

@pytest.fixture
def small_disk(tmp_path):
    """(a tmpfs of 8 MiB, what fills it to the last page, what makes room again).

    None where none can be mounted.
    """
    folder, filler = tmp_path / "disk", tmp_path / "disk" / "filler"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0

    def fill():
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    yield (folder, fill, filler.unlink) if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def frozen_file(tmp_path):
    """(what makes a file immutable, what ends that), or None where no file can be."""
    path = tmp_path / "try"
    path.touch()

    def change(sign):
        def run(name):
            command = ["chattr", f"{sign}i", name]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0
        return run
    frozen = []
    works = bool(shutil.which("chattr")) and change("+")(path) and change("-")(path)

    def freeze(name):
        frozen.append(name)
        assert change("+")(name)
    yield (freeze, change("-")) if works else None
    for name in frozen:
        change("-")(name)


@pytest.fixture
def gated(serve, script):
    """gated(*flags, environment): a server with the runtime GATED."""
    runtime = f"qpu={script(GATED)}"
    return lambda *flags, environment=None: serve(*flags, "--runtime", runtime,
                                                  environment=environment)


def in_trouble(server, gate, begin, end, answer):
    """A server that cannot write from `begin` to `end`.

    Nothing is lost, nothing is half done, and it says so once. `answer`: the status, what the
    answer says, what health says.
    """
    status, says, health = answer
    ended = server.wait(server.add())
    running = server.add("X(1)", "verbatim")
    assert server.request("GET", "/health/").json == {"status": "ok"}
    gate.begun()
    before = ids(server)
    begin()
    refused = add(server, BATCH)
    assert (refused.status, refused.headers["Content-Type"]) == (status, "application/problem+json")
    assert says in refused.detail and "oqc.db: " in refused.detail
    assert int(refused.headers["Retry-After"]) > 0
    for _ in range(3):
        assert add(server, BATCH).status == status
    gate.end()                          # the running job ends, and that cannot be written
    unwell = server.request("GET", "/health/", key=None)
    assert unwell.status == 503 and unwell.json["status"] == "failing"
    assert len(unwell.json["reasons"]) == 1 and health in unwell.json["reasons"][0]
    assert server.get(ended) == ended and ids(server) == before, "reads go on, nothing is stored"
    assert server.result(ended).status == 200
    end()
    assert server.wait(running)["status"] == "Success", server.log
    after = add(server, BATCH)
    assert after.status == 201 and len(after.json) == len(BATCH)
    assert server.request("GET", "/health/").json == {"status": "ok"}
    assert after.json[0]["id"] == before[-1] + 1
    assert server.wait(after.json[-1])["status"] == "Success"
    assert len(lines(server, " error database: ")) == 1
    assert len(lines(server, "can be written again")) == 1
    assert len(lines(server, "waiting for the database")) <= 1 and "Traceback" not in server.log
    assert server.stop() == 0


def test_a_full_disk_refuses_jobs_with_507_loses_no_status_and_recovers_by_itself(
        gated, gate, rigged, small_disk, tmp_path):
    answer = (507, "KiB of room left on the disk", "room")
    if small_disk:
        folder, fill, room = small_disk
        server = gated("--db", folder / "oqc.db")

        def make_room():
            server.line("waiting for the database")     # the status of the job that has ended
            room()
        in_trouble(server, gate, fill, make_room, answer)
    else:
        full = tmp_path / "full"
        in_trouble(gated(environment=rigged), gate, full.touch, full.unlink, answer)


@pytest.mark.slow
def test_a_prune_of_long_jobs_needs_little_of_the_room_that_it_frees(serve, tmp_path):
    """Also where SQLite is built to write zeros over all that is deleted, as Debian's is."""
    server = serve()
    long = {"job": ", ".join(["X(90)"] * 70_000), "mode": "echo"}
    for _ in range(20):
        assert add(server, [long] * 5).status == 201
    before = (tmp_path / "oqc.db-wal").stat().st_size
    pruned = server.request("DELETE", "/jobs/list/?older-than=0s")
    assert pruned.json == {"deleted": 100} and (tmp_path / "oqc.db").stat().st_size < 1 << 20
    assert (tmp_path / "oqc.db-wal").stat().st_size - before < 8 << 20


def test_a_database_that_may_grow_no_more_is_a_full_disk(serve, rigged, tmp_path):
    server = serve(environment=rigged)
    first = server.wait(server.add())
    (tmp_path / "full").touch()
    refused = add(server, BATCH)
    assert (refused.status, ids(server)) == (507, [1])
    assert "KiB of room left on the disk" in refused.detail
    assert server.get(first) == first
    (tmp_path / "full").unlink()
    assert add(server, BATCH).status == 201 and server.request("GET", "/health/").status == 200


def test_a_disk_that_is_nearly_full_is_said_before_anything_fails(serve, small_disk, tmp_path):
    if not small_disk:
        # the same, of a file system that says so by itself
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            "import os, types\n"
            "os.statvfs = lambda path: types.SimpleNamespace(f_blocks=1, f_frsize=4096,\n"
            "    f_bavail=1 if os.path.exists('disk/filler') else 9999)\n", encoding="utf-8")
    folder = small_disk[0] if small_disk else tmp_path / "disk"
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    server = serve("--db", folder / "oqc.db", environment=environment)
    assert server.request("GET", "/health/").status == 200
    first = server.add()
    (folder / "filler").write_bytes(bytes(5 << 20))
    answer = server.request("GET", "/health/")
    assert answer.status == 503 and " KiB of room left on the disk" in answer.json["reasons"][0]
    for _ in range(2):
        refused = add(server, {"job": "X(90)", "mode": "echo"})
        assert refused.status == 507 and refused.detail == answer.json["reasons"][0]
    server.wait(first)
    pruned = server.request("DELETE", "/jobs/list/?older-than=0s").json
    assert pruned == {"deleted": 1}, "there is room for what is there already"
    assert server.request("GET", "/health/").status == 503
    (folder / "filler").unlink()
    assert server.request("GET", "/health/").status == 200
    assert server.wait(server.add())["status"] == "Success"
    server.line("can be written again")
    assert len(lines(server, " error database: ")) == 1


def test_on_a_full_disk_a_server_starts_that_has_its_files_and_else_says_that_there_is_no_room(
        serve, small_disk, rigged, tmp_path):
    if not small_disk:              # the same, of a database that may have one page
        small_disk = tmp_path, (tmp_path / "full").touch, (tmp_path / "full").unlink
    environment = rigged if small_disk[0] == tmp_path else {}
    folder, fill, room = small_disk
    path = folder / "oqc.db"
    path.touch()
    fill()
    assert "no room on the disk" in refusal(tmp_path, "--db", path, environment=environment)
    room()
    server = serve("--db", path, environment=environment)
    job = server.wait(server.add())
    server.process.kill()
    server.stop()
    fill()
    server = serve("--db", path, environment=environment)
    assert server.get(job) == job and add(server, BATCH).status == 507
    assert server.request("GET", "/health/").status == 503
    room()
    assert add(server, BATCH).status == 201 and server.request("GET", "/health/").status == 200
    assert server.stop() == 0
    fill()
    if environment:
        return                      # what has its pages needs no other
    beside = ("disk/oqc.db-wal", "disk/oqc.db-shm")         # empty: SQLite came no further
    assert "no room on the disk" in refusal(tmp_path, "--db", path, beside=beside)
    room()
    assert serve("--db", path, environment=environment).get(job) == job


READ_ONLY = "cannot be written now (attempt to write a readonly database)"


def test_a_file_that_cannot_be_written_any_more_refuses_jobs_with_503_and_recovers(
        gated, gate, rigged, frozen_file, tmp_path):
    if frozen_file:
        freeze, thaw = frozen_file
        wal = tmp_path / "oqc.db-wal"
        answer = (503, "disk I/O error", "disk I/O error")
        in_trouble(gated(), gate, lambda: freeze(wal), lambda: thaw(wal), answer)
    else:
        read_only_for_a_while(gated(environment=rigged), gate, tmp_path)


def read_only_for_a_while(server, gate, folder):
    """SQLite says that the database cannot be written."""
    mark = folder / "read-only"
    in_trouble(server, gate, mark.touch, mark.unlink, (503, READ_ONLY, READ_ONLY))


def test_a_database_that_became_read_only_refuses_jobs_with_503_and_recovers(
        gated, gate, rigged, tmp_path):
    read_only_for_a_while(gated(environment=rigged), gate, tmp_path)


@pytest.mark.parametrize("replaced", [False, True], ids=["moved", "replaced"])
def test_a_database_that_was_moved_away_refuses_jobs_with_503_until_it_is_back(
        gated, gate, tmp_path, replaced):
    """What would be written into it is lost when the server closes it."""
    file, elsewhere = tmp_path / "oqc.db", tmp_path / "elsewhere"

    def move():
        file.rename(elsewhere)
        if replaced:
            shutil.copy(elsewhere, file)
    said = "was moved, replaced, emptied or deleted while the server uses it"
    in_trouble(gated(), gate, move, lambda: elsewhere.rename(file), (503, said, said))


# What a server does not start on

@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Folders as servers leave them: "stopped", or "killed" with its last jobs in the WAL alone."""
    folder = tmp_path_factory.mktemp("left")
    for name in ("stopped", "killed"):
        (folder / name).mkdir()
        server = Server(folder / name)
        assert add(server, BATCH[:500]).status == 201
        server.wait(500)
        if name == "killed":
            server.stop()
            server = Server(folder / name)
            server.wait(server.add("Y(1)"))
            server.process.kill()
        server.stop()
    return folder


def refusal(folder, *flags, environment=None, beside=(), written=()):
    """The one line with which a server refuses to start.

    After it the folder is as it was but for the lock, for the files named in `beside`, and for
    those that are `written` meanwhile by a server that runs.
    """
    before = files(folder)
    env = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
    env.update({"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, **(environment or {}))
    ended = subprocess.run([sys.executable, "-m", "oqc", "--port", "0", *flags], cwd=folder,
                           check=False, timeout=60, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert ended.stderr.startswith("oqc: ") and ended.stderr.count("\n") == 1, ended.stderr
    after = {name: content for name, content in files(folder).items()
             if name in before or name not in beside}
    for name in written:
        before.pop(name, None)
        after.pop(name, None)
    assert after == before
    return ended.stderr[len("oqc: "):-1]


def files(folder):
    """{name: content} of what there is, but for an empty lock.

    An index of a WAL (-shm) is made anew by each reader: its content is None.
    """
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and (path.stat().st_size or path.suffix != ".lock"):
            content = None if path.name.endswith("-shm") else path.read_bytes()
            found[path.relative_to(folder).as_posix()] = content
    return found


def overwrite(path, begin, data):
    """Write over bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(data)


def random_pages(path):
    """Overwrite every page but the first."""
    overwrite(path, 4096, random.Random(4).randbytes(path.stat().st_size - 4096))


def by_hand(begin, data):
    """What makes the file a backup that somebody put there, and overwrites a page of it: one that
    a server left when it stopped is not read at the start."""
    def harm(path):
        overwrite(path, 18, b"\1\1")
        overwrite(path, begin, data)
    return harm


def another_program(path):
    """A database with the tables of another program in its place."""
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 252006674")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE jobs (id)")
        connection.commit()


def truncate(size):
    return lambda path: os.truncate(path, size)


def newer(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def without(*suffixes):
    """What removes these of the database's files."""
    def remove(path):
        for suffix in suffixes:
            path.with_name(path.name + suffix).unlink()
    return remove


def with_large_pages(path):
    """As another SQLite may have made it; cut off in its last page."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA journal_mode = DELETE; PRAGMA page_size = 65536; VACUUM")
    os.truncate(path, path.stat().st_size - 1)


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 40
STOPPED, KILLED = "stopped", "killed"
HARMS = {                           # what there was, what happened to it, what the line says of it
    "pages overwritten": (STOPPED, random_pages, "is damaged (", "put a backup in its place"),
    "pages overwritten after a kill": (
        KILLED, random_pages, "is damaged (", "put a backup in its place"),
    "one page overwritten": (
        STOPPED, by_hand(8192, b"\xff" * 4096), "is damaged (", "backup"),
    "one page zeroed": (
        STOPPED, by_hand(12288, bytes(4096)), "is damaged (", "backup"),
    "its first bytes": (
        STOPPED, lambda path: overwrite(path, 0, b"garbage!"), "is not a database", "--db"),
    "truncated": (
        STOPPED, truncate(8192), "is truncated, 8192 bytes of ", "put a backup in its place"),
    "truncated within a page": (
        STOPPED, truncate(9000), "is truncated, 9000 bytes of ", "backup"),
    "truncated within a large page": (
        STOPPED, with_large_pages, f"{(31 << 16) - 1} bytes of {31 << 16}; ", "backup"),
    "truncated within the header": (STOPPED, truncate(50), "is not a database", "--db"),
    "truncated after a kill": (KILLED, truncate(8192), "is damaged (", "backup"),
    "another program's database": (
        STOPPED, another_program, "is another program's database", "--db"),
    "a text": (
        STOPPED, lambda path: path.write_bytes(b"shopping list\n" * 99),
        "is not a database", "--db"),
    "a picture": (STOPPED, lambda path: path.write_bytes(PNG), "is not a database", "--db"),
    "of a newer version": (
        STOPPED, newer, "was written by a newer oqc (version 99 of the ", "run that one"),
    "without its WAL after a kill": (
        KILLED, without("-wal"), "-wal: is missing or empty, ", "restore oqc.db"),
    "without WAL and index after a kill": (
        KILLED, without("-wal", "-shm"), "-wal: is missing or empty, ", "restore oqc.db"),
    "gone after a kill": (
        KILLED, without(""), "is missing or empty, but", "remove oqc.db.lock and oqc.db-wal"),
    "gone with its WAL after a kill": (
        KILLED, without("", "-wal", "-shm"), "is missing or empty, but", "remove oqc.db.lock"),
    "gone with its lock after a kill": (
        KILLED, without("", ".lock"), "is missing or empty, but", "put the file back"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_database_that_is_not_as_it_was_left_is_refused_in_a_line_and_stays_as_it_is(
        left, tmp_path, name):
    state, harm, says, todo = HARMS[name]
    shutil.copytree(left / state, tmp_path, dirs_exist_ok=True)
    harm(tmp_path / "oqc.db")
    line = refusal(tmp_path)
    assert line.startswith("oqc.db") and says in line and todo in line


def test_a_link_to_a_database_is_that_database_also_after_a_kill(serve, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.db").symlink_to("disk/jobs.db")
    server = serve("--db", "link.db")
    job = server.wait(server.add())
    with pytest.raises(StoreError, match="another oqc uses this database"):
        take_lock(str(tmp_path / "disk/jobs.db"))
    server.process.kill()
    server.process.wait()
    server = serve("--db", "link.db")
    assert server.get(job) == job
    assert not list(check(str(tmp_path / "link.db")))
    assert server.stop() == 0 and set(files(tmp_path)) == {"disk/jobs.db", "link.db"}


@pytest.mark.parametrize("state", ["stopped", "killed"])
def test_a_database_that_is_as_it_was_left_is_opened(left, serve, tmp_path, state):
    shutil.copytree(left / state, tmp_path, dirs_exist_ok=True)
    server = serve()
    assert ids(server) == list(range(1, 502 if state == "killed" else 501))
    assert server.stop() == 0
    assert set(files(tmp_path)) == {"oqc.db"}


@pytest.mark.parametrize("name, remove, jobs", [
    ("gone after a kill", ["oqc.db.lock", "oqc.db-wal"], 0)])
def test_what_the_line_says_to_do_helps(left, serve, tmp_path, name, remove, jobs):
    state, harm, _, _ = HARMS[name]
    shutil.copytree(left / state, tmp_path, dirs_exist_ok=True)
    harm(tmp_path / "oqc.db")
    line = refusal(tmp_path)
    for one in remove:
        assert one in line
        (tmp_path / one).unlink()
    assert len(ids(serve())) == jobs


@pytest.mark.parametrize("state", ["stopped", "killed", None])
def test_a_file_system_without_locks_is_refused_in_a_line(left, tmp_path, rigged, state):
    if state:
        shutil.copytree(left / state, tmp_path, dirs_exist_ok=True)
    (tmp_path / "no-locks").touch()
    line = refusal(tmp_path, environment=rigged)
    assert line == ("oqc.db: its file system has no locks (No locks available); "
                    "name a file on a local disk with --db")
    assert (tmp_path / "oqc.db").exists() == bool(state)


# What people do to the files

def remove_wal(folder):
    """As `rm` does it."""
    (folder / "oqc.db-wal").unlink()


def empty_wal(folder):
    """Another one, as the next program makes it that opens the database."""
    (folder / "oqc.db-wal").unlink()
    (folder / "oqc.db-wal").touch()


def remove_index(folder):
    (folder / "oqc.db-shm").unlink()


def copy_a_backup_over(folder):
    """Onto the same file, so that it has the same inode."""
    shutil.copy(folder / "backup.db", folder / "oqc.db")


GONE = "-wal: was moved, replaced, emptied or deleted while the server uses it"


@pytest.mark.parametrize("harm, says", [
    (remove_wal, GONE), (empty_wal, GONE), (remove_index, GONE.replace("wal", "shm"))])
def test_a_wal_or_index_that_is_gone_is_said_no_job_is_taken_and_a_stop_saves_what_was(
        serve, tmp_path, harm, says):
    server = serve()
    jobs = [server.wait(server.add()) for _ in range(3)]
    harm(tmp_path)
    for _ in range(2):
        refused = add(server, {"job": "X(90)", "mode": "echo"})
        assert refused.status == 503 and says in refused.detail
        health = server.request("GET", "/health/")
        assert health.status == 503 and says in health.json["reasons"][0]
    assert says in server.line(" error database: ")
    assert len(lines(server, " error database: ")) == 1
    assert server.stop() == 0
    assert "at this stop all jobs were saved in the file" in server.log
    server = serve()
    assert [server.get(job) for job in jobs] == jobs
    assert not list(check(str(tmp_path / "oqc.db")))


def test_a_wal_that_is_emptied_in_place_is_said_and_a_stop_says_that_jobs_are_lost(
        serve, tmp_path):
    """As `>oqc.db-wal` does it, or a rotation of logs."""
    server = serve()
    server.wait(server.add())
    os.truncate(tmp_path / "oqc.db-wal", 0)
    for _ in range(2):
        refused = add(server, {"job": "X(90)", "mode": "echo"})
        assert refused.status == 503 and GONE in refused.detail
        assert server.request("GET", "/health/").status == 503
    assert server.stop() == 0
    assert "at this stop the jobs accepted last were not saved" in server.log
    assert "the jobs accepted last were in it" in refusal(tmp_path)
    assert command(tmp_path, "restore", "oqc.db")[0] == 0
    server = serve()
    assert ids(server) == [] and server.add()["id"] == 1


@pytest.mark.parametrize("harm", [remove_wal, empty_wal])
def test_after_a_kill_a_wal_that_was_removed_is_missed_at_the_start(serve, tmp_path, harm):
    server = serve()
    server.wait(server.add())
    harm(tmp_path)
    server.process.kill()
    server.stop()
    line = refusal(tmp_path)
    assert "oqc.db-wal: is missing or empty, and the jobs accepted last were in it" in line
    assert "put it back" in line and "restore oqc.db" in line


def test_a_backup_that_is_copied_over_the_database_of_a_running_server_is_said(serve, tmp_path):
    server = serve()
    server.wait(server.add())
    backup(str(tmp_path / "oqc.db"), str(tmp_path / "backup.db"))
    copy_a_backup_over(tmp_path)
    refused = add(server, {"job": "X(90)", "mode": "echo"})
    assert refused.status == 503 and "was overwritten while the server uses it" in refused.detail
    assert server.request("GET", "/health/").status == 503
    server.process.kill()
    server.stop()
    assert "oqc.db: is a backup" in refusal(tmp_path)


def by_a_link(folder):
    """A second name of the file."""
    os.link(folder / "oqc.db", folder / "other" / "oqc.db")


def by_a_bind_mount(folder):
    """As a container does it that is given one file."""
    (folder / "other" / "oqc.db").touch()
    mount = ["mount", "--bind", folder / "oqc.db", folder / "other" / "oqc.db"]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted")


# What a server writes: at its start, for instance, when it was seen.
LIVE = ("oqc.db", "oqc.db-wal", "other/oqc.db")


@pytest.mark.parametrize("name", [by_a_link, by_a_bind_mount])
def test_another_name_of_the_file_lets_no_second_server_in_and_loses_nothing_after_a_kill(
        serve, tmp_path, name):
    (tmp_path / "other").mkdir()
    server = serve()
    job = server.wait(server.add())
    name(tmp_path)
    try:
        line = refusal(tmp_path, "--db", "other/oqc.db", written=LIVE)
        assert line.startswith("other/oqc.db: another oqc uses this database")
        more = server.wait(server.add())
        server.process.kill()
        server.stop()
        line = refusal(tmp_path, "--db", "other/oqc.db")
        assert "other/oqc.db-wal: is missing or empty" in line
        server = serve()
        assert [server.get(job), server.get(more)] == [job, more]
        assert server.stop() == 0
    finally:
        subprocess.run(["umount", tmp_path / "other" / "oqc.db"], check=False, capture_output=True)


def test_a_lock_file_that_is_removed_lets_no_second_server_in(serve, tmp_path):
    server = serve()
    job = server.wait(server.add())
    (tmp_path / "oqc.db.lock").unlink()
    assert "another oqc uses this database" in refusal(tmp_path, written=LIVE)
    server.process.kill()
    server.stop()
    assert serve().get(job) == job


def test_a_copy_of_the_file_alone_that_a_server_uses_is_no_backup(serve, tmp_path):
    """Its last jobs are in the WAL that was not copied."""
    server = serve()
    server.wait(server.add())
    shutil.copy(tmp_path / "oqc.db", tmp_path / "copy.db")
    line = refusal(tmp_path, "--db", "copy.db", written=LIVE)
    assert "copy.db-wal: is missing or empty" in line
    with pytest.raises(StoreError, match="copy.db-wal: is missing or empty"):
        list(check(str(tmp_path / "copy.db")))
    copy = str(tmp_path / "backup.db")
    backup(str(tmp_path / "oqc.db"), copy)
    assert server.stop() == 0 and not list(check(copy))
    assert not list(check(str(tmp_path / "oqc.db")))


def test_a_check_makes_no_new_wal_where_it_is_missing(serve, tmp_path):
    server = serve()
    server.wait(server.add())
    server.process.kill()
    server.stop()
    remove_wal(tmp_path)
    path = str(tmp_path / "oqc.db")
    with pytest.raises(StoreError, match="-wal: is missing or empty"):
        list(check(path))
    with pytest.raises(StoreError, match="-wal: is missing or empty"):
        backup(path, str(tmp_path / "backup.db"))
    assert not (tmp_path / "oqc.db-wal").exists() and not (tmp_path / "backup.db").exists()


def test_a_backup_beside_the_wal_of_what_it_replaced_is_refused_until_that_is_gone(
        backed_up, serve):
    copy_a_backup_over(backed_up)
    line = refusal(backed_up)
    assert line.startswith("oqc.db: is a backup, and oqc.db-wal belongs to what was here before")
    assert "remove oqc.db-wal and oqc.db-shm" in line
    remove_wal(backed_up)
    remove_index(backed_up)
    assert ids(serve()) == [1]


# Restore and compact

def command(folder, *arguments, environment=None):
    """(status, what it printed) of a command."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **(environment or {})}
    done = subprocess.run([sys.executable, "-m", "oqc", *arguments], cwd=folder, check=False,
                          timeout=60, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# So that integrity_check finds them wrong, and quick_check does not.
SWAPPED_INDEXES = (
    "PRAGMA writable_schema = 1",
    "CREATE TEMP TABLE roots AS SELECT name, rootpage FROM sqlite_master",
    "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM roots WHERE name = 'jobs_mode')"
    " WHERE name = 'jobs_submitter'",
    "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM roots WHERE name ="
    " 'jobs_submitter') WHERE name = 'jobs_mode'",
)


@pytest.fixture
def backed_up(serve, tmp_path):
    """A folder with backup.db, which has job 1, and the database of a killed server, which has
    job 2 in its WAL alone."""
    server = serve()
    server.wait(server.add())
    backup(str(tmp_path / "oqc.db"), str(tmp_path / "backup.db"))
    server.wait(server.add())
    server.process.kill()
    server.stop()
    return tmp_path


def test_a_restore_puts_a_backup_in_place_and_keeps_what_it_replaces(serve, backed_up):
    (backed_up / "oqc.db").chmod(0o640)
    before = (backed_up / "backup.db").read_bytes()
    owner = 12345
    if os.geteuid() == 0:
        os.chown(backed_up / "oqc.db", owner, owner)
    status, text = command(backed_up, "restore", "backup.db")
    assert (status, text) == (
        0, "oqc.db: restored from backup.db; what was there is oqc.db.replaced-1 now\n")
    stat = (backed_up / "oqc.db").stat()
    assert stat.st_mode & 0o777 == 0o640
    assert os.geteuid() or stat.st_uid == (backed_up / "oqc.db.lock").stat().st_uid == owner
    assert (backed_up / "backup.db").read_bytes() == before
    assert not (backed_up / "oqc.db-shm").exists(), "the index of another WAL"
    kept = str(backed_up / "oqc.db.replaced-1")
    with contextlib.closing(sqlite3.connect(f"file:{kept}?mode=ro", uri=True)) as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (2,)
    server = serve()
    assert ids(server) == [1] and server.add()["id"] == 2
    assert server.stop() == 0 and not list(check(str(backed_up / "oqc.db")))
    command(backed_up, "restore", "backup.db")
    assert (backed_up / "oqc.db.replaced-2").exists()


def test_a_restore_refuses_while_a_server_uses_the_database_and_what_is_no_backup(
        serve, backed_up):
    server = serve()
    status, text = command(backed_up, "restore", "backup.db")
    assert status == 1 and "another oqc uses this database" in text and ids(server) == [1, 2]
    assert server.stop() == 0
    shutil.copy(backed_up / "backup.db", backed_up / "bad.db")
    overwrite(backed_up / "bad.db", 8192, b"\xff" * 4096)
    shutil.copy(backed_up / "backup.db", backed_up / "index.db")
    sql(backed_up / "index.db", *SWAPPED_INDEXES)
    (backed_up / "text").write_text("shopping list\n" * 99)
    for name, says in (("bad.db", "is damaged ("), ("index.db", "is damaged ("),
                       ("text", "is not a database"), ("none.db", "no such file")):
        status, text = command(backed_up, "restore", name)
        assert status == 1 and says in text and text.count("\n") == 1
    assert ids(serve()) == [1, 2] and not list(backed_up.glob("*restor*"))


@pytest.mark.parametrize("arguments", [("restore", "backup.db"), ("compact",)])
def test_a_database_that_a_server_uses_by_another_name_is_neither_replaced_nor_made_smaller(
        serve, backed_up, arguments):
    server = serve()
    (backed_up / "other").mkdir()
    by_a_link(backed_up)
    status, text = command(backed_up, *arguments, "--db", "other/oqc.db")
    says = "by another name of the file"
    if arguments == ("compact",):   # which needs the WAL that is under the first name
        says = "-wal: is missing or empty"
    assert status == 1 and says in text
    others = {path.name for path in (backed_up / "other").iterdir()}
    assert others - {"oqc.db.lock"} == {"oqc.db"}
    assert ids(server) == [1, 2] and server.stop() == 0


# Dies at the n-th change of a name, or of the lock file's size.
DIES = """
import os, signal, sys
calls = [0]
def dying(function):
    def call(*arguments):
        calls[0] += 1
        if calls[0] == int(os.environ["DIES_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
os.rename, os.ftruncate = dying(os.rename), dying(os.ftruncate)
"""


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_a_restore_that_is_killed_at_any_step_loses_nothing_and_is_done_by_the_next(
        serve, backed_up, dies_at):
    (backed_up / "site").mkdir()
    (backed_up / "site" / "sitecustomize.py").write_text(DIES, encoding="utf-8")
    environment = {"PYTHONPATH": f"{backed_up / 'site'}:{ROOT}", "DIES_AT": str(dies_at)}
    assert command(backed_up, "restore", "backup.db", environment=environment)[0] == -9
    if dies_at > 1:
        assert "a restore of it was interrupted, run it again" in refusal(backed_up)
    assert command(backed_up, "restore", "backup.db")[0] == 0
    assert ids(serve()) == [1]
    counts = set()
    for kept in backed_up.glob("oqc.db.replaced-?"):
        with contextlib.closing(sqlite3.connect(f"file:{kept}?mode=ro", uri=True)) as connection:
            counts |= set(connection.execute("SELECT count(*) FROM jobs"))
    assert (2,) in counts, "what was replaced is whole"


def test_jobs_that_were_open_in_a_backup_wait_until_somebody_resumes_them(
        gated, gate, tmp_path):
    server = gated()
    running, waiting = (server.add("X(1)", "verbatim") for _ in range(2))
    gate.begun()
    backup(str(tmp_path / "oqc.db"), str(tmp_path / "backup.db"))
    for _ in range(2):
        gate.end()
    server.wait(waiting)
    gate.begun()
    assert server.stop() == 0
    status, text = command(tmp_path, "restore", "backup.db")
    assert status == 0 and "2 jobs were waiting or running" in text
    for _ in range(2):              # also after another start
        server = gated()
        for name in ("qpu", "simulator"):
            runtime = server.runtime(name)
            assert runtime["state"] == "paused" and runtime["reason"] == (
                "restored from backup.db: 2 jobs were waiting or running; resume runs them again")
        assert server.wait(server.add())["status"] == "Success", "an echo moves nothing"
        assert not server.get(running)["end_time"] and not server.get(waiting)["start_time"]
        assert server.stop() == 0
    server = gated()
    server.request("POST", "/runtimes/qpu/resume/")
    for job in (running, waiting):
        gate.end()
        assert server.wait(job)["status"] == "Success"
    assert server.stop() == 0
    assert gated().runtime("qpu")["state"] == "idle", "it is not paused again"


def test_what_is_in_the_file_alone_can_be_restored_where_the_wal_is_lost(serve, tmp_path, left):
    shutil.copytree(left / "killed", tmp_path, dirs_exist_ok=True)
    remove_wal(tmp_path)
    line = refusal(tmp_path)
    assert line.endswith("oqc restore oqc.db")
    assert command(tmp_path, *line.split()[-2:])[0] == 0
    assert sql(tmp_path / "oqc.db", "PRAGMA application_id") == [(0x6F716331,)], "nobody uses it"
    assert len(ids(serve())) == 500


def test_a_compact_gives_room_back_and_has_an_older_file_give_it_back_later(serve, tmp_path):
    path = tmp_path / "oqc.db"
    shutil.copy(ROOT / "tests" / "version_1.db", path)
    server = serve()
    assert add(server, BATCH).status == 201
    server.request("DELETE", "/jobs/list/?older-than=0s")
    assert "another oqc uses this database" in command(tmp_path, "compact")[1]
    before = ids(server)
    assert server.stop() == 0
    size = path.stat().st_size
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        (tmp_path / "oqc.db.lock").unlink()
    status, text = command(tmp_path, "compact")
    assert os.geteuid() or (tmp_path / "oqc.db.lock").stat().st_uid == 12345
    assert status == 0 and path.stat().st_size < size / 2
    assert text == f"oqc.db: {size} bytes before, {path.stat().st_size} now\n"
    assert set(files(tmp_path)) == {"oqc.db"} and not list(check(str(path)))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert ids(serve()) == before


KILLED_AFTER_VACUUM = """
import os, signal, sqlite3
connect = sqlite3.connect
class Connection(sqlite3.Connection):
    def execute(self, statement, *values):
        done = super().execute(statement, *values)
        if statement == "VACUUM":
            os.kill(os.getpid(), signal.SIGKILL)
        return done
sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)
"""


def test_a_compact_that_is_killed_loses_nothing_and_its_wal_is_missed(serve, tmp_path):
    server = serve()
    assert add(server, BATCH[:500]).status == 201
    assert server.stop() == 0
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLED_AFTER_VACUUM, encoding="utf-8")
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    assert command(tmp_path, "compact", environment=environment)[0] == -9
    (tmp_path / "oqc.db-wal").rename(tmp_path / "elsewhere")
    remove_index(tmp_path)
    assert "-wal: is missing or empty" in refusal(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "oqc.db-wal")
    server = serve()
    assert len(ids(server)) == 500 and server.stop() == 0
    assert not list(check(str(tmp_path / "oqc.db")))


# A disk that the database filled

@pytest.mark.parametrize("version", [1, 2])
def test_a_disk_that_the_database_filled_has_room_for_a_prune_and_takes_jobs_again(
        serve, tmp_path, version):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted")
    try:
        path = folder / "oqc.db"
        if version == 1:
            shutil.copy(ROOT / "tests" / "version_1.db", path)
        server = serve("--db", path)
        while (status := add(server, BATCH[:1000]).status) == 201:
            pass
        assert status == 507 and server.request("GET", "/health/").status == 503
        assert shutil.disk_usage(folder).free > 1 << 20, "refused before the last megabytes"
        assert server.stop() == 0
        server = serve("--db", path)        # whose WAL begins anew, and is short
        while (status := add(server, BATCH[:1000]).status) == 201:
            pass
        assert status == 507
        full = path.stat().st_size
        assert server.request("DELETE", "/jobs/list/?older-than=0s").json["deleted"] > 10_000
        assert server.request("GET", "/health/").status == 200
        assert add(server, BATCH[:1000]).status == 201
        assert server.stop() == 0
        if version == 1:
            assert path.stat().st_size >= full, "its pages are used again"
        else:
            assert path.stat().st_size < full / 2, "they are given back"
    finally:
        server.stop()
        subprocess.run(["umount", "-l", folder], check=True)


MANY_OLD = """
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {})
    INSERT INTO jobs (job, mode, status, runtime, return_code, created_time, start_time, end_time,
                      attempts, shots, seed, echo_code, submitter)
    SELECT 'X(90)', 'echo', 'Success', 'echo', 0, '2020', '2020', '2020', 1, 1, n, 0, 'bob' FROM n
    """
NOW = "INSERT OR REPLACE INTO notes VALUES ('seen', strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"


def sql(path, *statements):
    """What the last of these statements gives, of a database that no server uses."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
    return rows


@pytest.mark.slow
def test_signals_are_heard_during_a_prune(serve, tmp_path):
    path = tmp_path / "oqc.db"
    assert serve().stop() == 0
    sql(path, MANY_OLD.format(300_000), NOW)
    server = serve("--keep-days", "30")
    first = server.request("GET", "/jobs/list/?limit=1").json
    until(lambda: server.request("GET", "/jobs/list/?limit=1").json != first)
    server.process.send_signal(signal.SIGHUP)
    server.line("keys read again")
    first = server.request("GET", "/jobs/list/?limit=1").json
    until(lambda: server.request("GET", "/jobs/list/?limit=1").json != first)   # it goes on
    assert server.stop() == 0
    server.line(" jobs that ended before ")
    assert sql(path, "SELECT count(*) FROM jobs")[0][0] > 1000, "it was still at it"
    server = serve()
    first = server.request("GET", "/jobs/list/?limit=1").json
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.request, "DELETE", "/jobs/list/?older-than=30d")
        until(lambda: server.request("GET", "/jobs/list/?limit=1").json != first)
        assert server.stop() == 0
        answer = asked.result()
    assert answer.status == 503 and "jobs are deleted so far" in answer.detail
    assert sql(path, "SELECT count(*) FROM jobs")[0][0] > 1000


def test_a_prune_by_hand_says_how_many_how_old_and_whose_key(serve):
    server = serve()
    server.wait(server.add())
    assert server.request("DELETE", "/jobs/list/?older-than=0s").json == {"deleted": 1}
    line = server.line(" info 1 jobs that ended before 20")
    assert line.endswith("Z are deleted, as documented asks for")


# A clock that is wrong

AHEAD = """
import os, time
now, now_ns = time.time, time.time_ns
def ahead():
    return 3650 * 86400 * os.path.exists("ahead")
time.time = lambda: now() + ahead()
time.time_ns = lambda: now_ns() + ahead() * 10 ** 9
"""


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "from its jobs"])
def test_a_clock_that_is_ten_years_ahead_deletes_nothing_by_itself(serve, tmp_path, seen):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AHEAD, encoding="utf-8")
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    server = serve(environment=environment)
    job = server.wait(server.add())
    assert server.stop() == 0
    if not seen:
        sql(tmp_path / "oqc.db", "DELETE FROM notes")
    (tmp_path / "ahead").touch()
    for _ in range(2):              # it is no excuse that it was seen a moment ago
        server = serve("--keep-days", "30", environment=environment)
        server.line("warning no old jobs are deleted: by the clock no server ran for 36")
        assert server.get(job) == job
        assert server.stop() == 0
    (tmp_path / "ahead").unlink()
    server = serve(environment=environment)
    server.add()
    (tmp_path / "ahead").touch()
    assert server.request("DELETE", "/jobs/list/?older-than=30d").json["deleted"], "as asked for"
    assert server.stop() == 0
    server = serve("--keep-days", "30", environment=environment)
    server.add()
    assert "no old jobs are deleted" not in server.log


def test_what_ended_before_the_clock_was_set_back_did_not_end_in_the_last_minute(serve, tmp_path):
    server = serve()
    for _ in range(2):
        job = server.wait(server.add())
    assert server.stop() == 0
    sql(tmp_path / "oqc.db", f"UPDATE jobs SET end_time = '2999' WHERE id = {job['id']}")
    server = serve()
    until(lambda: server.request("GET", "/status/").json["ended_last_hour"])
    status = server.request("GET", "/status/").json
    assert (status["ended_last_minute"], status["ended_last_hour"]) == (1, 1)


# What is read at the start

def test_after_a_clean_stop_the_database_is_not_read_through_and_after_a_kill_also_while_serving(
        serve, tmp_path):
    path = tmp_path / "oqc.db"
    server = serve()
    long = ", ".join(["X(90)"] * 500_000)
    for _ in range(5):
        server.add(long)
    assert server.stop() == 0 and path.stat().st_size > 16 << 20
    overwrite(path, path.stat().st_size - (6 << 20), b"\xff" * 4096)    # in the strings
    server = serve()
    server.add()
    assert server.request("GET", "/health/").status == 200
    server.process.kill()
    server.stop()
    server = serve()
    assert "is damaged (" in server.line(" error database: ")
    assert server.request("GET", "/health/").status == 503
    assert add(server, BATCH[:1]).status == 503 and server.stop() == 0


# What may only be read

@pytest.mark.parametrize("state", ["stopped", "killed", "killed, no index"])
@pytest.mark.parametrize("medium", ["read-only", "not ours"])
def test_a_check_and_a_backup_need_not_write_beside_the_database(left, public, state, medium):
    folder = public / "medium"
    shutil.copytree(left / state.split(",")[0], folder)
    if "no index" in state:
        remove_index(folder)
    if medium == "not ours":
        done = as_nobody(folder, public)
    else:
        mount = ["mount", "--bind", "-o", "ro", folder, folder]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("nothing can be mounted")
        try:
            done = [command(public, *ARGUMENTS[0]), command(public, *ARGUMENTS[1])]
        finally:
            subprocess.run(["umount", folder], check=True)
    assert done == [(0, "medium/oqc.db: ok\n"), (0, "")]
    jobs = 501 if state.startswith("killed") else 500
    assert sql(public / "copy.db", "SELECT count(*) FROM jobs") == [(jobs,)]


ARGUMENTS = (["check", "--db", "medium/oqc.db"], ["backup", "copy.db", "--db", "medium/oqc.db"])
AS_NOBODY = """
import gettext, locale, os, sys         # before they can be read no more
from oqc import app, cli, commands
os.setuid(65534)
sys.exit(cli.main(sys.argv[1:]))
"""


def as_nobody(folder, public):
    """What the two commands come to for somebody who may read the files and not write."""
    if os.geteuid():
        pytest.skip("needs root")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    done = []
    for arguments in ARGUMENTS:
        ended = subprocess.run(
            [sys.executable, "-B", "-c", AS_NOBODY, *arguments], cwd=public, check=False,
            timeout=60, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        done.append((ended.returncode, ended.stdout + ended.stderr))
    return done


# Damage that comes later

DAMAGES = {                         # what is asked for, what is done to job 2, what check says
    "job": ("", "UPDATE jobs SET job = 'X(90)\"' WHERE id = 2",
            "its job string does not fit the pattern"),
    "text": ("", "UPDATE jobs SET runtime_error = CAST(x'ff' AS TEXT) WHERE id = 2",
             "a text of it is no UTF-8"),
    "bytes": ("", "UPDATE jobs SET runtime_error = x'63ff' WHERE id = 2", "a text of it is none"),
    "bytes of a name": ("details", "UPDATE jobs SET submitter = x'63' WHERE id = 2",
                        "a text of it is none"),
    "text of a result": ("result", "REPLACE INTO results VALUES (2, CAST(x'ff' AS TEXT), 0)",
                         "its result is no UTF-8"),
    "JSON of a result": ("result", "REPLACE INTO results VALUES (2, '[1', 1)",
                         "its result is no JSON"),
    "note": ("details", "UPDATE jobs SET note = '{' WHERE id = 2", "its note is no JSON"),
    "attempt": ("details", "UPDATE attempts SET runtime_error = CAST(x'ff' AS TEXT) WHERE job = 2",
                "its attempt is no UTF-8"),
    "device": ("details", "UPDATE devices SET text = '{'", "its device is no JSON"),
    "log": ("log", "UPDATE logs SET log = x'00' WHERE job = 2", "a log of it is damaged"),
}
SAYS_DEVICE = """echo '{"ready": true, "device": {"name": "d"}}'; echo warm >&2
sed -u 's/^{"id": \\([0-9]*\\),.*/{"id": \\1, "return_code": 0, "result": 1}/'"""


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_row_is_500_for_that_job_and_nothing_else_and_a_check_names_it(
        serve, script, tmp_path, name):
    part, statement, says = DAMAGES[name]
    (tmp_path / "oqc.ini").write_text(
        f"[runtime qpu]\ncommand = {script(SAYS_DEVICE)}\nprotocol = lines\n", encoding="utf-8")
    server = serve("--config", "oqc.ini")
    server.wait(server.add())
    assert server.wait(server.add(mode="verbatim", note={}))["return_code"] == 0
    server.wait(server.add())
    assert server.stop() == 0
    sql(tmp_path / "oqc.db", statement)
    assert f"job 2: {says}" in list(check(str(tmp_path / "oqc.db")))
    server = serve("--config", "oqc.ini")
    answer = server.request("GET", f"/jobs/2/{part}")
    assert answer.status == 500 and "Retry-After" not in answer.headers
    assert "job 2: what is stored of it is damaged" in answer.detail
    for number in (1, 3):
        assert server.request("GET", f"/jobs/{number}/{part}").status == 200
    assert server.add() and server.request("GET", "/health/").status == 200
    assert "Traceback" not in server.log


NO_TEXT = "UPDATE jobs SET {} = CAST({} || x'ff' AS TEXT) WHERE id = 2"
DAMAGED_ROWS = {                    # what is done to job 2; what of it still has its answers
    "job": (NO_TEXT.format("job", "job"), ()),
    "job, with a quote": ("UPDATE jobs SET job = 'X(90)\"\\' WHERE id = 2", ()),
    "job, as bytes": ("UPDATE jobs SET job = x'58ff' WHERE id = 2", ()),
    "runtime_error": (NO_TEXT.format("runtime_error", "'cold'"), ()),
    "tag": (NO_TEXT.format("tag", "tag"), ("",)),
    "submitter": (NO_TEXT.format("submitter", "submitter"), ("",)),
    "note": ("UPDATE jobs SET note = '{' WHERE id = 2", ("",)),
    "created_time": (NO_TEXT.format("created_time", "'2020'"), ()),
    "runtime_error, as bytes": ("UPDATE jobs SET runtime_error = x'63ff' WHERE id = 2", ()),
    "submitter, as bytes": ("UPDATE jobs SET submitter = x'63' WHERE id = 2", ("",)),
    "note, as bytes": ("UPDATE jobs SET note = x'7b7d' WHERE id = 2", ("",)),
    "tag, with a quote": ("UPDATE jobs SET tag = 'a\"b' WHERE id = 2", ("", "details")),
    "shots": ("UPDATE jobs SET shots = 'many' WHERE id = 2", ("", "details")),
}


@pytest.mark.parametrize("name", DAMAGED_ROWS)
def test_a_damaged_row_costs_a_listing_no_other_row(serve, tmp_path, name):
    statement, answered = DAMAGED_ROWS[name]
    server = serve()
    server.request("POST", "/runtimes/simulator/pause/")
    for _ in range(3):
        server.add(mode="simulation", tag="t", note={})
    assert server.stop() == 0
    sql(tmp_path / "oqc.db", statement)
    server = serve()
    for query in ("", "?limit=5", "?state=waiting", "?order=desc", "?since=1999", "?by=documented",
                  "?limit=2&after=1", "?limit=1&after=2&since=1999"):
        listing = server.request("GET", "/jobs/list/" + query)
        assert listing.status == 200 and listing.json[-1], query
        table = server.request("GET", "/jobs/list/" + query, headers={"Accept": "text/plain"})
        assert len(table.body.splitlines()) == 1 + len(listing.json)
    assert ids(server) == [1, 2, 3]
    assert [one["id"] for one in server.request("GET", "/jobs/results/").json] == [1, 2, 3]
    for media_type in ("application/x-ndjson", "text/csv", "text/plain"):
        answer = server.request("GET", "/jobs/results/", headers={"Accept": media_type})
        assert len(answer.body.splitlines()) == 3 + (media_type != "application/x-ndjson")
    for path in ("/status/", "/status/?mode=simulation&wait=1", "/status/?tag=t",
                 "/status/?state=waiting", "/metrics/", "/health/"):
        assert server.request("GET", path).status == 200, path
    for part in ("", "details"):
        answer = server.request("GET", f"/jobs/2/{part}")
        assert answer.status == (200 if part in answered else 500)
        assert answer.json and server.request("GET", f"/jobs/3/{part}").status == 200
        if answer.status == 500:
            assert "job 2: what is stored of it is damaged" in answer.detail
    assert server.request("POST", "/runtimes/simulator/resume/").status == 200
    assert server.wait(3)["status"] == "Success"
    assert server.request("POST", "/jobs/cancel/?state=ended").json["cancelled"] == 0
    assert "Traceback" not in server.log


@pytest.mark.parametrize("number", [1, 2], ids=["at the start", "behind another"])
@pytest.mark.parametrize("change", [
    "job = CAST(job || x'ff' AS TEXT)", "job = 'X(90); rm'", "job = x'58ff'"])
def test_a_job_that_is_damaged_while_it_waits_ends_with_70_and_is_given_to_no_runtime(
        serve, script, tmp_path, change, number):
    runtime = f"qpu={script('cat >>ran')}"
    server = serve("--runtime", runtime)
    server.request("POST", "/runtimes/qpu/pause/")
    for _ in range(3):
        server.add(mode="verbatim")
    assert server.stop() == 0
    sql(tmp_path / "oqc.db", f"UPDATE jobs SET {change} WHERE id = {number}")
    server = serve("--runtime", runtime)
    server.request("POST", "/runtimes/qpu/resume/")
    assert server.wait(3)["status"] == "Success"
    listing = server.request("GET", "/jobs/list/").json
    assert [job["return_code"] for job in listing] == [70 if n == number else 0 for n in (1, 2, 3)]
    ended = listing[number - 1]
    assert (ended["status"], ended["runtime"]) == ("Runtime Error", None)
    assert f"job {number}: what is stored of it is damaged" in ended["runtime_error"]
    assert server.request("GET", "/status/").json["idle"]
    assert (tmp_path / "ran").read_text(encoding="utf-8") == "X(90)\n" * 2
    assert server.request("GET", f"/jobs/{number}/").status == (200 if "rm" in change else 500)
    assert server.request("POST", f"/jobs/{number}/rerun/").status == 500
    assert server.request("GET", f"/jobs/{number}/bloch.svg").status == 500
    assert "Traceback" not in server.log and server.line("is damaged; `oqc check` says")


@pytest.mark.parametrize("column", ["submitter", "asked_runtime", "tag", "note"])
def test_what_is_damaged_beside_a_job_string_keeps_no_server_from_its_jobs(
        serve, script, tmp_path, column):
    runtime = f"qpu={script('cat')}"
    server = serve("--runtime", runtime)
    server.request("POST", "/runtimes/qpu/pause/")
    for _ in range(3):
        server.add(mode="verbatim")
    assert server.stop() == 0
    sql(tmp_path / "oqc.db", f"UPDATE jobs SET {column} = CAST(x'ff' AS TEXT) WHERE id = 2")
    server = serve("--runtime", runtime)
    server.request("POST", "/runtimes/qpu/resume/")
    assert server.wait(3)["status"] == server.wait(1)["status"] == "Success"
    if column == "note":                    # which its runtime would get
        assert server.wait(2)["return_code"] == 70
    elif column == "asked_runtime":         # which nobody is
        assert server.request("GET", "/jobs/list/?state=waiting").json[0]["id"] == 2
        assert server.request("DELETE", "/jobs/2/").json["return_code"] == 130
    else:
        assert server.wait(2)["status"] == "Success"
    assert server.request("GET", "/status/").json["idle"] and "Traceback" not in server.log


def test_a_note_of_when_a_server_ran_that_is_damaged_deletes_nothing_and_ends_no_server(
        serve, tmp_path):
    server = serve()
    server.wait(server.add())
    assert server.stop() == 0
    sql(tmp_path / "oqc.db", "UPDATE jobs SET end_time = '2020', start_time = '2020',"
        " created_time = '2020'", "UPDATE notes SET value = 'x' WHERE name = 'seen'")
    server = serve("--keep-days", "30")
    server.line(" error old jobs not deleted: ")
    assert server.get(1)["return_code"] == 0
    assert server.request("DELETE", "/jobs/list/?older-than=30d").json == {"deleted": 1}
    assert server.stop() == 0 and serve("--keep-days", "30").add()["id"] == 2


def test_damage_under_a_running_server_is_503_and_one_line_in_the_log_and_ends_nothing(
        left, serve, tmp_path):
    shutil.copytree(left / "stopped", tmp_path, dirs_exist_ok=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "oqc.db")) as connection:
        root, = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'jobs'").fetchone()
        # What ended in the last hour is read at the start, and a page that was read is kept.
        long_ago = "2026-01-01T00:00:00.000000Z"
        connection.execute("UPDATE jobs SET created_time = ?, start_time = ?, end_time = ?",
                           3 * (long_ago,))
        connection.commit()
    server = serve()
    size = (tmp_path / "oqc.db").stat().st_size
    for page in range(1, size // 4096):
        if page + 1 != root:
            overwrite(tmp_path / "oqc.db", page * 4096, b"\xff" * 4096)
    answer = server.request("GET", "/jobs/250/")
    assert answer.status == 503
    assert "oqc.db: is damaged (" in answer.detail and "backup in its place" in answer.detail
    for _ in range(20):
        assert server.request("GET", "/jobs/250/").status == 503
        refused = add(server, {"job": "X(90)", "mode": "echo"})
        assert refused.status == 503, "it might never be found again"
        assert "is damaged (" in refused.detail
        with contextlib.suppress(http.client.HTTPException):        # or cut short at the damage
            assert server.request("GET", "/jobs/list/").status == 503
        health = server.request("GET", "/health/")
        assert health.status == 503 and "is damaged (" in health.json["reasons"][0]
    assert server.request("GET", "/").status == 200 and server.process.poll() is None
    assert len(lines(server, "is damaged (")) == 1 and "Traceback" not in server.log, server.log
    assert "again" not in server.log
    assert server.stop() == 0
    assert "is damaged (" in refusal(tmp_path)


# The worst moment

@pytest.fixture
def counting(tmp_path, script):
    """(what makes a runtime that writes a line for each attempt, what reads these lines)."""
    log = tmp_path / "attempts"
    log.touch()
    return (lambda more="": script(f'echo "$OQC_JOB_ID.$OQC_ATTEMPT" >>{log}; {more}'),
            lambda: log.read_text(encoding="utf-8").split())


def section(tmp_path, command, interrupted):
    """An INI file with this runtime."""
    path = tmp_path / "oqc.ini"
    text = f"[runtime qpu]\ncommand = {command}\ninterrupted = {interrupted}\n"
    path.write_text(text, encoding="utf-8")
    return path


ENDS = {                            # when the server dies, what the section says: attempts, the end
    ("runtime", "retry"): (["1.1", "1.2"], ("Success", 0, None)),
    ("runtime", "fail"): (["1.1"], ("Runtime Error", 137, "interrupted, outcome unknown")),
    ("before", "retry"): (["1.1", "1.2"], ("Success", 0, None)),
    ("before", "fail"): (["1.1"], ("Runtime Error", 137, "interrupted, outcome unknown")),
    ("after", "retry"): (["1.1"], ("Success", 0, None)),
    ("after", "fail"): (["1.1"], ("Success", 0, None)),
}


@pytest.mark.parametrize("when, interrupted", ENDS)
def test_a_job_whose_server_dies_as_it_ends_is_run_again_or_ended_as_its_section_says_and_once(
        serve, rigged, counting, tmp_path, when, interrupted):
    runtime, attempts = counting
    dies = ('[ "$OQC_ATTEMPT" = 2 ] || [ ! -e die ] || [ "$(cat die)" != runtime ] || '
            "kill -9 $PPID; exit 0")
    config = section(tmp_path, runtime(dies), interrupted)
    (tmp_path / "die").write_text(when, encoding="utf-8")
    server = serve("--config", config, environment=rigged)
    job = server.add(mode="verbatim")
    assert server.process.wait(20) == -9
    (tmp_path / "die").unlink()
    server = serve("--config", config, environment=rigged)
    ended = server.wait(job)
    expected, end = ENDS[when, interrupted]
    assert (ended["status"], ended["return_code"], ended["runtime_error"]) == end
    assert attempts() == expected
    server.process.kill()
    server.stop()
    server = serve("--config", config, environment=rigged)
    server.wait(server.add(mode="verbatim"))
    assert server.get(job) == ended and attempts() == [*expected, "2.1"], "it stays as it ended"


def test_a_job_is_added_whole_or_not_at_all_when_the_server_dies_in_the_middle(serve, tmp_path):
    server = serve()
    sent, died = threading.Event(), threading.Event()

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while not died.is_set():
                connection.request("POST", "/jobs/add/", "[" + ", ".join(
                    ['{"job": "X(90)", "mode": "echo"}'] * 100) + "]", {"api_key": KEY})
                sent.set()
                connection.getresponse().read()
        connection.close()
    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert sent.wait(20)
    server.line(" 201 ")
    server.process.kill()
    died.set()
    for thread in threads:
        thread.join(30)
    count = len(ids(serve()))
    assert count and count % 100 == 0
    assert (tmp_path / "oqc.db").exists()


# A start that fails

FAILS = """
import errno, os, threading
start, pwrite = threading.Thread.start, os.pwrite
def start_or_fail(thread):
    if thread.name == os.environ["FAILS"]:
        raise RuntimeError("can't start new thread")
    start(thread)
def write_or_fail(*arguments):
    if os.environ["FAILS"] == "pwrite":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(*arguments)
threading.Thread.start, os.pwrite = start_or_fail, write_or_fail
"""


@pytest.mark.parametrize("state", ["stopped", "killed"])
@pytest.mark.parametrize("fails", ["reaper", "loader", "echo-0", "listener", "pwrite"])
def test_a_start_that_fails_leaves_a_database_that_the_next_one_opens(
        left, serve, tmp_path, fails, state):
    shutil.copytree(left / state, tmp_path, dirs_exist_ok=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAILS, encoding="utf-8")
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "FAILS": fails}
    for _ in range(2):
        status, text = command(tmp_path, "--port", "0", environment=environment)
        assert status == 1 and "Traceback" not in text
        assert text.splitlines()[-1].startswith("oqc: ") and "missing" not in text
    server = serve()
    assert len(ids(server)) == (501 if state == "killed" else 500)
    assert server.stop() == 0 and not list(check(str(tmp_path / "oqc.db")))


# More jobs than there is room for

def test_more_jobs_than_may_wait_are_refused_with_503_at_once_and_none_of_them_is_stored(
        gated, gate):
    server = gated("--max-waiting", "3")
    running = server.add("X(1)", "verbatim")
    gate.begun()
    body = {"job": "X(90)", "mode": "verbatim"}
    assert add(server, [body] * 4).status == 503, "all or none"
    assert add(server, [body] * 2).status == add(server, body).status == 201
    for refused in (add(server, body), add(server, {"job": "X(90)", "mode": "echo"})):
        assert refused.status == 503
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert "3 jobs wait already (--max-waiting)" in refused.detail
        assert int(refused.headers["Retry-After"]) > 0
    assert ids(server) == [1, 2, 3, 4] and server.request("GET", "/health/").status == 200
    gate.end()
    assert server.wait(running)["status"] == "Success"
    gate.begun()
    assert add(server, body).status == 201, "there is room again"
    for _ in range(4):
        gate.end()
    assert server.wait(5)["status"] == "Success"


def test_jobs_that_come_at_the_same_moment_are_counted_too(gated):
    server = gated("--max-waiting", "5")
    assert server.request("POST", "/runtimes/qpu/pause/").status == 200
    body = b'{"job": "X(90)", "mode": "verbatim"}'
    data = (b"POST /jobs/add/ HTTP/1.1\r\nHost: localhost\r\napi_key: %b\r\n"
            b"Content-Length: %d\r\n\r\n%b") % (
        KEY.encode(), len(body), body)
    with contextlib.ExitStack() as stack:
        for _ in range(2):          # the second time nothing is left of the first
            server.process.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(Wire(server, data)) for _ in range(20)]
            server.process.send_signal(signal.SIGCONT)
            assert sorted(client.answer()[0] for client in clients) == [201] * 5 + [503] * 15
            for number in ids(server):
                server.request("DELETE", f"/jobs/{number}/")


def test_jobs_that_waited_before_a_restart_count_too_and_are_never_refused(gated, gate):
    server = gated()
    jobs = add(server, [{"job": "X(90)", "mode": "verbatim"}] * 5).json
    gate.begun()
    server.process.kill()
    server.stop()
    server = gated("--max-waiting", "2")
    assert add(server, {"job": "X(90)", "mode": "echo"}).status == 503
    gate.begun()
    for _ in jobs:
        gate.end()
    assert [server.wait(job)["status"] for job in jobs] == ["Success"] * 5
    assert server.wait(server.add())["status"] == "Success"


def test_a_cancelled_job_waits_no_more(gated, gate):
    server = gated("--max-waiting", "3")
    body = {"job": "X(90)", "mode": "verbatim"}
    for _ in range(2):              # the second time nothing is left of the first
        assert server.request("POST", "/runtimes/qpu/pause/").status == 200
        for _ in range(4):
            job = server.add(mode="verbatim")
            assert server.request("DELETE", f"/jobs/{job['id']}/").status == 200
        jobs = [server.add(mode="verbatim") for _ in range(3)]
        assert add(server, body).status == 503
        assert server.request("POST", "/runtimes/qpu/resume/").status == 200
        for job in jobs:
            gate.end()
        assert [server.wait(job)["status"] for job in jobs] == ["Success"] * 3


def test_a_kill_before_anything_is_read_or_written_costs_no_later_start(serve, tmp_path):
    dies = ("import os; from oqc.clock import Clock; from oqc.store import Store; "
            "store = Store('oqc.db', Clock()); os.kill(os.getpid(), 9)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in (1, 2):           # with a database that is new, and one that is not
        killed = subprocess.run([sys.executable, "-c", dies], cwd=tmp_path, env=environment,
                                check=False)
        assert killed.returncode == -9
        server = serve()
        assert server.add()["id"] == number
        assert server.stop() == 0
