"""What is served as it is: the page, the cheat sheet, the manual, the API as OpenAPI."""
import base64
import hashlib
import pkgutil
import re

from oqc import manual


def _data(name: str) -> bytes:
    """Return a file that lies beside this one, also inside the .pyz; read at start, since that may
    be replaced."""
    data = pkgutil.get_data("oqc", name)
    assert data is not None
    return data


def _hash_of_element(page: bytes, name: bytes) -> str:
    """Return the hash of a script or style that stands in a page (CSP level 3, section 2.3.1)."""
    content = page.split(b"<%b>" % name)[1].split(b"</%b>" % name)[0]
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _policy(page: bytes) -> str:
    """Return the Content-Security-Policy that lets the browser run the script and the style that
    stand in the page, and speak to this server, and nothing else."""
    return (f"default-src 'none'; script-src 'sha256-{_hash_of_element(page, b'script')}'; "
            f"style-src 'sha256-{_hash_of_element(page, b'style')}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# What only those need who read the file: indentation, comments, empty lines, ends of statements.
FOR_READERS = re.compile(rb"^ +(//.*\n)?|^//.*\n| {2,}//.*$|^\n|(?<=[;{])\n", re.MULTILINE)

CHEAT_SHEET = _data("cheatsheet.txt").decode()
OPENAPI = _data("openapi.json")
MANUAL = manual.read()
PAGE_BODY = FOR_READERS.sub(b"", _data("page.html"))
PAGE_HEADERS = (("Content-Security-Policy", _policy(PAGE_BODY)),
                ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
                ("Cache-Control", "no-cache"), ("Vary", "Accept"))
PICTURE_HEADERS = (("Content-Security-Policy", "default-src 'none'"),
                   ("X-Content-Type-Options", "nosniff"))
