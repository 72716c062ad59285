"""What is read from the source of oqc: its rooms and who may enter which, by the imports and calls
of every module; and which SQL is said."""
import ast
import importlib.util
import re
import sysconfig
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "oqc"

# Each room, and the rooms that it imports from; an arrow only ever points further down.
ROOMS = {
    "__main__": {"cli"},
    "cli": {"commands", "app", "builtin", "relay", "manual", "config", "keys"},
    "commands": {"client", "config", "jobs", "keys"},       # that ask a server, not by HTTP
    "__init__": {"client"},     # when it is asked for; every room imports it without saying so
    "client": {"config", "clock", "keys", "jobs"},
    "app": {"log", "config", "server", "api", "keys", "workers", "waiting", "store", "database",
            "builtin", "runtimes", "keeper", "tree", "clock", "jobs"},
    "log": {"clock"},
    "config": {"keys", "jobs"},
    "server": {"api", "connection", "wire", "messages"},
    "connection": {"wire", "messages"},
    "wire": {"messages"},       # the parser of what comes over the sockets, kept apart from them
    "api": {"documents", "queries", "messages", "text", "results", "manual", "bloch", "keys",
            "jobs"},
    "documents": {"manual"},    # what is served as it is
    "queries": {"messages", "jobs"},    # what a query asks for, kept apart from what answers it
    "messages": {"jobs"},       # requests and responses, kept apart from what they lead to
    "text": {"results", "jobs"},        # what a person or a scraper reads
    "workers": {"waiting", "recent", "turns", "jobs"},
    "waiting": {"jobs"},
    "recent": set(),            # what ended of late, tested alone
    "turns": {"jobs"},          # the queue, tested alone
    "store": {"database", "jobs"},
    "database": {"jobs"},       # the file, kept apart from the jobs in it
    "builtin": {"runtimes", "qubit", "jobs"},
    "relay": {"runtimes", "keeper", "tree", "clock", "jobs"},
    "runtimes": {"process", "tree", "lines", "jobs"},
    "lines": {"jobs"},          # what a runtime says over `lines`, kept apart from processes
    "process": {"tree"},
    "keeper": {"tree"},         # the process that ends what is left when the server dies
    "tree": set(),              # whose is a process
    "manual": set(),
    "keys": set(),
    "results": {"jobs", "qubit"},       # the numbers of a result, kept apart from formats
    "bloch": {"qubit"},         # the picture of a path
    "qubit": set(),
    "clock": set(),
    "jobs": set(),
}

# What only some rooms may use, as patterns; the longest that fits decides. What is not named here,
# every room may use.
ONLY_IN = {
    # SQL
    "sqlite3": {"store", "database"},
    # processes
    "subprocess": {"tree"},
    "multiprocessing": {"tree"},
    "concurrent.futures.ProcessPoolExecutor": {"tree"},
    "concurrent.futures.process": {"tree"},
    "pty": {"tree"},
    "os.exec*": {"tree"},
    "os.fork*": {"keeper"},
    "os.popen": {"tree"},
    "os.posix_spawn*": {"tree"},
    "os.spawn*": {"tree"},
    "os.system": {"tree"},
    # dice
    "random": {"qubit", "app"},                 # app makes the dice of the other rooms
    "secrets": {"app", "cli"},      # keys
    "uuid": {"app"},
    "os.getrandom": {"app"},
    # the name of an instance, and keys of idempotency
    "os.urandom": {"app", "client", "database", "relay"},
    # sockets
    "asyncio": {"server"},
    "socket": {"server"},
    "socketserver": {"server"},
    "ssl": {"server", "client"},
    "select": {"server", "connection", "process", "relay", "tree"},
    "selectors": {"server", "process", "tree"},
    "http": {"server"},
    "http.client": {"client"},
    "urllib.error": {"client"},
    "urllib.request": {"client"},
    # the wall clock, and sleeping
    "time": {"clock"},
    "datetime": {"clock"},
    "calendar": {"clock"},
    "email.utils": {"clock"},
    # what would hide an import from this test
    "builtins.__import__": set(),
    "builtins.eval": set(),
    "builtins.exec": set(),
    "importlib.import_module": set(),
    "runpy": set(),
}


def names_used(tree):
    """(line, dotted name) of all that is imported, and of all that is reached through an imported
    name."""
    bound = {name: f"builtins.{name}" for name in ("__import__", "eval", "exec")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                if alias.asname:
                    bound[alias.asname] = alias.name
                else:
                    top = alias.name.partition(".")[0]
                    bound[top] = top
        elif isinstance(node, ast.ImportFrom):
            # There are no packages inside oqc, so that any number of dots means oqc itself.
            origin = node.module
            if node.level:
                origin = f"oqc.{node.module}" if node.module else "oqc"
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
    for node in ast.walk(tree):
        inner = node
        rest = ""
        while isinstance(inner, ast.Attribute):
            rest = f".{inner.attr}{rest}"
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in bound:
            yield node.lineno, bound[inner.id] + rest


def rooms_for(name):
    """The rooms that may use a dotted name, or None if every room may."""
    fitting = [pattern for pattern in ONLY_IN
               if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    return ONLY_IN[max(fitting, key=len)] if fitting else None


def is_standard(module):
    """Whether a top-level module comes with Python: sys.stdlib_module_names is there only from 3.10
    on."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    origin = Path(spec.origin).resolve()
    if "site-packages" in origin.parts or "dist-packages" in origin.parts:
        return False
    homes = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib")}
    return not homes.isdisjoint(origin.parents)


def wrongs(room, source):
    """What a module of this name must not do but does, each with the first line where it does."""
    found = {}
    for line, name in names_used(ast.parse(source)):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if name.endswith(".*"):
            found.setdefault(f"{name} hides what is imported", line)
        elif top == "oqc":
            if target in ROOMS and target != room and target not in ROOMS[room]:
                found.setdefault(f"{room} may not import {target}", line)
        elif top != "builtins" and not is_standard(top):
            found.setdefault(f"{top} is not in the standard library", line)
        rooms = rooms_for(name)
        if rooms is not None and room not in rooms:
            owners = " and ".join(sorted(rooms)) or "no room"
            found.setdefault(f"{name} belongs to {owners}, not to {room}", line)
    return [f"line {line}: {wrong}" for wrong, line in found.items()]


def test_every_module_is_a_room_and_every_room_is_there():
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert modules == {f"{room}.py" for room in ROOMS}


def test_arrows_point_down():
    rooms_above = set()
    for room, allowed in ROOMS.items():
        rooms_above.add(room)
        assert not rooms_above & allowed, room


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_to_itself(room):
    assert wrongs(room, (PACKAGE / f"{room}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("room, source, wrong", [
    ("api", "from oqc import store", "api may not import store"),
    ("api", "from oqc.store import Store", "api may not import store"),
    ("api", "import oqc.store", "api may not import store"),
    ("api", "import oqc\noqc.store.Store()", "api may not import store"),
    ("api", "import oqc as package\npackage.store.Store()", "api may not import store"),
    ("api", "from . import store", "api may not import store"),
    ("api", "from .store import Store as Rows", "api may not import store"),
    ("jobs", "def late():\n    from oqc import clock", "line 2: jobs may not import clock"),
    ("clock", "from oqc.cli import main", "clock may not import cli"),
    ("__init__", "from oqc import jobs", "__init__ may not import jobs"),
    ("app", "from oqc.cli import main", "app may not import cli"),
    ("client", "from oqc import commands", "client may not import commands"),
    ("store", "from oqc.jobs import *", "oqc.jobs.* hides"),
    ("runtimes", "from os import *", "os.* hides"),
    ("api", "import sqlite3", "sqlite3 belongs to database and store"),
    ("api", "if True:\n    import sqlite3.dbapi2 as sql",
     "sqlite3.dbapi2 belongs to database and store"),
    ("runtimes", "import subprocess", "subprocess belongs to tree"),
    ("workers", "import subprocess", "subprocess belongs to tree"),
    ("workers", "from subprocess import Popen", "subprocess.Popen belongs to tree"),
    ("workers", "from multiprocessing import Pool", "belongs to tree"),
    ("workers", "from concurrent.futures import ProcessPoolExecutor", "belongs to tree"),
    ("app", "import pty", "pty belongs to tree"),
    ("app", "import os\nos.posix_spawnp('ls', [], {})", "os.posix_spawnp belongs to tree"),
    ("app", "import os\nos.fork()", "os.fork belongs to keeper"),
    ("app", "import os as o\no.execv('/bin/ls', [])", "os.execv belongs to tree"),
    ("app", "import os.path\nos.system('ls')", "os.system belongs to tree"),
    ("app", "from os import popen as ask", "os.popen belongs to tree"),
    ("app", "import os\nstart = os.spawnv", "os.spawnv belongs to tree"),
    ("workers", "from random import Random", "random.Random belongs to app and qubit"),
    ("api", "import secrets", "secrets belongs to app and cli"),
    ("store", "import os\nos.urandom(8)", "os.urandom belongs to app and client and database"),
    ("api", "import socket", "socket belongs to server"),
    ("app", "import socketserver", "socketserver belongs to server"),
    ("app", "import ssl", "ssl belongs to client and server"),
    ("api", "from http import HTTPStatus", "http.HTTPStatus belongs to server"),
    ("cli", "from http.server import HTTPServer", "http.server.HTTPServer belongs to server"),
    ("server", "import http.client", "http.client belongs to client"),
    ("commands", "import http.client", "http.client belongs to client"),
    ("api", "from urllib.request import urlopen", "urllib.request.urlopen belongs to client"),
    ("workers", "import select",
     "select belongs to connection and process and relay and server and tree"),
    ("workers", "import selectors", "selectors belongs to process and server and tree"),
    ("workers", "import time", "time belongs to clock"),
    ("workers", "from time import sleep", "time.sleep belongs to clock"),
    ("store", "from datetime import datetime", "datetime.datetime belongs to clock"),
    ("server", "from email.utils import formatdate", "email.utils.formatdate belongs to clock"),
    ("api", "store = __import__('oqc.store')", "builtins.__import__ belongs to no room"),
    ("api", "import importlib\nimportlib.import_module('oqc.store')",
     "importlib.import_module belongs to no room"),
    ("api", "exec('import oqc.store')", "builtins.exec belongs to no room"),
    ("server", "import pytest", "pytest is not in the standard library"),
    ("server", "from pylint.lint import Run", "pylint is not in the standard library"),
    ("server", "import nowhere_to_be_found", "nowhere_to_be_found is not in the standard library"),
])
def test_a_wrong_is_found(room, source, wrong):
    assert wrong in "\n".join(wrongs(room, source))


@pytest.mark.parametrize("room, source", [
    ("cli", "from oqc import __version__\nfrom oqc import app, config\nimport oqc.config"),
    ("app", "import oqc.store\nfrom oqc.clock import Clock\nimport random"),
    ("store", "import sqlite3\nsqlite3.connect(':memory:')"),
    ("tree", "import os, select, subprocess\n"
                "os.posix_spawn('/bin/ls', [], {})\nos.waitpid(1, 0)"),
    ("server", "import http.server\nimport socket, ssl\n"
               "from http.server import ThreadingHTTPServer"),
    ("client", "import http.client, ssl, urllib.request"),
    ("api", "from urllib.parse import parse_qsl\nimport json"),
    ("clock", "import time\nfrom datetime import datetime\ntime.sleep(0)"),
    ("workers", "import re\nre.compile('x').exec\nself.time.sleep(1)\ntime = self.clock.time()"),
    ("jobs", "from __future__ import annotations\nimport _json, array, math, sys, zlib"),
])
def test_what_is_allowed_is_let_through(room, source):
    assert wrongs(room, source) == []


# SQL

NEWER = re.compile(                 # than SQLite 3.26, with the version that brought it
    r"RETURNING"                    # 3.35
    r"|\bSTRICT\b"                  # 3.37
    r"|->"                          # 3.38
    r"|VACUUM\s+\w*\s*INTO"         # 3.27
    r"|GENERATED\s+ALWAYS|\)\s+(STORED|VIRTUAL)\b|\bAS\s*\(\s*\w+\s*\|\|"       # 3.31
    r"|NULLS\s+(FIRST|LAST)"        # 3.30
    r"|\bFILTER\s*\("               # 3.30, but for windows
    r"|\biif\s*\("                  # 3.32
    r"|UPDATE\s+(?!.*\bSELECT\b)[^;]*\bSET\b[^;]*\bFROM\b"                      # 3.33
    r"|MATERIALIZED|DROP\s+COLUMN"  # 3.35
    r"|unixepoch|\bformat\s*\("     # 3.38
    r"|(RIGHT|FULL)\s+(OUTER\s+)?JOIN|DISTINCT\s+FROM"                          # 3.39
    r"|timediff|octet_length|string_agg|\bconcat(_ws)?\s*\(", re.IGNORECASE | re.DOTALL)
SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|VACUUM|ALTER|WITH)\b")


def statements(source):
    """The SQL in the text of a module: its strings, those of an f-string put together, but for
    docstrings."""
    left_out = set()
    for node in ast.walk(ast.parse(source)):        # what contains a string comes before it
        text = ""
        if isinstance(node, ast.JoinedStr):
            left_out.update(node.values)
            for part in node.values:
                text += part.value if isinstance(part, ast.Constant) else " ? "
        elif isinstance(node, ast.Expr):
            left_out.add(node.value)
        elif isinstance(node, ast.Constant) and node not in left_out:
            text = str(node.value)
        if SQL.search(text):
            yield text


def test_every_statement_is_one_that_sqlite_3_26_understands():
    found = []
    for name in ("store", "database"):
        found += statements((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    assert len(found) > 25 and any("CREATE TABLE jobs" in text for text in found)
    assert not [text for text in found if NEWER.search(text)]


@pytest.mark.parametrize("statement", [
    "INSERT INTO jobs (job) VALUES (?) RETURNING id", "CREATE TABLE t (a INTEGER) STRICT",
    "VACUUM INTO 'copy'", "SELECT result ->> '$.a' FROM results",
    "CREATE TABLE t (a, b GENERATED ALWAYS AS (a) STORED)", "SELECT iif(a, 1, 2) FROM t",
    "UPDATE jobs SET due = d.due FROM d WHERE d.id = jobs.id", "SELECT unixepoch()",
    "ALTER TABLE t DROP COLUMN a", "SELECT * FROM t WHERE a IS NOT DISTINCT FROM b"])
def test_a_newer_statement_is_found(statement):
    for source in (f"execute({statement!r})", f"execute(f{statement + '{a}'!r})"):
        assert [text for text in statements(source) if NEWER.search(text)], source
    assert not list(statements(f'"""{statement}"""'))
