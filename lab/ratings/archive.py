"""The archive of rated texts: fetched from the package index that pip uses, its hash pinned, its code never run.

vaderSentiment 3.3.2's source archive carries the data of Hutto and Gilbert (ICWSM 2014). The package is under the MIT
licence; the texts are their authors'. So the archive is fetched where it is needed, and nothing of it is committed. pip
itself would run the archive's setup.py even to download it; hence the few requests of the simple index (PEP 503) here.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

from ..files import atomic, warn_damaged

PROJECT = "vadersentiment"
FILE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CACHE = Path("build/ratings")
"""Where the archive and what is made of it are kept, below the folder that a study is run in; git ignores it."""

_PYPI = "https://pypi.org/simple"
_TIMEOUT = 60  # seconds


def fetched_archive(folder: Path = CACHE) -> Path:
    """The archive in `folder`, fetched first where it is missing or damaged.

    Args:
        folder: made if missing.

    Raises:
        FileNotFoundError: no index of pip's configuration gave the file; says what each one said.
    """
    path = folder / FILE
    if path.is_file():
        if _sha256(path.read_bytes()) == SHA256:
            return path
        warn_damaged(path, "its sha256 is not the pinned one")
    options = pip_options()
    refusals = []
    for index in indexes(options):
        try:
            data = _from_index(index, options)
        except (OSError, ValueError) as error:
            refusals.append(f"{_shown(index)}: {' '.join(str(error).split())}")
            continue
        with atomic(path) as beside:
            beside.write_bytes(data)
        return path
    tried = "; ".join(refusals) or "pip's configuration names no index (no-index)"
    raise FileNotFoundError(
        f"the human ratings could not be fetched: {tried}. Put {FILE} (sha256 {SHA256}) into {folder} by hand, or set "
        "pip's `index-url` to an index that has it."
    )


def pip_options() -> dict[str, str]:
    """pip's configured options by name; environment variables go before `download`'s section, that before `global`."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        rank = {":env:": 2, "download": 1, "global": 0}.get(section)
        if rank is not None and rank >= found.get(name, (-1, ""))[0]:
            found[name] = (rank, str(ast.literal_eval(value)))
    return {name: value for name, (_, value) in found.items()}


def indexes(options: dict[str, str]) -> list[str]:
    """Addresses of the simple indexes that pip would ask, in its order."""
    if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    return [options.get("index-url", _PYPI), *options.get("extra-index-url", "").split()]


def _from_index(index: str, options: dict[str, str]) -> bytes:
    """The archive from one index."""
    page = f"{index.rstrip('/')}/{PROJECT}/"
    if page.startswith("file:"):
        page += "index.html"
    body, address = _read(page, options)
    parser = _Links()
    parser.feed(body.decode(errors="replace"))
    for link in parser.links:
        target = urllib.parse.urldefrag(urllib.parse.urljoin(address, link)).url
        if urllib.parse.unquote(target).endswith("/" + FILE):
            data, _ = _read(_with_login(target, index), options)
            if (got := _sha256(data)) != SHA256:
                raise ValueError(f"its {FILE} has sha256 {got}, expected {SHA256}.")
            return data
    raise ValueError(f"it does not list {FILE}.")


class _Links(HTMLParser):
    """Gathers the addresses of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _read(address: str, options: dict[str, str]) -> tuple[bytes, str]:
    """What an address holds, and the address that it led to, both with the login that stands in it."""
    parts = urllib.parse.urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"Accept": "text/html, */*;q=0.1"})
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    context = ssl.create_default_context(cafile=options.get("cert"))
    if {host, parts.hostname} & set(options.get("trusted-host", "").split()):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what arrives is checked by its hash
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT, context=context) as answer:
            return answer.read(), answer.url
    except urllib.error.URLError as error:
        raise OSError(f"{getattr(error, 'code', '')} {error.reason}".strip()) from error


def _with_login(address: str, index: str) -> str:
    """The address with the index's login, where it is on the index's host."""
    parts, of_index = urllib.parse.urlsplit(address), urllib.parse.urlsplit(index)
    same = parts.hostname == of_index.hostname and parts.port == of_index.port
    return parts._replace(netloc=of_index.netloc).geturl() if same else address


def _shown(index: str) -> str:
    """An index's address without its login."""
    parts = urllib.parse.urlsplit(index)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
