"""What a page shows of a text that a model, a person or a file wrote: the whole text, and nothing but text.

    shown(text)    Markdown: one line of our own HTML for each block, or a fenced block of code
    quoted(text)   the same in one block quote
    inert(text)    a piece of a sentence of ours, in Markdown or HTML
    in_html(text)  the same between tags of ours
    visible(text)  what a label or a field gets: no HTML, no Markdown

Who judges a text must see all of it, and nothing of it may act or cover the page. So the page's own Markdown parser and
sanitizer, which let much HTML through, never see a text: it is parsed here, without HTML, entities, images and
references, and written with the few tags of `TAGS`. A link shows where it leads and leads nowhere else. Characters that
cannot be seen are named. Each block is compared with the lines it came from; one that lost a letter is shown as it was
written, whatever the reason.

`with_source` hides the text itself behind what is shown, for the page's Copy and Edit (`page.js`).
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape

from markdown_it import MarkdownIt
from markdown_it.token import Token

TAGS = frozenset((
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th",
    "td", "em", "strong", "s", "hr", "br", "pre", "code", "a", "small", "div",
))  # fmt: skip
LONGEST_FORMATTED = 200_000
NESTED = 16
MARKS_IN_A_ROW = 4

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"  # elsewhere they join letters and emoji
    "|(?<=[\u200c\u200d\ufe00-\ufe0f])[\u200c\u200d\ufe00-\ufe0f](?<![\ufe0e\ufe0f]\u200d)"
)
_STACKED = re.compile(
    "([\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0e31\u0e34-\u0e3a"
    "\u0e47-\u0e4e\u0eb4-\u0ebc\u0ec8-\u0ecd\u0f71-\u0f84\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u302a-\u302f"
    f"\ufe20-\ufe2f]{{{MARKS_IN_A_ROW}}})"
)
_LETTERS = re.compile(r"[^\x00-/:-@\[-`{-\x7f\s]+")
_MEANS_SOMETHING = re.compile(r"[!-+<-@\[-`{-~-]|:(?=//)|(?<=www)\.|(?<=\d)\.(?=\s|\Z)", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://[^\s<>\"'`(){}\[\]]*[^\s<>\"'`(){}\[\].,;:!?*_~]", re.IGNORECASE)
_MAY_OPEN = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)
_LANGUAGE = re.compile(r"[A-Za-z0-9+#.-]{1,30}")
_SOURCE = re.compile(r"<!--zl ([A-Za-z0-9+/=]*)-->\s*\Z")


class _Parser(MarkdownIt):
    """Takes every link as it was written; `_link` decides which may be opened."""

    def normalizeLink(self, url: str) -> str:  # noqa: N802
        return url

    def validateLink(self, url: str) -> bool:  # noqa: ARG002, N802
        return True


_PARSER = (
    _Parser("commonmark", {"html": False, "maxNesting": NESTED})
    .enable(["table", "strikethrough"])
    .disable(["entity", "image", "reference"])
)


def visible(text: str) -> str:
    """The text with a name in place of each character that cannot be seen, such as `⟨U+202E⟩`, which turns text round.

    Marks that are stacked on a letter are spread, a few to a place, so that they cannot climb over other lines.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return _STACKED.sub("\\1\u25cc", text)


def inert(text: object) -> str:
    """A text in a sentence of ours: each sign that could mean something in Markdown or HTML becomes its number."""
    one_line = " ".join(visible(str(text)).split())
    return _MEANS_SOMETHING.sub(lambda found: f"&#{ord(found[0])};", one_line)


def in_html(text: object) -> str:
    """A text between tags of ours: one line, so that Markdown sees one block of HTML."""
    return _text(" ".join(visible(str(text)).split()))


def shown(text: str) -> str:
    """Markdown that shows a text as formatted as it can be without hiding any of it."""
    return "\n\n".join(_blocks(visible(text), fences=True))


def quoted(text: str) -> str:
    """Markdown that shows a text in one block quote, which it cannot leave."""
    return f"<blockquote>{''.join(_blocks(visible(text), fences=False))}</blockquote>"


@lru_cache(maxsize=128)
def with_source(text: str) -> str:
    """`shown`, with the text itself behind it where nobody sees it: what Copy copies and Edit edits."""
    return f"{shown(text)}\n\n<!--zl {b64encode(text.encode('utf-8', 'replace')).decode()}-->"


def source_of(text: str) -> str:
    """What a person who edited a text means: the source behind what is shown, where the page handed that back."""
    found = _SOURCE.search(text)
    return b64decode(found[1]).decode("utf-8", "replace") if found else text


# --- blocks -----------------------------------------------------------------------------------------------------------


def _blocks(text: str, *, fences: bool) -> Iterator[str]:
    """The blocks of a text, each in one line of HTML; with `fences` code outside of lists as a fenced block."""
    if len(text) > LONGEST_FORMATTED:
        yield _code(text)
        return
    lines, reached = text.split("\n"), 0
    for tokens in _top_level(_PARSER.parse(text)):
        begin, end = tokens[0].map or (reached, reached)
        yield from _as_written(lines[reached:begin])
        reached = max(reached, end)
        written = _Written()
        for token in tokens:
            written.add(token)
        block, source = written.html(), "\n".join(lines[begin:end])
        if _letters(source) != _letters("".join(written.seen)):
            yield from _as_written(lines[begin:end])
        elif fences and tokens[0].type == "fence":
            yield from _fence(tokens[0])
        else:
            yield block
    yield from _as_written(lines[reached:])


def _top_level(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    begin = 0
    for index, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0:
            yield tokens[begin : index + 1]
            begin = index + 1


def _as_written(lines: Sequence[str]) -> Iterator[str]:
    """Lines that could not be formatted without losing something."""
    if any(line.strip() for line in lines):
        yield _code("\n".join(lines).strip("\n"))


def _fence(token: Token) -> Iterator[str]:
    """Code as the page's own fenced block, which colours it and has a button to copy; its language stands above."""
    code = token.content
    language = token.info.strip()
    if any(sign in code for sign in ("\t", "%%%LATEX", "<!--")) or not code.strip():  # the page would change these
        yield _code(code, language)
        return
    if language:
        yield f"<p><small>{_text(language)}</small></p>"
    ticks = "`" * (1 + max([2, *map(len, re.findall("`+", code))]))
    known = language.lower() if _LANGUAGE.fullmatch(language) and language.lower() != "mermaid" else ""
    yield f"{ticks}{known}\n{code.removesuffix(chr(10))}\n{ticks}"


def _code(code: str, language: str = "") -> str:
    above = f"<p><small>{_text(language)}</small></p>" if language else ""
    return f"<div>{above}<pre><code>{_text(code)}</code></pre></div>"


def _letters(text: str) -> str:
    """What must not get lost: everything but white space and ASCII punctuation, some of which is Markdown."""
    return "".join(_LETTERS.findall(text))


def _text(text: str) -> str:
    """Text between tags, on one line and with nothing in it that the page's Markdown could take for its own."""
    return escape(text).replace("\n", "&#10;").replace("\t", "&#9;").replace("%", "&#37;").replace("$", "&#36;")


class _Written:
    """One block as HTML, and what is seen of it: letters and the numbers of lists."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._html: list[str] = []
        self._links: list[Token] = []

    def html(self) -> str:
        return "".join(self._html)

    def add(self, token: Token) -> None:
        """Add a token of the parser, with its children."""
        if token.type == "inline":
            for child in token.children or ():
                self.add(child)
        elif token.type in ("text", "text_special"):
            self._say(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            self._html.append("<br>")
        elif token.type == "code_inline":
            self._tag("<code>")
            self._say(token.content, is_code=True)
            self._tag("</code>")
        elif token.type in ("fence", "code_block"):
            self.seen += (token.info, token.content)
            self._html.append(_code(token.content, token.info.strip()))
        elif token.type == "link_open":
            self._links.append(token)
            self._html.append("&lt;" if token.markup == "autolink" else "")
        elif token.type == "link_close":
            self._end_link(self._links.pop())
        elif not token.hidden and token.tag in TAGS:
            self._tag(f"</{token.tag}>" if token.nesting < 0 else f"<{token.tag}{self._attributes(token)}>")

    def _tag(self, tag: str) -> None:
        self._html.append(tag)

    def _say(self, text: str, *, is_code: bool = False) -> None:
        self.seen.append(text)
        end = 0
        for found in () if is_code else _ADDRESS.finditer(text):
            self._html += (_text(text[end : found.start()]), _link(found[0]))
            end = found.end()
        self._html.append(_text(text[end:]))

    def _end_link(self, token: Token) -> None:
        """After the words of a link: where it leads. The words of an address in angle brackets say that themselves."""
        if token.markup == "autolink":
            self._html.append("&gt;")
            return
        address, title = str(token.attrGet("href") or ""), str(token.attrGet("title") or "")
        self.seen += (address, title)
        self._html.append(f" ({_link(address)}{f' &quot;{_text(title)}&quot;' if title else ''})")

    def _attributes(self, token: Token) -> str:
        """The number of a list's item and the side a column is aligned to: what a text may say of how it looks."""
        if token.type == "list_item_open" and token.info.isdecimal():
            number = int(token.info)
            self.seen.append(str(number))
            return f' value="{number}"'
        side = str(token.attrGet("style") or "").removeprefix("text-align:")
        return f' align="{side}"' if side in ("left", "right", "center") else ""


def _link(address: str) -> str:
    """An address that opens what it says, in a tab of its own; any other is only shown."""
    if not _MAY_OPEN.match(address):
        return _text(address)
    return f'<a href="{_text(address)}" target="_blank" rel="noopener noreferrer nofollow">{_text(address)}</a>'
