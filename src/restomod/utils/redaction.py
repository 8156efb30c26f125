"""Redaction of secrets and home folders in shared files: pages, Markdown, pictures, records of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from restomod.utils.on_exit import split_then
from restomod.utils.text import visible

REDACTED = "[redacted]"

# word boundaries in names: non-letters and changes of case (accessToken matches; tokenizer and monkey do not)
BEGINS = r"(?:(?<![a-z])(?=[a-z])|(?<![A-Z])(?=[A-Z]))"
ENDS = r"(?!(?<=[a-z])[a-z]|(?<=[A-Z])[A-Z])"
PASSWORD = rf"(?i:passwor[dt]|passwd|passphrase){ENDS}"
SECRET = (
    rf"(?:{PASSWORD}|(?i:secret|credentials?){ENDS}|{BEGINS}"
    rf"(?i:(?:api|auth|access|account|secret|bot|hf|hub)?(?:token|key)|o?auth|signature){ENDS})"
)
ARGUMENT = rf"(?:{SECRET}|{BEGINS}(?i:pass|sig|jwt|(?<=[_-])pwd){ENDS})"  # words with other meanings in prose
# values, except redacted ones and the constants, types and calls of source code
NO_VALUE = (
    r"(?!\[redacted\]|(?:[Nn]one|[Tt]rue|[Ff]alse|null|str|int|bytes|bool|password|secret|\d{1,3})(?![\w-])"
    r"|[\w.]{0,64}[(\[])"
)
QUOTED = r"""(?:\\?"[^"\n]{0,4096}"|'[^'\n]{0,4096}')"""
VALUE = rf"""{NO_VALUE}(?:{QUOTED}|[^\s"'\\,;&}}\])]{{1,4096}})"""
LIKELY = (  # 8 characters with letters and digits, or 16 without a break
    r"""(?=\\?["']?(?=[^\s"']{8})(?=[^\s"']{0,64}[A-Za-z])(?:[^\s"']{0,64}\d|[A-Za-z0-9+/]{16}))"""
)
MEMBER = r"""\\?["']?\s{0,4}[:=]\s{0,4}"""  # separator of name and value
NAME = r"(?<![\w.-])[\w.-]{0,40}?"  # start of a name
REST = r"[\w.-]{0,40}"
TOKEN = r"(?:(?<![\w-])|(?<=\\[nrt]))"  # start of a token; an escaped line feed may precede it
# patterns with linear running time; the group `keep` precedes the secret and is kept
SECRETS = tuple(
    map(
        re.compile,
        (
            # tokens of known forms: Hugging Face, OpenAI, Anthropic, GitHub, GitLab, Slack, npm, PyPI, ...
            rf"{TOKEN}(?:hf_|api_org_|sk-|gsk_|pplx-|gh[pousr]_|github_pat_|gl[a-z]{{2,5}}-|xox[a-z]-|xapp-|npm_|pypi-"
            r"|nvapi-|r8_|rpa_|wandb_v1_|tgp_v1_|[rs]k_(?:live|test)_|whsec_|dckr_pat_|dop_v1_|shp[a-z]{2}_|hv[sb]\."
            r"|SG\.|PMAK-|GOCSPX-|lin_api_|ntn_|secret_|figd_|sntry[su]_|AGE-SECRET-KEY-)"
            r"(?=[\w.-]{0,80}\d|[\w-]{0,12}[A-Za-z]{16})[\w-]{16,}(?:\.[\w-]{16,})?",
            r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])",  # Amazon
            r"(?<![\w-])(?:AIza[\w-]{30,}|ya29\.[\w-]{16,}|1//0[\w-]{20,})",  # Google
            rf"{TOKEN}eyJ[\w-]{{8,}}\.[\w-]{{8,}}(?:\.[\w-]*)?",  # JSON Web Tokens
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----END)[\s\S])*(?:-----END[A-Z ]{0,40}-----)?",
            # HTTP headers
            r"(?i)(?P<keep>\bauthorization\b[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?:[a-z]{1,20}\s{1,4})?)[^\s\"',;]{4,}",
            rf"(?i)(?P<keep>\bbearer\s{{1,4}}){LIKELY}[\w.~+/=-]{{8,}}",
            r"(?i)(?P<keep>\bwandb\s{1,4}login\s{1,4}(?:--relogin\s{1,4})?)[0-9a-f]{40}\b",
            # URLs: user and password; parameters such as token=, X-Amz-Signature=, sig=
            r"(?P<keep>[a-zA-Z]://)[^/\s?#\"'<>]{1,512}(?=@)",
            rf"(?P<keep>[?&#](?!key=)[\w.-]{{0,40}}?{ARGUMENT}{REST}=)(?!\[redacted\])[^&\s\"'#<>]{{1,4096}}",
            # flags, environment variables, and other names with a value that may be a secret
            rf"(?P<keep>(?<![\w-])--(?!no-)[\w.-]{{0,40}}?{ARGUMENT}{REST}(?:=|\s{{1,4}}(?!-))){VALUE}",
            rf"(?P<keep>(?<![\w.-])(?=[A-Z])[A-Z0-9_]{{0,40}}?{ARGUMENT}[A-Z0-9_]{{0,40}}=){VALUE}",
            rf"(?P<keep>{NAME}{PASSWORD}{REST}{MEMBER}){VALUE}",
            rf"(?P<keep>{NAME}(?i:secret|credentials?){ENDS}{REST}(?:=|{MEMBER}(?=\\?[\"']))){VALUE}",
            # (the value of a plain `key` or `token`, common in source code, is a secret from 16 characters on)
            r"(?P<keep>(?<![\w.-])(?!(?i:key|token)\W{1,9}+[^\s\"']{0,15}(?![^\s\"']))"
            rf"[\w.-]{{0,40}}?{SECRET}{REST}{MEMBER}){LIKELY}{VALUE}",
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
    """Replace possible secrets by "[redacted]".

    Secrets are tokens of known formats; values of flags, variables, members and parameters with names such as token,
    key or password; and user names and passwords of URLs.
    """
    for pattern in SECRETS:
        text = pattern.sub(lambda found: f"{found.groupdict().get('keep') or ''}{REDACTED}", text)
    return text


def redact_text(text: str) -> str:
    """Redact secrets and replace home folders of all users and operating systems by ``~``."""
    text = redact_secrets(text)
    home = os.path.expanduser("~").rstrip("/\\")  # ten times as fast as `Path.home`, for thousands of texts
    if len(home) > 1:
        text = re.sub(rf"{PATH_BEGINS}{re.escape(home)}(?![\w.-])", "~", text)
    for pattern in HOMES:
        text = pattern.sub("~", text)
    return text


def redact(value: Any) -> Any:
    """Return a copy of a JSON value with all texts and keys redacted and control characters made visible."""
    if isinstance(value, str):
        return redact_text(visible(value))
    if isinstance(value, dict):
        return {redact(key): redact(part) for key, part in value.items()}
    return type(value)(map(redact, value)) if isinstance(value, list | tuple) else value


def redact_pieces(pieces: Sequence[str]) -> list[str]:
    """Redact a text that is divided into pieces, such as tokens.

    The text is redacted as a whole. The part from the first to the last change goes into the piece with the first
    change.
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
    """Redact secrets in the words of a command line and remove ``--then`` with its value. Paths are kept."""
    made: list[str] = []
    for word in split_then(list(words))[0]:
        flag = made[-1] if made and re.fullmatch(r"--(?!no-)[\w.-]+", made[-1]) else ""
        of_secret = re.search(ARGUMENT, flag) is not None
        made.append(REDACTED if of_secret and not word.startswith("--") else redact_secrets(word))
    return made
