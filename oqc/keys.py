"""The API keys: whose they are, what each role may do, and with which one a request came."""
import functools
import hashlib
import ipaddress
import re
from typing import Dict, Iterable, NamedTuple, Optional

READER, USER, OPERATOR = ROLES = ("reader", "user", "operator")
# Who may do what takes a role: one may also do what those before it may.
ALLOWED = {
    USER: "a user or an operator may do this",
    OPERATOR: "an operator may do this",
}
RESERVED = ("me", "oqc")            # names that say something else where a name may stand
KEY_HEADERS = ("api_key", "x-api-key")
NOT_HERE = ("the documented key is public, so while it is in force only requests to localhost are "
            "answered, and none through a proxy; with keys of its own the server answers all: "
            "`key NAME --role operator >keys; chmod 600 keys`, then start it with --keys-file keys")
HOST_NAME = re.compile(rb"(\[[^\]]*\]|[^:]*)(?::[0-9]*)?")


class Key(NamedTuple):
    """A key, and whose it is. A name may have several."""

    name: str
    role: str
    secret: bytes                   # any bytes that a header can carry


NOBODY = Key("", "", b"")           # where no key is needed


def may(role: str, needed: str) -> bool:
    """Return whether somebody of this role may do what takes that one."""
    return ROLES.index(role) >= ROLES.index(needed)


class Keys:
    """All keys that are known: who a request comes from."""

    def __init__(self, keys: Iterable[Key], public: bytes = b"") -> None:
        """`public`: a key that everybody knows."""
        self._keys = {self._digest(key.secret): key for key in keys}
        self.are_public = self._digest(public) in self._keys
        self.names = sorted({key.name for key in self._keys.values()})
        self.has_operator = any(key.role == OPERATOR for key in self._keys.values())

    def find(self, headers: Dict[str, bytes]) -> Optional[Key]:
        """Return the request's key, or None. Digests are looked up, not keys: how long that takes
        tells nothing about where a wrong key differs, and does not depend on how many keys there
        are."""
        for header in KEY_HEADERS:
            if header in headers:
                return self._keys.get(self._digest(headers[header]))
        scheme, _, token = headers.get("authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        return self._keys.get(self._digest(token.strip(b" ")))

    def name(self, headers: Dict[str, bytes]) -> Optional[str]:
        """Return the name of the request's key, or None."""
        key = self.find(headers)
        return key.name if key else None

    @staticmethod
    def _digest(secret: bytes) -> bytes:
        return hashlib.sha256(secret).digest()


def is_local(headers: Dict[str, bytes]) -> bool:
    """Return whether a request was meant for this machine and came from it, as far as it says so.

    A page of another site, whose name leads to 127.0.0.1 (DNS rebinding), sends that name.
    """
    if "via" in headers or "forwarded" in headers or "x-forwarded-" in " ".join(headers):
        return False
    host = headers.get("host")
    return host is None or _is_ours(host)       # none: HTTP/1.0, which no browser speaks


@functools.lru_cache(maxsize=256)
def _is_ours(header: bytes) -> bool:
    """Return whether a Host header names this machine, by whatever port."""
    match = HOST_NAME.fullmatch(header)
    return match is not None and is_loopback(match[1].decode("latin-1").strip("[]"))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach what listens on a host."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
