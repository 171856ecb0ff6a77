"""Secrets and local paths, kept out of all that is written, printed, tracked or uploaded.

A token of the Hub is hidden by its value, wherever it stands: one that was given (`keep_secret`), those in the
environment, those of stored logins, and whatever has a Hub token's shape.
"""

import configparser
import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

HIDDEN = "hidden-token"
"""The text in a token's place: letters and a dash, so that it is valid where a name must be."""

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# Below this a value is no token of the Hub, and hiding it would spoil ordinary words.
SHORTEST_TOKEN = 8
_TOKEN_SHAPE = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_SECRET_NAME = re.compile(r"TOKEN(?!IZER)|SECRET|PASSWORD|CREDENTIAL|API_?KEY|ACCESS_KEY")
# An absolute path is a quoted word (a flag with "=" before it, perhaps), or runs to the next blank, quote or bracket.
_QUOTED_PATH = re.compile(r"""(?P<open>['"](?:-[\w-]+=)?)(?P<path>~?/[^'"\n]+)(?P<close>['"])""")
_BARE_PATH = re.compile(r"""(?<![\w.:/~*?\]<-])(?P<path>~?/[^\s'"`,;()\[\]{}<>|]+)""")
# Of Windows, from a drive or a share on, likewise.
_QUOTED_WINDOWS_PATH = re.compile(
    r"""(?P<open>['"](?:-[\w-]+=)?)(?:[A-Za-z]:[\\/]|\\{2,4}[\w.-]+\\)[^'"\n]*?(?P<last>[^'"\n\\/]*)(?P<close>['"])"""
)
_BARE_WINDOWS_PATH = re.compile(r"""(?<![\w\\/])(?:[A-Za-z]:[\\/]|\\{2,4}[\w.-]+\\)(?:[^\s'"\\/]*[\\/]+)*""")

_given: set[str] = set()
Content = TypeVar("Content")


def keep_secret(token: str | None) -> None:
    """Let `redact` hide this token in this process from now on; None and the empty string are passed over."""
    if token and len(token.strip()) >= SHORTEST_TOKEN:
        _given.add(token.strip())


def known_tokens() -> list[str]:
    """Return the tokens of the Hub that this process can see, the longest first."""
    found = {os.environ.get(name, "").strip() for name in TOKEN_VARIABLES} | _stored_tokens() | _given
    return sorted((token for token in found if len(token) >= SHORTEST_TOKEN), key=len, reverse=True)


def redact(content: Content) -> Content:
    """Return text, or mappings and lists of text at any depth, with `HIDDEN` in the place of every token's value.

    Other values, such as numbers, are returned as they are; keys are text too.
    """
    return _redact(content, known_tokens())


def without_local_paths(text: str) -> str:
    """Return text that says nothing of where on this machine its files lie.

    An absolute path below the working directory becomes relative to it, and any other one its last part.
    """

    def shorten(match: re.Match) -> str:
        path = Path(match["path"])
        working_directory = Path.cwd()
        inside = path != working_directory and path.is_relative_to(working_directory)
        return path.relative_to(working_directory).as_posix() if inside else path.name

    quoted = _QUOTED_PATH.sub(lambda match: match["open"] + shorten(match) + match["close"], text)
    posix = _BARE_PATH.sub(shorten, quoted)
    windows = _QUOTED_WINDOWS_PATH.sub(lambda match: match["open"] + match["last"] + match["close"], posix)
    return _BARE_WINDOWS_PATH.sub("", windows)


def environment_without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those that hold a secret, by their name or by a token in their value."""
    tokens = known_tokens()
    return {
        name: value
        for name, value in environment.items()
        if not _SECRET_NAME.search(name.upper()) and _redact(value, tokens) == value
    }


def _redact(content: Any, tokens: list[str]) -> Any:
    if isinstance(content, str):
        for token in tokens:
            content = content.replace(token, HIDDEN)
        return _TOKEN_SHAPE.sub(HIDDEN, content)
    if isinstance(content, Path):
        hidden = _redact(str(content), tokens)
        return content if hidden == str(content) else Path(hidden)
    if isinstance(content, dict):
        return {_redact(key, tokens): _redact(value, tokens) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_redact(value, tokens) for value in content)
    return content


def _stored_tokens() -> set[str]:
    """The tokens of `hf auth login`, the one in use and those beside it."""
    from huggingface_hub import constants  # not at the top: options and command lines answer without it

    tokens = set()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        tokens.add(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    stored = configparser.ConfigParser(interpolation=None)
    try:
        stored.read(getattr(constants, "HF_STORED_TOKENS_PATH", ""), encoding="utf-8")
    except (OSError, UnicodeDecodeError, configparser.Error):
        return tokens
    return tokens | {stored[name].get("hf_token", "").strip() for name in stored.sections()}
