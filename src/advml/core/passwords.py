"""Hides passwords, tokens and keys in what is printed or kept.

    >>> masked("postgresql://ann:S3CRET@host/name is down")
    'postgresql://ann:***@host/name is down'

Libraries quote an address whole, cut short, decoded, or only the part that they could not parse. So there are two rules:

- Whatever looks like the password of an address, or like `password=...`, is masked wherever it stands.
- The secrets of the addresses in use (`remember`) and of the environment are masked by their value.

In doubt, too much is masked.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
# The patterns are bounded, so that a long text takes no longer than its length.
_NAME = r"""(?:(?:password|passwd|passphrase|passfile|pwd|secret|api_?key|access_?key|credential|odbc_connect)[\w-]{0,40}
    |(?:access|auth|api|bearer|refresh|security|session)[_-]?token)"""
# These are words too (`forward pass = 3 steps`): they count within an address, or without a blank before the sign.
_WORD = r"""(?<![\w.-])(?:(?:pass|token)(?:=|%3D)\s?|(?<=[?&;])(?:pass|token)\s?=\s?|(?<=[?&])sig(?:=|%3D))"""
# A value may hold `&` and `;`: it ends where the next `name=` begins, at a blank, or where its quote or brace ends.
_VALUE = r"""(?:'[^']{0,2000}'|"[^"]{0,2000}"|\{[^}]{0,2000}\}|(?:(?![&;][\w.%-]{1,60}=)\S)*)"""
_ASSIGNED = re.compile(rf"(?P<head>{_NAME}\s?(?:=|%3D)\s?|{_WORD})(?P<value>{_VALUE})", re.IGNORECASE | re.VERBOSE)
_HEAD = r"(?P<head>(?<=\w)(?<!\bs3)(?<!\bgs)(?<!\bfile)://[^\s:/?#@'\"\[]*:)"  # scheme://user:, but of no bucket or file
# A password may hold any character: it ends at the last @ of the word.
_PASSWORD = re.compile(rf"{_HEAD}(?P<value>\S{{0,2000}})(?=@)", re.IGNORECASE)
_TOKEN = re.compile(r"(?P<head>\bhttps?://)(?P<value>[^\s:/?#@'\"]+)(?=@)", re.IGNORECASE)  # a name alone may be the secret
_CUT = re.compile(rf"{_HEAD}(?P<value>(?!\d{{1,5}}(?![\w%]))(?!\S{{0,2000}}@)[^\s'\"]+)", re.IGNORECASE)  # not a port, and the @ is cut off
# Of a setting that should be an address: whatever stands between the first colon after the scheme and the last @, but a port.
_LOOSE = re.compile(r"^(?>(?:.*?:/+)?)[^:@/]*:(?!\d{1,5}[/?])(?P<value>.+)@", re.DOTALL)
_OF_THE_ENVIRONMENT = re.compile(r"(?:PASSWORD|PASSWD|TOKEN|SECRET|ACCESS_KEY|API_KEY)$")
_SHORT = 6  # characters: shorter secrets, and parts of secrets, are masked as whole words only
# `mlflow`, `postgres`, `admin`: masked by the patterns only, for by its value every message that says the word would lose it.
_ORDINARY = re.compile(r"[A-Z]?[a-z]{0,11}")

_remembered: set[str] = set()


def remember(address: str | None) -> None:
    """Mask the secrets of this address from now on, wherever they turn up."""
    _remembered.update(secrets(address or ""))


def masked(text: str) -> str:
    """The text without passwords, tokens and keys."""
    of_environment = {value for name, value in os.environ.items() if _OF_THE_ENVIRONMENT.search(name) and len(value) >= _SHORT}
    for secret in sorted(_remembered | _unusual(of_environment), key=len, reverse=True):
        alone = len(secret) < _SHORT or secret.isalpha() or secret.isdigit()
        bounds = (r"(?:(?<!\w)|(?<=%[\da-fA-F]{2}))", r"(?!\w)") if alone else ("", "")
        text = re.sub(f"{bounds[0]}{re.escape(secret)}{bounds[1]}", MASK, text)
    for pattern in (_PASSWORD, _TOKEN, _CUT, _ASSIGNED):
        text = pattern.sub(rf"\g<head>{MASK}", text)
    return text


def secrets(address: str) -> set[str]:
    """The passwords in an address, the parts that a parser may take for host, path or port, and their percent-encoded forms."""
    forms = (address, unquote_plus(address))
    found = {match["value"] for form in forms for pattern in (_TOKEN, _ASSIGNED, _LOOSE, _CUT) for match in pattern.finditer(form)}
    found = _unusual(found)
    found |= {part for secret in found for part in re.split(r"[@/?#:&;]", secret)}
    found |= {form(secret) for secret in found for form in (unquote, unquote_plus)}
    found |= {quoted(secret, safe="") for secret in found for quoted in (quote, quote_plus)}
    return {secret for secret in found if len(secret) > 1 and secret != MASK}


def _unusual(found: set[str]) -> set[str]:
    return {secret for secret in found if not _ORDINARY.fullmatch(secret)}
