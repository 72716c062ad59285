"""One-qubit physics: rotations, the state, its Bloch vector, shots, and a device that is not perfect. Pure.

Angles are whole degrees. The axes' rotations are exp(-i theta P / 2) for the Pauli matrix P (Nielsen and Chuang,
Quantum Computation and Quantum Information, section 4.2), applied left to right to a qubit that starts in |0>.
"""
import math
import random
from typing import Any, Dict, List, NamedTuple, Tuple

Vector = Tuple[float, float, float]     # x, y, z of a Bloch vector
DECIMALS = 15                           # of what is shown: the sixteenth is rounding noise, and -0.0


class _Matrices(Dict[str, Tuple[complex, complex, complex, complex]]):
    """{"X(90)": the four entries of its matrix, row by row}, each worked out when it is first asked for."""

    def __missing__(self, pulse: str) -> Tuple[complex, complex, complex, complex]:
        cosine, sine = _half_angle(int(pulse[2:-1]))
        entries = {"X": (complex(cosine), complex(0, -sine), complex(0, -sine), complex(cosine)),
                   "Y": (complex(cosine), complex(-sine), complex(sine), complex(cosine)),
                   "Z": (complex(cosine, -sine), 0j, 0j, complex(cosine, sine))}[pulse[0]]
        self[pulse] = entries
        return entries


MATRICES = _Matrices()


def _half_angle(degrees: int) -> Tuple[float, float]:
    """(cos, sin) of half an angle in whole degrees, exact for the multiples of 180."""
    quarters, rest = divmod(degrees, 180)
    cosine, sine = math.cos(math.radians(rest / 2)), math.sin(math.radians(rest / 2))
    return ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[quarters % 4]


def amplitudes(job: str) -> Tuple[complex, complex]:
    """The amplitudes of |0> and |1> after all pulses of a job."""
    a, b = 1 + 0j, 0j
    matrices = MATRICES
    for pulse in job.split(", "):
        m00, m01, m10, m11 = matrices[pulse]
        a, b = m00 * a + m01 * b, m10 * a + m11 * b
    norm = math.sqrt(abs(a) ** 2 + abs(b) ** 2)     # rounding moves it by about 1e-16 a pulse
    return a / norm, b / norm


def bloch(a: complex, b: complex) -> Vector:
    """The Bloch vector of a state: (<X>, <Y>, <Z>) (Nielsen and Chuang, section 1.2)."""
    product = a.conjugate() * b
    return 2 * product.real, 2 * product.imag, abs(a) ** 2 - abs(b) ** 2


def path(job: str) -> List[Vector]:
    """The Bloch vectors before the first pulse of a job and after each."""
    a, b = 1 + 0j, 0j
    vectors = [bloch(a, b)]
    for pulse in job.split(", "):
        m00, m01, m10, m11 = MATRICES[pulse]
        a, b = m00 * a + m01 * b, m10 * a + m11 * b
        vectors.append(bloch(a, b))
    return vectors


def _shown(value: float) -> float:
    return round(value, DECIMALS) + 0.0         # + 0.0 makes -0.0 a 0.0


def _counts(shots: int, seed: int, p1: float) -> Dict[str, Dict[str, int]]:
    """{"counts": …} of so many readings, drawn from random.Random(seed).random(), which is the same on every Python;
    nothing for no shots."""
    draw = random.Random(seed).random
    ones = sum(draw() < p1 for _ in range(shots))
    return {"counts": {"0": shots - ones, "1": ones}} if shots else {}


def simulation(job: str, shots: int, seed: int) -> Dict[str, Any]:
    """The result of a simulation job: the exact state, and counts of `shots` readings of it."""
    a, b = amplitudes(job)
    p1 = abs(b) ** 2
    return {"shots": shots, "seed": seed, **_counts(shots, seed, p1),
            "probabilities": [_shown(1 - p1), _shown(p1)],
            "statevector": [[_shown(part.real), _shown(part.imag)] for part in (a, b)],
            "bloch": [_shown(value) for value in bloch(a, b)]}


class Device(NamedTuple):
    """A qubit that is not perfect. The defaults are of the order of a transmon of today."""

    t1_us: float = 100.0            # microseconds in which the excited state decays to 1/e; inf: never
    t2_us: float = 80.0             # microseconds in which the phase does; at most twice T1
    pulse_ns: float = 40.0          # nanoseconds that an X or a Y takes, whatever its angle; a Z takes none
    over_rotation: float = 0.002    # each X and Y turns by this share of its angle too far
    readout_0: float = 0.01         # probability to read 1 where it is 0
    readout_1: float = 0.02         # probability to read 0 where it is 1

    def check(self) -> None:
        """Raise ValueError, with one line that says which value cannot be and what can."""
        for name, value in zip(Device._fields, self):
            if math.isnan(value):
                raise ValueError(f"{name}: is not a number")
        if self.t1_us <= 0:
            raise ValueError("t1_us: expected more than 0 microseconds")
        if not 0 < self.t2_us <= 2 * self.t1_us:
            raise ValueError("t2_us: expected more than 0 microseconds, and at most twice t1_us")
        if not 0 <= self.pulse_ns < math.inf:
            raise ValueError("pulse_ns: expected 0 nanoseconds or more")
        if not -1 <= self.over_rotation <= 1:
            raise ValueError("over_rotation: expected a share from -1 to 1")
        for name in ("readout_0", "readout_1"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability from 0 to 1")


def emulation(job: str, shots: int, seed: int, device: Device) -> Dict[str, Any]:
    """The result of a job on a device: counts of `shots` readings, and the device.

    X and Y turn the Bloch vector by their angle and relax it for the length of a pulse: x and y by exp(-t / T2), z
    towards |0> by exp(-t / T1) (the Bloch equations; Nielsen and Chuang, section 8.4.1 on T1 and T2). A Z is a change
    of frame that takes no time and has no error (McKay et al., Phys. Rev. A 96, 022330, 2017).
    """
    keep_z, keep_xy = (math.exp(-device.pulse_ns / 1000 / time) for time in (device.t1_us, device.t2_us))
    x, y, z = 0.0, 0.0, 1.0
    for pulse in job.split(", "):
        axis, angle = pulse[0], math.radians(int(pulse[2:-1]))
        angle *= 1 if axis == "Z" else 1 + device.over_rotation
        cosine, sine = math.cos(angle), math.sin(angle)
        if axis == "X":
            y, z = cosine * y - sine * z, sine * y + cosine * z
        elif axis == "Y":
            x, z = cosine * x + sine * z, cosine * z - sine * x
        else:
            x, y = cosine * x - sine * y, sine * x + cosine * y
        if axis != "Z":
            x, y, z = x * keep_xy, y * keep_xy, 1 + (z - 1) * keep_z
    p1 = (1 - z) / 2 * (1 - device.readout_1) + (1 + z) / 2 * device.readout_0
    parameters = {name: value if math.isfinite(value) else None for name, value in device._asdict().items()}
    return {"shots": shots, "seed": seed, **_counts(shots, seed, p1),
            "probabilities": [_shown(1 - p1), _shown(p1)], "device": parameters}
