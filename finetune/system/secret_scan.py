"""Finds secrets in a text: by the rules of detect-secrets, and by our own for tokens that it has no rule for."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

# Tokens of Hugging Face, GitHub, OpenAI, Anthropic, AWS, Google, Slack (app level) and npm; private keys; the password
# in an address. A recipe is held to these alone, because the import of detect-secrets takes half a second.
SECRET_PATTERN = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|(?<![A-Za-z0-9])(sk-(proj-|ant-\w+-)?[A-Za-z0-9]{20}[\w-]*|AKIA[0-9A-Z]{16})"
    r"|(?<![\w-])AIza[\w-]{35}(?![\w-])|xapp-\d-[A-Z0-9]+-\d+-[a-f0-9]{32,}|:_authToken=\s*[\w-]{20,}"
    r"|-----BEGIN (\w+ )*PRIVATE KEY|(?<=://)[^\s:/?#@${}<>\"']+:[^\s/@${}<>\"']+(?=@)"
)
# Names of keys, and of variables of the environment, whose value is a secret.
SECRET_NAME_PATTERN = re.compile(
    r"(?<!eos)(?<!pad)(?<!bos)(?<!unk)(^|_)(token|api_?key|password|passwd|secret)$|_key$", re.IGNORECASE
)
# Left out: rules by entropy, which hashes and ids meet; by the name before an assignment, which prose and code hold
# (names are looked at in structured files, see `find_named_secret`); of Artifactory, which words in capitals meet; and
# of npm, whose pattern takes quadratic time (detect-secrets 1.5).
_DETECTORS = (
    *("aws.AWSKeyDetector", "azure_storage_key.AzureStorageKeyDetector", "basic_auth.BasicAuthDetector"),
    *("discord.DiscordBotTokenDetector", "github_token.GitHubTokenDetector", "gitlab_token.GitLabTokenDetector"),
    *("jwt.JwtTokenDetector", "mailchimp.MailchimpDetector", "openai.OpenAIDetector", "private_key.PrivateKeyDetector"),
    *("pypi_token.PypiTokenDetector", "sendgrid.SendGridDetector", "slack.SlackDetector"),
    *("square_oauth.SquareOAuthDetector", "stripe.StripeDetector", "telegram_token.TelegramBotTokenDetector"),
    "twilio.TwilioKeyDetector",
)
# The characters of a piece, and of these the ones that the next piece begins with.
_PIECE, _OVERLAP = 3000, 1000
# A value under the name of a secret, if it is neither a word nor a path.
_NAMED_VALUE = re.compile(r"(?=\S*[0-9])(?=\S*[A-Za-z])[^\s/]{8,}")


@functools.cache
def _detectors() -> list[tuple[str, Callable[[str], Any]]]:
    """The kind of secret that each detector finds, and its function. They import requests, at first use."""
    found = []
    for name in _DETECTORS:
        module, _, kind = name.partition(".")
        detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), kind)()
        found.append((str(detector.secret_type), detector.analyze_string))
    return found


def find_secret(text: str) -> str | None:
    """The kind of a secret in a text, such as `AWS Access Key`; None if none is found."""
    if SECRET_PATTERN.search(text):
        return "a token, a private key or a password"
    from detect_secrets.filters import heuristic

    # In pieces that overlap: several rules take quadratic time in a long line (detect-secrets 1.5).
    for start in range(0, max(len(text) - _OVERLAP, 1), _PIECE - _OVERLAP):
        piece = text[start : start + _PIECE]
        for kind, analyze in _detectors():
            for secret in analyze(piece):
                # `https://user:${PASSWORD}@host` and `user:<password>@host` are none.
                if not (heuristic.is_templated_secret(secret) or heuristic.is_not_alphanumeric_string(secret)):
                    return kind
    return None


def long_words(text: str) -> str:
    """The words of a vocabulary that are long enough for a secret, each on a line.

    Args:
        text: A vocabulary file, which may have 30 MB.
    """
    return "\n".join(re.findall(r"[^\s\"',]{16,}", text))


def find_named_secret(value: Any, name: str = "") -> str | None:
    """The name in a map, or in maps and lists within it, under which a secret is written out; None if there is none.

    Args:
        value: Data as JSON or YAML have it.
        name: The name that the value stands under.
    """
    if isinstance(value, dict):
        return next((found for key, child in value.items() if (found := find_named_secret(child, str(key)))), None)
    if isinstance(value, list):
        return next((found for child in value if (found := find_named_secret(child, name))), None)
    named = isinstance(value, str) and SECRET_NAME_PATTERN.search(name)
    return name if named and "${" not in value and _NAMED_VALUE.fullmatch(value) else None
