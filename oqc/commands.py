"""The commands that ask a server, for people without curl; and one oqc as a runtime of another."""
import argparse
import codecs
import contextlib
import functools
import json
import math
import os
import re
import secrets
import signal
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple
from urllib.parse import quote, urlencode

from oqc.client import ANSWER_TIMEOUT, LOCAL, MOST_WAIT, Client, Failed, connect, decoded
from oqc.config import Command, decimal, whole
from oqc.keys import OPERATOR, USER, may

EX_FAILED, EX_USAGE, EX_TEMPFAIL = 1, 2, 75         # sysexits.h, and what argparse ends with
NOT_ENDED = 124                     # timeout(1)
INTERRUPTED, BROKEN_PIPE, TERMINATED = 128 + 2, 128 + 13, 128 + 15      # the shell
CANCEL_TIMEOUT = 1.0                    # seconds for a cancel after TERM: KILL may come after two
SEEDS = 2 ** 63                     # how many there are: 0 to 2**63 - 1
BATCH = 1000                        # jobs of standard input in one request
BATCH_BYTES = 1 << 18               # and bytes of them
ERASE = "\r\x1b[K"                  # makes a terminal empty the line it is on
SHOWN_EVERY = 1                     # seconds from one progress of many jobs to the next
LASTING = ("mode", "runtime", "tag", "by", "since", "until")     # what a job keeps
FILTERS = ("status", "state", *LASTING)
LASTING_FLAGS = " ".join(f"--{name}" for name in LASTING)
FILTER_FLAGS = f"--status --state {LASTING_FLAGS}"
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


def visible_lines(text: str) -> bytes:
    """Return the same of several lines, as it is written."""
    return visible(text, "\t\n").encode()


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


def show(client: Client, path: str, seconds: float = ANSWER_TIMEOUT) -> int:
    """Write what the server has at a path, for a terminal as a table in which nothing moves the
    cursor; return 0. `seconds`: until the answer comes, and between two pieces of it."""
    terminal = sys.stdout.isatty()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")      # a piece may cut a character
    for piece in client.stream("GET", path, text=terminal, seconds=seconds):
        write(visible_lines(decoder.decode(piece)) if terminal else piece)
    return 0


def show_change(client: Client, path: str, answer: bytes) -> int:
    """Write the answer to a change, for a terminal the table at a path; return 0."""
    if answer and not sys.stdout.isatty():
        return write(answer)
    return show(client, path)


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
            if code != EX_FAILED:
                raise
            say(f"oqc: {error}")
        first = first or code
    return first


def describe(numbers: Sequence[int]) -> str:
    """Return what to call these jobs."""
    if len(numbers) == 1:
        return f"job {numbers[0]}"
    return f"{len(numbers)} jobs, {numbers[0]} to {numbers[-1]}"


def show_ended(client: Client, deadline: float, number: int, part: str = "",
               label: str = "") -> int:
    """Write a job, or a part of it and its error, as soon as it has ended; return its return code.

    Return NOT_ENDED if it has not ended at the deadline. `label` stands before the error.
    """
    job = client.ended_job(number, deadline)
    if job is None:
        say(f"oqc: job {number} has not ended yet; it goes on")
        return NOT_ENDED
    path = f"/jobs/{number}/{part}"
    text = sys.stdout.isatty()
    answer = client.patiently(lambda _: client.ask("GET", path, text=text), deadline)
    write(visible_lines(answer.decode("utf-8", "replace")) if text else answer)
    if part and job["runtime_error"]:
        say(label + job["runtime_error"])
    return int(job["return_code"])


# add

class Adding:
    """The jobs of one `oqc add`, from the command line or from standard input."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self.client = client
        self.many = options.job == "-"
        self.waits = options.wait is not None
        self.members = job_members(options)
        self.numbers: List[int] = []        # the ids of those that are added

    def add(self, batch: List[Line]) -> bytes:
        """Add jobs, all or none; return the answer. Raise CommandFailed."""
        held = [signal.SIGTERM] if self.waits else []
        signal.pthread_sigmask(signal.SIG_BLOCK, held)      # until there are ids to be cancelled
        try:
            jobs = [{"job": job, **self.members, **self._seed(place)}
                    for place, (_, job) in enumerate(batch, len(self.numbers))]
            body = json.dumps(jobs if self.many else jobs[0]).encode()
            # With a key: on a connection that was closed meanwhile it is sent again.
            answer = self.client.ask("POST", "/jobs/add/", body,
                                     idempotency_key=secrets.token_hex(16))
            added = decoded(answer)
            self.numbers += [job["id"] for job in (added if self.many else [added])]
        except Failed as error:
            raise self._failed(error, batch) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        return answer

    def _seed(self, place: int) -> Dict[str, Any]:
        """Return the member seed of a job of standard input, by its place among all, from 0.

        With one seed for all of them their random numbers would be the same, and so their errors.
        A seed that is out of range is left to the server to refuse.
        """
        seed = self.members.get("seed")
        if not self.many or not isinstance(seed, int) or seed >= SEEDS:
            return {}
        return {"seed": (seed + place) % SEEDS}

    def _failed(self, error: Failed, batch: List[Line]) -> CommandFailed:
        """Return why a batch was not added, by its lines, and what was added before it."""
        reason = str(error)
        place = re.match(r"\[([0-9]+)\]: ", reason)         # of a job in the batch
        if place:
            line, _ = batch[int(place[1])]
            reason = f"line {line}: {reason[place.end():]}"
        if error.sent:
            reason += "; it may or may not have been added"
        code = error.exit_status
        if self.numbers:
            first, _ = batch[0]
            reason += f"; added {describe(self.numbers)}, before line {first}"
        elif self.waits and error.passing and not error.sent:
            code = EX_TEMPFAIL
        return CommandFailed(reason, code)

    def show_result(self, deadline: float, number: int) -> int:
        """Write the result of a job as soon as it has ended; return its return code."""
        label = f"job {number}: " if len(self.numbers) > 1 else ""
        return show_ended(self.client, deadline, number, "result/", label)

    def cancel(self) -> None:
        """Cancel all jobs, soon."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.client.connection.close()          # it may be in the middle of an answer
        for number in reversed(self.numbers):   # so that none begins because another was cancelled
            with contextlib.suppress(Failed):   # it has ended, or ends after this program
                self.client.ask("DELETE", f"/jobs/{number}/", seconds=CANCEL_TIMEOUT)


def add(client: Client, options: argparse.Namespace) -> int:
    """Add a job, or those on standard input; with --wait end as they do."""
    adding = Adding(client, options)
    try:
        if adding.waits:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
            return add_and_wait(adding, options)
        if adding.many:
            return add_lines(adding)
        answer = adding.add([(0, options.job)])
        return show_change(client, f"/jobs/{adding.numbers[0]}/", answer)
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
    for batch in batches():
        answer = adding.add(batch)
        if not terminal:
            write("".join(json.dumps(job) + "\n" for job in decoded(answer)).encode())
        progress(f"{len(adding.numbers)} jobs added")
    return write(f"added {describe(adding.numbers)}\n".encode() if terminal else b"")


def add_and_wait(adding: Adding, options: argparse.Namespace) -> int:
    """Add jobs and show their results; return the first return code that is not 0."""
    deadline = adding.client.deadline(options.wait)
    for batch in batches() if adding.many else [[(0, options.job)]]:
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


def batches() -> Iterator[List[Line]]:
    """Yield the jobs on standard input, as many at a time as are sent together.

    Raises OSError, and Failed if there is none.
    """
    batch: List[Line] = []
    size = 0
    for number, line in enumerate(open(0, "rb", closefd=False), 1):
        if not line.strip():
            continue
        if batch and (len(batch) == BATCH or size + len(line) > BATCH_BYTES):
            yield batch
            batch = []
            size = 0
        batch.append((number, line.decode("utf-8", "replace").rstrip("\r\n")))
        size += len(line)
    if not batch:
        raise Failed("standard input: expected a job on each line, found none")
    yield batch


# The other commands

def show_jobs(part: str, client: Client, options: argparse.Namespace) -> int:
    """Show jobs, or a part of each."""
    return for_each(lambda number: show(client, f"/jobs/{number}/{part}"), options.ids)


def show_logs(client: Client, options: argparse.Namespace) -> int:
    """Show what was said in the attempts at jobs; with --follow while they run."""
    if not options.follow:
        return show_jobs("log/", client, options)
    return for_each(lambda number: show(client, f"/jobs/{number}/log/?follow=1", math.inf),
                    options.ids)


def filters(options: argparse.Namespace) -> Dict[str, str]:
    """Return the filters among the flags, as the server takes them."""
    return given(options, FILTERS)


def given(options: argparse.Namespace, names: Sequence[str]) -> Dict[str, str]:
    """Return those of these flags that are given. The server refuses one that is empty: left out,
    as of a variable that is not set, it would select more than is meant."""
    flags = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in flags.items() if value is not None}


def ids_or_filters(options: argparse.Namespace) -> Dict[str, str]:
    """Return the filters of a command that takes them in place of ids, {} for ids; raise
    CommandFailed for both or neither."""
    query = filters(options)
    if bool(query) == bool(options.ids):
        raise CommandFailed("expected the ids of jobs, or flags such as --tag that say which",
                            EX_USAGE)
    return query


def wait(client: Client, options: argparse.Namespace) -> int:
    """Show jobs as soon as they have ended; return the first return code that is not 0."""
    query = ids_or_filters(options)
    deadline = client.deadline(options.seconds)
    if not query:
        return for_each(lambda number: show_ended(client, deadline, number), options.ids)
    first = client.patiently(lambda _: first_job(client, query), deadline)
    if "since" in query:
        query["since"] = first["created_time"]      # an age would soon leave out the first ones
    open_jobs = Progress(client, urlencode(query)).wait(deadline)
    if open_jobs:
        say(f"oqc: {open_jobs} jobs have not ended yet; they go on")
        return NOT_ENDED
    path = "/jobs/list/?" + urlencode(query)
    ended = decoded(client.ask("GET", path))
    if sys.stdout.isatty():
        show(client, path)
    else:
        write("".join(json.dumps(job) + "\n" for job in ended).encode())
    codes = [int(job["return_code"] or 0) for job in ended]
    return next(filter(None, codes), 0)


def first_job(client: Client, query: Dict[str, str]) -> Any:
    """Return the first job that filters select; raise Failed if there is none."""
    jobs = decoded(client.ask("GET", "/jobs/list/?" + urlencode({**query, "limit": 1})))
    if not jobs:
        raise Failed("no job matches")
    return jobs[0]


class Progress:
    """How far the jobs are that filters select, shown on a terminal."""

    def __init__(self, client: Client, query: str) -> None:
        self.client = client
        self.path = f"/status/?{query}&wait="
        self.left = 0                   # jobs that had not ended when the server was last asked
        self._patience = SHOWN_EVERY if sys.stderr.isatty() else MOST_WAIT
        self._began = client.deadline(0)
        self._done_before = -1          # those that had ended when it began

    def wait(self, deadline: float) -> int:
        """Wait until all have ended; return how many have not at the deadline."""
        self.client.patiently(self._ask, deadline)
        return self.left

    def _ask(self, seconds: int) -> Optional[bool]:
        """Return True if all have ended; None if not within so many seconds."""
        answer = self.client.ask("GET", f"{self.path}{min(seconds, self._patience)}")
        counts = decoded(answer)["jobs"]
        self.left = left_of(counts)
        progress(self._text(counts["succeeded"] + counts["failed"], counts["failed"]))
        return None if self.left else True

    def _text(self, done: int, failed: int) -> str:
        """Return how many of all are done and failed, and how long the others may take."""
        if self._done_before < 0:
            self._done_before = done
        text = f"{done} of {done + self.left} jobs done, {failed} failed"
        since = done - self._done_before
        if since and self.left:
            seconds = (self.client.deadline(0) - self._began) * self.left / since
            text += f", about {round(seconds)} s left"
        return text


def left_of(counts: Dict[str, int]) -> int:
    """Return how many jobs have not ended, of the counts of a status."""
    return counts["waiting"] + counts["running"] + counts["retrying"]


def cancel(client: Client, options: argparse.Namespace) -> int:
    """Cancel jobs and show them, or all that filters select and say how many."""
    query = ids_or_filters(options)
    if not query:
        return for_each(functools.partial(cancel_job, client), options.ids)
    if sys.stdin and sys.stdin.isatty() and not options.yes:
        role = decoded(client.ask("GET", "/status/"))["you"]["role"]
        asked = query if role == OPERATOR else {"by": "me", **query}
        counts = decoded(client.ask("GET", f"/status/?{urlencode(asked)}"))["jobs"]
        question = f"cancel {left_of(counts)} jobs, of which {counts['running']} run? [y/N] "
        if may(role, USER) and not agreed(question):
            say("oqc: nothing is cancelled")
            return EX_FAILED
    return write(client.ask("POST", f"/jobs/cancel/?{urlencode(query)}", seconds=math.inf))


def agreed(question: str) -> bool:
    """Return whether somebody at the terminal says yes."""
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def rerun(client: Client, options: argparse.Namespace) -> int:
    """Add jobs that are to be run again as new ones, and show those."""
    return for_each(functools.partial(rerun_job, client), options.ids)


def rerun_job(client: Client, number: int) -> int:
    """Add a job again and show the new one; return 0."""
    answer = client.ask("POST", f"/jobs/{number}/rerun/", idempotency_key=secrets.token_hex(16))
    return show_change(client, f"/jobs/{decoded(answer)['id']}/", answer)


def cancel_job(client: Client, number: int) -> int:
    """Cancel a job and show it; return 0."""
    path = f"/jobs/{number}/"
    return show_change(client, path, client.ask("DELETE", path))


def list_jobs(client: Client, options: argparse.Namespace) -> int:
    """Show all jobs, or a page of them."""
    page = given(options, ("limit", "after", "order"))
    return show(client, "/jobs/list/?" + urlencode({**filters(options), **page}))


def status(client: Client, _: argparse.Namespace) -> int:
    """Show the state of the server; on a terminal also which commands this key may carry out."""
    show(client, "/status/")
    if sys.stdout.isatty():
        you = decoded(client.ask("GET", "/status/"))["you"]
        names = [name for name, command in COMMANDS.items() if may(you["role"], command.role)]
        write(f"\n{you['name']} ({you['role']}) may: {', '.join(names)}\n".encode())
    return 0


def prune(client: Client, options: argparse.Namespace) -> int:
    """Delete the jobs that ended longer ago than an age."""
    path = f"/jobs/list/?older-than={quote(options.older_than)}"
    return write(client.ask("DELETE", path, seconds=math.inf))


def switch(action: str, client: Client, options: argparse.Namespace) -> int:
    """Pause a runtime, or resume it, and show it."""
    reason = getattr(options, "reason", None)       # resume takes none
    body = json.dumps({"reason": reason}).encode() if reason else b""
    path = f"/runtimes/{quote(options.name, safe='')}/{action}/"
    return show_change(client, "/runtimes/", client.ask("POST", path, body))


# The command line

ADD = """\
With JOB - every line of standard input is a job. With --seed SEED (or OQC_SEED) the n-th job of
standard input, counted from 0, gets SEED + n, and 0 follows after 9223372036854775807: with one
seed for all jobs all would use the same random numbers, so that their errors are alike and a fit
through them is misled.

With --wait the command ends as the job does: it writes the job's result to standard output and its
runtime_error to standard error, and exits with its return code. So the command can be a runtime of
another server:
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
COMMANDS = {
    "add": Command(
        "JOB", "add a job, or with - each line of standard input; with --wait show results",
        add, "job --mode --shots --seed --return-code --tag --note --runtime --priority --wait",
        ADD, USER),
    "get": Command("ID", "show jobs", functools.partial(show_jobs, ""), "ids"),
    "list": Command("", "show all jobs, those that flags select, or a page of them",
                    list_jobs, f"{FILTER_FLAGS} --limit --after --order"),
    "wait": Command("ID", "wait for jobs and show each as soon as it has ended; or for all that "
                          "flags select, and show them then",
                    wait, f"[ids] {LASTING_FLAGS} --seconds"),
    "cancel": Command("ID", "cancel jobs, or all that flags select and that have not ended",
                      cancel, f"[ids] {FILTER_FLAGS} --yes", role=USER),
    "rerun": Command("ID", "add jobs again, as new ones: the same job, mode, shots, seed and tag",
                     rerun, "ids", role=USER),
    "result": Command("ID", "show the results of jobs: what their runtimes wrote",
                      functools.partial(show_jobs, "result/"), "ids"),
    "details": Command("ID", "show the attempts at jobs, their tags and notes, what they wait for",
                       functools.partial(show_jobs, "details/"), "ids"),
    "log": Command("ID", "show what the runtimes of jobs wrote on standard error",
                   show_logs, "ids --follow"),
    "prune": Command("--older-than AGE", "delete the jobs that ended longer ago than AGE",
                     prune, "--older-than", role=OPERATOR),
    "runtimes": Command("", "show the runtimes: their states, modes and jobs",
                        lambda client, _: show(client, "/runtimes/")),
    "pause": Command("NAME", "pause a runtime: it starts no more jobs",
                     functools.partial(switch, "pause"), "name --reason", role=OPERATOR),
    "resume": Command("NAME", "resume a runtime: it starts jobs again",
                      functools.partial(switch, "resume"), "name", role=OPERATOR),
    "status": Command("", "show how many jobs wait, run and have ended",
                      status),
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
        client = connect(options.server, options.key_file, options.ca,
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
