"""Access control: bearer tokens and loopback addresses."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
from pathlib import Path

TOKEN_VARIABLE = "ONEREC_HF_TOKEN"
_MIN_LENGTH = 16


def read_token(token: str | None, token_file: str | None) -> str | None:
    """
    The server's token: from the argument, the first line of a file, or the environment variable `ONEREC_HF_TOKEN`; None without any.
    The variable is removed, so that child processes do not inherit it.

    Raises:
        ValueError: two tokens, a token that is too short, or characters that are invalid in a header. The message does not contain the token.
        OSError: unreadable file.
    """
    variable = os.environ.pop(TOKEN_VARIABLE, None)
    if token is not None and token_file is not None:
        raise ValueError("--token and --token_file are both given; pass only one of them")
    source = "--token"
    if token_file is not None:
        source = f"--token_file {token_file}"
        lines = Path(token_file).read_text(encoding="utf-8", errors="replace").splitlines()
        token = lines[0].strip() if lines else ""
    elif token is None:
        source, token = TOKEN_VARIABLE, variable
    if token is None:
        return None
    if len(token) < _MIN_LENGTH or not all("!" <= character <= "~" for character in token):
        raise ValueError(
            f"{source}: the token must have at least {_MIN_LENGTH} printable ASCII characters without spaces; create one with `openssl rand -hex 16`"
        )
    return token


def is_loopback(host: str) -> bool:
    """
    Whether an address, or all addresses of a host name, are loopback addresses.

    Raises:
        OSError: unknown host.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise OSError(
            f"--host {host}: unknown address; use 127.0.0.1 for this machine only, or 0.0.0.0 for all networks"
        ) from None
    return bool(host) and all(ipaddress.ip_address(str(each[4][0]).split("%")[0]).is_loopback for each in found)


def is_allowed(authorization: bytes | None, token: str) -> bool:
    """
    Whether a request's `Authorization` header is `Bearer` and the token, compared in constant time.

    Example:
        >>> is_allowed(b"Bearer a-token-of-ours", "a-token-of-ours"), is_allowed(None, "a-token-of-ours")
        (True, False)
    """
    scheme, _, given = (authorization or b"").partition(b" ")
    return hmac.compare_digest(given.strip(), token.encode()) and scheme.lower() == b"bearer"
