"""The path of a job on the Bloch sphere as a picture, the text of an SVG file. Pure."""
import math
from typing import Dict, Iterable, Iterator, List, Tuple

from oqc import qubit
from oqc.qubit import Vector

MOST = 100                          # pulses drawn: with more a picture shows nothing
NUMBERED = 20                       # states with their number beside them, and the last one
STEP = 6                            # degrees from one point of an arc to the next, at most
WIDTH = 480
HEIGHT = 564
RADIUS = 180
HEAD = 14                           # the length of the arrow's head
LETTERS = 54                        # of a line of writing, in the widest of the usual fonts

# The view: x comes towards the viewer and to the left, y goes to the right, z up.
RIGHT = (-0.5, 0.8660254, 0.0)
UP = (-0.296198, -0.1710101, 0.9396926)
TOWARDS = (0.8137977, 0.4698463, 0.3420201)
ORIGIN = (0.0, 0.0, 0.0)
X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
DOWN = (0.0, 0.0, -1.0)
AXES = (("x", X), ("y", Y), ("z |0⟩", Z), ("|1⟩", DOWN))
PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}" role="img" aria-labelledby="title path" \
font-family="sans-serif" font-size="15" fill="none" stroke-linejoin="round">
<title id="title">{title}</title>
<desc id="path">{path}</desc>
<rect width="{width}" height="{height}" fill="#fff"/>
<g stroke="#667"><circle cx="{middle}" cy="{middle}" r="{radius}"/><path d="{grid[0]}"/>\
<path stroke-dasharray="2 5" d="{grid[1]}"/><path d="{axes}"/></g>
<g stroke="#06c" stroke-width="3"><path d="{arcs[0]}"/>\
<path stroke-dasharray="5 5" d="{arcs[1]}"/></g>
<path stroke="#000" stroke-width="2" d="{arrow}"/>
<path fill="#000" d="{head}"/>
<g fill="#000">{marks}</g>
<g fill="#000" font-family="monospace" font-size="13">{writing}</g>
</svg>
"""


def picture(title: str, job: str) -> str:
    """Return an SVG of the path that an ideal qubit takes in the first MOST pulses of a job.

    What lies behind the outline of the sphere is dashed.
    """
    total = job.count(", ") + 1
    pulses = job.split(", ", MOST)[:MOST]
    shown = ", ".join(pulses)
    path = qubit.path(shown)
    story = "; ".join(f"{pulse} to {_numbers(vector)}" for pulse, vector in zip(pulses, path[1:]))
    description = f"x, y, z from (0, 0, 1): {story}."
    caption = shown
    if total > MOST:
        caption = f"the first {MOST} of {total} pulses"
        description += f" These are {caption}."
    writing = (_cut(caption, LETTERS), "0: start, 1: after the first pulse, …",
               f"{len(pulses)}: {_numbers(path[-1])}")
    return PICTURE.format(
        width=WIDTH,
        height=HEIGHT,
        radius=RADIUS,
        middle=WIDTH // 2,
        title=title,
        path=description,
        grid=_lines([_arc(Y, "X", 360), _arc(Z, "Y", 360), _arc(X, "Z", 360)]),
        arcs=_lines(_arc(start, pulse[0], int(pulse[2:-1])) for start, pulse in zip(path, pulses)),
        axes="".join(f"M{_place(ORIGIN)}L{_place(axis)}" for _, axis in AXES),
        arrow=f"M{_place(ORIGIN)}L{_place(path[-1])}",
        head=_head(path[-1]),
        marks="".join(_marks(path)),
        writing="".join(_text(20, HEIGHT - 70 + 24 * number, line)
                        for number, line in enumerate(writing)))


def _marks(path: List[Vector]) -> Iterator[str]:
    """Yield a dot with its numbers for each state, and the names of the axes."""
    places: Dict[str, List[str]] = {}
    for number, vector in enumerate(path):
        numbers = places.setdefault(_place(vector), [])
        if number <= NUMBERED or number == len(path) - 1:
            numbers.append(str(number))
    for place, numbers in places.items():
        x, y = map(float, place.split())
        yield f'<circle cx="{x}" cy="{y}" r="4"/>'
        beside, anchor = (-7, "end") if x > 300 else (7, "start")       # where there is room
        yield _text(x + beside, y + 16, _cut(",".join(numbers), 16), anchor)
    for name, axis in AXES:
        x, y = _beyond(axis)
        yield _text(x, y + 5, name, "middle")


def _beyond(axis: Vector) -> Tuple[float, float]:
    """Return where the name of an axis stands: past its end, and not on the sphere's outline."""
    middle = WIDTH / 2
    x, y = map(float, _place(axis).split())
    length = math.hypot(x - middle, y - middle)
    distance = 1.16 * length
    if distance > RADIUS - 22:
        distance = max(distance, RADIUS + 22)
    return middle + (x - middle) * distance / length, middle + (y - middle) * distance / length


def _head(end: Vector) -> str:
    """Return the head of the arrow that ends there, as the d of a path; none if it points at the
    viewer."""
    middle = WIDTH / 2
    x, y = map(float, _place(end).split())
    length = math.hypot(x - middle, y - middle)
    if length < HEAD:
        return ""
    along = (x - middle) / length
    down = (y - middle) / length
    points = [f"{x + far * along - beside * down:.1f} {y + far * down + beside * along:.1f}"
              for far, beside in ((0, 0), (-HEAD, 5), (-HEAD, -5))]
    return f"M{'L'.join(points)}Z"


def _arc(start: Vector, axis: str, degrees: int) -> List[Vector]:
    """Return the points on the way of a rotation; more than a whole turn is drawn as one."""
    degrees = min(degrees, 360)
    steps = max(1, math.ceil(degrees / STEP))
    return [qubit.turned(start, axis, math.radians(degrees * number / steps))
            for number in range(steps + 1)]


def _lines(arcs: Iterable[List[Vector]]) -> Tuple[str, str]:
    """Return what lies in front of the sphere's outline, and what behind, as the d of two paths."""
    front: List[str] = []
    behind: List[str] = []
    for arc in arcs:
        last = None                 # where the line before this one went
        for start, end in zip(arc, arc[1:]):
            side = behind if _dot(TOWARDS, start) + _dot(TOWARDS, end) < 0 else front
            if side is not last:
                side.append(f"M{_place(start)}")
            side.append(f"L{_place(end)}")
            last = side
    return "".join(front), "".join(behind)


def _dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other))


def _place(vector: Vector) -> str:
    """Return where a point is in the picture, "x y"."""
    x = WIDTH / 2 + RADIUS * _dot(RIGHT, vector)
    y = WIDTH / 2 - RADIUS * _dot(UP, vector)
    return f"{x:.1f} {y:.1f}"


def _numbers(vector: Vector) -> str:
    return f"({', '.join(f'{round(value, 4) + 0.0:g}' for value in vector)})"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 2] + " …"
