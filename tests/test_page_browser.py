"""report.html in a real browser: headless Chromium with its driver, where both are installed.

NEO_SCREENSHOT=FILE keeps the picture of the committed comparison as a PNG:

    NEO_SCREENSHOT=experiments/variants/report.png pytest tests/test_page_browser.py -m slow
"""

import csv
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from example_runs import example_run
from PIL import Image

from neo.results.page import render_page
from neo.results.panels import COLOURS
from neo.results.printing import number
from neo.results.records import find_records, read_record
from neo.results.summary import number_of
from neo.results.table_spec import read_table_spec
from neo.results.tables import build_table

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HOSTILE = "</script><img src=x onerror=document.title='broken'><!-- \u2028"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium and chromedriver on PATH (Debian: chromium, chromium-driver)",
    ),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")


class Browser:
    """A headless Chromium with what the tests ask of it."""

    def __init__(self, profile):
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        logs = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        self.driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
        self.size(1400, 1000)

    def size(self, width, height):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def scheme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, path):
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(path.as_uri())

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.run(script, selector)

    def choose(self, selector, text):
        from selenium.webdriver.support.select import Select

        Select(self.find(selector)).select_by_visible_text(text)

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def header(self, label):
        (head,) = [
            head
            for head in self.all("#runs thead th button")
            if head.find_element("css selector", "span").text == label
        ]
        return head

    def shown_runs(self):
        script = "return [...document.querySelectorAll('#runs tbody')].map((b) => b.dataset.run)"
        return self.run(script)

    def column(self, label):
        """The texts under a header, in the order shown."""
        script = """
          const heads = [...document.querySelectorAll('#runs thead th')];
          const at = heads.findIndex((h) => h.querySelector('span')?.textContent === arguments[0]);
          return [...document.querySelectorAll('#runs tbody')].map(
            (body) => body.rows[0].cells[at].textContent);
        """
        return self.run(script, label)

    def curve(self, run_id):
        """The drawn line of a run, read back from pixels into the numbers of its axes."""
        path = self.find(f'#curves g[data-run="{run_id}"] path').get_attribute("d")
        keys = ("x0", "x1", "y0", "y1", "left", "right", "top", "bottom")
        ends = {key: float(self.find("#curves").get_attribute(f"data-{key}")) for key in keys}
        pixels = [tuple(map(float, spot.split())) for spot in path[1:].split("L")]
        across = (ends["x1"] - ends["x0"]) / (ends["right"] - ends["left"])
        up = (ends["y1"] - ends["y0"]) / (ends["bottom"] - ends["top"])
        return [
            (ends["x0"] + (x - ends["left"]) * across, ends["y0"] + (ends["bottom"] - y) * up)
            for x, y in pixels
        ]

    def problems(self):
        """What the console said, and every request that left the file."""
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(f"asked for {url}")
        return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser, after which the console must be empty and nothing asked for."""
    chromium.size(1400, 1000)
    chromium.scheme("light")
    yield chromium
    assert chromium.problems() == []


class Experiment:
    """A committed experiment, and its page in a file."""

    def __init__(self, name, folder):
        found = [(path, read_record(path)) for path in find_records(EXPERIMENTS / name)]
        self.runs = {run.run_id: run for _, run in found}
        self.logs = {run.run_id: path.with_suffix(".csv") for path, run in found}
        spec = read_table_spec(EXPERIMENTS / name / "table.yaml")
        table = build_table(spec, self.runs.values())
        self.path = folder / f"{name}.html"
        text = render_page(table, list(self.runs.values()), self.logs)
        self.path.write_text(text, encoding="utf-8")

    def of(self, lora):
        return {run_id for run_id, run in self.runs.items() if run.choices["lora"] == lora}

    def logged(self, run_id, name):
        with self.logs[run_id].open(newline="") as file:
            found = {int(r["step"]): float(r[name]) for r in csv.DictReader(file) if r[name]}
        return sorted(found.items())


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return Experiment("variants", tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    return Experiment("variants_search", tmp_path_factory.mktemp("pages"))


def test_a_page_of_130_runs_opens_with_an_empty_console_and_without_a_request(browser, search):
    browser.open(search.path)
    assert set(browser.shown_runs()) == set(search.runs)
    assert browser.find("#count").text == "130 of 130 runs"
    assert len(browser.all("#curves g.line")) == 130
    assert not browser.run("return performance.getEntriesByType('resource')")


def test_the_policy_holds_against_a_script_that_is_not_the_pages_own(chromium, variants):
    chromium.open(variants.path)
    chromium.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = \"x\"';"
        "document.head.append(s); const i = document.createElement('img'); i.src = 'no.png';"
        "document.body.append(i);"
    )
    time.sleep(0.2)
    assert chromium.driver.title != "x"
    problems = chromium.problems()
    assert len(problems) >= 2
    assert all("Content Security Policy" in text for text in problems)


@pytest.mark.parametrize(
    ("label", "key", "scale", "decimals"),
    [
        ("val kd", "val/kd", 1, 4),
        ("supervised", "perf/tokens_per_s", 1, 0),
        ("exact match", "eval/mini/exact_match", 100, 1),
    ],
)
def test_a_click_on_a_header_sorts_by_the_recorded_numbers_and_a_second_reverses(
    browser, variants, label, key, scale, decimals
):
    browser.open(variants.path)
    numbers = {run_id: number_of(run, key) for run_id, run in variants.runs.items()}
    browser.header(label).click()
    up = browser.shown_runs()
    assert [numbers[run_id] for run_id in up] == sorted(numbers.values())
    assert browser.column(label) == [number(numbers[r] * scale, decimals) for r in up]
    (sorted_head,) = browser.all('#runs th[aria-sort="ascending"]')
    assert label in sorted_head.text
    browser.header(label).click()
    assert [numbers[r] for r in browser.shown_runs()] == sorted(numbers.values(), reverse=True)
    assert len(browser.all('#runs th[aria-sort="descending"]')) == 1
    assert not browser.all('#runs th[aria-sort="ascending"]')


def test_the_numbers_on_the_page_are_those_of_the_records(browser, variants):
    browser.open(variants.path)
    shown = dict(zip(browser.shown_runs(), browser.column("trainable parameters"), strict=True))
    expected = {r: number(run.num_trainable_parameters or 0, 0) for r, run in variants.runs.items()}
    assert shown == expected


def test_a_filter_leaves_exactly_the_runs_of_its_variant_and_reset_brings_all_back(browser, search):
    browser.open(search.path)
    browser.choose('select[data-column="lora"]', "dora")
    assert set(browser.shown_runs()) == search.of("dora")
    assert browser.find("#count").text == "10 of 130 runs"
    assert len(browser.all("#curves g.line")) == 10
    browser.choose('select[data-column="optim.lr"]', "0.001")
    expected = {r for r in search.of("dora") if search.runs[r].config["optim"]["lr"] == 0.001}
    assert set(browser.shown_runs()) == expected
    assert len(expected) == 2
    browser.find("#reset").click()
    assert set(browser.shown_runs()) == set(search.runs)


def test_words_in_the_search_field_must_all_be_there(browser, search):
    browser.open(search.path)
    browser.find("#query").send_keys("lora=PISSA_fast seed=100")
    expected = {r for r in search.of("pissa_fast") if search.runs[r].seed == 100}
    assert set(browser.shown_runs()) == expected
    browser.find("#query").send_keys(" nosuchword")
    assert browser.shown_runs() == []
    assert browser.find("#nothing").is_displayed()
    assert browser.all("#curves g.line") == []


def test_a_ticked_run_is_drawn_alone_and_its_line_is_what_was_logged(browser, variants):
    browser.open(variants.path)
    run_id = sorted(variants.of("dora"))[0]
    browser.find(f'tbody[data-run="{run_id}"] input').click()
    assert [g.get_attribute("data-run") for g in browser.all("#curves g.line")] == [run_id]
    for name, scale in (("val/kd", 1), ("train/loss", 1), ("val/agreement", 100)):
        browser.choose("#metric", name)
        expected = [(step, value * scale) for step, value in variants.logged(run_id, name)]
        drawn = browser.curve(run_id)
        assert len(drawn) == len(expected)
        ends = [float(browser.find("#curves").get_attribute(f"data-{k}")) for k in ("y0", "y1")]
        for (x, y), (step, value) in zip(drawn, expected, strict=True):
            assert x == pytest.approx(step, abs=0.01)
            assert y == pytest.approx(value, abs=(ends[1] - ends[0]) / 10_000)
    browser.find("#unchoose").click()
    assert len(browser.all("#curves g.line")) == 65


def test_over_tokens_a_line_ends_at_the_tokens_of_the_run(browser, variants):
    browser.open(variants.path)
    run_id = sorted(variants.of("lora"))[0]
    browser.find(f'tbody[data-run="{run_id}"] input').click()
    browser.choose("#axis", "supervised tokens")
    (first, _), (last, _) = browser.curve(run_id)[0], browser.curve(run_id)[-1]
    tokens = dict(variants.logged(run_id, "train/tokens"))
    assert first == pytest.approx(tokens[variants.logged(run_id, "val/kd")[0][0]], rel=1e-3)
    assert last == pytest.approx(variants.runs[run_id].num_tokens, rel=1e-3)


def test_on_a_log_scale_every_line_stays_and_the_axis_says_so(browser, search):
    browser.open(search.path)
    before = browser.run("return document.querySelector('#curves g.line path').getAttribute('d')")
    browser.find("#log").click()
    after = browser.run("return document.querySelector('#curves g.line path').getAttribute('d')")
    assert before != after
    assert len(browser.all("#curves g.line")) == 130
    assert "val/kd (nats/token), log" in browser.texts("#curves .label")


def test_the_pointer_and_the_keys_tell_run_step_and_value(browser, variants):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(variants.path)
    run_id = sorted(variants.of("eva"))[0]
    browser.find(f'tbody[data-run="{run_id}"] input').click()
    browser.run("document.getElementById('curves').scrollIntoView({block: 'center'})")
    path = browser.find("#curves g.line path").get_attribute("d")
    x, y = map(float, path[1:].split("L")[-1].split())
    svg = browser.find("#curves")
    from_middle = (round(x - svg.size["width"] / 2), round(y - svg.size["height"] / 2))
    ActionChains(browser.driver).move_to_element_with_offset(svg, *from_middle).perform()
    step, value = variants.logged(run_id, "val/kd")[-1]
    tip = browser.find("#tip").text
    assert f"val/kd {number(value, 4)} nats/token" in tip
    assert f"step {step}" in tip
    assert f"run {run_id}" in tip
    assert "lora eva" in tip
    browser.run("document.getElementById('curves').focus()")
    browser.press(Keys.ESCAPE)
    assert not browser.find("#tip").is_displayed()
    browser.press(Keys.ARROW_RIGHT)
    browser.press(Keys.ARROW_RIGHT)
    step, value = variants.logged(run_id, "val/kd")[1]
    assert f"val/kd {number(value, 4)} nats/token" in browser.find("#tip").text
    browser.press(Keys.ENTER)
    assert browser.find("#details h2 code").text == run_id


def details(browser, part="#details"):
    lines = browser.run(
        "return [...document.querySelectorAll(`${arguments[0]} .listing tr`)]"
        ".filter((row) => !row.hidden)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))",
        part,
    )
    return {line[0]: line[1:] for line in lines}


def leaves(value, path=()):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield ".".join(path), value


def test_a_click_on_a_run_opens_its_whole_config_and_what_else_is_recorded(browser, variants):
    browser.open(variants.path)
    run = variants.runs[sorted(variants.of("pissa"))[0]]
    browser.find(f'tbody[data-run="{run.run_id}"] td.run').click()
    shown = details(browser)
    config = dict(leaves(run.config))
    assert len(config) > 40
    for path, value in config.items():
        (text,) = shown[path]
        assert text == value if isinstance(value, str) else json.loads(text) == value
    assert shown["val/kd"] == [number(run.metrics["val/kd"], 4), "nats/token"]
    assert shown["eval/mini/exact_match"][1] == "%"
    assert shown["commit"] == [run.commit]
    assert shown["versions.torch"] == [run.versions["torch"]]
    assert shown["models.teacher.hash"] == [run.models["teacher"]["hash"]]
    assert shown["rows.read"] == [str(run.rows["read"])]
    command, started = browser.texts("#details .code code")
    assert command == "python -m neo.train " + " ".join(run.overrides)
    assert started == " ".join(run.argv)
    browser.find("#details input").send_keys("lora.")
    left = set(details(browser, "#details section:has(input)"))
    assert left == {path for path in config if "lora." in f"{path} = {config[path]}"}


def test_the_page_is_used_by_keys_alone(browser, variants):
    from selenium.webdriver.common.keys import Keys

    browser.open(variants.path)
    browser.run("arguments[0].focus()", browser.header("seed"))
    browser.press(Keys.ENTER)
    assert browser.column("seed") == sorted(browser.column("seed"))
    assert browser.column("seed")[::13] == ["0", "1", "2", "3", "4"]
    browser.run("document.querySelector('#runs td.run button').focus()")
    browser.press(Keys.ENTER)
    assert browser.find("#details").is_displayed()
    assert browser.run("return document.activeElement.closest('dialog') !== null")
    browser.press(Keys.ESCAPE)
    assert not browser.find("#details").is_displayed()
    assert browser.run("return document.activeElement.closest('td.run') !== null")
    browser.run("document.querySelector('[role=tab]').focus()")
    browser.press(Keys.ARROW_RIGHT)
    assert browser.find("#panel1").is_displayed()
    assert not browser.find("#panel0").is_displayed()


def test_failed_and_unmatched_runs_are_shown_with_the_reason_and_no_text_becomes_markup(
    browser, tmp_path
):
    (tmp_path / "table.yaml").write_text(
        "title: Hostile\nrows:\n  - {label: Neo, where: {method: neo}}\ncolumns:\n"
        "  - {metric: val/kd}\n",
        encoding="utf-8",
    )
    runs = [
        example_run("neo", 0, metrics={"val/kd": 0.5}),
        example_run("neo", 1, status="oom", error=HOSTILE, config={HOSTILE: HOSTILE, "seed": 1}),
        example_run(
            "kd", 0, metrics={"val/kd": 0.25}, overrides=[HOSTILE], versions={"v": HOSTILE}
        ),
        example_run("kd", 1, status="interrupted"),
    ]
    table = build_table(read_table_spec(tmp_path / "table.yaml"), runs)
    page = tmp_path / "report.html"
    page.write_text(render_page(table, runs, {}), encoding="utf-8")
    browser.open(page)
    assert browser.shown_runs() == ["neo0", "neo1", "kd0", "kd1"]
    assert browser.texts("#runs tr.reason") == [HOSTILE, "no reason was recorded"]
    assert browser.column("status") == ["ok", "oom", "ok", "interrupted"]
    assert browser.column("val/kd") == ["0.5000", "—", "0.2500", "—"]
    assert [r for r in browser.column("run") if "no row" in r] == ["kd0no row", "kd1no row"]
    assert browser.find("#no-curves").is_displayed()
    browser.choose('select[data-column="status"]', "oom")
    assert browser.shown_runs() == ["neo1"]
    browser.find("#runs tr.reason td:last-child").click()
    assert browser.texts("#details .reason") == [HOSTILE]
    assert details(browser)[HOSTILE] == [HOSTILE]
    assert browser.run("return document.images.length") == 0
    assert browser.driver.title == "Hostile"
    browser.find("#details .close").click()
    browser.find("#reset").click()
    for direction in ("ascending", "descending"):
        browser.header("val/kd").click()
        assert browser.column("val/kd")[2:] == ["—", "—"]
        assert len(browser.all(f'#runs th[aria-sort="{direction}"]')) == 1


def test_an_empty_experiment_is_a_page_too(browser, tmp_path):
    (tmp_path / "table.yaml").write_text(
        "title: Nothing yet\nrows: [{label: Neo, where: {method: neo}}]\n"
        "columns: [{metric: val/kd}]\n"
    )
    page = tmp_path / "report.html"
    table = build_table(read_table_spec(tmp_path / "table.yaml"), [])
    page.write_text(render_page(table, [], {}), encoding="utf-8")
    browser.open(page)
    assert browser.find("#count").text == "0 of 0 runs"


def luminance(colour):
    channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_are_readable_in_both_colour_schemes(browser, variants, scheme):
    browser.scheme(scheme)
    browser.open(variants.path)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    page = browser.run(style, "body", "backgroundColor")
    card = browser.run(style, "#chart", "backgroundColor")
    assert (luminance(page) < 0.1) == (scheme == "dark")
    for selector in ("#runs td", "#count", "#drawn", "#runs thead small", ".status", "button.link"):
        assert contrast(browser.run(style, selector, "color"), card) >= 4.5, selector
    for group in browser.all("#legend svg path"):
        assert contrast(group.value_of_css_property("stroke"), card) >= 1.9


def test_on_a_narrow_screen_nothing_but_the_tables_scrolls_sideways(browser, variants):
    browser.size(390, 800)
    browser.open(variants.path)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.find("#runs td.run button").click()
    assert browser.run("return document.querySelector('dialog').scrollWidth <= innerWidth")


def with_palette(image):
    """The image in the colours of lines and its most frequent ones, the others as the nearest.

    That is a third of the file. Pillow's own palettes average, and lose the colours of thin lines.
    """
    pixels = np.asarray(image, dtype=np.int32).reshape(-1, 3)
    colours, places, counts = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    lines = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS]
    frequent = colours[np.argsort(-counts, kind="stable")[: 256 - len(lines)]]
    palette = np.concatenate([frequent, lines])
    nearest = [np.square(palette - colour).sum(axis=1).argmin() for colour in colours]
    indices = np.array(nearest, dtype=np.uint8)[places.reshape(-1)]
    shown = Image.fromarray(indices.reshape(image.height, image.width))
    shown.putpalette(palette.astype(np.uint8).tobytes())
    return shown


def test_the_picture_of_the_committed_comparison(browser, variants, tmp_path):
    """Takes the picture that is kept beside the experiment, where NEO_SCREENSHOT names a file."""
    browser.size(1400, 1290)
    browser.open(variants.path)
    browser.header("val kd").click()
    for entry in browser.all("#legend button"):
        if entry.text in ("lora", "dora", "lora_fa"):
            browser.run("arguments[0].click()", entry)  # leaves the pointer elsewhere
    browser.run("document.activeElement.blur()")
    time.sleep(0.3)
    picture = Path(os.environ.get("NEO_SCREENSHOT", tmp_path / "report.png"))
    image = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png()))
    with_palette(image.convert("RGB")).save(picture, optimize=True)
    assert 20_000 < picture.stat().st_size < 300_000
    assert len(browser.all("#curves g.strong")) == 15
