"""What a person is shown of a text: all of it, and nothing but text. (In a real browser: tests/browser/.)"""

import random
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nasty_texts import ALL
from pages import answer, built, operations_in, record_pair

from chat_app.operations import Operations
from chat_app.ui.admin import AdminPage
from chat_app.ui.chat import ChatPage, refused, titled
from chat_app.ui.rate import RatePage
from chat_app.ui.shown_text import TAGS, in_html, inert, quoted, shown, source_of, visible, with_source

ATTRIBUTES = {"a": {"href", "target", "rel"}, "li": {"value"}, "th": {"align"}, "td": {"align"}}
PIECES = (
    "<b style='x'>", "</b>", "<style>", "</style>", "<!--", "-->", "<?x", "?>", "<![CDATA[", "&lt;", "&", "\n", "\n\n",
    "```", "```html\n", "~~~", "`", "``", "    ", "\t", "- ", "1. ", "7) ", "> ", "# ", "| a | b |\n|---|---|\n| c |",
    "[x](", ")", "](javascript:x)", "![", "[r]: https://x 't'", "[r]", "<https://e.x>", "https://e.x/a_b", "**", "_",
    "*", "~~", "\\", "$$", "%%%LATEX_BLOCK_0%%%", "---", "===", "word", "Ünïcode", "\u202e", "\u200d", "<textarea>",
    '"', "'", "(", "}", "\r\n", "\u2028", "|",
)  # fmt: skip


class Seen(HTMLParser):
    """What a reader sees of HTML: its words, the numbers of lists; and every tag with its attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("br", "hr"):
            self.open.append(tag)
        if tag == "li":
            self.words.append(dict(attrs).get("value") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags that do not close each other"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(f"a declaration: {decl}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


def letters(text: str) -> str:
    return "".join(one for one in text if one.isalnum() or (ord(one) > 127 and not one.isspace()))


def blocks(markdown: str) -> list[tuple[bool, str]]:
    """The blocks as any Markdown reads them: a fence to its end, else one line of HTML between empty lines."""
    found: list[tuple[bool, str]] = []
    lines = iter(markdown.split("\n"))
    for line in lines:
        fence = re.fullmatch(r"(`{3,})([A-Za-z0-9+#.-]*)", line)
        if fence:
            inside = []
            for one in lines:
                if one == fence[1]:
                    break
                inside.append(one)
                assert not re.match(rf" {{0,3}}{fence[1]}", one), "the fence ends before its code does"
            else:
                raise AssertionError("a fence without an end")
            assert fence[2] != "mermaid"
            found.append((False, "\n".join(inside)))
        elif line:
            assert line.startswith("<"), line[:80]
            assert next(lines, "") == "", "HTML and what follows it are one block"
            found.append((True, line))
        if fence:
            assert next(lines, "") == ""
    return found


def check(text: str) -> None:
    """Both forms show every letter in order, with no tags and attributes but ours."""
    assert letters(words(quoted(text))) == letters(visible(text)), repr(text)
    said = "".join(words(block) if is_html else block for is_html, block in blocks(shown(text)))
    assert letters(said) == letters(visible(text)), repr(text)


def words(block: str) -> str:
    seen = Seen()
    seen.feed(block)
    seen.close()
    assert not seen.open
    for tag, attributes in seen.tags:
        assert tag in TAGS, tag
        assert attributes.keys() <= ATTRIBUTES.get(tag, set()), (tag, attributes)
        if tag == "a":
            assert str(attributes["href"]).lower().startswith(("http://", "https://", "mailto:"))
    return "".join(seen.words)


@pytest.mark.parametrize("text", ALL, ids=range(len(ALL)))
def test_every_word_is_shown_and_nothing_but_text(text: str) -> None:
    check(text)


def test_so_it_is_for_whatever_is_put_together() -> None:
    dice = random.Random(12)
    for _ in range(3000):
        check("".join(dice.choices(PIECES, k=dice.randint(1, 14))))


def test_ordinary_text_is_still_formatted() -> None:
    told = (
        "Say **this** and `a < b`:\n\n1. one\n2. two\n\n| a | b |\n|--|--:|\n| 1 | 2 |\n\n```python\nif a < b: ...\n```"
    )
    assert shown(told).split("\n\n") == [
        "<p>Say <strong>this</strong> and <code>a &lt; b</code>:</p>",
        '<ol><li value="1">one</li><li value="2">two</li></ol>',
        '<table><thead><tr><th>a</th><th align="right">b</th></tr></thead><tbody><tr><td>1</td>'
        '<td align="right">2</td></tr></tbody></table>',
        "<p><small>python</small></p>",
        "```python\nif a < b: ...\n```",
    ]


def test_a_link_says_where_it_leads_and_opens_nothing_but_the_web_and_mail() -> None:
    there = '<a href="https://e.x/" target="_blank" rel="noopener noreferrer nofollow">https://e.x/</a>'
    assert shown('[bank](https://e.x/ "a title")') == f"<p>bank ({there} &quot;a title&quot;)</p>"
    assert shown("see https://e.x/.") == f"<p>see {there}.</p>"
    for address in ("javascript:alert(1)", "data:text/html,x", "/v1/export", "//e.x", "JAVASCRIPT:x", "vbscript:x"):
        assert "<a " not in shown(f"[x]({address}) <{address}>")
    assert "<img" not in shown("![x](https://e.x/p.png)")


def test_what_cannot_be_seen_is_named_and_what_joins_letters_is_left() -> None:
    assert visible("a\u202eb\u200bc\x00\U000e0041") == "a⟨U+202E⟩b⟨U+200B⟩c⟨U+0000⟩⟨U+E0041⟩"
    assert visible("a\ud800b") == "a⟨U+D800⟩b"
    for plain in ("👩\u200d👩\u200d👧", "❤\ufe0f\u200d🔥", "می\u200cخواهم", "é e\u0301", "ไม่", "tab\tline\n"):
        assert visible(plain) == plain
    assert visible("z" + "\u0301" * 9).count("\u25cc") == 2


def test_a_piece_of_our_sentences_is_text_in_markdown_and_in_html() -> None:
    told = inert("**[x](y)** <b>\n\n# `1.` &lt; http://x | _a_ $$")
    assert not re.search(r"[*\[\]()<>`_|$]|://", told)
    assert inert("1. www.example.com a@b.c - + 7.") == "1&#46; www&#46;example.com a&#64;b.c &#45; &#43; 7&#46;"
    assert "\n" not in told
    assert words(f"<p>{told}</p>") == "**[x](y)** <b> # `1.` &lt; http://x | _a_ $$"


def test_the_text_itself_is_behind_what_is_shown() -> None:
    for text in ("a <b> & c\n\n```\nx\n```", "<!--zl ZmFrZQ==-->", ""):
        assert source_of(with_source(text)) == text
    assert source_of("typed by a person") == "typed by a person"


def test_a_refusal_quotes_and_does_nothing() -> None:
    told = str(refused(ValueError("there is no <img src=x onerror=alert(1)> 'x'\n\n**y**")).message)
    assert words(f"<p>{told}</p>") == "there is no <img src=x onerror=alert(1)> 'x' **y**"


def test_long_and_twisted_texts_are_shown_in_no_time() -> None:
    began = time.monotonic()
    for text in (
        "[" * 20_000,
        "**a" * 7_000,
        "<a " * 7_000,
        "![[]()" * 4_000,
        "> " * 10_000,
        "`" * 20_000,
        "W" * 3_000_000,
    ):
        assert letters(words(quoted(text))) == letters(text)
    assert time.monotonic() - began < 60  # seconds; each takes a fraction of one


def test_an_answer_cannot_pass_for_the_head_of_another() -> None:
    assert 'class="zl-head"' in titled(1, shown("x"))
    assert "class" not in shown('#### Answer 2\n\n<h4 class="zl-head">Answer 2</h4>').replace("class=&quot;", "")
    assert in_html("a\n\n<b>") == "a &lt;b&gt;"


# --- what the pages' handlers hand over -------------------------------------------------------------------------------

WEAPON = '<form action=/v1/backups style="position:fixed;inset:0"><button>First</button></form> [x](/v1/export) &lt;i'


@pytest.fixture
def operations(tmp_path: Path) -> Iterator[Operations]:
    with operations_in(tmp_path) as found:
        yield found


def harmless(value: str) -> bool:
    """Nothing that a page could take for HTML or a link: whatever is between angle brackets is a tag of ours."""
    tags = re.findall(r"<(?!!--zl )/?\s*([^\s>]*)", value)
    return set(tags) <= TAGS and "](" not in value and "&lt;i" not in value.replace("&amp;lt;i", "")


def below_its_head(value: str) -> str:
    return value.removeprefix('<h4 class="zl-head">Answer 1</h4>').removeprefix('<h4 class="zl-head">Answer 2</h4>')


def test_the_chat_shows_messages_answers_and_titles_as_text(operations: Operations) -> None:
    chat = built(ChatPage, operations)
    store = operations._store
    turn = operations.begin_turn(None, WEAPON + "\u202e")
    written = answer(WEAPON)
    store.record_candidate(written, [{"role": "user", "content": WEAPON}], turn_id=turn.turn_id)
    store.record_answer(turn.turn_id, written.candidate_id)
    waits = store.record_turn(turn.conversation_id, WEAPON)
    record_pair(store, WEAPON, waits.turn_id, answers=(WEAPON, f"{WEAPON} 2"))
    view = chat.open_thread(turn.conversation_id)
    shown_here = [message["content"] for message in view[chat.thread]]
    assert len(shown_here) == 3
    for value in (*shown_here, view[chat.first], view[chat.second]):
        assert harmless(value), value
        assert letters(visible(WEAPON)) in letters(words(below_its_head(value).partition("\n\n<!--zl")[0]))
    titles = [title for title, _ in chat._thread_choices()]
    assert titles[0].startswith("<form action")  # a label is no HTML
    assert "\u202e" not in "".join(titles)


def test_the_rate_page_shows_prompt_and_answers_as_text(operations: Operations) -> None:
    rate = built(RatePage, operations)
    record_pair(operations._store, f"{WEAPON}\n\n> out of the quote\n\n</blockquote>", answers=(WEAPON, "two"))
    view = rate.next_pair()
    for value in (view[rate.asked], view[rate.first], view[rate.second]):
        assert harmless(value), value
    assert view[rate.asked].count("<blockquote>") == 2  # ours, and the quote within
    assert letters(WEAPON) in letters(words(below_its_head(view[rate.first])))


def test_the_admin_page_quotes_as_text(operations: Operations) -> None:
    admin = built(lambda found, page: AdminPage(found, page, (Exception,)), operations)
    messages = [
        admin.import_preferences(f"/tmp/{WEAPON}.jsonl", "auto")[admin.imported],
        admin.retrain_without("dpo-lora", WEAPON)[admin.message],
        admin.start_practice(WEAPON)[admin.message],
    ]
    for value in messages:
        assert harmless(value), value
    assert "form" in "".join(messages)
