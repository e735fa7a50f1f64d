"""Rewrite a text as its words and their combinations, in the same way in Python and in a chat template.

A word is a run of letters, marks and digits; any other character is a word of its own. Chinese, Japanese, Thai, Lao,
Khmer and Burmese have no spaces between words. There, each character with its vowel signs and tone marks is a word. The
runs of three and four characters, where a sign counts as one, follow the pairs of words. In a text with zero-width
spaces between words, as in Khmer, the runs show the ends of words, and whole words follow them. Inflected words share
parts, so their runs of letters can be written too: of four letters in alphabets such as Latin, and of two and three in
scripts such as Arabic, Devanagari and Hangul, whose words have fewer characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

UNKNOWN = "[UNK]"
MAX_WORDS = 512  # maximum number of words per text
MAX_LETTERS = 64  # maximum length of a word whose letters are written
UNSEEN_WORDS = 0.03  # fraction of unseen words from which the letters of words are read
ALPHABETS = "\u0590"  # Latin, Greek, Cyrillic and Armenian letters come before this one
LETTERS, FEW_LETTERS = (4,), (2, 3)  # lengths of the runs of letters, in these alphabets and in other scripts
RUNS = (3, 4)  # lengths of the runs of characters in scripts without spaces; pairs are written for all words
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


def _escaped(text: str) -> str:
    """Return a string literal of the template."""
    return "'" + "".join(f"\\U{ord(letter):08x}" for letter in text) + "'"


PROMPT = "{%- if messages | length > 1 -%}{{- messages[0].content -}}{%- endif -%}"  # a prompt comes first
SCAN = (
    f"{{%- set text = messages[-1].content.translate({SPACED}) -%}}"
    "{%- if not text.isascii() -%}{%- set scanned -%}{%- for c in text -%}"
    f"{{%- if c < {_escaped(chr(128))} -%}}{{{{ c }}}}"
    f"{{%- elif c == {_escaped(BREAK)} -%}}{{{{ ' ' }}}}"
    f"{{%- elif c in {_escaped(IGNORED)} -%}}"
    "{%- elif c.isspace() -%}{{ c }}"
    f"{{%- elif c in {_escaped(CONNECTORS)} or not ('a' ~ c).isidentifier() -%}}{{{{ ' ' ~ c ~ ' ' }}}}"
    f"{{%- elif c < {_escaped(UNSPACED[0][0])} or c.isdecimal() -%}}{{{{ c }}}}"
    f"{{%- elif {' or '.join(f'{_escaped(a)} <= c <= {_escaped(b)}' for a, b in UNSPACED)} -%}}"
    f"{{{{ ' ' ~ {_escaped(FIRST)} ~ c ~ {_escaped(LAST)} if c.isidentifier()"
    f" else {_escaped(MORE)} ~ c ~ {_escaped(LAST)} }}}}"
    "{%- else -%}{{ c }}{%- endif -%}{%- endfor -%}{%- endset -%}"
    f"{{%- set text = scanned.replace({_escaped(LAST + MORE)}, '').replace({_escaped(LAST)}, ' ')"
    f".replace({_escaped(MORE)}, ' ') -%}}{{%- endif -%}}"
    f"{{%- set words = text.split()[:{MAX_WORDS}] -%}}"
)
_NEXT, _BREAK = f"{LAST} {FIRST}", "\u2064"  # between unspaced characters; a zero-width space
SCAN_WITH_ENDS = (
    SCAN.replace("{%- if", f"{{%- set ends = {_escaped(BREAK)} in text -%}}{{%- if", 1)
    .replace(f"{_escaped(BREAK)} -%}}{{{{ ' ' }}}}", f"{_escaped(BREAK)} -%}}{{{{ {_escaped(_BREAK)} }}}}", 1)
    .replace(
        f".replace({_escaped(LAST)}",
        f".replace({_escaped(_NEXT)}, {_escaped(f' {FIRST}{JOIN}')} if ends else {_escaped(_NEXT)})"
        f".replace({_escaped(f'{_BREAK} {FIRST}')}, {_escaped(f' {FIRST}{END}')})"
        f".replace({_escaped(_BREAK)}, ' ').replace({_escaped(LAST)}",
    )
)
PAIRS = (
    f"{{{{- words | join(' ') or '{UNKNOWN}' -}}}}"  # a text without a word becomes one unknown token
    "{%- for i in range(1, words | length) %} {{ words[i - 1] }}_{{ words[i] }}{%- endfor -%}"
)
_RUNS = (
    f" if {_escaped(FIRST)} in part -%}}"
    f"{{%- set run = '[' ~ part.split({_escaped(FIRST)})[1:] | join ~ ']' -%}}{{%- for size in {[*RUNS]} -%}}"
    "{%- for i in range(run | length - size + 1) -%}{{ ' _' ~ run[i:i + size] }}{%- endfor -%}{%- endfor -%}"
)
CHARACTERS = (
    "{%- if not text.isascii() -%}"
    f"{{%- for part in (' ' ~ words | join(' ')).replace({_escaped(f' {FIRST}{JOIN}')}, {_escaped(FIRST)})"
    f".replace({_escaped(f' {FIRST}{END}')}, {_escaped(END + FIRST)})"
    f".replace({_escaped(' ' + FIRST)}, {_escaped(' ' + FIRST)} if ends else {_escaped(FIRST)}).split(){_RUNS}"
    f"{{%- for word in run[1:-1].split({_escaped(END)}) if ends -%}}{{{{ ' _[' ~ word ~ ']' }}}}{{%- endfor -%}}"
    "{%- endfor -%}{%- endif -%}"
)
CHARACTERS_WITHOUT_ENDS = (  # of earlier versions
    f"{{%- if not text.isascii() -%}}{{%- for part in (words | join(' ')).replace(' ' ~ {_escaped(FIRST)}, "
    f"{_escaped(FIRST)}).split(){_RUNS}{{%- endfor -%}}{{%- endif -%}}"
)
WHOLE_CHARACTERS = (  # of earlier versions
    f"{{%- if not text.isascii() -%}}{{%- for size in {RUNS} -%}}{{%- for i in range(words | length - size + 1) -%}}"
    "{%- set run = words[i:i + size] | join -%}"
    f"{{%- if run.count({_escaped(FIRST)}) == size -%}}{{{{ ' _' ~ run }}}}{{%- endif -%}}"
    "{%- endfor -%}{%- endfor -%}{%- endif -%}"
)


def _parts(few: tuple[int, ...]) -> str:
    """Return the part of the template that writes the runs of letters of each word.

    Args:
        few: Lengths of the runs in scripts other than ``ALPHABETS``.
    """
    return (
        f"{{%- for word in words if word | length > 1 and word[0] != {_escaped(FIRST)} -%}}"
        f"{{%- set sizes = {[*LETTERS]} if word < {_escaped(ALPHABETS)} else {[*few]} -%}}"
        f"{{%- set word = '<' ~ word[:{MAX_LETTERS}] ~ '>' -%}}{{%- for size in sizes -%}}"
        "{%- for i in range(word | length - size + 1) -%}{{ ' _' ~ word[i:i + size] }}{%- endfor -%}{%- endfor -%}"
        "{%- endfor -%}"
    )


def _template(*parts: str, ends: bool = True) -> str:
    scan, marks = (SCAN_WITH_ENDS, (FIRST + END, JOIN, FIRST)) if ends else (SCAN, FIRST)
    cleaned = "".join(f".replace({_escaped(mark)}, '')" for mark in marks)
    return f"{PROMPT}{scan}{{%- set written -%}}{''.join(parts)}{{%- endset -%}}{{{{- written{cleaned} -}}}}"


class _Table(dict[int, str]):
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


TABLE = _Table()


class Rewriting(NamedTuple):
    """How an encoder has its texts rewritten; its chat template says the same."""

    template: str
    letters: bool = False  # whether the runs of letters of each word are written
    scripts: bool = True  # whether scripts without spaces and marks other than those of ASCII are known
    prompted: bool = True  # whether a prompt is read
    few: tuple[int, ...] = FEW_LETTERS  # lengths of the runs of letters in scripts other than ALPHABETS
    whole: bool = False  # whether runs of characters consist of words, that is, of characters with their signs
    ends: bool = True  # whether runs show the ends of words, in texts with zero-width spaces

    def words(self, text: str) -> list[str]:
        """Return the words of a text; those of scripts without spaces begin with a mark."""
        if not self.scripts or text.isascii():
            return text.translate(SPACED).split()[:MAX_WORDS]
        scanned = text.translate(TABLE).replace(LAST + MORE, "")
        return scanned.replace(LAST, " ").replace(MORE, " ").split()[:MAX_WORDS]

    def rewrite(self, text: str) -> str:
        """Rewrite one text as the chat template does, but faster."""
        words = self.words(text)
        written = [*words, *map("_".join, pairwise(words))]
        if self.scripts and not text.isascii():
            written += ["_" + run for run, _, _ in self._runs(words, text)]
        for word in words if self.letters else ():
            if len(word) > 1 and word[0] != FIRST:
                padded = f"<{word[:MAX_LETTERS]}>"
                for size in self._sizes(word):
                    written += [f"_{padded[i : i + size]}" for i in range(len(padded) - size + 1)]
        joined = " ".join(written) or UNKNOWN
        return joined.replace(FIRST, "") if self.scripts else joined

    def _runs(self, words: Sequence[str], text: str) -> Iterator[tuple[str, int, int]]:
        """Yield each run of characters in scripts without spaces, and the indices of its first and last word."""
        unspaced = [word[0] == FIRST for word in words]
        if self.whole:
            for size in RUNS:
                for start in range(len(words) - size + 1):
                    if all(unspaced[start : start + size]):
                        yield "".join(words[start : start + size]), start, start + size - 1
            return
        joints, start = self._joints(words, text), 0
        for stop in range(1, len(words) + 1):
            if stop < len(words) and unspaced[stop] == unspaced[start] and joints[stop] != " ":
                continue
            if unspaced[start]:
                parts = [words[start][1:], *(joints[i] + words[i][1:] for i in range(start + 1, stop))]
                run = f"[{''.join(parts)}]"
                owner = [start, *(i for i, part in enumerate(parts, start) for _ in part), stop - 1]
                for size in RUNS:
                    for i in range(len(run) - size + 1):
                        yield run[i : i + size], owner[i], owner[i + size - 1] - (run[i + size - 1] == END)
                if self.ends and BREAK in text:
                    places = [start, *(i for i in range(start + 1, stop) if joints[i]), stop]
                    for first, after in pairwise(places):
                        yield f"[{''.join(words[first:after]).replace(FIRST, '')}]", first, after - 1
            start = stop

    def _joints(self, words: Sequence[str], text: str) -> list[str]:
        """Return what is before each character: the end of a word or a space, if the text has zero-width spaces."""
        if not self.ends or BREAK not in text:
            return [""] * len(words)
        spans = self.spans(text)[: len(words)]
        gaps = [text[one[1] : other[0]].strip(IGNORED) for one, other in pairwise(spans)]
        return ["", *((END if gap[-1] == BREAK else " ") if gap else "" for gap in gaps)]

    def spans(self, text: str) -> list[Span]:
        """Return the span of each word, also of those after the limit."""
        if text.isascii() or not self.scripts:
            return _spans(text, lambda c: SPACED.get(ord(c), c))
        return _spans(text, lambda c: TABLE[ord(c)])

    def pieces(self, text: str) -> list[Span]:
        """Return the span of each piece of the rewritten text, in its order; letters belong to their word."""
        spans, words = self.spans(text)[:MAX_WORDS], self.words(text)
        found = [*spans, *((first[0], second[1]) for first, second in pairwise(spans))]
        if self.scripts and not text.isascii():
            found += [(spans[first][0], spans[last][1]) for _, first, last in self._runs(words, text)]
        for word, span in zip(words, spans, strict=True) if self.letters else ():
            if len(word) > 1 and word[0] != FIRST:
                found += [span] * sum(max(0, len(word[:MAX_LETTERS]) + 3 - size) for size in self._sizes(word))
        return found

    def _sizes(self, word: str) -> tuple[int, ...]:
        """Return the lengths of the runs of letters of a word."""
        return LETTERS if word < ALPHABETS else self.few


def _spans(text: str, table: Callable[[str], str]) -> list[Span]:
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


ASCII_WORDS = (  # of earlier versions
    f"{{%- set words = messages[-1].content.translate({SPACED}).split()[:{MAX_WORDS}] -%}}" + PAIRS
)
WORDS = Rewriting(_template(PAIRS, CHARACTERS))
WITH_LETTERS = Rewriting(_template(PAIRS, CHARACTERS, _parts(FEW_LETTERS)), letters=True)
EARLIER = (
    Rewriting(_template(PAIRS, CHARACTERS_WITHOUT_ENDS, _parts(FEW_LETTERS), ends=False), letters=True, ends=False),
    Rewriting(_template(PAIRS, CHARACTERS_WITHOUT_ENDS, ends=False), ends=False),
    Rewriting(_template(PAIRS, WHOLE_CHARACTERS, _parts(LETTERS), ends=False), letters=True, few=LETTERS, whole=True),
    Rewriting(_template(PAIRS, WHOLE_CHARACTERS, ends=False), whole=True),
    Rewriting(PROMPT + ASCII_WORDS, scripts=False),
    Rewriting(ASCII_WORDS, scripts=False, prompted=False),
)
REWRITINGS = {one.template: one for one in (WORDS, WITH_LETTERS, *EARLIER)}


def unseen_share(counts: Mapping[str, int]) -> float:
    """Estimate the fraction of words in new texts that do not occur in texts with these words (Good, 1953).

    The estimate is the number of words that occur once, divided by the number of all occurrences.

    >>> unseen_share({"a": 3, "boat": 3, "red": 1, "blue": 1})
    0.25
    """
    return sum(count == 1 for count in counts.values()) / max(1, sum(counts.values()))


def needs_letters(texts: Iterable[str]) -> bool:
    """Return whether many words of new texts will be unseen, because words are inflected or the texts are few."""
    return unseen_share(Counter(map(str.lower, chain.from_iterable(map(WORDS.words, texts))))) > UNSEEN_WORDS
