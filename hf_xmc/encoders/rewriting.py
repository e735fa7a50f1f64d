"""Rewrite a text as its words and their combinations, in the same way in Python and in a chat template.

A word is a run of letters, marks and digits; any other character is a word of its own. Chinese, Japanese, Thai, Lao,
Khmer and Burmese have no spaces between words. There, each character with its vowel signs and tone marks is a word. The
runs of three and four characters, where a sign counts as one, follow the pairs of words. In a text with zero-width
spaces between words, as in Khmer, the runs show the ends of words, and whole words follow them. Inflected words share
parts, so their runs of letters can be written too: of four letters in alphabets such as Latin, and of two and three in
scripts such as Arabic, Devanagari and Hangul, whose words have fewer characters.

The first words say most: a title, or what a definition begins with. So they are written again, with a mark: the first
eight of the text, and the first four and the first two of its body, which follows the first colon. A text without a
colon is all body.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from hf_xmc.encoders.characters import BREAK, END, FIRST, IGNORED, LAST, MORE, SPACED, TABLE, Span, spans_of
from hf_xmc.encoders.templates import (
    ALPHABETS,
    ASCII_WORDS,
    CHARACTERS,
    CHARACTERS_WITHOUT_ENDS,
    FEW_LETTERS,
    LEADING,
    LEADS,
    LETTERS,
    MAX_LETTERS,
    MAX_WORDS,
    PAIRS,
    PROMPT,
    RUNS,
    UNKNOWN,
    WHOLE_CHARACTERS,
    letters_of_words,
    template_of,
)

UNSEEN_WORDS = 0.03  # fraction of unseen words from which the letters of words are read


class Rewriting(NamedTuple):
    """How an encoder has its texts rewritten; its chat template says the same."""

    template: str
    letters: bool = False  # whether the runs of letters of each word are written
    scripts: bool = True  # whether scripts without spaces and marks other than those of ASCII are known
    prompted: bool = True  # whether a prompt is read
    few: tuple[int, ...] = FEW_LETTERS  # lengths of the runs of letters in scripts other than ALPHABETS
    whole: bool = False  # whether runs of characters consist of words, that is, of characters with their signs
    ends: bool = True  # whether runs show the ends of words, in texts with zero-width spaces
    leads: bool = True  # whether the leading words are written again, with a mark

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
        written += [f"_{mark}{words[place]}" for mark, place in self._leads(words)]
        if self.scripts and not text.isascii():
            written += ["_" + run for run, _, _ in self._runs(words, text)]
        for word in words if self.letters else ():
            if len(word) > 1 and word[0] != FIRST:
                padded = f"<{word[:MAX_LETTERS]}>"
                for size in self._sizes(word):
                    written += [f"_{padded[i : i + size]}" for i in range(len(padded) - size + 1)]
        joined = " ".join(written) or UNKNOWN
        return joined.replace(FIRST, "") if self.scripts else joined

    def _leads(self, words: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Yield the mark and the index of each leading word of the text and of its body, which follows a title."""
        body = words.index(":") + 1 if self.leads and ":" in words else 0
        for mark, part, size in LEADING if self.leads else ():
            first = body if part == "body" else 0
            yield from ((mark, place) for place in range(first, min(first + size, len(words))))

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
            return spans_of(text, lambda c: SPACED.get(ord(c), c))
        return spans_of(text, lambda c: TABLE[ord(c)])

    def pieces(self, text: str) -> list[Span]:
        """Return the span of each piece of the rewritten text, in its order; letters belong to their word."""
        spans, words = self.spans(text)[:MAX_WORDS], self.words(text)
        found = [*spans, *((first[0], second[1]) for first, second in pairwise(spans))]
        found += [spans[place] for _, place in self._leads(words)]
        if self.scripts and not text.isascii():
            found += [(spans[first][0], spans[last][1]) for _, first, last in self._runs(words, text)]
        for word, span in zip(words, spans, strict=True) if self.letters else ():
            if len(word) > 1 and word[0] != FIRST:
                found += [span] * sum(max(0, len(word[:MAX_LETTERS]) + 3 - size) for size in self._sizes(word))
        return found

    def _sizes(self, word: str) -> tuple[int, ...]:
        """Return the lengths of the runs of letters of a word."""
        return LETTERS if word < ALPHABETS else self.few


_FEW = letters_of_words(FEW_LETTERS)
WORDS = Rewriting(template_of(PAIRS, LEADS, CHARACTERS))
WITH_LETTERS = Rewriting(template_of(PAIRS, LEADS, CHARACTERS, _FEW), letters=True)
_PLAIN = Rewriting("", leads=False)
_WITHOUT_ENDS = _PLAIN._replace(ends=False)
EARLIER = (
    _PLAIN._replace(template=template_of(PAIRS, CHARACTERS, _FEW), letters=True),
    _PLAIN._replace(template=template_of(PAIRS, CHARACTERS)),
    _WITHOUT_ENDS._replace(template=template_of(PAIRS, CHARACTERS_WITHOUT_ENDS, _FEW, ends=False), letters=True),
    _WITHOUT_ENDS._replace(template=template_of(PAIRS, CHARACTERS_WITHOUT_ENDS, ends=False)),
    _PLAIN._replace(
        template=template_of(PAIRS, WHOLE_CHARACTERS, letters_of_words(LETTERS), ends=False),
        letters=True,
        few=LETTERS,
        whole=True,
    ),
    _PLAIN._replace(template=template_of(PAIRS, WHOLE_CHARACTERS, ends=False), whole=True),
    _PLAIN._replace(template=PROMPT + ASCII_WORDS, scripts=False),
    _PLAIN._replace(template=ASCII_WORDS, scripts=False, prompted=False),
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
