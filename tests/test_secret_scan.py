"""The search for secrets: each kind is found where it may stand, and nothing is found in ordinary files.

The secrets are made here from letters and digits in turn; no file holds one.
"""

import base64
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from finetune.system.secret_scan import SECRET_PATTERN, find_named_secret, find_secret


def letters(count: int, alphabet: str = "aB3dE6gH9jK2") -> str:
    return (alphabet * count)[:count]


def jwt() -> str:
    parts = ({"alg": "HS256"}, {"sub": "1234567890"})
    text = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return f"{text}.{letters(43)}"


KINDS = {
    "aws id": "AKIA" + letters(16, "ABCD2345"),
    "aws key": f"aws_secret_access_key = '{letters(40)}'",
    "azure": "AccountKey=" + letters(86) + "==",
    "password in an address": "postgres://ann:" + letters(12) + "@db.example.com/rows",
    "discord": "M" + letters(23) + "." + letters(6) + "." + letters(27),
    "github": "ghp_" + letters(36),
    "github, fine-grained": "github_pat_" + letters(30),
    "gitlab": "glpat-" + letters(20),
    "google": "AIza" + letters(35),
    "hugging face": "hf_" + letters(34),
    "jwt": jwt(),
    "mailchimp": letters(32, "ab12") + "-us12",
    "npm": "//registry.example.com/:_authToken=npm_" + letters(36),
    "openai": "sk-" + letters(20) + "T3Blbk" + "FJ" + letters(20),
    "openai, project": "sk-proj-" + letters(40),
    "anthropic": "sk-ant-api03-" + letters(60),
    "pem": "-----BEGIN RSA PRIVATE " + "KEY-----",
    "pgp": "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----",
    "pypi": "pypi-AgEIcHlwaS5vcmc" + letters(80),
    "sendgrid": "SG." + letters(22) + "." + letters(43),
    "slack": "xoxb-" + "123456789012-" * 2 + letters(24, "ab12"),
    "slack, app level": "xapp-1-" + "A1B2C3-123456-" + letters(64, "ab12"),
    "slack webhook": "https://hooks.slack.com/services/T" + letters(8) + "/B" + letters(8) + "/" + letters(24),
    "square": "sq0csp-" + letters(43),
    "stripe": "sk_live_" + letters(24),
    "telegram": "1234567890:" + letters(35),
    "twilio": "SK" + letters(32, "ab12"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found(kind: str) -> None:
    for text in (KINDS[kind], f'{{"a": "b", "c": "{KINDS[kind]}"}}\n', f"# a line\n  key: {KINDS[kind]}\nanother: 1\n"):
        assert find_secret(text), text


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com:8000/v1?user=ann@example.com",
        "https://user:${PASSWORD}@example.com",
        "https://user:<password>@example.com",
        "ssh://git@example.com:22/x",
        "git+https://x-access-token:${TOKEN}@github.com/a/b",
        "sha256:" + letters(64, "0123456789abcdef"),
        "7f3c1d1e-8a55-4b0e-9d2f-0a1b2c3d4e5f",
        "the token <|eot_id|>, a password and a secret key",
        "BEGIN CERTIFICATE",
        "data:image/png;base64," + letters(400),
        "hf_hub_download, sk-learn, AKIA, xoxb-",
    ],
)
def test_what_is_no_secret_is_none(text: str) -> None:
    assert find_secret(text) is None


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"a": [{"wandb_api_key": letters(20)}]}, "wandb_api_key"),
        ({"signing_key": letters(12)}, "signing_key"),
        ({"db": {"password": letters(9)}}, "password"),
        ({"hub_token": letters(20)}, "hub_token"),
        ({"label_key": "completion", "image_key": "pixel_values"}, None),
        ({"eos_token": "<|end_of_text_1|>", "pad_token": letters(12)}, None),
        ({"api_key": "${WANDB_API_KEY_1}", "secret": None, "key": letters(20)}, None),
        ({"attention_key": "model.layers.0/self_attn"}, None),
    ],
)
def test_names_of_secrets_in_structured_files(value: object, found: str | None) -> None:
    assert find_named_secret(value) == found


@pytest.mark.slow
def test_nothing_is_found_in_the_projects_own_files_and_rows() -> None:
    names = ("data/*.jsonl", "recipes/*.yaml", "docs/*.md", "finetune/**/*.py", "finetune/**/*.jinja", "tests/*.jsonl")
    files = [file for name in names for file in ROOT.glob(name)]
    assert len(files) > 100
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    own = text.replace("-----BEGIN (", "")  # our pattern
    assert [find_secret(part) for part in own.split("\n\n") if SECRET_PATTERN.search(part)] == []
    assert find_secret(own) is None


def test_a_secret_is_found_wherever_it_stands_in_a_long_text() -> None:
    for place in range(0, 7000, 500):
        assert find_secret("x " * (place // 2) + KINDS["jwt"] + " y" * 3000) == "JSON Web Token"


@pytest.mark.slow
def test_a_long_line_takes_no_quadratic_time() -> None:
    """A vocabulary may be one line of megabytes; each of these is the beginning of many a pattern."""
    pieces = ("//", "://a:", "eyJ", "xoxb-1-", "0123456789", "sk-", "aws", "AC", "M" + letters(23), "-us", "hf_", "a.")
    for piece in pieces:
        text = piece * (60_000 // len(piece))
        began = time.process_time()
        find_secret(text)
        assert time.process_time() - began < 5, piece


def test_a_recipe_is_read_without_the_detectors() -> None:
    """Their import takes half a second."""
    code = "import sys, finetune.recipe.yaml_tree; sys.exit('detect_secrets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
