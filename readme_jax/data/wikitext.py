"""Plain prose from MediaWiki markup: enough for articles, with no claim to render every template."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

_BACK_MATTER = re.compile(
    r"^==\s*(references|notes|footnotes|citations|sources|bibliography|further reading|external links|see also)\s*==",
    re.IGNORECASE | re.MULTILINE,
)
_REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b.*?</ref\s*>", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(r"<!--.*?-->|<(math|gallery|timeline|source|code|pre)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_KEPT_TEMPLATE = re.compile(  # {{convert|5|km}} and {{lang|fr|mot}} stand in the middle of sentences
    r"\{\{\s*(?:(?:convert|cvt)\s*\|([^|{}]*)\|([^|{}]*)|lang\s*\|[^|{}]*\|([^|{}]*))[^{}]*\}\}", re.IGNORECASE
)
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_DROPPED_LINK = re.compile(r"\s*:?\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|//)[^\s\]]*\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
_REMAINS = re.compile(r"^.*(?:\{\{|\}\}|\{\||\|\}|\[\[|\]\]).*$|^\s*[|!].*$", re.MULTILINE)


def _exhaust(pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
    """Substitute innermost matches until none is left, which unwinds nesting."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _template_text(match: re.Match[str]) -> str:
    number, unit, phrase = match.groups()
    return phrase if phrase is not None else f"{number} {unit}"


def _link_text(match: re.Match[str]) -> str:
    return "" if _DROPPED_LINK.match(match[1]) else match[1].rsplit("|", 1)[-1]


def plain_text(markup: str) -> str:
    """The prose of one article: no templates, tables, references, files, categories or back matter.

    Lines whose markup does not balance are dropped.
    """
    text = markup
    if back := _BACK_MATTER.search(text):
        text = text[: back.start()]
    text = _HIDDEN.sub("", text)
    text = _REFERENCE.sub("", text)
    text = _KEPT_TEMPLATE.sub(_template_text, text)
    text = _exhaust(_INNERMOST_TEMPLATE, "", text)
    text = _exhaust(_INNERMOST_TABLE, "", text)
    text = _exhaust(_INNERMOST_LINK, _link_text, text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = _HEADING.sub(r"\1", text)
    text = _LIST_MARK.sub("", text)
    text = _REMAINS.sub("", text)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"\(\s*[;,]?\s*\)", "", text)  # what a pronunciation template leaves behind
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" +([,.;])", r"\1", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()
