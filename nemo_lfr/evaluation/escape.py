"""Text of strangers in reports: cells that a spreadsheet would run, markup that a Markdown viewer would show."""

import re

from nemo_lfr.errors import printable

# What a spreadsheet takes for a formula, also in the full width of East Asian input, and the spaces it passes over.
FORMULA = re.compile(r"[\s\x00-\x1f\u200b-\u200f\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|-", re.IGNORECASE | re.ASCII)
MARKUP = {char: f"\\{char}" for char in "\\`*[]|!~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def plain_cell(text: str) -> str:
    """Return a CSV cell that no spreadsheet runs: a formula gets an apostrophe in front, a number stays.

    Control characters are replaced; bytes of names that are not text stay.
    """
    formula = FORMULA.match(text) or text[:1] in ("\t", "\r")
    text = "".join(char if char.isprintable() or "\ud800" <= char <= "\udfff" else "?" for char in text)
    return f"'{text}" if formula and not NUMBER.fullmatch(text) else text


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: without HTML, links, emphasis or cells of its own."""
    text = "".join(MARKUP.get(char, char) for char in printable(text.replace("\n", " ")))
    # Viewers make links of bare addresses, and headings or lists of what a line begins with.
    text = re.sub(r"(?i)(:)(//)|(www)(\.)", lambda match: "&#58;//" if match[1] else f"{match[3]}&#46;", text)
    text = text.replace("@", "&#64;")
    return re.sub(r"^(\s*\d*)([#+.)-])(?=\s|$)", r"\1\\\2", text)


def code_fence(text: str) -> str:
    """Return the fence of a code block that `text` cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
