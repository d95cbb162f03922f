"""What is hidden, what is left alone, and that the pass over a column misses nothing that reading each text finds."""

from __future__ import annotations

import base64
import json
import random
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from feedback_store import redaction
from feedback_store.errors import InvalidRecord
from feedback_store.redaction import KINDS, Finding, Redacted, find, preview, redact, redact_column, suspicious

HEX = "0123456789abcdef"
MIXED = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zAaBbCcDdEeFfGgHhIiJjKkLlMmNnOoPpQqRrSsTtUuVvWwXxYyZz0123456789"
PEM = "\n".join(
    ["-----BEGIN RSA " + "PRIVATE KEY-----", MIXED[:64], MIXED[:40] + "==", "-----END RSA PRIVATE KEY-----"]
)


def token(claims: dict[str, object]) -> str:
    """One part of a JSON Web Token."""
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")


JWT = f"{token({'alg': 'HS256', 'typ': 'JWT'})}.{token({'sub': '1234567890', 'name': 'Jo'})}.{MIXED[:43]}"

EMAILS = (
    "jo@example.com", "jo.van-der_berg+news@mail.example.co.uk", "o'brien@example.ie", "jürgen@müller.example.de",
    "иван@пример.рф", "a@b.museum", "jo@xn--bcher-kva.xn--p1ai", "x" * 64 + "@example.org",
)  # fmt: skip
PHONES = (
    "+1 202 555 0142", "+12025550142", "+1 (202) 555-0142", "+1.202.555.0142", "+1-555-123-4567", "+44 20 7946 0958",
    "(+44) 20 7946 0958", "+44 (0)20 7946 0958", "+4930/1234567", "+33 1 23 45 67 89", "+380 (99) 220 72 42",
    "+91 98765 43210", "+86\u00a0138\u00a00013\u00a08000", "＋81 3-1234-5678", "+٩٦٦ ٥٠ ١٢٣ ٤٥٦٧", "(555) 123-4567",
    "(202)555-0142", "555-123-4567", "1-800-555-1212", "202.555.0142", "555\u2011123\u20114567",
)  # fmt: skip
# Put together here, so that nothing that looks like a key stands in a file.
WHOLE_KEYS = (
    "AKIA" + "QWERTYUIOP234567", "ASIA" + "QWERTYUIOP234567", "A3TX" + "QWERTYUIOP234567",
    "AccountKey=" + MIXED[:86] + "==", "M" + MIXED[:23] + "." + MIXED[:6] + "." + MIXED[:27],
    "ghp_" + MIXED[:36], "gho_" + MIXED[:36], "ghs_" + MIXED[:40], "github_pat_" + MIXED[:22] + "_" + MIXED[:59],
    "glpat-" + MIXED[:20], "glrt-" + MIXED[:24], "GR1348941" + MIXED[:20], "glcbt-64_" + MIXED[:20],
    "glimt-" + MIXED[:25], "glptt-" + MIXED[:40], "glagent-" + MIXED[:50], "gloas-" + MIXED[:64],
    HEX * 2 + "-us12", "pypi-" + "AgEIcHlwaS5vcmc" + MIXED[:80], "pypi-" + "AgENdGVzdC5weXBpLm9yZw" + MIXED[:80],
    "SG." + MIXED[:22] + "." + MIXED[:43], "xoxb-" + "123456789012-1234567890123-" + MIXED[:24],
    "xoxp-" + "1-2-3-" + HEX * 2, "https://hooks.slack.com/services/" + "T0123ABCD/B0123ABCD/" + MIXED[:24],
    "xapp-1-" + "A0123ABCD-1234567890-" + HEX, "sq0csp-" + MIXED[:43], "sk_live_" + MIXED[:24], "rk_live_" + MIXED[:90],
    "sk_test_" + MIXED[:24], "123456789:" + MIXED[:35], "AC" + HEX * 2, "SK" + HEX * 2,
    "sk-" + MIXED[:20] + "T3BlbkFJ" + MIXED[:20], "sk-team_1-" + MIXED[:20] + "T3BlbkFJ" + MIXED[:20],
    "sk-proj-" + MIXED[:60] + "_" + MIXED[:30] + "-x", "sk-ant-" + "api03-" + MIXED[:90] + "_AA", "sk-" + HEX * 2,
    "hf_" + string.ascii_letters[:34], "AIza" + MIXED[:35], "npm_" + MIXED[:36], JWT, JWT.rpartition(".")[0],
    PEM, PEM.replace("\n", "\\n"), PEM.partition("\n-----END")[0],
    PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK").replace("KEY-----\n", "KEY-----\nVersion: 1.2\n\n"),
)  # fmt: skip
# A secret within its words: (before, secret, after).
KEYS_IN_WORDS = (
    ("postgres://jo:", "s3cr3t-word", "@db.example.com:5432/app"),
    ('aws_secret_access_key = "', (MIXED + MIXED)[:40], '"'),
    ("AWS_SECRET_ACCESS_KEY=", "/+" + MIXED[:38], ""),
)

ORDINARY = (
    "In 1999-2004 and (1685-1750), on 2023-10-12 at 08:00:15, from 07/01/2021 to 26.03.2023 17:06.",
    "ISBN 978-3-16-148410-0, ISSN 2049-3630, doi 10.1016/j.cpc.2020.112139, arXiv 2402.01306.",
    "It costs $1,234,567.89 or 1 234 567 euros; 4111 1111 1111 1111 and 4111-1111-1111-1111 are test cards.",
    "192.168.100.200, 10.0.0.1:8080, 2001:db8::8a2e:370:7334, 37.7749° N, 122.4194° W, part 12-555-123-4567.",
    "Layers of 256 512 1024 units; 128 256 512 1024 2048; x = 3.14159265358979; +1.4142135623; 6.02e+23.",
    "a+12025550142b, n+15551234567, -63.404 + 49.697 - 34.673 + 39.466, 1033/2851 = 0.36, 123-45-6789, 12:30+0100.",
    "@app.route('/'), @override, y = A @ B, react@17.0.2, user@localhost, me @ home, jo@, @jo, a@b, x@y.z.",
    "sk-learn, sk-fading-circle, task-based risk-free desk-top, hf_hub_download, AIza, AKIA, eyJ, ghp_, npm_config.",
    "It starts with -----BEGIN RSA PRIVATE KEY----- and ends otherwise. https://example.com:8080/a@b",
    "git log 3f786850e387550fdab836ed7e6dc881de23001b, md5 d41d8cd98f00b204e9800998ecf8427e, laws of keys.",
    "john at example dot com, five five five one two three four, [email], [phone] and [key].",
    "",
)


@pytest.mark.parametrize("email", EMAILS)
def test_an_email_address_is_hidden(email: str) -> None:
    assert redact(f"Write to {email}.") == Redacted("Write to [email].", {"email": 1})
    assert redact(f"<{email}>,({email})|mailto:{email}").text == "<[email]>,([email])|mailto:[email]"
    assert redact(email).text == "[email]"


@pytest.mark.parametrize("phone", PHONES)
def test_a_phone_number_is_hidden(phone: str) -> None:
    assert redact(f"Call {phone}, please.") == Redacted("Call [phone], please.", {"phone": 1})
    assert redact(f"tel:{phone}\n{phone} or {phone}.").text == "tel:[phone]\n[phone] or [phone]."


@pytest.mark.parametrize("key", WHOLE_KEYS)
def test_a_key_is_hidden_to_its_end(key: str) -> None:
    assert redact(f"Use '{key}' here.") == Redacted("Use '[key]' here.", {"key": 1})
    assert redact(f"KEY={key}\nOTHER=1").text == "KEY=[key]\nOTHER=1"
    assert redact("a\\n" + key).text == "a\\n[key]"


@pytest.mark.parametrize(("before", "secret", "after"), KEYS_IN_WORDS)
def test_only_the_secret_of_its_words_is_hidden(before: str, secret: str, after: str) -> None:
    assert redact(f"{before}{secret}{after}") == Redacted(f"{before}[key]{after}", {"key": 1})


def test_a_putty_key_is_hidden() -> None:
    key = f"Private-Lines: 2\n{MIXED[:64]}\n{MIXED[:20]}==\nPrivate-MAC: {HEX}"
    assert redact(f"Comment: jo\n{key}\n").text == "Comment: jo\n[key]\n"


def test_every_pattern_of_a_key_has_an_example_here() -> None:
    """A pattern that a new release of the library brings is seen here, and whether the hints let it through."""
    texts = [*WHOLE_KEYS, *("".join(words) for words in KEYS_IN_WORDS), f"Private-Lines: 1\nAA\nPrivate-MAC: {HEX}"]
    for pattern, _ in redaction._all_keys():
        examples = [text for text in texts if pattern.search(text)]
        assert examples, pattern.pattern
        assert all(find(text) for text in examples)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == Redacted(text, {})
    assert find(text) == []


def test_what_follows_a_number_is_no_part_of_it() -> None:
    assert redact("+1 202 555 0142 2 times").text == "[phone] 2 times"
    assert redact("(+44 20 7946 0958)").text == "([phone])"
    assert redact("555-123-45678, 1555-123-4567, 555-123-4567-8").found == {}
    assert redact("+12025550142abc").found == {}


@pytest.mark.parametrize(
    ("region", "phone"),
    [
        ("DE", "030 1234567"), ("DE", "(030) 1234567"), ("DE", "0151/23456789"), ("GB", "020 7946 0958"),
        ("FR", "01 23 45 67 89"), ("FR", "06.12.34.56.78"), ("ES", "612 345 678"), ("IN", "0471 220 0915"),
        ("IN", "04712200915"), ("US", "202 555 0142"), ("US", "2025550142"), ("CH", "044 668 18 00"),
    ],
)  # fmt: skip
def test_national_numbers_are_found_with_a_region(region: str, phone: str) -> None:
    assert redact(f"Call {phone} 2 times", region) == Redacted("Call [phone] 2 times", {"phone": 1})
    assert redact(f"{phone}, {phone}\n{phone}", region).text == "[phone], [phone]\n[phone]"
    assert redact(f"Call {phone}").found == {}
    assert suspicious(pa.array([f"Call {phone}"]), region).to_pylist() == [True]


@pytest.mark.parametrize("region", ["DE", "FR", "GB", "IN", "US"])
def test_years_dates_decimals_and_rows_of_numbers_are_no_national_numbers(region: str) -> None:
    for text in (
        "(1685-1750), 1925-1934, 25/03/2023 06:05, 26.03.2023 17:06, 2014/08/30",
        "[6864.78678324707, 5628.0045641089], 0.003937007673700544, -34.673 / 31.284, 3.4 .654 5.8 .479 1.1",
        "4-5-2-1-2-5-4-3-5-1-4-5-3-4-5-3-5-4-3-5-1-3-5-1-2-5-4-3-5, 1.8785123893673198, item 04712200915a",
    ):
        assert redact(text, region).found == {}


def test_an_unknown_region_is_refused() -> None:
    message = r"Redaction.region is 'Europe'; it must be None or a country in two capitals, such as GB."
    with pytest.raises(InvalidRecord, match=message):
        redact("Hello", "Europe")
    with pytest.raises(InvalidRecord, match=message):
        redact_column(pa.array(["Hello"]), "Europe")


def test_findings_are_in_the_order_of_the_text_with_their_places() -> None:
    text = f"Ring 555-123-4567 or write jo@example.com with {WHOLE_KEYS[0]}."
    assert find(text) == [
        Finding("phone", 5, 17, "555-123-4567"),
        Finding("email", 27, 41, "jo@example.com"),
        Finding("key", 47, 67, WHOLE_KEYS[0]),
    ]
    assert redact(text).found == {"email": 1, "phone": 1, "key": 1}
    assert list(redact(text).found) == list(KINDS)


def test_kinds_that_touch_leave_nothing_of_each_other() -> None:
    assert redact("jo@example.com+442079460958").text == "[email][phone]"
    assert redact("+442079460958+442079460958").text == "[phone][phone]"
    assert redact("(555)123-4567(555)123-4567").text == "[phone][phone]"
    assert redact(f"https://jo:pass@example.com/?k={WHOLE_KEYS[0]}").text == "https://jo:[key]@example.com/?k=[key]"
    assert redact("_jo@example.com_ `jo@example.com` **jo@example.com**").text == "[email]_ `[email]` **[email]**"


def test_redacting_again_finds_nothing() -> None:
    draw = random.Random(2)
    for text in (soup(draw) for _ in range(300)):
        once = redact(text)
        assert redact(once.text) == Redacted(once.text, {})
        assert redact(text) == once


def planted(draw: random.Random) -> str:
    """A text as in a chat, here and there with something to hide."""
    items = (*EMAILS, *PHONES, *WHOLE_KEYS, *("".join(words) for words in KEYS_IN_WORDS))
    parts = [draw.choice(ORDINARY) for _ in range(draw.randrange(1, 5))]
    for _ in range(draw.choice((0, 0, 1, 2))):
        parts.insert(draw.randrange(len(parts) + 1), draw.choice(items))
    return draw.choice((" ", "\n", ", ", " – ")).join(parts)


def soup(draw: random.Random) -> str:
    """Pieces of everything against each other, cut anywhere: what nobody writes and a pattern may stumble on."""
    pieces = []
    for _ in range(draw.randrange(1, 9)):
        piece = draw.choice((*EMAILS, *PHONES, *WHOLE_KEYS, *ORDINARY, *("".join(words) for words in KEYS_IN_WORDS)))
        start = draw.choice((0, 0, draw.randrange(len(piece) + 1)))
        pieces.append(piece[start : draw.choice((len(piece), draw.randrange(len(piece) + 1)))])
    return draw.choice(("", "", " ", "-", ".", "=", "\n")).join(pieces)


@pytest.mark.parametrize("region", [None, "GB"])
@pytest.mark.parametrize("write", [planted, soup])
def test_a_column_is_redacted_as_each_of_its_texts(write: Callable[[random.Random], str], region: str | None) -> None:
    draw = random.Random(1)
    texts = [write(draw) for _ in range(400)]
    column, found = redact_column(pa.array(texts), region)
    each = [redact(text, region) for text in texts]
    assert column.to_pylist() == [one.text for one in each]
    assert dict(found) == {kind: sum(one.found.get(kind, 0) for one in each) for kind in KINDS}
    assert min(found.values()) > 20


@pytest.mark.parametrize("region", [None, "GB", "US"])
def test_the_hints_pass_over_nothing_that_a_search_without_them_finds(region: str | None) -> None:
    draw = random.Random(3)
    for text in [planted(draw) for _ in range(300)] + [soup(draw) for _ in range(300)]:
        assert find(text, region) == redaction._find(text, (redaction.KEY, redaction.EMAIL, redaction.PHONE), region)


def test_few_ordinary_texts_are_read_one_by_one() -> None:
    words = "The quick brown fox (aged 12) jumps over 3 lazy dogs; it costs $5.99 – see example.com/a?b=c#d in 2024. "
    flags = suspicious(pa.array([words * 10, words + "jo@example.com", None, ""]))
    assert flags.to_pylist() == [False, True, False, False]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_columns_of_every_form_keep_their_type_and_their_gaps(kind: pa.DataType) -> None:
    texts = ["Hello", None, "jo@example.com", "", "555-123-4567 and jo@example.com"]
    hidden = ["Hello", None, "[email]", "", "[phone] and [email]"]
    whole = pa.array(texts, kind)
    for column in (whole, pa.chunked_array([whole[:1], whole[1:]]), pa.chunked_array([whole, whole[:0]])):
        redacted, found = redact_column(column)
        assert redacted.to_pylist() == hidden
        assert redacted.type == kind
        assert type(redacted) is type(column)
        assert found == {"email": 2, "phone": 1}
    assert redact_column(whole[2:3])[0].to_pylist() == ["[email]"]
    assert suspicious(pa.chunked_array([whole[:1], whole[1:]])).to_pylist() == [False, False, True, False, True]


def test_a_column_without_findings_comes_back_itself() -> None:
    for column in (
        pa.array(["Hello", None]),
        pa.chunked_array([["Hello"], ["x@y"]]),
        pa.chunked_array([], pa.string()),
    ):
        redacted, found = redact_column(column)
        assert redacted is column
        assert not found


def test_a_preview_shows_what_would_be_hidden_and_no_value() -> None:
    rows = [("row 1", "Nothing."), ("row 2", "Write to jo@example.com or ring +44 20 7946 0958,\nnow!")]
    email, phone = preview(rows, 10)
    assert (email.row_id, email.kind, email.masked) == ("row 2", "email", "j…@e…")
    assert email.context == "Write to j…@e… or ring"
    assert (phone.kind, phone.masked, phone.context) == ("phone", "+44…58", "or ring +44…58, now!")


def test_a_preview_shows_little_of_a_key_and_less_of_a_short_one() -> None:
    long, short = preview([("1", WHOLE_KEYS[0]), ("2", "ftp://jo:hunter@example.com")], 10)
    assert (long.masked, short.masked) == ("AKIA…", "h…")
    assert short.context == "ftp://jo:h…@example.com"


def test_no_context_of_a_preview_holds_a_value() -> None:
    draw = random.Random(4)
    texts = [planted(draw) for _ in range(200)]
    for hidden in preview(((str(at), text) for at, text in enumerate(texts)), 10_000):
        for finding in find(texts[int(hidden.row_id)]):
            assert finding.value not in hidden.context


def test_a_preview_ends_at_its_limit_and_reads_no_further() -> None:
    def rows() -> Iterator[tuple[str, str]]:
        for at in range(1500):
            yield str(at), "jo@example.com, jim@example.com"
        raise AssertionError("read on")

    assert [hidden.row_id for hidden in preview(rows(), 3)] == ["0", "0", "1"]
    assert preview([], 3) == []


@pytest.mark.parametrize(
    "piece",
    [
        "@", "a@", "a@a.", "a", "-eyJ", "eyJ", "-sk-", "sk-T3BlbkFJ", "xoxb-1-", "awskey",
        "-----BEGIN PRIVATE KEY-----", "-", "+1 2 3 4 5 6 7 8 ", "1", "555-123-", "://a:b", "glagent-", "\\n",
        "Private-Lines: 1 A",
    ],
)  # fmt: skip
def test_hostile_texts_end(piece: str) -> None:
    """A pattern that reads on from every place would need minutes for one of these."""
    text = "jo@example.com " + piece * (60_000 // len(piece))
    assert redact(text).text.startswith("[email] ")


def test_a_chain_of_numbers_takes_one_round() -> None:
    assert redact("+442079460958" * 3000).text == "[phone]" * 3000
    assert redact("(555)123-4567" * 3000).text == "[phone]" * 3000
    assert redact("0471 220 0915 " * 3000, "IN").text == "[phone] " * 3000


def test_the_libraries_are_loaded_on_first_use() -> None:
    code = (
        "import sys; from feedback_store.redaction import redact; redact('Hello'); "
        "print([one for one in ('phonenumbers', 'detect_secrets', 'requests', 'duckdb') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_placeholders_are_no_findings() -> None:
    text = " ".join(f"[{kind}]" for kind in KINDS)
    assert redact(text) == Redacted(text, {})
    assert re.fullmatch(r"(\[\w+\] ?)+", text)
