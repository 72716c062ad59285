"""One-qubit physics: rotations, state, Bloch vector, shots, a device that is not perfect. Pure.

Angles are whole degrees. A pulse is the rotation exp(-i theta P / 2) for the Pauli matrix P of its
axis (Nielsen and Chuang, Quantum Computation and Quantum Information, section 4.2). The pulses of a
job are applied left to right to a qubit that starts in |0>.
"""
import math
import random
from typing import Any, Dict, List, NamedTuple, Tuple

Vector = Tuple[float, float, float]     # x, y, z of a Bloch vector
DECIMALS = 15                           # of a result: the sixteenth is rounding noise, and -0.0
ONE = 10 ** 39                          # 1 as a fixed-point number; PI likewise
PI = 3141592653589793238462643383279502884197
RATIO_MOST = 2 ** 36                    # the most that p + q of a ratio p / q may be


class _HalfAngles(Dict[int, Tuple[float, float]]):
    """{degrees from 0 to 179: (cos, sin) of half of them}, worked out when first asked for.

    Both are scaled by one factor. cos and sin rounded each to the nearest float would turn by up
    to 1.4e-16 rad too far or too little, which is 1.4e-11 after 100,000 equal pulses. A factor that
    both share does no harm, since the state is normalised at its end. So they are multiples of two
    whole numbers q and p with p / q = tan to 1e-19, which floats hold exactly. The factor is at
    most 1 and lacks 5e-6 at most: a state shrinks by e in 200,000 pulses, and a float has room for
    e**708.
    """

    def __missing__(self, degrees: int) -> Tuple[float, float]:
        angle = degrees * PI // 360
        # tan x = x / (1 - x² / (3 - x² / (5 - …))) (DLMF 4.25.1)
        below = 41 * ONE
        for odd in range(39, 0, -2):
            below = odd * ONE - angle * angle // below
        p, q = _ratio(angle, below)
        factor = math.isqrt(2 ** 106 // (p * p + q * q))
        # the products have 53 bits: nothing is rounded
        self[degrees] = (factor * q / 2 ** 53, factor * p / 2 ** 53)
        return self[degrees]


def _ratio(above: int, below: int) -> Tuple[int, int]:
    """Return the whole numbers p and q of a ratio close to above / below; p + q <= RATIO_MOST.

    p / q is the last such convergent of its continued fraction, by Euclid's algorithm, and misses
    the value by less than 1 / (q times the next q) (Hardy and Wright, An Introduction to the Theory
    of Numbers, chapter X).
    """
    last_p, last_q = 0, 1
    p, q = 1, 0
    while below:
        whole, rest = divmod(above, below)
        next_p = whole * p + last_p
        next_q = whole * q + last_q
        if next_p + next_q > RATIO_MOST:
            break
        last_p, p = p, next_p
        last_q, q = q, next_q
        above, below = below, rest
    return p, q


class _Matrices(Dict[str, Tuple[complex, complex, complex, complex]]):
    """{"X(90)": the four entries of its matrix, row by row}, worked out when first asked for.

    They are scaled as in _HalfAngles. All are kept: one for each spelling (7, 07, 007) of an axis
    and an angle, 3,330 at most.
    """

    def __missing__(self, pulse: str) -> Tuple[complex, complex, complex, complex]:
        turns, rest = divmod(int(pulse[2:-1]), 180)
        cosine, sine = HALF_ANGLES[rest]
        for _ in range(turns):      # 180 degrees more swap cos and sin of the half: exact
            cosine, sine = -sine, cosine
        entries = {
            "X": (complex(cosine), complex(0, -sine), complex(0, -sine), complex(cosine)),
            "Y": (complex(cosine), complex(-sine), complex(sine), complex(cosine)),
            "Z": (complex(cosine, -sine), 0j, 0j, complex(cosine, sine)),
        }
        self[pulse] = entries[pulse[0]]
        return self[pulse]


HALF_ANGLES = _HalfAngles()
MATRICES = _Matrices()


def amplitudes(job: str) -> Tuple[complex, complex]:
    """Return the amplitudes of |0> and |1> after all pulses of a job, normalised.

    They are right within 1e-12 after 100,000 pulses.
    """
    a, b = 1 + 0j, 0j
    matrices = MATRICES             # a local name: this loop is all that a long job takes
    for pulse in job.split(", "):
        m00, m01, m10, m11 = matrices[pulse]
        a, b = m00 * a + m01 * b, m10 * a + m11 * b
    norm = math.sqrt(_squared(a) + _squared(b))
    return a / norm, b / norm


def _squared(amplitude: complex) -> float:
    """Return |amplitude|². math.hypot and abs give another last digit on other Pythons."""
    return amplitude.real * amplitude.real + amplitude.imag * amplitude.imag


def bloch(a: complex, b: complex) -> Vector:
    """Return the Bloch vector (<X>, <Y>, <Z>) of a state (Nielsen and Chuang, section 1.2).

    It has the length 1, also where the state is not normalised.
    """
    product = a.conjugate() * b
    p0 = _squared(a)
    p1 = _squared(b)
    norm = p0 + p1
    return 2 * product.real / norm, 2 * product.imag / norm, (p0 - p1) / norm


def turned(vector: Vector, axis: str, angle: float) -> Vector:
    """Return a Bloch vector after a rotation by `angle` radians about an axis."""
    x, y, z = vector
    cosine = math.cos(angle)
    sine = math.sin(angle)
    if axis == "X":
        return x, cosine * y - sine * z, sine * y + cosine * z
    if axis == "Y":
        return cosine * x + sine * z, y, cosine * z - sine * x
    return cosine * x - sine * y, sine * x + cosine * y, z


def path(job: str) -> List[Vector]:
    """Return the Bloch vectors before the first pulse of a job and after each pulse."""
    a, b = 1 + 0j, 0j
    vectors = [bloch(a, b)]
    for pulse in job.split(", "):
        m00, m01, m10, m11 = MATRICES[pulse]
        a, b = m00 * a + m01 * b, m10 * a + m11 * b
        vectors.append(bloch(a, b))
    return vectors


def _rounded(value: float) -> float:
    return round(value, DECIMALS) + 0.0         # + 0.0 makes -0.0 a 0.0


def _readings(shots: int, seed: int, p1: float) -> Dict[str, Any]:
    """Return the members of a result that are of reading: shots, seed, counts, probabilities.

    Without shots there are no counts. They are drawn from random.Random(seed).random(), which is
    the same on every Python.
    """
    members: Dict[str, Any] = {"shots": shots, "seed": seed}
    if shots:
        draw = random.Random(seed).random
        ones = sum(draw() < p1 for _ in range(shots))
        members["counts"] = {"0": shots - ones, "1": ones}
    members["probabilities"] = [_rounded(1 - p1), _rounded(p1)]
    return members


def simulation(job: str, shots: int, seed: int) -> Dict[str, Any]:
    """Return the result of a simulation job: the exact state, and counts of `shots` readings of it.

    Probabilities are of reading 0 and 1, the state vector's members [real, imaginary].
    """
    a, b = amplitudes(job)
    return {
        **_readings(shots, seed, _squared(b)),
        "statevector": [[_rounded(part.real), _rounded(part.imag)] for part in (a, b)],
        "bloch": [_rounded(value) for value in bloch(a, b)],
    }


class Device(NamedTuple):
    """A qubit that is not perfect. The defaults are of the order of a transmon of today."""

    t1_us: float = 100.0            # microseconds in which the excited state decays to 1/e
    t2_us: float = 80.0             # microseconds in which the phase does
    pulse_ns: float = 40.0          # nanoseconds that an X or a Y takes; a Z takes none
    over_rotation: float = 0.002    # X and Y turn too far by this share of their angle
    readout_0: float = 0.01         # probability to read 1 where it is 0
    readout_1: float = 0.02         # probability to read 0 where it is 1

    def check(self) -> None:
        """Raise ValueError, with one line that says which value is invalid and what is allowed.

        T2 is at most twice T1: what decays loses its phase, too (Krantz et al., Appl. Phys. Rev. 6,
        021318, 2019, section III.B). Only the times to decay may be infinite. No comparison holds
        for a NaN.
        """
        for name, holds, expected in (
                ("t1_us", 0 < self.t1_us <= math.inf,
                 "more than 0 microseconds, inf for no decay"),
                ("t2_us", 0 < self.t2_us <= 2 * self.t1_us,
                 "more than 0 microseconds, and at most twice t1_us"),
                ("pulse_ns", 0 <= self.pulse_ns < math.inf, "0 nanoseconds or more, and finite"),
                ("over_rotation", -1 <= self.over_rotation <= 1, "a share from -1 to 1"),
                ("readout_0", 0 <= self.readout_0 <= 1, "a probability from 0 to 1"),
                ("readout_1", 0 <= self.readout_1 <= 1, "a probability from 0 to 1")):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, not {_shown(getattr(self, name))}")


def _shown(value: float) -> str:
    """Return a number as it was given: with all its digits, and 5 rather than 5.0."""
    return repr(value)[:-2] if value.is_integer() and abs(value) < 1e16 else repr(value)


def emulation(job: str, shots: int, seed: int, device: Device) -> Dict[str, Any]:
    """Return the result of a job on a device that has passed its check.

    It has counts of `shots` readings, the probabilities of reading 0 and 1, and the device, where
    null stands for an infinite time, for which JSON has no word.

    X and Y turn the Bloch vector by their angle and relax it for the length of a pulse: x and y by
    exp(-t / T2), z towards |0> by exp(-t / T1) (F. Bloch, Phys. Rev. 70, 460, 1946; Nielsen and
    Chuang, equation 7.144). A Z is a change of frame that takes no time and has no error (McKay et
    al., Phys. Rev. A 96, 022330, 2017; arXiv:1612.00858).
    """
    keep_xy = math.exp(-device.pulse_ns / 1000 / device.t2_us)
    keep_z = math.exp(-device.pulse_ns / 1000 / device.t1_us)
    vector = (0.0, 0.0, 1.0)
    for pulse in job.split(", "):
        axis = pulse[0]
        angle = math.radians(int(pulse[2:-1]))
        if axis == "Z":
            vector = turned(vector, axis, angle)
        else:
            x, y, z = turned(vector, axis, angle * (1 + device.over_rotation))
            vector = (x * keep_xy, y * keep_xy, 1 + (z - 1) * keep_z)
    # rounding makes the vector of a perfect device a little longer than 1
    z = max(-1.0, min(vector[2], 1.0))
    p1 = (1 - z) / 2 * (1 - device.readout_1) + (1 + z) / 2 * device.readout_0
    parameters = {name: value + 0.0 if math.isfinite(value) else None
                  for name, value in device._asdict().items()}
    return {**_readings(shots, seed, p1), "device": parameters}
