"""Tests of escaping untrusted text for CSV cells, Markdown and terminals."""

import pytest

from nemo_lfr.errors import printable
from nemo_lfr.evaluation.escape import code_fence, escape_markdown, plain_cell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+cmd", "'+1+cmd"),
        ("-1+cmd", "'-1+cmd"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'?=1"),
        ("\r=1", "'?=1"),
        ("\n=1", "'?=1"),
        ("\ttext", "'?text"),
        (" =1+1", "' =1+1"),
        ("\u200b=1", "'?=1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("-2e-5", "-2e-5"),
        ("-", "-"),
        ("speech/a-b.wav", "speech/a-b.wav"),
        ("a\x1b[31m\u202e", "a?[31m?"),
        ("\udcff.wav", "\udcff.wav"),
    ],
)
def test_a_spreadsheet_runs_no_cell(text, expected):
    assert plain_cell(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "[a](javascript:alert(1))",
        "![a](http://x.y/z.png)",
        "www.x.y",
        "a@b.c",
        "a | b",
        "a\n# heading",
        "# heading",
        "1. item",
        "`code` **bold** ~~gone~~",
        "&lt;b&gt;",
        "\x1b]8;;http://x.y\x07text\u202e",
    ],
)
def test_markdown_shows_text_as_it_is(text):
    escaped = escape_markdown(text)
    assert escaped.isprintable()
    assert not any(mark in escaped for mark in ("<", ">", "://", "www.", "@", "&lt;b", "\n"))
    for char in "`*[]|!~":
        assert escaped.count(char) == escaped.count(f"\\{char}")
    assert not escaped.startswith(("# ", "1. "))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_a_ b", r"\_a\_ b"),
        ("speech/_a_b_.wav", r"speech/\_a_b\_.wav"),
        ("__bold__", r"\_\_bold\_\_"),
        ("## two", r"\## two"),
        ("---", r"\---"),
        ("===", r"\==="),
        ("- item", r"\- item"),
        ("12) item", r"12\) item"),
    ],
)
def test_markdown_at_the_start_and_underscores_are_escaped(text, expected):
    assert escape_markdown(text) == expected


@pytest.mark.parametrize(
    "text", ["nemo_lfr (bundled)", "0.5 (0.4 to 0.6)", "SI-SDR (dB)", "-3.2", "8 x 2016", "caf\u00e9"]
)
def test_plain_text_is_not_changed(text):
    assert escape_markdown(text) == plain_cell(text) == text


def test_code_fence_is_longer_than_any_in_its_content():
    assert code_fence("a") == "```" and code_fence("a ```` b") == "`````"


@pytest.mark.parametrize("char", ["\x00", "\x1b", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\n", "\udc80"])
def test_a_terminal_gets_no_control_characters(char):
    assert printable(f"a{char}b") == "a?b"
