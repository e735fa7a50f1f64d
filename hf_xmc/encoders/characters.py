"""How each character of a text is written, so that words can be split at spaces."""

from __future__ import annotations

from collections.abc import Callable

MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~"
SPACED = {ord(mark): f" {mark} " for mark in MARKS} | {ord("_"): " "}  # _ joins pairs
CONNECTORS = "\u203f\u2040\u2054\u30fb\ufe33\ufe34\ufe4d\ufe4e\ufe4f\uff3f\uff65"  # words of their own, like a hyphen
IGNORED = "\u00ad\u061c\u180e\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e" + "".join(
    map(chr, (*range(0x2060, 0x2070), 0xFEFF))
)  # joiners, soft hyphens and directions, which are invisible
BREAK, END = "\u200b", "|"  # a zero-width space between words, and how the runs show it
FIRST, LAST, MORE, JOIN = "\u200b", "\u2061", "\u2062", "\u2063"  # marks of unspaced characters
UNSPACED = (  # blocks of scripts without spaces
    ("\u0e01", "\u0eff"),  # Thai, Lao
    ("\u1000", "\u109f"),  # Burmese
    ("\u1780", "\u17ff"),  # Khmer
    ("\u1950", "\u1aaf"),  # Tai, Buginese
    ("\u1b00", "\u1b7f"),  # Balinese
    ("\u2e80", "\u312f"),  # kana, bopomofo
    ("\u31a0", "\u31ff"),
    ("\u3400", "\u4dbf"),  # Han
    ("\u4e00", "\ua4cf"),  # Han, Yi
    ("\ua980", "\ua9ff"),  # Javanese, Burmese
    ("\uaa60", "\uaadf"),  # Burmese, Tai Viet
    ("\uf900", "\ufaff"),  # Han
    ("\uff66", "\uff9f"),  # narrow kana
    ("\U0001b000", "\U0001b16f"),  # kana
    ("\U00020000", "\U0003fffd"),  # Han
)
Span = tuple[int, int]  # first character, and the one after the last


class Table(dict[int, str]):
    """The text that each character is written as, computed once."""

    def __missing__(self, code: int) -> str:
        self[code] = _written(chr(code))
        return self[code]


def _written(c: str) -> str:
    if c.isascii():
        return SPACED.get(ord(c), c)
    if c == BREAK or c in IGNORED:
        return " " if c == BREAK else ""
    if c.isspace():
        return c
    if c in CONNECTORS or not ("a" + c).isidentifier():
        return f" {c} "
    if c.isdecimal() or not any(first <= c <= last for first, last in UNSPACED):
        return c
    return f" {FIRST}{c}{LAST}" if c.isidentifier() else MORE + c + LAST


TABLE = Table()


def spans_of(text: str, table: Callable[[str], str]) -> list[Span]:
    """Return the span of each word, as :meth:`Rewriting.words` finds them."""
    spans: list[Span] = []
    extends = ""  # what the next character must be to extend the last word
    for place, c in enumerate(text):
        written = table(c)
        if not written:
            continue
        if written.isspace():
            extends = ""
        elif written[0] == " " and written[-1] == " ":
            spans.append((place, place + 1))
            extends = ""
        else:
            kind = MORE if len(written) > 1 and written[-1] == LAST else "a"
            joins = extends == kind and not written.startswith(" ")
            spans[len(spans) - joins :] = [(spans[-1][0] if joins else place, place + 1)]
            extends = kind
    return spans
