r"""Build a data set of prose, some of it long, from manual pages: a page, and the pages that its SEE ALSO names.

    python recipes/data/build_manpages.py --pages /usr/share/man --output_dir manpages

A query is a page: its NAME line, and its DESCRIPTION or, without one, all other sections but SYNOPSIS and SEE ALSO. Its
labels are the pages in SEE ALSO that are in the folders; a label's text is its NAME line. In a query, ``_`` stands for
every reference such as ``open(2)``, and for the names of its labels. A file that includes or links to another page, or
repeats its text, is another name of that page. The split is that of ``wordnet-hypernyms``.

``docs/results/manual-pages.md`` has the results on the pages of these packages of Debian 12:

    apt-get install mandoc
    apt-get download allegro4-doc coreutils debhelper devscripts dovecot-core emboss erlang-manpages \
        freebsd-manpages git-annex git-man grass-doc groff inn2 iproute2 libarchive-dev libbsd-dev libcurl4-doc \
        libibverbs-dev libldap-dev libldns-dev libmemcached-dev libmojolicious-perl libmotif-dev libnbd-dev \
        libnet-dns-perl libowfat-dev libpcp3-dev libplack-perl libpmem2-dev libpoe-perl librdmacm-dev \
        libsdl1.2-dev libselinux1-dev libssl-doc libsystemd-dev libtickit-dev libtiff-dev liburing-dev \
        libx11-doc libxcb-doc libxt-dev libzip-dev libzmq3-dev lintian lvm2 manpages manpages-dev nbdkit \
        ncurses-doc netpbm nmh nut-server openafs-client pcp perl-doc perl-tk podman postfix slapd systemd \
        tcl8.6-doc tcllib texlive-binaries tk8.6-doc util-linux
    for deb in *.deb; do dpkg-deb -x "$deb" unpacked; done
    python recipes/data/build_manpages.py --pages unpacked/usr/share/man --output_dir manpages
"""

import argparse
import gzip
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_wordnet_hypernyms import is_test, write_data_set

from hf_xmc.cli import HelpFormatter

RENDERERS = {
    "mandoc": ["mandoc", "-T", "utf8", "-O", "width=1000"],  # the widest lines that it accepts
    "groff": ["groff", "-mandoc", "-Tutf8", "-k", "-t", "-e", "-rLL=1000n", "-rHY=0", "-P-cbou"],
}
SEE_ALSO = {"SEE ALSO", "RELATED", "RELATED INFORMATION"}
NOT_PROSE = {"NAME", "SYNOPSIS", *SEE_ALSO}
FILE = re.compile(r"(?P<name>.+)\.(?P<section>[0-9nl][^.]*?)(\.gz)?")
INCLUDE = re.compile(rb"(?:[.'](?:\\\"|\\#).*\n|\s)*\.so\s+(\S+)\s*$")
REFERENCE = re.compile(r"([\w.+:@-]*[\w+]) ?\(([0-9]\w*|n)\)")
MODULE = re.compile(r"\w+(?:::\w+)+")
HYPHENS = str.maketrans("\u2010\u2011\u2212", "---")


class Page(NamedTuple):
    """A file of a page: its rendered text, or the id of the page to which it only refers."""

    name: str
    section: str
    text: str
    target: str = ""

    @property
    def uid(self) -> str:
        return f"{self.name}({self.section})"


def id_of(file: str) -> tuple[str, str] | None:
    """Return the name and the section of a page from its file name, such as ``open.2.gz``."""
    found = FILE.fullmatch(Path(file).name)
    return (found["name"], found["section"].lower()) if found else None


def read_page(path: Path, name: str, section: str, command: list[str]) -> Page:
    """Read a page, and render it with a command that reads standard input."""
    source, target = b"", os.readlink(path) if path.is_symlink() else ""
    if not target:
        source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        included = INCLUDE.match(source)
        target = os.fsdecode(included[1]) if included else ""
    if target:
        return Page(name, section, "", "{}({})".format(*(id_of(target) or ("", ""))))
    shown = subprocess.run(command, input=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    text = re.sub(".\b", "", shown.decode(errors="replace"))  # bold is a letter, a backspace and the letter again
    return Page(name, section, text.translate(HYPHENS))


def sections_of(text: str) -> dict[str, str]:
    """Return the sections of a rendered page by heading, which is the only text in the first column."""
    found: dict[str, str] = {}
    heading = ""
    for line in text.strip().splitlines()[1:-1]:  # without the page's header and footer
        if line[:1].strip():
            heading = " ".join(line.upper().split())
        else:
            found[heading] = found.get(heading, "") + line.strip() + "\n"
    return found


def prose_of(sections: dict[str, str]) -> str:
    chosen = [sections["DESCRIPTION"]] if sections.get("DESCRIPTION", "").strip() else []
    chosen = chosen or [text for heading, text in sections.items() if heading not in NOT_PROSE]
    return " ".join(" ".join(chosen).split())


def read_pages(folders: list[Path], command: list[str]) -> list[Page]:
    """Read the pages of all folders in the order of their ids. The first folder with an id wins."""
    paths: dict[tuple[str, str], Path] = {}
    for folder in folders:
        found = {page: path for path in sorted(folder.glob("man[0-9nl]*/*")) if (page := id_of(path.name))}
        if not found:
            raise ValueError(f"{folder}: expected pages such as man2/open.2.gz, found none.")
        paths = {**found, **paths}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pages = pool.map(lambda page: read_page(paths[page], *page, command), paths)
        return sorted(pages, key=lambda page: page.uid)


class Manual:
    """The distinct pages, and the names of each."""

    def __init__(self, pages: list[Page]) -> None:
        self.titles: dict[str, str] = {}
        self.prose: dict[str, str] = {}
        self.see_also: dict[str, str] = {}
        self.page_of: dict[str, str] = {}  # the distinct page of every id
        self.section_of = {page.uid: page.section for page in pages}
        seen: dict[tuple[str, str], str] = {}
        for page in pages:
            sections = sections_of(page.text)
            title = re.sub(r" [-\u2013\u2014]+ ", " - ", " ".join(sections.get("NAME", "").split()), count=1)
            prose = prose_of(sections)
            if title and prose:
                self.page_of[page.uid] = first = seen.setdefault((title, prose), page.uid)
                self.titles[first], self.prose[first] = title, prose
                found = "\n".join(text for heading, text in sections.items() if heading in SEE_ALSO)
                self.see_also[first] = self.see_also.get(first, "") + found
        targets = {page.uid: page.target for page in pages if page.target}
        for uid in targets:
            self._follow(uid, targets)
        self.names: dict[str, set[str]] = {uid: set() for uid in self.titles}
        self.sections: dict[str, list[str]] = {}  # of the pages of a name
        for page in pages:
            if page.uid in self.page_of:
                self.names[self.page_of[page.uid]].add(page.name)
                self.sections.setdefault(page.name, []).append(page.section)

    def _follow(self, uid: str, targets: dict[str, str]) -> None:
        """Make a file that only refers to another a name of the page at the end of the chain."""
        at, visited = uid, set()
        while at in targets and at not in visited:
            visited.add(at)
            at = targets[at]
        if at in self.page_of:
            self.page_of[uid] = self.page_of[at]

    def find(self, name: str, section: str, own: str) -> str | None:
        """Return the page that a reference means on a page of section ``own``.

        On a page of section ``3ssl``, ``bio(7)`` is in ``7ssl``, else in 7, else in the first section of 7. Debian has
        the pages of section ``n`` in ``3tcl`` and ``3tk``.
        """
        wanted = section.lower() if section != "n" else "3"
        known = self.sections.get(name, [])
        for choice in (wanted[:1] + own[1:], wanted, *sorted(known)):
            if choice in known and choice[:1] == wanted[:1]:
                return self.page_of[f"{name}({choice})"]
        return None

    def labels_of(self, uid: str) -> set[str]:
        """Return the pages in SEE ALSO: ``open(2)``, ``File::Spec``, and items of a list such as ``open, close``."""
        own, text = self.section_of[uid], self.see_also[uid]
        found = {self.find(name, section, own) for name, section in REFERENCE.findall(text)}
        found |= {self.find(name, "3", own) for name in MODULE.findall(text)}
        items = [item.strip().rstrip(".").strip() for item in re.split(r"[,;\n]|\band\b", text)]
        found |= {self.find(item, own, own) for item in items if item}
        return {label for label in found if label} - {uid}

    def masked(self, uid: str, labels: set[str]) -> tuple[str, str]:
        """Return the NAME line and the prose of a page, in which ``_`` stands for names of other pages."""
        names = set().union(*(self.names[label] for label in labels)) - self.names[uid]
        longest_first = "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))
        mask = re.compile(rf"(?<![\w-])(?<!::|\w\.)(?:{longest_first})(?!\w|[.-]\w|::\w)") if names else None
        texts = [re.sub(r"[\w.+:@-]*[\w+]\(([0-9]\w*|n)\)", "_", text) for text in (self.titles[uid], self.prose[uid])]
        title, prose = (mask.sub("_", text) if mask else text for text in texts)
        return title, prose


def build(folders: list[Path], output_dir: Path, renderer: str = "mandoc") -> None:
    command = RENDERERS[renderer]
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{renderer} was not found. Install it, or choose another --renderer of {sorted(RENDERERS)}.")
    pages = read_pages(folders, command)
    manual = Manual(pages)
    positives = {uid: labels for uid in manual.titles if (labels := manual.labels_of(uid))}
    queries = {uid: manual.masked(uid, labels) for uid, labels in positives.items()}
    trained = set().union(*(labels for uid, labels in positives.items() if not is_test(uid)))
    texts = {uid: (manual.titles[uid], "") for uid in sorted(trained)}
    write_data_set(output_dir, texts, queries, positives, is_test)
    print(
        f"{len(pages)} files, {len(pages) - len(manual.page_of)} of them without a NAME line, prose or target; "
        f"{len(manual.titles)} distinct pages, {len(positives)} of them with labels"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--pages", type=Path, nargs="+", required=True, help="folders with man1, man2 and so on")
    parser.add_argument("--renderer", choices=sorted(RENDERERS), default="mandoc", help="the program that reads pages")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    build(arguments.pages, arguments.output_dir, arguments.renderer)
