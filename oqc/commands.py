"""The commands that ask a server, for people without curl; and one oqc as a runtime of another."""
import argparse
import codecs
import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from oqc.client import (
    JSON, LOCAL, SEEDS, Client, Counts, Failed, NotEnded, batches)
from oqc.config import Command, decimal, whole
from oqc.jobs import Job
from oqc.keys import OPERATOR, USER, may

EX_FAILED, EX_USAGE, EX_TEMPFAIL = 1, 2, 75         # sysexits.h, and what argparse ends with
INTERRUPTED, BROKEN_PIPE, TERMINATED = 128 + 2, 128 + 13, 128 + 15      # the shell
CANCEL_TIMEOUT = 1.0                    # seconds for a cancel after TERM: KILL may come after two
ERASE = "\r\x1b[K"                  # makes a terminal empty the line it is on
LASTING = ("mode", "runtime", "tag", "by", "since", "until")     # what a job keeps
FILTERS = ("status", "state", *LASTING)
LASTING_FLAGS = " ".join(f"--{name}" for name in LASTING)
FILTER_FLAGS = f"--status --state {LASTING_FLAGS}"
NDJSON = "application/x-ndjson"
FORMATS = {"csv": "text/csv", "ndjson": NDJSON, "json": JSON, "table": "text/plain"}
Line = Tuple[int, str]              # of standard input: its number, the job on it


class CommandFailed(Failed):
    """A command that could not be carried out, with its exit status; no text, no message."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.exit_status = status


# Output

def progress(text: str) -> None:
    """Show on a terminal how far the command is, until something else is written."""
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            print(ERASE + text, end="", file=sys.stderr, flush=True)


def visible(text: str, kept: str = "\t") -> str:
    """Return a text with what would move a cursor, but for these characters, as `\\x1b`."""
    return "".join(char if char.isprintable() or char in kept else repr(char)[1:-1]
                   for char in text)


def say(line: str) -> None:
    """Write a line on standard error, if it can be written."""
    progress("")
    with contextlib.suppress(OSError):
        print(visible(line), file=sys.stderr, flush=True)


def write(data: bytes) -> int:
    """Write to standard output and return 0; raise Failed, saying nothing if nobody reads on."""
    progress("")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            raise CommandFailed("", BROKEN_PIPE) from None
        raise Failed(f"standard output: {error.strerror}") from None
    return 0


def show(pieces: Iterable[bytes], terminal: Optional[bool] = None) -> int:
    """Write what a raw client returns, for a terminal so that nothing in it moves the cursor;
    return 0."""
    if terminal is None:
        terminal = sys.stdout.isatty()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")      # a piece may cut a character
    for piece in pieces:
        if terminal:
            piece = visible(decoder.decode(piece), "\t\n").encode()
        write(piece)
    return 0


def shown(client: Client) -> Any:
    """Return a client of what is to be shown: tables on a terminal, else JSON."""
    return client.raw("text/plain" if sys.stdout.isatty() else JSON)


def show_lines(jobs: Iterable[Job]) -> int:
    """Write jobs as JSON, a line each; return 0."""
    return write("".join(json.dumps(job._asdict()) + "\n" for job in jobs).encode())


# Several jobs

def for_each(do: Callable[[int], int], numbers: Sequence[int]) -> int:
    """Do something about each of these jobs; return the first status that is not 0.

    A job that the server refuses keeps no other back.
    """
    first = 0
    for place, number in enumerate(numbers):
        progress(f"{place} of {len(numbers)} jobs")
        try:
            code = do(number)
        except Failed as error:
            code = error.exit_status
            if code not in (EX_FAILED, NotEnded.exit_status):
                raise
            say(f"oqc: {error}")
        first = first or code
    return first


def describe(numbers: Sequence[int]) -> str:
    """Return what to call these jobs."""
    if len(numbers) == 1:
        return f"job {numbers[0]}"
    return f"{len(numbers)} jobs, {numbers[0]} to {numbers[-1]}"


def show_when_ended(method: Callable[..., Any], client: Client, deadline: float,
                    number: int) -> Job:
    """Write what this method of a client returns for a job, as soon as it has ended; return the
    job. Raise NotEnded at the deadline."""
    job: Job = client.wait(number, max(0.0, deadline - client.deadline(0)))
    answer = client.patiently(lambda _: list(method(shown(client), number)), deadline)
    show(answer)
    return job


# add

class Adding:
    """The jobs of one `oqc add`, from the command line or from standard input."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self.client = client
        self.many = options.job == "-"
        self.waits = options.wait is not None
        self.members = job_members(options)
        self.numbers: List[int] = []        # the ids of those that are added

    def add(self, batch: List[Line]) -> List[Job]:
        """Add jobs and return them. Raise CommandFailed."""
        held = [signal.SIGTERM] if self.waits else []
        signal.pthread_sigmask(signal.SIG_BLOCK, held)      # until there are ids to be cancelled
        added: List[Job] = []
        try:
            members = {"mode": None, **self.members}
            if self.many:
                added = self.client.add_all((job for _, job in batch), **self._seeded(members))
            else:
                added = [self.client.add(batch[0][1], **members)]
        except Failed as error:
            added = error.added
            raise self._failed(error, batch) from None
        finally:
            self.numbers += [job.id for job in added]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        return added

    def _seeded(self, members: Dict[str, Any]) -> Dict[str, Any]:
        """Return the members of the next batch: its seed goes on where the last one ended."""
        seed = members.get("seed")
        if not isinstance(seed, int) or seed >= SEEDS:
            return members
        return {**members, "seed": (seed + len(self.numbers)) % SEEDS}

    def _failed(self, error: Failed, batch: List[Line]) -> CommandFailed:
        """Return why a batch was not added, by its lines, and what was added before."""
        reason = str(error)
        rest = batch[len(error.added):]
        place = re.match(r"\[([0-9]+)\]: ", reason)         # of a job in the rest
        if place:
            line, _ = rest[int(place[1])]
            reason = f"line {line}: {reason[place.end():]}"
        if error.sent:
            reason += "; it may or may not have been added"
        code = error.exit_status
        before = self.numbers + [job.id for job in error.added]
        if before:
            first, _ = rest[0]
            reason += f"; added {describe(before)}, before line {first}"
        elif self.waits and error.passing and not error.sent:
            code = EX_TEMPFAIL
        return CommandFailed(reason, code)

    def show_result(self, deadline: float, number: int) -> int:
        """Write the result of a job as soon as it has ended; return its return code."""
        method = Client.result
        if self.many and "tag" in self.members:
            method = record_of
        job = show_when_ended(method, self.client, deadline, number)
        if job.runtime_error:
            label = f"job {number}: " if len(self.numbers) > 1 else ""
            say(label + job.runtime_error)
        return int(job.return_code or 0)

    def cancel(self) -> None:
        """Cancel all jobs, soon."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in reversed(self.numbers):   # so that none begins because another was cancelled
            with contextlib.suppress(Failed):   # it has ended, or ends after this program
                self.client.ask("DELETE", f"/jobs/{number}/", seconds=CANCEL_TIMEOUT)


def record_of(client: Client, number: int) -> List[bytes]:
    """Return a job with its result, as JSON in a line; raise Failed if it is pruned."""
    line = b"".join(client.raw(NDJSON).results(after=number - 1, limit=1))
    if not line.startswith(b'{"id": %d,' % number):     # but that of the next job
        raise Failed(f"no job has the id {number}")
    return [line]


def add(client: Client, options: argparse.Namespace) -> int:
    """Add a job, or those on standard input; with --wait end as they do."""
    adding = Adding(client, options)
    try:
        if adding.waits:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
            return add_and_wait(adding, options)
        if adding.many:
            return add_lines(adding)
        added = adding.add([(0, options.job)])
        return show(shown(client).get(added[0])) if sys.stdout.isatty() else show_lines(added)
    except SystemExit:              # by that handler
        adding.cancel()
        raise
    except KeyboardInterrupt:
        going_on = f"; not cancelled: {describe(adding.numbers)}" if adding.numbers else ""
        say(f"oqc: interrupted{going_on}")
        return INTERRUPTED


def add_lines(adding: Adding) -> int:
    """Add the jobs on standard input and show them, a job a line whatever the batches; return 0."""
    terminal = sys.stdout.isatty()
    for batch in batches_on_input():
        added = adding.add(batch)
        if not terminal:
            show_lines(added)
        progress(f"{len(adding.numbers)} jobs added")
    return write(f"added {describe(adding.numbers)}\n".encode() if terminal else b"")


def add_and_wait(adding: Adding, options: argparse.Namespace) -> int:
    """Add jobs and show their results; return the first return code that is not 0."""
    deadline = adding.client.deadline(options.wait)
    for batch in batches_on_input() if adding.many else [[(0, options.job)]]:
        adding.add(batch)
        progress(f"{len(adding.numbers)} jobs added")
    return for_each(functools.partial(adding.show_result, deadline), adding.numbers)


def job_members(options: argparse.Namespace) -> Dict[str, Any]:
    """Return the members of a job beside its string, from flags and from the environment.

    A server gives its runtimes the first three in their environment.
    """
    members: Dict[str, Any] = {}
    for name in ("mode", "shots", "seed", "return_code"):
        text = getattr(options, name) or os.environ.get(f"OQC_{name.upper()}")
        if text:
            is_number = re.fullmatch("[0-9]{1,19}", text)
            members[name] = int(text) if is_number else text    # the server refuses other text
    for name in ("tag", "runtime", "priority"):
        text = getattr(options, name)
        if text is not None:
            is_number = name == "priority" and re.fullmatch("-?[0-9]{1,19}", text)
            members[name] = int(text) if is_number else text
    if options.note is not None:
        try:
            members["note"] = json.loads(options.note)
        except ValueError:
            raise CommandFailed("--note: expected a JSON object", EX_USAGE) from None
    return members


def batches_on_input() -> Iterator[List[Line]]:
    """Yield the jobs on standard input, as many at a time as are sent together; raise OSError, and
    Failed if there is none."""
    return batches(lines_on_input(), lambda line: len(line[1]))


def lines_on_input() -> Iterator[Line]:
    """Yield the jobs on standard input; raise OSError, and Failed if there is none."""
    is_empty = True
    for number, line in enumerate(open(0, "rb", closefd=False), 1):
        if line.strip():
            is_empty = False
            yield number, line.decode("utf-8", "replace").rstrip("\r\n")
    if is_empty:
        raise Failed("standard input: expected a job on each line, found none")


# The other commands

def show_each(method: Callable[..., Any], client: Client, options: argparse.Namespace) -> int:
    """Show what this method of a client returns for jobs."""
    return for_each(lambda number: show(method(shown(client), number)), options.ids)


def show_logs(client: Client, options: argparse.Namespace) -> int:
    """Show what was said in the attempts at jobs; with --follow while they run."""
    return show_each(Client.follow if options.follow else Client.log, client, options)


def show_all(method: Callable[..., Any], client: Client, _: argparse.Namespace) -> int:
    """Show what this method of a client returns."""
    return show(method(shown(client)))


def change_each(method: Callable[..., Any], client: Client, options: argparse.Namespace) -> int:
    """Do to jobs what this method of a client does, and show those that it returns."""
    if not sys.stdout.isatty():
        return show_each(method, client, options)
    return for_each(lambda number: show(shown(client).get(method(client, number))), options.ids)


def change_runtime(method: Callable[..., Any], client: Client, options: argparse.Namespace) -> int:
    """Do to a runtime what this method of a client does, and show it, on a terminal among all."""
    more = [options.reason] if hasattr(options, "reason") else []
    if not sys.stdout.isatty():
        return show(method(client.raw(), options.name, *more))
    method(client, options.name, *more)
    return show(shown(client).runtimes())


def given(options: argparse.Namespace, names: Sequence[str]) -> Dict[str, str]:
    """Return those of these flags that are given. The server refuses one that is empty: left out,
    as of a variable that is not set, it would select more than is meant."""
    flags = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in flags.items() if value is not None}


def ids_or_filters(options: argparse.Namespace) -> Dict[str, str]:
    """Return the filters of a command that takes them in place of ids, {} for ids; raise
    CommandFailed for both or neither."""
    query = given(options, FILTERS)
    if bool(query) == bool(options.ids):
        raise CommandFailed("expected the ids of jobs, or flags such as --tag that say which",
                            EX_USAGE)
    return query


def wait(client: Client, options: argparse.Namespace) -> int:
    """Show jobs as soon as they have ended; return the first return code that is not 0."""
    query = ids_or_filters(options)
    deadline = client.deadline(options.seconds)
    if not query:
        return for_each(functools.partial(wait_for_one, client, deadline), options.ids)
    if "since" in query:                # an age would soon leave out the first ones
        found = client.patiently(lambda _: list(client.list(**query, limit=1)), deadline)
        for first in found or ():
            query["since"] = first.created_time
    shows = sys.stderr.isatty()
    client.wait(timeout=options.seconds, progress=Progress(client) if shows else None, **query)
    ended = client.list(**query)
    if sys.stdout.isatty():
        show(shown(client).list(**query))
    else:
        show_lines(ended)
    codes = [int(job.return_code or 0) for job in ended]
    return next(filter(None, codes), 0)


def wait_for_one(client: Client, deadline: float, number: int) -> int:
    """Show a job as soon as it has ended; return its return code."""
    return int(show_when_ended(Client.get, client, deadline, number).return_code or 0)


class Progress:
    """How far the jobs are that filters select, shown on a terminal whenever it is called."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._began = client.deadline(0)
        self._done_before = -1          # those that had ended when it began

    def __call__(self, counts: Counts) -> None:
        """Show how many of all are done and failed, and how long the others may take."""
        if self._done_before < 0:
            self._done_before = counts.done
        text = f"{counts.done} of {counts.done + counts.left} jobs done, {counts.failed} failed"
        since = counts.done - self._done_before
        if since and counts.left:
            seconds = (self._client.deadline(0) - self._began) * counts.left / since
            text += f", about {round(seconds)} s left"
        progress(text)


def cancel(client: Client, options: argparse.Namespace) -> int:
    """Cancel jobs and show them, or all that filters select and say how many."""
    query = ids_or_filters(options)
    if not query:
        return change_each(Client.cancel, client, options)
    if sys.stdin and sys.stdin.isatty() and not options.yes:
        role = client.status().you["role"]
        asked = query if role == OPERATOR else {"by": "me", **query}
        counts = client.count(**asked)
        question = f"cancel {counts.left} jobs, of which {counts.running} run? [y/N] "
        if may(role, USER) and not agreed(question):
            say("oqc: nothing is cancelled")
            return EX_FAILED
    return show(client.raw().cancel(**query))


def agreed(question: str) -> bool:
    """Return whether somebody at the terminal says yes."""
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def paged(options: argparse.Namespace) -> Dict[str, str]:
    """Return the filters among the flags, and those that ask for a page."""
    return given(options, (*FILTERS, "limit", "after", "order"))


def list_jobs(client: Client, options: argparse.Namespace) -> int:
    """Show all jobs, or a page of them."""
    return show(shown(client).list(**paged(options)))


def show_results(client: Client, options: argparse.Namespace) -> int:
    """Show jobs with their results."""
    terminal = sys.stdout.isatty()
    name = options.format or ("table" if terminal else "ndjson")
    pieces = client.raw(FORMATS[name]).results(**paged(options))
    if terminal:        # a CR there is shown
        pieces = (piece.replace(b"\r\n", b"\n") for piece in pieces)
    return show(pieces)


def show_status(client: Client, options: argparse.Namespace) -> int:
    """Show the state of the server; on a terminal also which commands this key may carry out."""
    show_all(Client.status, client, options)
    if sys.stdout.isatty():
        you = client.status().you
        names = [name for name, command in COMMANDS.items() if may(you["role"], command.role)]
        write(f"\n{you['name']} ({you['role']}) may: {', '.join(names)}\n".encode())
    return 0


def prune(client: Client, options: argparse.Namespace) -> int:
    """Delete the jobs that ended longer ago than an age."""
    return show(client.raw().prune(options.older_than))


# The command line

ADD = """\
With JOB - every line of standard input is a job. With --seed SEED (or OQC_SEED) the n-th job of
standard input, counted from 0, gets SEED + n, and 0 follows after 9223372036854775807: with one
seed for all jobs all would use the same random numbers, so that their errors are alike and a fit
through them is misled.

With --wait the command ends as the job does: it writes the job's result to standard output and its
runtime_error to standard error, and exits with its return code. With JOB - and --tag a line has in
place of the result the whole record, with its id, job, numbers and result, as of `results`. Without
--tag the command can be a runtime of another server:
--runtime 'far=python3 -m oqc add - --wait --server http://far:12021 --key-file far.key'
It exits with 75 (try again) if no job was added because the server cannot be reached, is stopping
or is full. SIGTERM cancels the jobs that have not ended. After Ctrl-C they go on.

"""
HELP = """\
The key is read from --key-file, else from OQC_API_KEY. A server on this machine may take the
documented key; then neither is needed. The answer is a table on a terminal, else JSON.

Exit status: 0 success; 1 the server refused; 2 wrong usage; 69 the server cannot be reached; 77 no
key or a wrong one; 78 invalid settings; 130 Ctrl-C. A command that waits for jobs exits with the
first return code that is not 0, in the order of the jobs, or with 124 if a job has not ended when
the time is over. While the server cannot be reached, for instance because it is restarted, the
command asks again.
"""
# Each command, the method of a client that it is, and what of the answer is shown.
COMMANDS = {
    "add": Command(
        "JOB", "add a job, or with - each line of standard input; with --wait show results",
        add, "job --mode --shots --seed --return-code --tag --note --runtime --priority --wait",
        ADD, USER),
    "get": Command("ID", "show jobs", functools.partial(show_each, Client.get), "ids"),
    "list": Command("", "show all jobs, those that flags select, or a page of them",
                    list_jobs, f"{FILTER_FLAGS} --limit --after --order"),
    "wait": Command("ID", "wait for jobs and show each as soon as it has ended; or for all that "
                          "flags select, and show them then",
                    wait, f"[ids] {LASTING_FLAGS} --seconds"),
    "cancel": Command("ID", "cancel jobs, or all that flags select and that have not ended",
                      cancel, f"[ids] {FILTER_FLAGS} --yes", role=USER),
    "rerun": Command("ID", "add jobs again, as new ones: the same job, mode, shots, seed and tag",
                     functools.partial(change_each, Client.rerun), "ids", role=USER),
    "result": Command("ID", "show the results of jobs: what their runtimes wrote",
                      functools.partial(show_each, Client.result), "ids"),
    "results": Command("", "show jobs with their results and P(1), a line each: a sweep as a table",
                       show_results, f"{FILTER_FLAGS} --format --limit --after --order"),
    "details": Command("ID", "show the attempts at jobs, their tags and notes, what they wait for",
                       functools.partial(show_each, Client.details), "ids"),
    "log": Command("ID", "show what the runtimes of jobs wrote on standard error",
                   show_logs, "ids --follow"),
    "prune": Command("--older-than AGE", "delete the jobs that ended longer ago than AGE",
                     prune, "--older-than", role=OPERATOR),
    "runtimes": Command("", "show the runtimes: their states, modes and jobs",
                        functools.partial(show_all, Client.runtimes)),
    "pause": Command("NAME", "pause a runtime: it starts no more jobs",
                     functools.partial(change_runtime, Client.pause), "name --reason",
                     role=OPERATOR),
    "resume": Command("NAME", "resume a runtime: it starts jobs again",
                      functools.partial(change_runtime, Client.resume), "name", role=OPERATOR),
    "status": Command("", "show how many jobs wait, run and have ended", show_status),
}


def duration(text: str) -> float:
    """Return the SECONDS of a flag; without any, as in a bare --wait, they have no end."""
    return decimal(0, 10 ** 9, text) if text else math.inf


ARGUMENTS: Dict[str, Dict[str, Any]] = {
    "ids": {
        "metavar": "ID", "nargs": "+", "type": functools.partial(whole, 1, 2 ** 63 - 1),
        "help": "the id of a job"},
    "[ids]": {
        "metavar": "ID", "nargs": "*", "type": functools.partial(whole, 1, 2 ** 63 - 1),
        "help": "the id of a job"},
    "job": {
        "metavar": "JOB",
        "help": 'pulses such as "X(90), Y(180)"; - reads jobs from standard input, one a line'},
    "name": {"metavar": "NAME", "help": "the name of a runtime"},
    "--mode": {"help": "verbatim, simulation or echo; add also reads OQC_MODE"},
    "--shots": {"help": "how many times to measure, 0 to 1000000 [OQC_SHOTS]"},
    "--seed": {"help": "seed of the random numbers; with JOB - each job gets another, see below "
                       "[OQC_SEED]"},
    "--return-code": {
        "help": "return code of an echo, 0 to 255 [OQC_RETURN_CODE]"},
    "--wait": {
        "metavar": "SECONDS", "nargs": "?", "type": duration,
        "help": "wait until the job has ended, with =SECONDS at most so long"},
    "--seconds": {"type": duration, "default": math.inf,
                  "help": "wait at most so long [default: without end]"},
    "--follow": {"action": "store_true",
                 "help": "go on with what is written, until the job has ended"},
    "--tag": {"help": "a name for what they belong to, such as a sweep: letters, digits, ., _, -"},
    "--note": {"metavar": "JSON",
               "help": "an object that is kept with them, such as '{\"sample\": \"A\"}'"},
    "--priority": {"metavar": "N",
                   "help": "-100 to 100, 0 if not given; above 0 takes an operator's key"},
    "--runtime": {"metavar": "NAME", "help": "the runtime: that is to run them, or that did"},
    "--state": {"help": "only jobs in this state: waiting, running, ended"},
    "--by": {"metavar": "NAME", "help": "only jobs that came with a key of this name; me: yours"},
    "--since": {"metavar": "TIME",
                "help": "only jobs added since then: 2026-11-23T17:19 (UTC), its beginning, or an "
                        "age such as 90d, 12h, 30m or 0s"},
    "--until": {"metavar": "TIME", "help": "only jobs added before"},
    "--yes": {"action": "store_true", "help": "do not ask, also on a terminal"},
    "--status": {"help": "only jobs with this status: Starting, Retrying, Success, Runtime Error"},
    "--format": {"choices": tuple(FORMATS),
                 "help": "of what is shown [default: table on a terminal, else ndjson]"},
    "--limit": {"help": "show at most so many jobs, 1 to 10000"},
    "--after": {"help": "only jobs that follow this id in the list"},
    "--order": {"help": "asc (oldest job first) or desc"},
    "--older-than": {"metavar": "AGE", "required": True, "help": "such as 90d, 12h, 30m or 0s"},
    "--reason": {"help": "why it is paused; shown with the runtime"},
    "--server": {"metavar": "URL", "help": f"URL of the server [OQC_SERVER; default: {LOCAL}]"},
    "--key-file": {
        "metavar": "FILE",
        "help": "file with a key, or one line of a keys file, for you alone to read "
                "[OQC_KEY_FILE]"},
    "--ca": {
        "metavar": "FILE",
        "help": "certificates (PEM) to trust, in place of the system's [OQC_CA]"},
}


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the commands."""
    parser = argparse.ArgumentParser(prog="oqc", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, description=command.description, epilog=command.notes + HELP,
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        subparser.set_defaults(run=command.run)
        for argument in [*command.takes.split(), "--server", "--key-file", "--ca"]:
            subparser.add_argument(argument.strip("[]"), **ARGUMENTS.get(argument, {}))
    return parser


def run(arguments: Sequence[str]) -> int:
    """Carry out a command that asks a server; return the exit status. Raise ConfigError."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    # A bare --wait must not take the job that stands behind it for its seconds.
    arguments = ["--wait=" if argument == "--wait" else argument for argument in arguments]
    options = command_line().parse_args(arguments)
    try:
        client = Client(options.server, key_file=options.key_file, ca=options.ca,
                        report=lambda reason: say(f"oqc: {reason}"))
        return int(options.run(client, options))
    except Failed as error:
        if str(error):
            say(f"oqc: {error}")
        return error.exit_status
    except OSError as error:        # only standard input is left
        say(f"oqc: standard input: {error.strerror}")
        return EX_FAILED
    finally:
        progress("")
