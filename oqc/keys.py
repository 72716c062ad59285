"""The API keys: whose they are, what each role may do, and with which one a request came."""
import hashlib
from typing import Dict, Iterable, NamedTuple, Optional

READER, USER, OPERATOR = ROLES = ("reader", "user", "operator")
# Who may do what takes a role: one may also do what those before it may.
ALLOWED = {
    USER: "a user or an operator may do this",
    OPERATOR: "an operator may do this",
}
RESERVED = ("me", "oqc")            # names that say something else where a name may stand
KEY_HEADERS = ("api_key", "x-api-key")


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
