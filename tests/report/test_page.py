"""The page as text: escaped, whole in itself, and small enough. How it looks is tested in a browser."""

from __future__ import annotations

import base64
import gzip
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from findings_examples import HOSTILE, findings, hostile, picture, sound, text

from arrow_quant_v2.errors import ConfigurationError, ValidationError
from arrow_quant_v2.report import page as page_room
from arrow_quant_v2.report.page import page

OUTSIDE = re.compile(r"(src|href|action|poster|data|srcset|formaction)", re.IGNORECASE)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of its rows."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def hostile_page() -> Elements:
    return Elements(page({HOSTILE: hostile(), HOSTILE + "2": hostile()}))


def test_nothing_of_a_model_becomes_an_element_or_a_handler(hostile_page: Elements) -> None:
    assert [one.get("type") for one in hostile_page.of("script")] == [
        "application/json",
        "application/octet-stream",
        None,
    ]
    for tag, attributes in hostile_page.found:
        assert not [name for name in attributes if name.startswith("on")], tag
    assert all(str(one["src"]).startswith("data:image/png;base64,") for one in hostile_page.of("img"))


def test_a_single_hostile_model_is_as_harmless() -> None:
    elements = Elements(page({HOSTILE: hostile()}))
    assert len(elements.of("script")) == 3
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]


def test_the_page_names_no_address_outside_itself() -> None:
    made = Elements(page({"one": findings(samples=(text(), picture(), sound()))}))
    addresses = [value for _, attributes in made.found for name, value in attributes.items() if OUTSIDE.fullmatch(name)]
    assert addresses
    assert all(str(address).startswith(("#", "data:")) for address in addresses)


def test_its_policy_runs_our_two_scripts_alone() -> None:
    (policy,) = (one["content"] for one in Elements(page({"a": findings()})).of("meta") if "http-equiv" in one)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("'sha256-") == 2
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_plotly_lies_in_the_page_once_whatever_the_number_of_models() -> None:
    made = page({str(number): findings() for number in range(4)})
    (packed,) = re.findall(r'<script type="application/octet-stream" id="plotly">([^<]+)</script>', made)
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed))[:200]
    assert len(made) < 2_500_000


@pytest.mark.parametrize(("passed", "said"), [(True, "Bar met"), (False, "Bar missed")])
def test_the_verdict_comes_before_any_figure(passed: bool, said: str) -> None:
    content = page({"a model": findings(passed=passed)}).partition("<main")[2]
    assert content.index(said) < content.index("output cosine is 0.9512, the bar is 0.9") < content.index("3 MB")


def test_every_layer_has_its_row_with_its_decision() -> None:
    made = page({"a": findings(25)})
    assert made.count('<tr data-kind="quantized">') == 19
    assert made.count('<tr data-kind="fallback">') == 6
    assert made.count('<tr data-kind="kept">') == 1
    assert "cosine 0.8 &lt; 0.85, number 3" in made


def test_what_is_not_measured_is_a_dash_with_its_reason() -> None:
    made = page({"a": findings()})
    assert re.search(r"PSNR</th><td[^>]*>\u2013</td>.*no pictures were made", made)


def test_changed_tokens_are_marked_on_both_sides() -> None:
    made = page({"a": findings()})
    assert "<mark>V </mark>" in made
    assert "<mark>L </mark>" in made
    assert "8 of 10 tokens equal" in made


def test_samples_of_one_seed_lie_together_whichever_model_made_them() -> None:
    other = replace(text(), quantized=text().original)
    made = page({"int2": findings(), "int4": findings(samples=(other,))})
    assert made.count('<article class="sample text">') == 1
    assert "10 of 10 tokens equal" in made


def test_a_picture_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"begins with b'<svg onl'; give it as PNG"):
        page({"a": findings(samples=(replace(picture(), quantized=b"<svg onload=..."),))})


def test_without_its_packages_the_page_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_room, "NEEDED", ("jinja2", "no_such_plotly"))
    with pytest.raises(ConfigurationError, match=r"needs no_such_plotly; pip install 'arrow-quant-v2\[report\]'"):
        page({"a": findings()})


def test_a_page_of_no_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="of no model"):
        page({})
