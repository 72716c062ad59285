"""The protocol lines as bytes: which lines there are, and what each means."""
import json

import pytest

from oqc import lines
from oqc.lines import Announcement, Answer, Lines


def taken(chunks, most=100):
    """The lines that are taken out of output that comes in these pieces."""
    output = bytearray()
    reader = Lines(most)
    found = []
    for chunk in chunks:
        output += chunk
        found += list(reader.take(output))
    return found, bytes(output)


@pytest.mark.parametrize("ends", [b"\n", b"\r", b"\r\n", b"\n\n\r \r"])
def test_line_feeds_and_carriage_returns_end_a_line_and_blank_ones_are_left_out(ends):
    assert taken([b"a" + ends + b"b" + ends + b"c"]) == ([(b"a", True), (b"b", True)], b"c")


def test_lines_are_the_same_however_they_are_cut_into_pieces():
    text = b"first\r\nsecond\rthird\n" + b"x" * 150 + b"\nlast\nrest"
    whole = taken([text])
    assert whole == ([(b"first", True), (b"second", True), (b"third", True), (b"x" * 100, False),
                      (b"last", True)], b"rest")
    for size in (1, 2, 3, 7, 99, 101):
        assert taken([text[at:at + size] for at in range(0, len(text), size)]) == whole


def test_a_line_that_never_ends_is_given_once_and_takes_no_room():
    found, left = taken([b"y" * 60] * 100)
    assert (found, left) == ([(b"y" * 100, False)], b"")


def read(text):
    return lines.read(text.encode(), 1024, (75,))


def test_an_answer_is_read_with_its_id_and_outcome():
    answer = read('{"id": 6, "return_code": 75, "runtime_error": "busy", "result": [1]}')
    assert isinstance(answer, Answer)
    assert (answer.id, answer.noise) == (6, b"")
    assert answer.outcome[:5] == (75, "busy", "[1]", True, True)


def test_what_stands_before_an_answer_on_its_line_is_noise():
    answer = read('100 % {"id": 6, "return_code": 0}')
    assert (answer.id, answer.noise, answer.outcome.return_code) == (6, b"100 %", 0)
    assert read('100 % {"return_code": 0}') is None
    assert read('100 % {"id": true, "return_code": 0}') is None


@pytest.mark.parametrize("noise", ["50% {a}", "{} {'b': 1}", '{"a": {"id": 5}}', "{{", "{\"id\""])
def test_braces_and_objects_before_an_answer_on_its_line_are_noise(noise):
    answer = read(noise + ' {"id": 6, "return_code": 0}')
    if noise == '{"id"':
        assert answer.outcome.return_code == 76, "half an answer, and another one"
    else:
        assert (answer.id, answer.noise, answer.outcome.return_code) == (6, noise.encode(), 0)


def test_two_answers_on_a_line_are_none():
    answer = read('{"id": 6, "return_code": 0} {"id": 7, "return_code": 0}')
    assert (answer.id, answer.outcome.return_code) == (6, 76)


def test_an_answer_inside_of_a_broken_one_is_none():
    answer = read('{"id": 6, "return_code": 0, "result": NaN, "log": {"id": 6, "return_code": 0}')
    assert (answer.id, answer.outcome.return_code) == (6, 76)


def test_a_line_of_many_braces_is_read_in_one_go():
    assert read('{"a":' * 200_000) is None
    assert read('{"a": 1} {' * 100_000) is None


@pytest.mark.parametrize("text, number", [
    ('{"result": {"id": 22}, "id": 15, "return_code": 0} x', 15),
    ('{"id": 6, "return_code": NaN}', 6), ('{"id": -3, "return_code": 0} x', -3),
    ('{"return_code": 0, "result": Infinity, "id": 12}', 12),
    ('{"result": {"id": 22, "x": NaN}, "id": 15, "return_code": 0}', 15),
    ('\ufeff{"id": 6, "return_code": 0}', 6)])
def test_of_an_answer_that_is_not_json_the_id_is_read(text, number):
    answer = read(text)
    assert (answer.id, answer.outcome.return_code, answer.outcome.result) == (number, 76, text)
    assert answer.outcome.pause is None


def test_an_id_out_of_range_is_another_one():
    assert read('{"id": 99999999999999999999, "return_code": 0}').id == 10 ** 20 - 1


@pytest.mark.parametrize("text, expected", [
    ('{"ready": true}', Announcement(True, None)),
    ('{"ready": true, "device": {"a": 1}}', Announcement(True, '{"a": 1}')),
    ('{"device": {"a": 1}, "id": 5}', Announcement(False, '{"a": 1}')),
    ('{"ready": 1}', None), ('{"device": []}', None), ('{"device": {"a": NaN}}', None),
    ('{"id": 6, "result": 1}', None), ("[1]", None), ("", None)])
def test_announcements_are_told_from_noise(text, expected):
    assert read(text) == expected


def test_of_a_line_that_is_too_long_the_id_at_its_beginning_counts():
    text = b'{"id": 6, "return_code": 0, "result": "' + b"y" * 100
    for asked in (6, 7, None):
        assert lines.read_cut(text, asked, 10).id == 6
    assert lines.read_cut(text, 6, 10).outcome.result == '"yyyyyyyyy'
    assert lines.read_cut(text.replace(b'"id": 6, ', b""), 7, 10).id == 7
    assert lines.read_cut(b"y" * 100, 6, 10) is None


@pytest.mark.parametrize("begins", [
    '{"return_code": 0, "result": {"id": 1, "a": "', '{"result": {"id": 1, "a": "',
    '{"runtime_error": "', '{"seconds": 5, "return_code": 0, "data": "'])
def test_a_line_that_is_too_long_and_names_no_question_answers_the_one_that_was_asked(begins):
    assert lines.read_cut(begins.encode() + b"y" * 100, 7, 10).id == 7


@pytest.mark.parametrize("begins", ['{"config": "', '{"t1": 5, "result": "', '{"data": {"id": 7, '])
def test_an_object_that_is_too_long_and_begins_as_no_answer_does_is_noise(begins):
    assert lines.read_cut(begins.encode() + b"y" * 100, 7, 10) is None


def test_a_result_is_measured_as_json():
    for size, code in ((1022, 0), (1023, 76)):
        answer = {"id": 1, "return_code": 0, "result": "y" * size}
        assert read(json.dumps(answer)).outcome.return_code == code


def test_a_failure_whose_result_is_too_long_keeps_its_code_and_names_the_key():
    answer = {"id": 1, "return_code": 3, "runtime_error": "warm", "result": "y" * 2000}
    assert read(json.dumps(answer)).outcome[:2] == (
        3, "warm; a result longer than result_bytes (1024); its beginning is kept")
