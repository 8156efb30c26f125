"""Shared texts contain no secrets and no home folders. The secrets here are invented."""

from __future__ import annotations

import sys
import time

import pytest

from restomod.runs.folder import environment
from restomod.utils.redaction import redact, redact_command, redact_pieces, redact_text

HEX = "0123456789abcdef0123456789abcdef01234567"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/runs/x", "~/runs/x"),
        ('{"path": "/home/alice"}', '{"path": "~"}'),
        ("--data.path=/Users/alice/d", "--data.path=~/d"),
        ("/mnt/nfs/home/alice/d and /root/x", "~/d and ~/x"),
        ("file:///home/alice/d", "file://~/d"),
        ("C:\\Users\\Alice Smith\\runs", "~\\runs"),
        ('"C:\\\\Users\\\\alice\\\\runs"', '"~\\\\runs"'),
        ("C:/Users/alice/runs", "~/runs"),
        ("https://example.org/users/guide", "https://example.org/users/guide"),
        ("/rooted /homely /data/x", "/rooted /homely /data/x"),
    ],
)
def test_homes_are_shortened(text: str, shown: str) -> None:
    assert redact_text(text) == shown


def test_the_users_home_is_shortened_at_any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/alice")
    assert redact_text("/data/people/alice/x /data/people/alice2") == "~/x /data/people/alice2"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        *((f"a {token} b", token) for token in ("hf_" + "aB3" * 10, "sk-proj-" + "aB3_" * 8, "ghp_" + "x1" * 18)),
        *((f"({token})", token) for token in ("github_pat_11AB" + "c_2" * 10, "AKIAIOSFODNN7EXAMPLE", JWT)),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("curl -H 'authorization: bearer abc123def456'", "abc123def456"),
        ("Bearer abc123def456", "abc123def456"),
        (f"wandb login {HEX}", HEX),
        (f"--wandb-key {HEX} --steps 5", HEX),
        (f"WANDB_API_KEY={HEX} restomod", HEX),
        ("--hub_token=abc", "abc"),
        ('--db-password "two words" --steps 5', "two words"),
        ('{"hub-token": "abc12345678"}', "abc12345678"),
        ('"{\\"password\\": \\"letmein\\"}"', "letmein"),
        ("https://alice:letmein@example.org/x", "letmein"),
        ("https://alice:letmein@example.org/x", "alice"),
        ("https://example.org/x?a=1&token=letmein&b=2", "letmein"),
        ("https://example.org/x?X-Amz-Signature=letmein", "letmein"),
        ("https://example.org/x?sv=1&sig=letmein", "letmein"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----", "MIIE"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQOY\n-----END PGP PRIVATE KEY BLOCK-----", "lQOY"),
        *(
            (f"a\\n{token} b", token)
            for token in ("hf_" + "aB3" * 10, "gsk_" + "aB3" * 10, "sk" + "_live_" + "aB3" * 8)
        ),
        *(
            (f"{token}", token)
            for token in ("glptt-" + "a1" * 10, "dop_v1_" + HEX, "SG." + "a1" * 11 + "." + "b2" * 20)
        ),
        *((f"to {token}", token) for token in ("hvs." + "a1" * 12, "AGE-SECRET-KEY-1" + "Q9" * 20)),
        ("x-api-key: abcdefghijklmnop", "abcdefghijklmnop"),
        *(
            (f"{name}letmein more", "letmein")
            for name in ("--pass ", "--pass=", "SMTP_PASS=", "client_secret=", "MYSQL_PWD=")
        ),
        ("AccountKey=abcDEF123456==;EndpointSuffix=x", "abcDEF123456"),
        ("{'token': 'abcdefghijklmnop'}", "abcdefghijklmnop"),
        ("https://example.org/#access_token=letmein", "letmein"),
    ],
)
def test_secrets_are_redacted(text: str, secret: str) -> None:
    shown = redact_text(text)
    assert secret not in shown
    assert shown.count("[redacted]") == 1
    assert redact_text(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        *(
            "--batch-tokens 65536 --max-tokens 5",
            "batch_tokens=524288",
            '"tokens": 12345678',
            "tokens_per_second 812345",
        ),
        *("sorted(words, key=len)", "a key is a value, a token is a number", "key: value", "the author=Bob"),
        *("the token: the", "token: the quick brown fox", "The secret: love", "Secretary: Bob", "signature: the mark"),
        *("--tokenizer gpt2-medium", "tokenizer=gpt2-medium-0123", "TOKENIZERS_PARALLELISM=false", "KEYBOARD=us"),
        *("monkey: 123456789", "keyboard: qwerty12345", "keypoint: abc12345", "key_size: 12345678", "key: 12345678"),
        *("key = value1234", "token_ids = tokenizer.encode(text1)", "token = next(tokens1)", "sort(key=itemgetter(1))"),
        *("password: str", "password = input()", "self.password = password", "password: Optional[str] = None"),
        *(
            "hf_hub_download_from_repo",
            "sk-learn-is-a-library-for-ml",
            "PWD=/mnt/data",
            "auth: none",
            "compass: north1",
        ),
        *("https://example.org/?monkey=1", "https://example.org/?key=intro&design=1", "docker run --user 1000:1000"),
        *(f"revision {HEX}", "the bearer of good news", "basic understanding", "https://example.org/a@b"),
    ],
)
def test_other_texts_are_unchanged(text: str) -> None:
    assert redact_text(text) == text


def test_a_command_keeps_its_other_arguments() -> None:
    words = [
        "train",
        "quickstart",
        "--then",
        "curl secret",
        "--then=x",
        "--hub-token",
        "abc",
        "--data.path",
        "/home/a/b",
    ]
    kept = ["train", "quickstart", "--hub-token", "[redacted]", "--data.path", "/home/a/b"]
    assert redact_command(words) == kept


@pytest.mark.parametrize("name", ["--" + "a-very-" * 12 + "long-token", "--token" + "-of-a-friend" * 12])
def test_a_secret_after_a_flag_of_any_length_is_redacted(name: str) -> None:
    assert redact_command([name, "abc", "x"]) == [name, "[redacted]", "x"]
    assert redact_command(["--no-" + name[2:], "abc"]) == ["--no-" + name[2:], "abc"]
    started = time.process_time()
    redact_command(["--" + "token" * 20_000 + "=", "abc"])
    assert time.process_time() - started < 2


def test_the_recorded_command_of_a_run_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/home/alice/bin/restomod", "train", "x", "--then", "curl secret", "--steps", "5"]
    )
    assert environment("cpu", "fp32")["command"] == ["restomod", "train", "x", "--steps", "5"]


def test_all_texts_and_names_of_a_value_are_redacted() -> None:
    value = {"/home/alice": [1, 2.5, None, True, ("\x1b[2J", {"a": "/root/x"})]}
    assert redact(value) == {"~": [1, 2.5, None, True, ("␛[2J", {"a": "~/x"})]}


def test_a_secret_across_pieces_is_redacted() -> None:
    pieces = ["my ", "hf_", "abcdefghij", "klmnopqrst", " and", "\x1b more"]
    shown = redact_pieces(pieces)
    assert "".join(shown) == "my [redacted] and␛ more"
    assert len(shown) == len(pieces)
    assert shown[0] == "my "
    assert shown[4:] == [" and", "␛ more"]
    assert redact_pieces(["a", "b"]) == ["a", "b"]


HARD = [" hf_a ", "wandb login -a ", "aKey", "key:", "a=(", "secret '", "AA:1", "/a", "-", "eyJ", 'key="', "://"]
HARD += ["/home", "a.", "A_", "C:\\Users\\", "--token ", "key: ", "?a", "hf_", "token"]


@pytest.mark.parametrize("unit", HARD)
def test_redaction_takes_linear_time(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    started = time.process_time()
    redact_text(text)
    assert time.process_time() - started < 2
