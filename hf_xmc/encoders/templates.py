"""The chat templates that rewrite a text as its words and their combinations, as a stock tokenizer runs them."""

from __future__ import annotations

from hf_xmc.encoders.characters import (
    BREAK,
    CONNECTORS,
    END,
    FIRST,
    IGNORED,
    JOIN,
    LAST,
    MORE,
    SPACED,
    UNSPACED,
)

UNKNOWN = "[UNK]"
MAX_WORDS = 512  # maximum number of words per text
MAX_LETTERS = 64  # maximum length of a word whose letters are written
ALPHABETS = "\u0590"  # Latin, Greek, Cyrillic and Armenian letters come before this one
LETTERS, FEW_LETTERS = (4,), (2, 3)  # lengths of the runs of letters, in these alphabets and in other scripts
LEADING = (("^", "0", 8), (":", "body", 4), ("::", "body", 2))  # mark, first word and number of leading words
RUNS = (3, 4)  # lengths of the runs of characters in scripts without spaces; pairs are written for all words


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
BODY = "{%- set body = words.index(':') + 1 if ':' in words else 0 -%}"  # the first word after a title
LEADS = BODY + "".join(
    f"{{%- for word in words[{first}:{first} + {size}] %}} _{mark}{{{{ word }}}}{{%- endfor -%}}"
    for mark, first, size in LEADING
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


def letters_of_words(few: tuple[int, ...]) -> str:
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


def template_of(*parts: str, ends: bool = True) -> str:
    """Return a template that writes some parts after each other."""
    scan, marks = (SCAN_WITH_ENDS, (FIRST + END, JOIN, FIRST)) if ends else (SCAN, FIRST)
    cleaned = "".join(f".replace({_escaped(mark)}, '')" for mark in marks)
    return f"{PROMPT}{scan}{{%- set written -%}}{''.join(parts)}{{%- endset -%}}{{{{- written{cleaned} -}}}}"


ASCII_WORDS = (  # of earlier versions
    f"{{%- set words = messages[-1].content.translate({SPACED}).split()[:{MAX_WORDS}] -%}}" + PAIRS
)
