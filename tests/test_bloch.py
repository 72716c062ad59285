"""The picture of a path on the Bloch sphere: what it shows, and what there is for other jobs."""
import math
import re
from xml.etree import ElementTree

import pytest

from oqc import bloch, qubit

SVG = "{http://www.w3.org/2000/svg}"


def drawn(job):
    """The elements of a job's picture."""
    return ElementTree.fromstring(bloch.picture("Job 7", job))


def position(x, y):
    """A point of the picture in units of the sphere's radius, from its middle."""
    return (float(x) - 240) / 180, (240 - float(y)) / 180


def points(root):
    """Every point of the path, in front and behind."""
    arcs = "".join(path.get("d") for path in root.findall(f"{SVG}g")[1])
    return [position(x, y) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", arcs)]


def seen(vector):
    """Where a point is on the picture's plane."""
    return tuple(sum(a * b for a, b in zip(axis, vector)) for axis in (bloch.RIGHT, bloch.UP))


def words(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def test_the_three_directions_of_the_view_are_at_right_angles_and_of_length_one():
    view = (bloch.RIGHT, bloch.UP, bloch.TOWARDS)
    for one in view:
        for other in view:
            product = sum(a * b for a, b in zip(one, other))
            assert product == pytest.approx(float(one is other), abs=1e-6)
    right, up, towards = view
    # no mirror image
    assert right[1] * up[2] - right[2] * up[1] == pytest.approx(towards[0], abs=1e-6)


@pytest.mark.parametrize("job", [
    "X(90)", "Y(45), Z(300), X(120)", "X(0)", "X(999), Y(7), Z(1)", "X(180), X(180)"])
def test_the_path_goes_through_every_state_and_is_marked_there(job):
    root = drawn(job)
    there = points(root)
    circles = root.findall(f"{SVG}g")[2].iter(f"{SVG}circle")
    marks = [position(circle.get("cx"), circle.get("cy")) for circle in circles]
    for vector in qubit.path(job):
        for places in (there, marks):
            assert min(math.dist(seen(vector), place) for place in places) < 0.001


def test_it_goes_the_way_of_the_rotation_and_not_straight():
    halfway = qubit.path("Y(60), Z(45)")[-1]    # on the way of Z(90), 0.1 from the straight line
    way = points(drawn("Y(60), Z(90)"))
    assert min(math.dist(seen(halfway), place) for place in way) < 0.05


def test_what_is_behind_is_dashed_and_what_is_in_front_is_not():
    front, behind = drawn("X(90), Z(90)").findall(f"{SVG}g")[1]
    assert front.get("stroke-dasharray") is None and behind.get("stroke-dasharray")
    assert front.get("d") and behind.get("d")
    assert drawn("Y(45)").findall(f"{SVG}g")[1][1].get("d") == ""


def test_it_has_a_title_a_description_and_the_numbers():
    root = drawn("X(90), Z(90)")
    assert root.find(f"{SVG}title").text == "Job 7"
    assert root.find(f"{SVG}desc").text == (
        "x, y, z from (0, 0, 1): X(90) to (0, -1, 0); Z(90) to (1, 0, 0).")
    assert {"X(90), Z(90)", "x", "y", "z |0⟩", "|1⟩", "0", "1", "2"} <= set(words(root))
    assert set(root.get("aria-labelledby").split()) == {"title", "path"}


@pytest.mark.parametrize("job", [
    "X(90), Z(90)", ", ".join(["X(359)"] * 100), "Y(7), " * 20 + "Z(1)"])
def test_writing_is_not_cut_at_the_edge_in_a_wide_font(job):
    writing = drawn(job).findall(f"{SVG}g")[3]
    assert writing.get("font-family") == "monospace" and len(writing) == 3
    for text in writing:                        # DejaVu Sans Mono is 0.602 em wide
        assert float(text.get("x")) + 0.602 * 13 * len(text.text) < 480


def test_the_names_of_the_axes_stand_off_the_outline():
    middles = [position(text.get("x"), float(text.get("y")) - 5) for text in
               drawn("X(0)").findall(f"{SVG}g")[2].iter(f"{SVG}text")
               if text.text in ("x", "y", "z |0⟩", "|1⟩")]
    assert len(middles) == 4
    for middle in middles:
        assert abs(math.dist(middle, (0, 0)) - 1) > 0.1


def test_the_arrow_has_a_head_unless_it_points_at_the_viewer():
    head = drawn("Y(90)").findall(f"{SVG}path")[1].get("d")
    tip = re.findall(r"-?[\d.]+", head)[:2]
    assert math.dist(position(*tip), seen((1, 0, 0))) < 0.001
    assert head.endswith("Z") and head.count("L") == 2
    assert bloch.picture("", "Y(70), Z(30)").count('fill="#000" d=""') == 1


def test_states_at_one_place_share_a_mark():
    assert "0,2,4" in words(drawn("X(180), X(180), X(180), X(180)"))


@pytest.mark.parametrize("count, says", [(100, None), (101, "the first 100 of 101 pulses"),
                                         (100_000, "the first 100 of 100000 pulses")])
def test_of_a_long_job_it_shows_the_beginning_and_says_so(count, says):
    pulses = ["X(359)", "Y(222)"] * (count // 2) + ["Z(1)"] * (count % 2)
    text = bloch.picture("Job 7", ", ".join(pulses))
    assert len(text) < 100_000
    assert (says in text) if says else ("the first 100 of" not in text)


def test_the_server_gives_the_picture_of_a_simulation(server):
    job = server.add("X(90), Z(90)", "simulation")
    answer = server.request("GET", f"/jobs/{job['id']}/bloch.svg")
    assert answer.status == 200 and answer.headers["Content-Type"] == "image/svg+xml"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    title = f"Job {job['id']} on the Bloch sphere"
    assert answer.body.decode() == bloch.picture(title, "X(90), Z(90)")


def test_other_jobs_have_none_and_other_people_get_none(server):
    echo = server.add("X(90)", "echo")
    answer = server.request("GET", f"/jobs/{echo['id']}/bloch.svg")
    assert answer.status == 409 and "has the mode echo; only a simulation" in answer.detail
    for name in ("999999", "0", "07", "x"):
        answer = server.request("GET", f"/jobs/{name}/bloch.svg")
        assert (answer.status, answer.body) == (404, b"0\n")
    assert server.request("GET", f"/jobs/{echo['id']}/bloch.svg", key=None).status == 401
