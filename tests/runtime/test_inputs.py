"""JSON from outside: one reader for all of it, whose refusals are one line."""

from pathlib import Path

import pytest

from cm.errors import UserError
from cm.runtime import job
from cm.runtime.inputs import json_or_none, misfit, parse_json, read_json_lines, read_regular
from cm.runtime.streams import Screen

ROOT = Path(__file__).parents[2]
# They read what the same program has written a moment before, or what lies in the package.
OWN = {"inputs.py", "torture.py", "paper_tables.py", "original_checkout.py", "peers.py"}


def test_json_is_parsed_in_one_place():
    files = [path for part in ("cm", "evaluations") for path in (ROOT / part).rglob("*.py")]
    assert {p.name for p in files if "json.load" in p.read_text(encoding="utf-8")} <= OWN


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"a": ' + "1" * 400 + "}", '{"a":' + "[" * 100_000, b"\xff{}", '{} {"a": 1}'],
)
def test_no_object_is_one_line_and_none(tmp_path, text):
    with pytest.raises(UserError, match=r"^x\.json: ") as caught:
        parse_json(text, "x.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert json_or_none(tmp_path / "x.json") is None


def test_what_nothing_can_print_or_open_is_escaped():
    found = parse_json(r'{"\ud800": ["a\u0000b", "\ud83d\ude00", "\\ud800"]}', "x")
    assert found == {"\\ud800": ["a\\0b", "\N{GRINNING FACE}", "\\ud800"]}


def test_torn_lines_are_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"step": 1}\n{"st\n[2]\n\xff\n{"step": 2}\n{"step"')
    assert list(read_json_lines(tmp_path / "x.jsonl")) == [{"step": 1}, {"step": 2}]


SCHEMA = {"n": int, "x": float, "flag": bool, "names": [str], "inner": {"text": (str, None)}}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, ""),
        ({"n": 3, "x": 3, "flag": True, "names": ["a"], "inner": {"text": None}, "other": []}, ""),
        ([], "it is a list, not an object"),
        ({"n": True}, "n is True, not a whole number"),
        ({"n": 3.0}, "n is 3.0, not a whole number"),
        ({"x": float("nan")}, "x is nan, not a finite number"),
        ({"x": None}, "x is None, not a finite number"),
        ({"flag": 1}, "flag is 1, not true or false"),
        ({"names": ["a", {}]}, "names[1] is a dict, not a text"),
        ({"inner": {"text": 7}}, "inner.text is 7, not a text"),
    ],
)
def test_a_schema_says_where_a_value_differs(value, problem):
    assert misfit(value, SCHEMA) == problem


def test_a_folder_and_a_socket_are_named_by_their_path(tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError) as caught:
        read_regular(tmp_path, 10)
    assert caught.value.filename == str(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s")
    with pytest.raises(UserError, match=r"^s is a socket, not a file"):
        read_regular("s", 10)


def test_an_error_is_one_printable_line_of_bounded_length(capsys):
    for text, shown in {
        "a\nb\x1b[31mred \ud800": "error: a b\\x1b[31mred \\ud800\n",
        "x" * 9000 + "end": f"error: {'x' * 500} ... {'x' * 247}end\n",
    }.items():

        def fail(text=text):
            raise UserError(text)

        with pytest.raises(SystemExit):
            job.run_main(fail)
        assert capsys.readouterr().err == shown


def test_a_screen_without_the_characters_goes_on(tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        screen = Screen(stream)
        for text in ("12 × 3\n", "caf\udce9\n", "end\n"):
            screen.write(text)
    assert (tmp_path / "out").read_bytes().split(b"\n") == [b"12 \\xd7 3", b"caf\\udce9", b"end", b""]
