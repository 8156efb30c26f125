"""Redaction of secrets and home folders in what is shared: pages, Markdown, pictures, records of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from restomod.afterwards import take_command
from restomod.text import visible

REDACTED = "[redacted]"

PASSWORD = r"(?:secret|passw(?:or)?d|passphrase|pwd|credential|signature|auth(?!or))"
SECRET = rf"(?:token(?!s)|key(?!s)|{PASSWORD})"
VALUE = r"""(?!\[redacted\])(?:\\?"[^"\n]{0,4096}"|'[^'\n]{0,4096}'|[^\s"'\\,;&}\])]{1,4096})"""
MEMBER = r"""\\?["']?\s{0,4}[:=]\s{0,4}"""  # what may stand between a name and its value
# each finds in linear time what it replaces; the group `keep` stays in front of that
SECRETS = tuple(
    map(
        re.compile,
        (
            # tokens of known forms: Hugging Face, OpenAI, Anthropic, GitHub, GitLab, Slack, npm, PyPI, Nvidia, ...
            r"(?<![A-Za-z0-9])(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|npm_|pypi-|nvapi-|r8_|rpa_|wandb_v1_)"
            r"[\w-]{16,}",
            r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])",  # Amazon
            r"(?<![\w-])(?:AIza[\w-]{30,}|ya29\.[\w-]{16,})",  # Google
            r"(?<![\w.-])eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?",  # JSON Web Tokens
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:(?!-----END)[\s\S])*(?:-----END[A-Z ]{0,40}-----)?",
            r"(?i)(?P<keep>\bauthorization\b[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?:[a-z]{1,20}\s{1,4})?)[^\s\"',;]{4,}",
            r"(?i)(?P<keep>\bbearer\s{1,4})(?=[^\s\"']{0,400}\d)[\w.~+/=-]{8,}",
            r"(?i)(?P<keep>\bwandb\s{1,4}login\s{1,4}(?:--relogin\s{1,4})?)[0-9a-f]{40}\b",
            # of addresses: user and password; parameters such as token=, X-Amz-Signature=, sig=
            r"(?P<keep>[a-zA-Z]://)[^/\s@?#\"'<>]{1,512}(?=@)",
            rf"(?i)(?P<keep>[?&][\w.-]{{0,40}}?(?:{SECRET}|sig|jwt)[\w.-]{{0,40}}=)[^&\s\"'#<>]{{1,4096}}",
            # flags, variables of the environment, and other names with a value that may be a secret
            rf"(?i)(?P<keep>(?<![\w-])--[\w.-]{{0,40}}?{SECRET}[\w.-]{{0,40}}(?:=|\s{{1,4}}(?!-))){VALUE}",
            rf"(?P<keep>(?<![\w.-])(?=[A-Z])[A-Z0-9_]{{0,40}}?(?i:{SECRET})[A-Z0-9_]{{0,40}}=){VALUE}",
            rf"(?i)(?P<keep>(?<![\w.-])[\w.-]{{0,40}}?{PASSWORD}[\w.-]{{0,40}}{MEMBER}){VALUE}",
            rf"(?i)(?P<keep>(?<![\w.-])[\w.-]{{0,40}}?{SECRET}[\w.-]{{0,40}}{MEMBER})(?=\S{{0,64}}\d)(?=\S{{8}}){VALUE}",
        ),
    )
)
PATH_BEGINS = r"(?:(?<![\w/.~\\-])|(?<=file://))"
HOMES = (
    re.compile(
        r"(?i)(?:\b[a-z]:|\\{2,4}[\w.$-]{1,64}|/cygdrive/[a-z])[\\/]{1,2}(?:users|documents and settings)[\\/]{1,2}"
        r"(?:[^\\/:*?\"<>|\r\n]{1,64}(?=[\\/])|[^\\/\s:*?\"'<>|]{1,64})"
    ),
    re.compile(rf"{PATH_BEGINS}(?:/[\w.-]{{1,64}}){{0,3}}/(?:home|homes|[Uu]sers)/[^/\s\"'`<>|:;,()\[\]\\]{{1,255}}"),
    re.compile(rf"{PATH_BEGINS}/root(?![\w.-])"),
)


def redact_secrets(text: str) -> str:
    """Replace what looks like a secret.

    Secrets are tokens of known forms, values of flags, variables, members and parameters that are called token, key,
    password or the like, and users and passwords of addresses.
    """
    for pattern in SECRETS:
        text = pattern.sub(lambda found: f"{found.groupdict().get('keep') or ''}{REDACTED}", text)
    return text


def redact_text(text: str) -> str:
    """Redact secrets, and shorten home folders of any user and operating system to ``~``."""
    text = redact_secrets(text)
    home = str(Path.home()).rstrip("/\\")
    if len(home) > 1:
        text = re.sub(rf"{PATH_BEGINS}{re.escape(home)}(?![\w.-])", "~", text)
    for pattern in HOMES:
        text = pattern.sub("~", text)
    return text


def redact(value: Any) -> Any:
    """A copy of a JSON value with `redact_text` applied to all texts and keys, and control characters `visible`."""
    if isinstance(value, str):
        return redact_text(visible(value))
    if isinstance(value, dict):
        return {redact(key): redact(part) for key, part in value.items()}
    return type(value)(map(redact, value)) if isinstance(value, list | tuple) else value


def redact_pieces(pieces: Sequence[str]) -> list[str]:
    """Redact a text that is cut into pieces, such as tokens, as a whole.

    All text between the first and the last difference goes into the piece where the first one lies.
    """
    whole = "".join(pieces)
    shown = redact_text(whole)
    if shown == whole:
        return [visible(piece) for piece in pieces]
    same = next((i for i, (a, b) in enumerate(zip(whole, shown, strict=False)) if a != b), min(len(whole), len(shown)))
    left = min(len(whole), len(shown)) - same
    after = next((i for i in range(left) if whole[-1 - i] != shown[-1 - i]), left)
    made, at = [], 0
    for piece in pieces:
        start, at = at, at + len(piece)
        text = whole[start : min(at, same)] if start < same else ""
        if start <= same < at:
            text += shown[same : len(shown) - after]
        text += whole[max(start, len(whole) - after) : at] if at > len(whole) - after else ""
        made.append(visible(text))
    return made


def redact_command(words: Sequence[str]) -> list[str]:
    """The words of a command line without ``--then``, its value and secrets. Paths are kept."""
    made: list[str] = []
    for word in take_command(list(words))[0]:
        of_secret = bool(made) and re.fullmatch(rf"(?i)--[\w.-]*{SECRET}[\w.-]*", made[-1]) is not None
        made.append(REDACTED if of_secret and not word.startswith("--") else redact_secrets(word))
    return made
