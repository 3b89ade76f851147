"""Escape untrusted text in CSV cells and Markdown."""

import re

from nemo_lfr.errors import printable

# A cell that starts with one of these characters, possibly after whitespace, is a formula in some spreadsheet program.
# The characters also have full-width forms.
FORMULA = re.compile(r"[\s\x00-\x1f\u200b-\u200f\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|-", re.IGNORECASE | re.ASCII)
MARKUP = {char: f"\\{char}" for char in "\\`*[]|!~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def plain_cell(text: str) -> str:
    """Escape text for a CSV cell so that spreadsheets do not evaluate it.

    Text that would be a formula gets an apostrophe at the start. A number is unchanged. Control characters are
    replaced by "?".
    """
    formula = FORMULA.match(text) or text[:1] in ("\t", "\r")
    text = "".join(char if char.isprintable() or "\ud800" <= char <= "\udfff" else "?" for char in text)
    return f"'{text}" if formula and not NUMBER.fullmatch(text) else text


def escape_markdown(text: str) -> str:
    """Escape text so that a Markdown viewer shows the text literally, on one line."""
    text = "".join(MARKUP.get(char, char) for char in printable(text.replace("\n", " ")))
    # Viewers turn plain addresses into links, and some characters at the start of a line into headings or lists.
    text = re.sub(r"(?i)(:)(//)|(www)(\.)", lambda match: "&#58;//" if match[1] else f"{match[3]}&#46;", text)
    text = text.replace("@", "&#64;")
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word, an underscore is literal
    return re.sub(r"^(\s*\d*)([#+.)=-])(?=[\s#=-]|$)", r"\1\\\2", text)


def code_fence(text: str) -> str:
    """Return a code fence that is longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
