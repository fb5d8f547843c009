"""Who may ask: tokens, and addresses that only this machine reaches."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
from pathlib import Path

TOKEN_VARIABLE = "ONEREC_HF_TOKEN"
_SHORTEST = 16


def read_token(token: str | None, token_file: str | None) -> str | None:
    """
    The token of a server: given, from a file's first line, or from the environment variable `ONEREC_HF_TOKEN`; None where there is none.
    The variable is removed, so that no child process inherits it.

    Raises:
        ValueError: it is given twice, too short to be safe, or holds characters that a header cannot; the message does not repeat it.
        OSError: the file cannot be read.
    """
    variable = os.environ.pop(TOKEN_VARIABLE, None)
    if token is not None and token_file is not None:
        raise ValueError("give --token or --token_file, not both")
    source = "--token"
    if token_file is not None:
        source = f"--token_file {token_file}"
        lines = Path(token_file).read_text(encoding="utf-8", errors="replace").splitlines()
        token = lines[0].strip() if lines else ""
    elif token is None:
        source, token = TOKEN_VARIABLE, variable
    if token is None:
        return None
    if len(token) < _SHORTEST or not all("!" <= character <= "~" for character in token):
        raise ValueError(
            f"{source}: a token has at least {_SHORTEST} letters, digits or signs of ASCII, no spaces; `openssl rand -hex 16` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """
    Whether only this machine reaches an address or all addresses of a name.

    Raises:
        OSError: there is no such host.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise OSError(
            f"--host {host}: there is no such address; 127.0.0.1 is this machine, 0.0.0.0 all of its networks"
        ) from None
    return bool(host) and all(ipaddress.ip_address(str(each[4][0]).split("%")[0]).is_loopback for each in found)


def is_allowed(authorization: bytes | None, token: str) -> bool:
    """
    Whether a request's `Authorization` header is `Bearer` and the token; takes the same time wherever they differ.

    Example:
        >>> is_allowed(b"Bearer a-token-of-ours", "a-token-of-ours"), is_allowed(None, "a-token-of-ours")
        (True, False)
    """
    scheme, _, given = (authorization or b"").partition(b" ")
    return hmac.compare_digest(given.strip(), token.encode()) and scheme.lower() == b"bearer"
