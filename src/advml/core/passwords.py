"""Mask passwords, tokens and keys in text that is printed or stored.

    >>> masked("postgresql://ann:S3CRET@host/name is down")
    'postgresql://ann:***@host/name is down'

Libraries quote an address completely, shortened, decoded, or only the part that they could not parse. So there are two rules:

- Text that looks like the password of an address, or like `password=...`, is masked.
- The values of known secrets, from addresses in use (`remember`) and from the environment, are masked.

In doubt, too much is masked.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
# The patterns are bounded, so that the time is linear in the length of the text.
_NAME = r"""(?:(?:password|passwd|passphrase|passfile|pwd|secret|api_?key|access_?key|credential|odbc_connect)[\w-]{0,40}
    |(?:access|auth|api|bearer|refresh|security|session)[_-]?token)"""
# `pass` and `token` are also ordinary words (`forward pass = 3 steps`): matched only in an address, or without a blank before the sign.
_WORD = r"""(?<![\w.-])(?:(?:pass|token)(?:=|%3D)\s?|(?<=[?&;])(?:pass|token)\s?=\s?|(?<=[?&])sig(?:=|%3D))"""
# A value may contain `&` and `;`: it ends before the next `name=`, at a blank, or at its closing quote or brace.
_VALUE = r"""(?:'[^']{0,2000}'|"[^"]{0,2000}"|\{[^}]{0,2000}\}|(?:(?![&;][\w.%-]{1,60}=)\S)*)"""
_ASSIGNED = re.compile(rf"(?P<head>{_NAME}\s?(?:=|%3D)\s?|{_WORD})(?P<value>{_VALUE})", re.IGNORECASE | re.VERBOSE)
_HEAD = r"(?P<head>(?<=\w)(?<!\bs3)(?<!\bgs)(?<!\bfile)://[^\s:/?#@'\"\[]*:)"  # scheme://user:, except for s3, gs and file
# A password may contain any character: it ends at the last @ of the word.
_PASSWORD = re.compile(rf"{_HEAD}(?P<value>\S{{0,2000}})(?=@)", re.IGNORECASE)
_TOKEN = re.compile(r"(?P<head>\bhttps?://)(?P<value>[^\s:/?#@'\"]+)(?=@)", re.IGNORECASE)  # a user name without password may be a token
# An address whose @ was cut off; ports are excluded.
_CUT = re.compile(rf"{_HEAD}(?P<value>(?!\d{{1,5}}(?![\w%]))(?!\S{{0,2000}}@)[^\s'\"]+)", re.IGNORECASE)
# For settings that should be an address: everything between the first colon after the scheme and the last @, except a port.
_LOOSE = re.compile(r"^(?>(?:.*?:/+)?)[^:@/]*:(?!\d{1,5}[/?])(?P<value>.+)@", re.DOTALL)
_OF_THE_ENVIRONMENT = re.compile(r"(?:PASSWORD|PASSWD|TOKEN|SECRET|ACCESS_KEY|API_KEY)$")
_SHORT = 6  # characters: shorter secrets are masked only as whole words
# Secrets that are ordinary words (`mlflow`, `postgres`, `admin`) are masked by the patterns only, not wherever the word occurs.
_ORDINARY = re.compile(r"[A-Z]?[a-z]{0,11}")

_remembered: set[str] = set()


def remember(address: str | None) -> None:
    """Mask the secrets of this address in all later messages."""
    _remembered.update(secrets(address or ""))


def masked(text: str) -> str:
    """Replace passwords, tokens and keys in a text by `***`."""
    of_environment = {value for name, value in os.environ.items() if _OF_THE_ENVIRONMENT.search(name) and len(value) >= _SHORT}
    for secret in sorted(_remembered | _unusual(of_environment), key=len, reverse=True):
        alone = len(secret) < _SHORT or secret.isalpha() or secret.isdigit()
        bounds = (r"(?:(?<!\w)|(?<=%[\da-fA-F]{2}))", r"(?!\w)") if alone else ("", "")
        text = re.sub(f"{bounds[0]}{re.escape(secret)}{bounds[1]}", MASK, text)
    for pattern in (_PASSWORD, _TOKEN, _CUT, _ASSIGNED):
        text = pattern.sub(rf"\g<head>{MASK}", text)
    return text


def secrets(address: str) -> set[str]:
    """Secrets in an address: passwords, their parts that a parser may take for host, path or port, and percent-encoded forms."""
    forms = (address, unquote_plus(address))
    found = {match["value"] for form in forms for pattern in (_TOKEN, _ASSIGNED, _LOOSE, _CUT) for match in pattern.finditer(form)}
    found = _unusual(found)
    found |= {part for secret in found for part in re.split(r"[@/?#:&;]", secret)}
    found |= {form(secret) for secret in found for form in (unquote, unquote_plus)}
    found |= {quoted(secret, safe="") for secret in found for quoted in (quote, quote_plus)}
    return {secret for secret in found if len(secret) > 1 and secret != MASK}


def _unusual(found: set[str]) -> set[str]:
    return {secret for secret in found if not _ORDINARY.fullmatch(secret)}
