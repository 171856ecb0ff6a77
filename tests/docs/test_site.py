"""Protects the built documentation: it builds without a warning, opens without another host, and has every flag."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from repository import ROOT

from fa_transformers import options

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install -e '.[docs]'")

# What a browser fetches by itself: tag -> attributes. A link that a reader clicks on is not among them.
FETCHED = {
    "audio": ("src",), "embed": ("src",), "iframe": ("src",), "image": ("href",), "img": ("src", "srcset"),
    "input": ("src",), "link": ("href",), "object": ("data",), "script": ("src",), "source": ("src", "srcset"),
    "track": ("src",), "use": ("href", "xlink:href"), "video": ("src", "poster"),
}  # fmt: skip
NOT_FETCHED_LINKS = {"canonical", "next", "prev", "alternate", "author", "license"}
OUTSIDE = re.compile(r"^\s*(?:https?:)?//", flags=re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')\s]+)""", flags=re.IGNORECASE)
# Hosts that Material's script can ask, each of them only for what our pages don't have.
IN_SCRIPTS = {"unpkg.com": 'class="mermaid"', "api.github.com": "md-source", "gitlab.com": "md-source"}


class Fetches(HTMLParser):
    """Addresses that a browser fetches when it opens a page, and the styles in the page."""

    def __init__(self, page: str):
        super().__init__()
        self.addresses: list[str] = []
        self.styles: list[str] = re.findall(r"<style[^>]*>(.*?)</style>", page, flags=re.DOTALL)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = {name: value or "" for name, value in attrs}
        self.styles.append(given.get("style", ""))
        if tag == "link" and set(given.get("rel", "").split()) <= NOT_FETCHED_LINKS:
            return
        if tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            self.addresses.append(given.get("content", "").partition("=")[2])
        for name in FETCHED.get(tag, ()):
            self.addresses += [part.split()[0] for part in given.get(name, "").split(",") if part.split()]


def outside_requests(page: str) -> list[str]:
    """Addresses on other hosts that opening a page fetches."""
    fetches = Fetches(page)
    styled = [address for style in fetches.styles for address in IN_STYLES.findall(style)]
    return [address for address in fetches.addresses if OUTSIDE.match(address)] + styled


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built strictly: a warning, such as one of a dead link or an unknown name, fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_opening_a_page_asks_no_other_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    asked = {page.relative_to(site): found for page in pages if (found := outside_requests(page.read_text("utf-8")))}
    assert not asked
    for style in site.rglob("*.css"):
        assert not IN_STYLES.findall(style.read_text(encoding="utf-8")), style


def test_scripts_have_no_reason_to_ask_another_host(site):
    html = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    for script in site.rglob("*.js"):
        code = re.sub(r"/\*!?.*?\*/", "", script.read_text(encoding="utf-8"), flags=re.DOTALL)
        hosts = set(re.findall(r"""["'`]https://([\w.-]+)""", code))
        assert hosts <= IN_SCRIPTS.keys(), f"{script.name}: {hosts - IN_SCRIPTS.keys()}"
    used = [host for host, reason in IN_SCRIPTS.items() if reason in html]
    assert not used


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img srcset="a.png 1x, https://cdn.example/b.png 2x">',
        "<style>@import 'https://fonts.example/css';</style>",
        '<p style="background: url(https://cdn.example/a.png)">',
    ],
)
def test_requests_to_other_hosts_are_seen(page):
    assert outside_requests(page)


def test_links_to_click_on_are_no_requests():
    assert not outside_requests('<a href="https://arxiv.org/abs/1812.01243">paper</a><img src="../images/a.png">')


def test_the_page_of_flags_has_every_field_and_its_help(site):
    page = (site / "reference" / "flags.html").read_text(encoding="utf-8")
    groups = [group for name, group in vars(options).items() if name.endswith("Options") and not name.startswith("_")]
    assert len(groups) == 7
    for group in groups:
        assert f'id="{group.__name__.lower()}"' in page
        for name in group.__dataclass_fields__:
            assert f"<code>--{name}</code>" in page, f"{group.__name__}.{name}"


def test_the_page_of_names_shows_signatures_and_docstrings(site):
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "Attend to all positions in time and memory linear in their number." in text
    assert "convert_checkpoint(" in text
    assert "FinetuneResult" in text
