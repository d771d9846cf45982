"""The page that shows a module, in a headless Chromium: what it marks, keys, dark colours, a phone, and on paper."""

from __future__ import annotations

import re

import pytest
from browser import opened, show
from linked import units

from pa_compiler import generate

_ENTRY = generate.ENTRIES["mla_fused"]  # its QK and PV are the only ones to multiply pairs
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def browser():
    with opened() as driver:
        yield driver


@pytest.fixture(scope="module")
def module(compiled):
    return compiled(_ENTRY.spec, _ENTRY.pipeline, _ENTRY.config)


@pytest.fixture(scope="module")
def path(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    module.report(path, context_lens=[4096, 33, 1024, 515], flops=90, bandwidth=12)
    return path


@pytest.fixture
def page(browser, path):
    """The page, newly opened, on a screen of 1400 x 900 pixels in light colours."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [LIGHT]})
    show(browser, path)
    return browser


LIGHT = {"name": "prefers-color-scheme", "value": "light"}
DARK = {"name": "prefers-color-scheme", "value": "dark"}


def marked(page, stage):
    """{number of a line: its text} of what is marked in a column."""
    lines = page.execute_script(
        f"return [...document.querySelectorAll('[data-stage=\"{stage}\"] .l.on')]"
        ".map(line => [Number(line.dataset.n), line.textContent.slice(line.firstChild.textContent.length)])"
    )
    return dict(lines)


def chip(page, stage):
    return page.find_element("css selector", f".chip[data-stage={stage}]")


def test_it_opens_from_a_file_and_complains_of_nothing(page, path):
    assert [entry for entry in page.get_log("browser") if entry["level"] != "DEBUG"] == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.title == "128/1 heads of 576/512, bfloat16, NHD"
    assert path.stat().st_size < 2_000_000
    assert not re.search(r"https?://|src=|@import|url\(", path.read_text().partition('<script type="text/plain"')[0])


def test_the_columns_are_the_texts(page, module):
    """Every line of the function that is shown, as it stands in the stage's text."""
    for stage in ("tensorir", "scheduled", "llvm", "asm"):
        shown = page.execute_script(
            f"return [...document.querySelectorAll('[data-stage={stage}] .l[data-n]')]"
            ".map(line => [Number(line.dataset.n), line.textContent.slice(line.firstChild.textContent.length)])"
        )
        lines = module.sources[stage].splitlines()
        assert len(shown) > 200
        assert all(lines[number - 1] == text for number, text in shown), stage
        assert any("fused_decode" in text for _, text in shown)


def test_choosing_qk_matmul_marks_the_dot_products_and_nothing_of_the_softmax(page, module):
    chip(page, "qk_matmul").click()
    found = units(module)
    of = {
        stage: [found.all[unit].stage if unit >= 0 else "" for unit in lines] for stage, lines in found.of_lines.items()
    }
    for stage in ("tensorir", "scheduled", "llvm", "asm"):
        lines = marked(page, stage)
        assert lines, stage
        assert {of[stage][number - 1] for number in lines} == {"qk_matmul"}
    asm, llvm = marked(page, "asm"), marked(page, "llvm")
    assert sum("tdpbf16ps" in text for text in asm.values()) == 4
    assert not [text for text in asm.values() if re.search(r"\tv(max|min|div)", text)]
    assert any("dpbf16ps" in text for text in llvm.values())
    assert 'with T.sblock("qk_matmul"):' in {text.strip() for text in marked(page, "tensorir").values()}
    chip(page, "softmax").click()
    assert not asm.keys() & marked(page, "asm").keys()
    assert any("vmaxps" in text for text in marked(page, "asm").values())


def test_choosing_a_line_marks_what_it_became(page):
    line = page.find_element(
        "xpath", "//*[@data-stage='tensorir']//*[contains(@class,'l ') or @class='l'][contains(., 'normalize')]"
    )
    page.execute_script("arguments[0].scrollIntoView(); arguments[0].click()", line)
    assert "normalize: " in page.find_element("id", "chosen").text
    assert any("vdivps" in text or "vdivss" in text for text in marked(page, "asm").values())


def test_keys(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(page).send_keys(*keys).perform()

    page.execute_script("document.getElementById('theme').focus()")
    for _ in range(40):
        if page.switch_to.active_element.get_attribute("data-stage") == "softmax":
            break
        press(Keys.TAB)
    press(Keys.ENTER)
    assert chip(page, "softmax").get_attribute("aria-pressed") == "true"
    assert marked(page, "asm")
    press(Keys.ESCAPE)
    assert not marked(page, "asm")
    while page.switch_to.active_element.get_attribute("aria-label") != "TensorIR":
        press(Keys.TAB)
    press(*[Keys.ARROW_DOWN] * 40, Keys.ENTER)
    assert marked(page, "tensorir")
    assert marked(page, "asm")
    before = marked(page, "tensorir")
    press(*[Keys.PAGE_DOWN] * 4, Keys.ARROW_UP, Keys.ENTER)
    assert marked(page, "tensorir") != before


def background(page):
    colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_light_and_dark(page):
    assert background(page) > 600
    page.find_element("id", "theme").click()
    assert background(page) < 150
    page.find_element("id", "theme").click()
    assert background(page) > 600


def test_dark_where_the_system_is(page, path):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [DARK]})
    show(page, path)
    assert background(page) < 150
    page.find_element("id", "theme").click()
    assert background(page) > 600


def test_a_phone_needs_no_scrolling_to_the_side(page, path):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    show(page, path)
    chip(page, "qk_matmul").click()
    assert page.execute_script("return window.innerWidth") == 390
    assert page.execute_script("return document.scrollingElement.scrollWidth") <= 390
    widest = page.execute_script(
        "return Math.max(...[...document.querySelectorAll('body *')]"
        ".filter(each => !each.closest('.code, .wide, .command, script, svg'))"
        ".map(each => each.getBoundingClientRect().right))"
    )
    assert widest <= 390


def test_on_paper_are_the_lines_that_are_chosen(page):
    chip(page, "qk_matmul").click()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [LIGHT]})
    shown = page.execute_script(
        "return [...document.querySelectorAll('[data-stage=asm] .l')].filter(each => each.offsetHeight > 0).length"
    )
    assert shown == len(marked(page, "asm")) > 64
    assert not page.find_element("id", "theme").is_displayed()


def test_a_loop_leads_to_its_lines(page):
    button = page.find_element("xpath", "//tr[td[2]='softmax']//button")
    button.click()
    assert re.match(r"(peak|probs|exact|tile_max|tile_sum): ", page.find_element("id", "chosen").text)
    at = page.execute_script("return document.querySelector('[data-stage=asm] .l.at').dataset.n")
    assert at == button.get_attribute("data-line")


def test_work_items_say_what_they_are(page):
    titles = page.execute_script("return [...document.querySelectorAll('#plan title')].map(each => each.textContent)")
    assert any(
        re.fullmatch(r"item \d+ on thread [01]: sequence 0, blocks \d+ to \d+, positions .* tokens", each)
        for each in titles
    )
    assert page.find_element("id", "plan").text.startswith("The plan of a call\ndecode of 4 sequences of 5,668 tokens")
