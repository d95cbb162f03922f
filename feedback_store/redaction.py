r"""Redaction: e-mail addresses, phone numbers and keys hidden by pattern, on the way into a snapshot. Pure: no store.

    column of texts --suspicious--> the few worth reading --redact--> [email], [phone], [key] --redact_column--> column
    (row id, text)… --preview--> what would be hidden, masked, for the page of an admin

``suspicious`` is one pass of Arrow over the whole column and comes first everywhere, also in ``redact`` and ``find``:
what it passes over, nothing finds. Phone numbers are judged by libphonenumber (``phonenumbers``), keys by the
patterns of ``detect-secrets`` and by a few of ours for forms that are newer than its release; both load on first use.

A pattern finds what has a form and nothing else. **Not found:** names, postal addresses, birthdays, numbers of
accounts, cards, passports and insurances, IP addresses, user names; passwords and tokens without a form of their own;
addresses and numbers that are spelled out ("john at example dot com", "five five five …"), split over lines, or in
digits other than those of ``_DIGIT``; addresses without a dot in the domain; phone numbers without a country code or an
area code, and without a ``region`` all national ones but those with brackets, hyphens or dots as in North America
("(202) 555-0142", not "202 555 0142", which looks like "256 512 1024"). So a redacted text is not an anonymous one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from feedback_store.errors import InvalidRecord

EMAIL = "email"
PHONE = "phone"
KEY = "key"
KINDS = (EMAIL, PHONE, KEY)

_Span = tuple[int, int]

# The dot-atom of RFC 5322, 3.2.3, without the characters that are mark-up or delimiters in texts (* / = ` | { } …),
# letters of every script (RFC 6531), lengths after RFC 5321, 4.5.3.1, and a domain with a dot. Every repeat is bounded
# or cannot give back what it took, so the time is linear in the text.
_EMAIL = re.compile(r"\w[\w.+%'&~-]{0,63}+@(?:[\w-]{1,63}+\.){1,8}(?:xn--[\w-]{1,59}|[^\W\d_]{2,63})")

_DIGIT = "[0-9٠-٩۰-۹०-९０-９]"
_SEPARATOR = "[ ().\\-/\u00a0\u2010-\u2015\u202f]"
_BREAK = "[-. \u00a0\u2010-\u2013]"
# E.164 has at most 15 digits; the library says how many of them make a number.
_INTERNATIONAL = re.compile(rf"(?<![^\W\d])(?<![+＋])\(?[+＋]\(?{_DIGIT}(?:{_SEPARATOR}{{0,3}}{_DIGIT}){{6,14}}(?!\w)")
_AREA = rf"\([0-9]{{3}}\){_BREAK}?"
_NORTH_AMERICAN = re.compile(
    rf"(?:(?<=\d){_AREA}|(?<![\w+])(?<!\d[-.])(?:1{_BREAK})?(?:{_AREA}|[0-9]{{3}}{_BREAK}))"
    rf"[0-9]{{3}}{_BREAK}[0-9]{{4}}(?!\w|[-./]\d)"
)
_NATIONAL_RUN = re.compile(rf"(?<![\w.,/=+-])[0-9]+(?:{_SEPARATOR}{{1,2}}[0-9]+)*(?!\w|[.,]\d)")
_NATIONAL_GROUPS = 6
_LEAST_DIGITS = 7
_DIGITS = re.compile(r"\d+")
_BRACKET_OR_HYPHEN = re.compile("[(\\-\u2010-\u2013]")
_DECIMAL = re.compile(r"[+＋]?\d+\.\d+")
_YEARS = re.compile(r"[12]\d{3} ?[-/\u2010-\u2015] ?[12]\d{3}")

# A run of one token: at its start no letter, digit, _ or - precedes (but for an escaped line end), so that a long run
# is read once and not from each of its characters.
_START = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))"
_DASHES = "-{4,5}"
_PEM = "[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?"
_LINE_END = r"(?:\s|\\[nrt])*+"
_OUR_KEYS = tuple(
    re.compile(pattern)
    for pattern in (
        # PEM (RFC 7468) and OpenPGP blocks: all of the key, where the library knows the first line only. A mention
        # of the first line without a key is no finding.
        rf"{_DASHES} ?BEGIN {_PEM} ?{_DASHES}"
        rf"(?:(?:[^-]++|-(?!---))*+{_DASHES} ?END {_PEM} ?{_DASHES}"
        rf"|(?:{_LINE_END}[A-Za-z0-9+/=]{{16,}}+)++)",
        r"Private-Lines: [0-9]+\s(?:[A-Za-z0-9+/=]++\s++)++Private-MAC: [0-9a-f]+",
        # JSON Web Tokens (RFC 7519): header, payload and the signature, which the library leaves.
        rf"{_START}eyJ[A-Za-z0-9_-]{{8,}}+\.[A-Za-z0-9_-]{{8,}}+(?:\.[A-Za-z0-9_-]++)*+",
        # OpenAI, Anthropic and those that write theirs alike; the library knows OpenAI's of 2024 only.
        rf"{_START}sk-(?:(?:admin|ant|or|proj|svcacct)-[A-Za-z0-9_-]{{20}}|[A-Za-z0-9]{{20}}|[A-Za-z0-9_-]*T3BlbkFJ)",
        r"github_pat_[A-Za-z0-9_]{22}",
        r"AIza[A-Za-z0-9_-]{35}",
        r"hf_[A-Za-z0-9]{30}",
        r"npm_[A-Za-z0-9]{36}",
        r"xapp-[0-9]-[A-Za-z0-9-]{20}",
        r"[rs]k_(?:live|test)_[A-Za-z0-9]{10}",
        r"(?i:aws_?secret_?(?:access_?)?key)['\"]?\s{0,3}[=:]\s{0,3}['\"]?([A-Za-z0-9/+]{40})",
    )
)
_REST_OF_TOKEN = re.compile("[A-Za-z0-9_-]*+")

# What a text must hold for anything of a kind to be in it, in the syntax of RE2. Short on purpose: long counted runs
# beside each other (``[0-9a-z]{32}``) make this pass five times slower.
_WORD = "[A-Za-z0-9_-]"
_EMAIL_HINT = r"[^\x00-\x20@]@[^\x00-\x20@]+\.[^\x00-\x20@]"
_PHONE_HINT = (
    rf"[+＋]\(?{_DIGIT}(?:{_SEPARATOR}{{0,3}}{_DIGIT}){{6}}"
    rf"|[0-9]{{3}}\)?{_BREAK}?[0-9]{{3}}{_BREAK}[0-9]{{4}}"
)
_NATIONAL_HINT = rf"[0-9](?:{_SEPARATOR}{{0,2}}[0-9]){{6}}"
_KEY_HINT = "|".join(
    (
        r"A(?:3T|BIA|CCA|KIA|SIA)[0-9A-Z]{4}",
        r"(?i:aws[^\n]{0,20}(?:key|pw|pass|token))",
        "AccountKey=",
        r"://[^/@\s]+@",
        rf"\.{_WORD}{{6}}\.{_WORD}{{8}}",
        "gh[opusr]_[A-Za-z0-9_]{3}",
        "github_pat_",
        rf"gl[a-z]+-{_WORD}{{12}}",
        "GR1348941",
        "eyJ[A-Za-z0-9]",
        "[0-9a-z]-us[0-9]",
        rf"sk-{_WORD}{{12}}",
        "pypi-AgE",
        rf"SG\.{_WORD}",
        "(?i:xox[a-z]-[0-9])",
        "xapp-",
        r"(?i:hooks\.slack)",
        "sq0csp-",
        "[rs]k_(?:live|test)_",
        rf"[0-9]{{8}}:{_WORD}{{8}}",
        "(?:AC|SK)[a-z0-9]{8}",
        "AIza",
        "hf_[A-Za-z0-9]{4}",
        "npm_[A-Za-z0-9]{4}",
        "PRIVATE KEY",
        "Private-Lines: ",
    )
)

_BATCH_TEXTS = 1000
_CONTEXT_CHARACTERS = 30


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to hide: ``value`` is ``text[start:end]``, ``kind`` is email, phone or key."""

    kind: str
    start: int
    end: int
    value: str


@dataclass(frozen=True, slots=True)
class Redacted:
    """A text with what was found replaced by ``[email]``, ``[phone]`` and ``[key]``; ``found`` counts by kind."""

    text: str
    found: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Hidden:
    """A finding as an admin may see it: ``masked`` is the value such as ``j…@e…``, ``context`` what stands around."""

    row_id: str
    kind: str
    masked: str
    context: str


def redact(text: str, region: str | None = None) -> Redacted:
    """The text without e-mail addresses, phone numbers and keys; redacting the result again changes nothing.

    ``region`` is a country such as ``GB`` whose national phone numbers are found too; None finds the international
    ones and those written as in North America. Raises ``InvalidRecord`` for a region that does not exist.
    """
    return _redact_all([text], region)[0]


def find(text: str, region: str | None = None) -> list[Finding]:
    """What ``redact`` would hide, in the order of the text and without overlaps. Raises as ``redact`` does."""
    return next(_find_all([text], region))


def preview(texts: Iterable[tuple[str, str]], limit: int, region: str | None = None) -> list[Hidden]:
    """The first ``limit`` findings in texts given as (row id, text), with no value in full. Raises as ``redact``."""
    return list(islice(_hidden(texts, region), limit))


def redact_column(
    column: pa.Array | pa.ChunkedArray, region: str | None = None
) -> tuple[pa.Array | pa.ChunkedArray, Counter[str]]:
    """A column of texts, each as ``redact`` gives it, and how much of each kind was hidden. None stays None.

    The same object comes back where nothing was found. Raises as ``redact`` does.
    """
    flags = suspicious(column, region)
    redacted = _redact_all(column.filter(flags).to_pylist(), region)
    found: Counter[str] = Counter()
    for one in redacted:
        found.update(one.found)
    if not found:
        return column, found
    return pc.replace_with_mask(column, flags, pa.array([one.text for one in redacted], column.type)), found


def suspicious(column: pa.Array | pa.ChunkedArray, region: str | None = None) -> pa.BooleanArray:
    """For each text of a column whether it may hold something to hide: True for all that do and a few others."""
    hints = _hints(region)
    flags = pc.fill_null(pc.match_substring_regex(column, "|".join(hints.values())), fill_value=False)
    return flags.combine_chunks() if isinstance(flags, pa.ChunkedArray) else flags


def _hints(region: str | None) -> dict[str, str]:
    """The kinds in the order they are looked for, each with what a text must hold."""
    _check_region(region)
    phone = _PHONE_HINT if region is None else f"{_PHONE_HINT}|{_NATIONAL_HINT}"
    return {KEY: _KEY_HINT, EMAIL: _EMAIL_HINT, PHONE: phone}


def _redact_all(texts: Sequence[str], region: str | None) -> list[Redacted]:
    done = list(texts)
    found: list[Counter[str]] = [Counter() for _ in texts]
    # Once more after each replacement: what stood beside a value may be one itself now. Every round hides characters
    # and the words in brackets are no finding, so this ends.
    rest = list(range(len(done)))
    while rest:
        changed = []
        for number, findings in zip(rest, _find_all([done[number] for number in rest], region), strict=True):
            if findings:
                found[number].update(finding.kind for finding in findings)
                done[number] = _replaced(done[number], ((one.start, one.end, f"[{one.kind}]") for one in findings))
                changed.append(number)
        rest = changed
    return [
        Redacted(text, {kind: of[kind] for kind in KINDS if of[kind]}) for text, of in zip(done, found, strict=True)
    ]


def _find_all(texts: Sequence[str], region: str | None) -> Iterator[list[Finding]]:
    """The findings of each text; a kind is looked for where its hint is."""
    column = pa.array(texts, pa.string())
    flags = {kind: pc.match_substring_regex(column, hint).to_pylist() for kind, hint in _hints(region).items()}
    for number, text in enumerate(texts):
        yield _find(text, [kind for kind in flags if flags[kind][number]], region)


def _find(text: str, kinds: Iterable[str], region: str | None) -> list[Finding]:
    findings: list[Finding] = []
    rest = text
    for kind in kinds:
        found = _joined(_spans(kind, rest, region))
        findings += [Finding(kind, start, end, text[start:end]) for start, end in found]
        # The next kind sees what is left, at the same places: the password of a URL is not the start of an address.
        rest = _replaced(rest, ((start, end, "\0" * (end - start)) for start, end in found))
    return sorted(findings, key=lambda finding: finding.start)


def _replaced(text: str, replacements: Iterable[tuple[int, int, str]]) -> str:
    pieces = []
    behind = 0
    for start, end, replacement in replacements:
        pieces += [text[behind:start], replacement]
        behind = end
    return "".join((*pieces, text[behind:])) if pieces else text


def _joined(spans: Iterable[_Span]) -> list[_Span]:
    """The spans in order, those that overlap as one."""
    joined: list[_Span] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _spans(kind: str, text: str, region: str | None) -> Iterator[_Span]:
    if kind == KEY:
        return _key_spans(text)
    return _phone_spans(text, region) if kind == PHONE else (match.span() for match in _EMAIL.finditer(text))


def _key_spans(text: str) -> Iterator[_Span]:
    for pattern, secret in _all_keys():
        behind = 0
        for match in pattern.finditer(text):
            if secret:
                yield match.span(secret)
            elif match.end() > behind:
                rest = _REST_OF_TOKEN.match(text, match.end())
                assert rest is not None
                behind = rest.end()
                yield match.start(), behind


@cache
def _all_keys() -> tuple[tuple[re.Pattern[str], int], ...]:
    """Every pattern of a key with the group that is the secret, 0 where all of it and the rest of its word are.

    Of the library those of one provider each, whose time is linear in the text; those that look for disorder (high
    entropy) or for words such as "password" hit ordinary texts. Its verification, which asks the provider, is not used.
    """
    from detect_secrets.plugins.aws import AWSKeyDetector
    from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
    from detect_secrets.plugins.basic_auth import BasicAuthDetector
    from detect_secrets.plugins.discord import DiscordBotTokenDetector
    from detect_secrets.plugins.github_token import GitHubTokenDetector
    from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
    from detect_secrets.plugins.mailchimp import MailchimpDetector
    from detect_secrets.plugins.pypi_token import PypiTokenDetector
    from detect_secrets.plugins.sendgrid import SendGridDetector
    from detect_secrets.plugins.slack import SlackDetector
    from detect_secrets.plugins.square_oauth import SquareOAuthDetector
    from detect_secrets.plugins.stripe import StripeDetector
    from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
    from detect_secrets.plugins.twilio import TwilioKeyDetector

    group_is_secret = (AWSKeyDetector(), BasicAuthDetector())
    whole_is_secret = (
        AzureStorageKeyDetector(), DiscordBotTokenDetector(), GitHubTokenDetector(), GitLabTokenDetector(),
        MailchimpDetector(), PypiTokenDetector(), SendGridDetector(), SlackDetector(), SquareOAuthDetector(),
        StripeDetector(), TelegramBotTokenDetector(), TwilioKeyDetector(),
    )  # fmt: skip
    return (
        *((pattern, pattern.groups) for plugin in group_is_secret for pattern in plugin.denylist),
        *((pattern, 0) for plugin in whole_is_secret for pattern in plugin.denylist),
        *((pattern, pattern.groups) for pattern in _OUR_KEYS),
    )


def _phone_spans(text: str, region: str | None) -> Iterator[_Span]:
    for match in _INTERNATIONAL.finditer(text):
        number = _longest_number(match[0])
        # "(+44) 20 …" has its bracket closed within the number, "(+44 20 …)" keeps both.
        start = match.start() + (number.startswith("(") and number.count("(") > number.count(")"))
        if number:
            yield start, match.start() + len(number)
    yield from (match.span() for match in _NORTH_AMERICAN.finditer(text) if _is_north_american(match[0]))
    if region is not None:
        yield from _national_spans(text, region)


def _longest_number(written: str) -> str:
    """As many groups of digits from the left as make a number that can be: "+1 202 555 0142" of "… 0142 2 times"."""
    from phonenumbers import NumberParseException, ValidationResult, is_possible_number_with_reason, parse

    if _DECIMAL.fullmatch(written):
        return ""
    for group in reversed(list(_DIGITS.finditer(written))):
        try:
            number = parse(written[: group.end()])
        except NumberParseException:
            continue
        if is_possible_number_with_reason(number) == ValidationResult.IS_POSSIBLE:
            return written[: group.end()]
    return ""


def _is_north_american(written: str) -> bool:
    """With brackets or a hyphen the form is enough, with dots the library must know it; "256 512 1024" is no number."""
    from phonenumbers import is_valid_number, parse

    if _BRACKET_OR_HYPHEN.search(written):
        return True
    return "." in written and is_valid_number(parse(written, "US"))


def _national_spans(text: str, region: str) -> Iterator[_Span]:
    for run in _NATIONAL_RUN.finditer(text):
        groups = [group.span() for group in _DIGITS.finditer(text, *run.span())]
        first = 0
        while first < len(groups):
            number = _national_number(text, groups[first : first + _NATIONAL_GROUPS], region)
            if number:
                start, end = groups[first][0], groups[first + number - 1][1]
                opened = text[start - 1 : start] == "(" and ")" in text[start:end]
                yield start - opened, end
            first += number or 1


def _national_number(text: str, groups: Sequence[_Span], region: str) -> int:
    """How many of these groups of digits, from the first, make a number of the region; 0 for none."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    starts_with_zero, lengths = _national_form(region)
    start = groups[0][0]
    if text[start - 1 : start] == "." or (starts_with_zero and text[start] != "0"):
        return 0
    for count in range(len(groups), 0, -1):
        written = text[start : groups[count - 1][1]]
        if sum(end - begin for begin, end in groups[:count]) not in lengths:
            continue
        if _DECIMAL.fullmatch(written) or _YEARS.fullmatch(written):
            continue
        found = PhoneNumberMatcher(written, region, leniency=Leniency.STRICT_GROUPING, max_tries=1)
        if any(number.raw_string == written for number in found):
            return count
    return 0


@cache
def _national_form(region: str) -> tuple[bool, frozenset[int]]:
    """Whether national numbers are written with a leading 0, and how many digits they can have."""
    from phonenumbers import PhoneMetadata, ndd_prefix_for_region

    prefix = ndd_prefix_for_region(region, True) or ""
    metadata = PhoneMetadata.metadata_for_region(region)
    assert metadata is not None
    assert metadata.general_desc is not None
    digits = {length + extra for length in metadata.general_desc.possible_length for extra in (0, len(prefix))}
    return prefix == "0", frozenset(length for length in digits if length >= _LEAST_DIGITS)


def _check_region(region: str | None) -> None:
    if region is None:
        return
    from phonenumbers import SUPPORTED_REGIONS

    if region not in SUPPORTED_REGIONS:
        raise InvalidRecord("Redaction", "region", region, "None or a country in two capitals, such as GB")


def _hidden(texts: Iterable[tuple[str, str]], region: str | None) -> Iterator[Hidden]:
    rows = iter(texts)
    while batch := list(islice(rows, _BATCH_TEXTS)):
        for (row_id, text), findings in zip(batch, _find_all([text for _, text in batch], region), strict=True):
            yield from _masked_rows(row_id, text, findings)


def _masked_rows(row_id: str, text: str, findings: Sequence[Finding]) -> Iterator[Hidden]:
    # No context reaches into the finding before or after: that would show its value.
    ends = [0, *(finding.end for finding in findings)]
    starts = [*(finding.start for finding in findings[1:]), len(text)]
    for finding, first, last in zip(findings, ends, starts, strict=False):
        masked = _masked(finding)
        before = text[max(first, finding.start - _CONTEXT_CHARACTERS) : finding.start]
        after = text[finding.end : min(last, finding.end + _CONTEXT_CHARACTERS)]
        yield Hidden(row_id, finding.kind, masked, " ".join(f"{before}{masked}{after}".split()))


def _masked(finding: Finding) -> str:
    value = finding.value
    if finding.kind == EMAIL:
        return f"{value[0]}…@{value.rpartition('@')[2][0]}…"
    if finding.kind == PHONE:
        return f"{value[:3]}…{value[-2:]}"
    return f"{value[: min(4, len(value) // 4)]}…"
