"""The bundled runtimes: what runs in the child, and the command that starts it.

`emulator` is a device with errors, `simulator` an exact one. Each is a program over the protocol
`lines`, for the server and on the command line.
"""
import argparse
import functools
import json
import os
import sys
from typing import Any, Dict, Optional, Sequence, Tuple

from oqc import jobs, qubit

# A child that is started with `-m oqc` could not be imported from the .pyz.
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from oqc.builtin import main; main(sys.argv[1:])"
)


def command(name: str) -> Tuple[str, ...]:
    """Return the command of a bundled runtime, from a folder and from a single file alike."""
    return (sys.executable, "-IS", "-c", START, _root(), name)


def main(arguments: Sequence[str]) -> int:
    """Run `emulator [--t1-us …]` or `simulator`; return the exit status.

    It answers the jobs that come on standard input, a JSON line each.
    """
    device = _device(arguments[0], arguments[1:])
    for line in sys.stdin.buffer:
        print(json.dumps(_answer(line, device)), flush=True)
    return 0


@functools.lru_cache(maxsize=None)
def _root() -> str:
    """Return where children import oqc from: the folder that holds oqc/, or a copy of the .pyz.

    The copy is in memory, since the file may be replaced while the server runs; without
    memfd_create(2) it is the file itself.
    """
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if not os.path.isfile(root) or not hasattr(os, "memfd_create"):
        return root
    copy = os.memfd_create("oqc.pyz")           # never closed: the kernel does that when we die
    with open(root, "rb") as source, open(copy, "wb", closefd=False) as target:
        target.write(source.read())
    return f"/proc/{os.getpid()}/fd/{copy}"


def _device(name: str, arguments: Sequence[str]) -> Optional[qubit.Device]:
    """Return the emulator's device, or None for the simulator; exit if an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog=f"oqc {name}",
        description="A runtime over the protocol lines: reads a job a line on standard input "
                    "and answers each in a line.",
    )
    if name == "simulator":
        parser.parse_args(arguments)
        return None
    for parameter, default in qubit.Device()._asdict().items():
        parser.add_argument(
            "--" + parameter.replace("_", "-"),
            type=float,
            default=default,
            help="default: %(default)s",
        )
    device = qubit.Device(**vars(parser.parse_args(arguments)))
    try:
        device.check()
    except ValueError as error:
        parser.error(str(error))
    return device


def _answer(line: bytes, device: Optional[qubit.Device]) -> Dict[str, Any]:
    """Return the answer to a question's line, from this device or, without one, an exact result."""
    number = None
    try:
        question = json.loads(line.decode("utf-8"), parse_constant=jobs.refuse_constant)
        if isinstance(question, dict):
            number = question.get("id")
        job, shots, seed = _task(question)
    except (ValueError, RecursionError) as error:
        error_text = f"not a job: {error}"
        return {"id": number, "return_code": jobs.DATAERR, "runtime_error": error_text}
    if device is None:
        result = qubit.simulation(job, shots, seed)
    else:
        result = qubit.emulation(job, shots, seed, device)
    return {"id": number, "return_code": 0, "runtime_error": None, "result": result}


def _task(question: Any) -> Tuple[str, int, int]:
    """Return job, shots and seed in a question; raise ValueError if it is none.

    Shots and seed may be left out, by people who type a question.
    """
    if isinstance(question, dict):
        members = {name: question[name] for name in ("job", "shots", "seed") if name in question}
        question = {"mode": "simulation", **members}
    submission = jobs.parse(question)
    return submission.job, submission.shots, submission.seed or 0
