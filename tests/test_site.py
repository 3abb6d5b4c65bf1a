"""The site builds without warnings, asks for nothing from a network, and has every link and name it speaks of."""

import html.parser
import os
import re
import socket
import subprocess
import sys
import types
import urllib.parse
import zlib

import pytest

from tests.conftest import ROOT
from tests.test_reference import PUBLIC

pytest.importorskip("mkdocstrings", reason="the site is built by the extra [docs]")
pytest.importorskip("material", reason="the site is built by the extra [docs]")
pytest.importorskip("latex2mathml", reason="the site is built by the extra [docs]")
pytestmark = pytest.mark.slow
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if (address := found.get(FETCHED.get(tag, ""))) and found.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, by a process whose sockets refuse every address."""
    folder = tmp_path_factory.mktemp("site")
    offline = folder / "sitecustomize.py"
    offline.write_text("import socket\ndef refuse(*_): raise OSError('offline')\nsocket.socket.connect = refuse\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert socket.socket.connect.__name__ == "connect"  # refused there, not here
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: _Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def test_nothing_is_fetched_from_a_network(site, pages):
    foreign = {a for page in pages.values() for a in page.fetched if urllib.parse.urlsplit(a).netloc}
    assert foreign == set()
    sheets = [path for path in site.rglob("*.css") if "url(http" in path.read_text() or "@import" in path.read_text()]
    assert sheets == []
    fonts = re.findall(r'url\("([^"]+)"\)', (site / "site.css").read_text())
    assert fonts, "formulas have no font of their own"
    assert [font for font in fonts if not (site / font).is_file()] == []


def test_every_link_and_picture_inside_of_the_site_is_there(site, pages):
    broken = []
    for path, page in pages.items():
        for address in [*page.links, *page.fetched]:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            inside = target.exists() and target.is_relative_to(site.resolve())
            anchor = urllib.parse.unquote(parts.fragment)
            if not inside or (anchor and target in pages and anchor not in pages[target].ids | {"__top"}):
                broken.append(f"{path.relative_to(site)}: {address}")
    assert broken == []


def test_every_public_name_has_an_anchor(site):
    lines = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ")[0] for line in zlib.decompress(lines).decode().splitlines()}
    missing = []
    for module, name in PUBLIC:
        found = getattr(module, name) if name else module
        if isinstance(found, types.ModuleType) or module.__name__.count(".") > 1:
            continue  # see test_reference
        # Where a submodule has the function's name, the page shows the function as that module's.
        if not {f"{module.__name__}.{name}", f"{getattr(found, '__module__', None)}.{name}"} & known:
            missing.append(f"{module.__name__}.{name}")
    assert missing == []
