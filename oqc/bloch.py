"""The path of a job on the Bloch sphere as a picture: from a job string to the text of an SVG file. Pure."""
import math
from typing import Dict, Iterable, List, Tuple

from oqc import qubit
from oqc.qubit import Vector

MOST = 100                          # pulses drawn: with more of them a picture shows nothing, and only grows
NUMBERED = 20                       # of them have their number beside them, and the last one
STEP = 6                            # degrees from one point of an arc to the next, at most
WIDTH, HEIGHT, RADIUS = 480, 540, 180
# From where one looks: x comes towards the viewer and to the left, y goes to the right, z up
RIGHT, UP, TOWARDS = ((-0.5, 0.8660254, 0.0), (-0.296198, -0.1710101, 0.9396926), (0.8137977, 0.4698463, 0.3420201))
AXES = {"X": (1.0, 0.0, 0.0), "Y": (0.0, 1.0, 0.0), "Z": (0.0, 0.0, 1.0)}
PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" \
aria-labelledby="title path" font-family="sans-serif" font-size="15" fill="none" stroke-linejoin="round">
<title id="title">{title}</title>
<desc id="path">{path}</desc>
<rect width="{width}" height="{height}" fill="#fff"/>
<g stroke="#667"><circle cx="{x}" cy="{y}" r="{radius}"/><path d="{grid[0]}"/>\
<path stroke-dasharray="2 5" d="{grid[1]}"/></g>
<g stroke="#06c" stroke-width="3"><path d="{arcs[0]}"/><path stroke-dasharray="5 5" d="{arcs[1]}"/></g>
<path stroke="#000" stroke-width="2" d="{arrow}"/>
<g fill="#000">{marks}</g>
</svg>
"""


def picture(title: str, job: str) -> str:
    """An SVG of the path that an ideal qubit takes, pulse by pulse, of the first MOST pulses of a job. What lies behind
    the sphere's outline is dashed."""
    pulses = job.split(", ", MOST)
    left_out = len(pulses) > MOST and pulses.pop().count(", ") + 1
    shown = ", ".join(pulses)
    path = qubit.path(shown)
    arcs = [_arc(start, pulse[0], int(pulse[2:-1])) for start, pulse in zip(path, pulses)]
    about = f"the first {MOST} of {MOST + left_out} pulses" if left_out else shown
    places: Dict[Tuple[str, str], List[str]] = {}
    for number, vector in enumerate(path):
        places.setdefault(_place(vector), []).extend([str(number)] * (number <= NUMBERED or number == len(pulses)))
    marks = [f'<circle cx="{x}" cy="{y}" r="4"/>' + _text(float(x) + 7, float(y) + 16, _cut(",".join(numbers), 16))
             for (x, y), numbers in places.items()]
    for name, axis in (("x", AXES["X"]), ("y", AXES["Y"]), ("z |0⟩", AXES["Z"]), ("|1⟩", (0.0, 0.0, -1.0))):
        x, y = _place((1.16 * axis[0], 1.16 * axis[1], 1.16 * axis[2]))
        marks.append(_text(float(x) - 6, float(y) + 5, name))
    marks.append(_text(20, HEIGHT - 50, _cut(about, 58)))
    marks.append(_text(20, HEIGHT - 22, f"0: start, 1: after the first pulse, …; {len(pulses)}: {_numbers(path[-1])}"))
    story = "; ".join(f"{pulse} to {_numbers(vector)}" for pulse, vector in zip(pulses, path[1:]))
    return PICTURE.format(
        width=WIDTH, height=HEIGHT, radius=RADIUS, x=WIDTH // 2, y=WIDTH // 2, title=title,
        path=f"x, y, z from (0, 0, 1): {story}." + (f" These are {about}." if left_out else ""),
        grid=_lines([_arc((0.0, 1.0, 0.0), "X", 360), _arc((0.0, 0.0, 1.0), "Y", 360), _arc((1.0, 0.0, 0.0), "Z", 360)]),
        arcs=_lines(arcs), arrow="M{} {}L{} {}".format(*_place((0.0, 0.0, 0.0)), *_place(path[-1])), marks="".join(marks))


def _arc(start: Vector, axis: str, degrees: int) -> List[Vector]:
    """The points on the way of a rotation; more than a whole turn is drawn as one."""
    steps = max(1, math.ceil(min(degrees, 360) / STEP))
    along = sum(a * b for a, b in zip(AXES[axis], start))
    (a1, a2, a3), (s1, s2, s3) = AXES[axis], start
    across = a2 * s3 - a3 * s2, a3 * s1 - a1 * s3, a1 * s2 - a2 * s1
    points = []
    for number in range(steps + 1):     # Rodrigues' formula
        angle = math.radians(min(degrees, 360) * number / steps)
        cosine, sine = math.cos(angle), math.sin(angle)
        x, y, z = (s * cosine + c * sine + a * along * (1 - cosine) for s, c, a in zip(start, across, AXES[axis]))
        points.append((x, y, z))
    return points


def _lines(arcs: Iterable[List[Vector]]) -> Tuple[str, str]:
    """What lies in front of the sphere's outline and what behind it, each as the d of a path."""
    parts: Tuple[List[str], List[str]] = ([], [])
    for arc in arcs:
        before = -1
        for start, end in zip(arc, arc[1:]):
            side = int(_along(TOWARDS, start) + _along(TOWARDS, end) < 0)
            parts[side].append(("" if side == before else "M{} {}".format(*_place(start))) + "L{} {}".format(*_place(end)))
            before = side
    return "".join(parts[0]), "".join(parts[1])


def _along(direction: Vector, vector: Vector) -> float:
    return sum(a * b for a, b in zip(direction, vector))


def _place(vector: Vector) -> Tuple[str, str]:
    """Where a point is in the picture."""
    return f"{WIDTH / 2 + RADIUS * _along(RIGHT, vector):.1f}", f"{WIDTH / 2 - RADIUS * _along(UP, vector):.1f}"


def _numbers(vector: Vector) -> str:
    return "({})".format(", ".join(f"{round(value, 4) + 0.0:g}" for value in vector))


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 2] + " …"
