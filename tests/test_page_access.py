"""The page of `sam3-jax serve` by keyboard, in narrow windows, in the dark, under axe-core."""

import io
import json
from pathlib import Path

import browser_page
import numpy as np
import pytest
from browser_page import user
from PIL import Image

from sam3_jax.outputs import rle

pytestmark = pytest.mark.browser
server, browser = browser_page.server, browser_page.browser

NARROW = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def results(one):
  """Opens an example and shows every kind of result."""
  one.example()
  one.ask("lion, pizza")
  one.get("#instances .name").first.click()
  one.tool("click")


def test_everything_works_by_keyboard(server, browser, tmp_path):
  with user(browser, server) as one:
    press = one.page.keyboard.press
    one.get("#examples button").first.focus()
    press("Enter")
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    one.page.keyboard.type("lion")  # the phrase has the focus
    press("Enter")
    one.idle()
    assert one.instances() == ["lion"]
    press("Escape")

    one.get("#canvas").focus()
    press("c")  # click with the cursor, which starts in the middle of the image
    assert one.get("input[name=mode]:checked").get_attribute("value") == "click"
    press("Enter")
    for _ in range(3):
      press("Shift+ArrowRight")
    for _ in range(4):
      press("Shift+ArrowDown")
    press("Enter")  # on the book
    one.idle()
    assert one.prompts() == ["lion", "click 1 (1 +)"]
    press("n")
    assert one.get("input[name=sign]:checked").get_attribute("value") == "0"
    press("Shift+ArrowUp")
    press("Enter")
    one.idle()
    assert one.prompts() == ["lion", "click 1 (1 +, 1 −)"]
    press("Control+z")
    press("Control+z")
    assert one.prompts() == ["lion"]

    press("b")  # a box
    press("Enter")
    for _ in range(6):
      press("Shift+ArrowDown")
      press("Shift+ArrowLeft")
    press("Enter")
    one.idle()
    assert one.prompts() == ["lion", "box 1"]

    press("Escape")
    press("]")  # select, rename, delete
    one.expect(one.get("#instances .selected .text")).to_have_text("lion")
    one.get("#instances .selected [data-action=Rename]").focus()
    press("Enter")
    one.page.keyboard.type("cub")
    press("Enter")
    assert one.instances() == ["cub", "box 1"]
    press("Delete")
    assert one.instances() == ["box 1"]
    one.get("#prompts input[type=range]").first.focus()
    press("ArrowLeft")
    one.expect(one.get("#prompts output").first).to_have_text("0.49")

    press("?")
    one.expect(one.get("#help")).to_be_visible()
    one.get("#single-keys").uncheck()
    press("Escape")
    one.get("#canvas").focus()
    press("p")
    assert one.get("input[name=mode]:checked").get_attribute("value") == "box"
    press("+")
    path = tmp_path / "saved.json"
    one.get("#save-coco").focus()
    with one.page.expect_download() as download:
      press("Enter")
    download.value.save_as(path)
    assert [entry["name"] for entry in json.loads(path.read_text())["categories"]] == [
      "lion",
      "box 1",
    ]


def test_tab_reaches_every_control_and_shows_it(server, browser):
  with user(browser, server) as one:
    results(one)
    one.get("body").focus()
    seen = []
    for _ in range(60):
      one.page.keyboard.press("Tab")
      name, outlined = one.page.evaluate(
        """() => {
          const element = document.activeElement;
          const box = element.closest("label") ?? element;
          const style = (one) => getComputedStyle(one).outlineStyle !== "none";
          if (element === document.body) return ["", true];
          const name = element.id || element.getAttribute("aria-label") || element.className;
          return [name, style(element) || style(box)];
        }"""
      )
      seen.append(name)
      assert outlined, name
    wanted = ["open-button", "undo", "theme", "help-button", "canvas", "phrase", "zoom-in"]
    wanted += ["Hide lion", "Remove lion", "Threshold of lion", "Rename lion 1", "opacity"]
    assert set(wanted) <= set(seen)


@pytest.mark.parametrize("size", [(320, 568), (801, 420), (900, 420)])
def test_controls_fit_into_small_windows(server, browser, size):
  """320 px is what WCAG 2.2 asks for (reflow). The tools are beside the panel from 801 px."""
  width, height = size
  with user(browser, server, viewport={"width": width, "height": height}) as one:
    results(one)
    assert one.page.evaluate("document.documentElement.scrollWidth") == width
    cut = one.page.evaluate(
      """() => {
        const right = (element) => element.getBoundingClientRect().right;
        const inside = { ".tools span": ".stage", ".prompt": ".panel", ".prompt *": ".prompt" };
        return Object.entries(inside).flatMap(([inner, outer]) =>
          [...document.querySelectorAll(inner)]
            .filter((e) => e.checkVisibility() && right(e) > right(e.closest(outer)) + 0.5)
            .map((e) => e.className || e.textContent));
      }"""
    )
    assert cut == []


def test_a_narrow_window(server, browser):
  with user(browser, server, **NARROW) as one:
    results(one)
    width = one.page.evaluate("document.documentElement.scrollWidth")
    assert width == 390
    cut = one.page.evaluate(
      """() => [...document.querySelectorAll("button, input, select, label")]
        .filter((e) => e.checkVisibility() && !e.closest(".hidden"))
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
        .map((e) => e.id || e.className || e.textContent)"""
    )
    assert cut == []
    one.page.touchscreen.tap(*one.screen(480, 400))
    one.idle()
    assert one.prompts()[-1] == "click 1 (1 +)"


def test_themes(server, browser):
  background = "getComputedStyle(document.body).backgroundColor"
  with user(browser, server, color_scheme="dark") as one:
    assert one.page.evaluate(background) == "rgb(20, 22, 27)"
    for name, color in (("light", "rgb(244, 245, 248)"), ("dark", "rgb(20, 22, 27)")):
      one.get("#theme").click()
      one.expect(one.get("#theme")).to_have_attribute("aria-label", f"Theme: {name}")
      assert one.page.evaluate(background) == color
    one.page.reload()
    one.expect(one.get("#theme")).to_have_attribute("aria-label", "Theme: dark")
    one.page.emulate_media(color_scheme="light")
    assert one.page.evaluate(background) == "rgb(20, 22, 27)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_axe_finds_no_serious_fault(server, browser, scheme, size):
  bundled = pytest.importorskip("axe_playwright_python")
  script = Path(bundled.__file__).parent / "axe.min.js"
  options = NARROW if size == "narrow" else {}
  with user(browser, server, color_scheme=scheme, bypass_csp=True, **options) as one:
    one.page.add_script_tag(path=script)
    faults = check(one)
    results(one)
    faults += check(one)
    for button, dialog in (("#help-button", "#help"), ("#model-button", "#model")):
      one.get(button).click()
      faults += check(one)
      one.get(f"{dialog} [data-close]").click()
    file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"text"}
    one.get("#file-input").set_input_files(file)
    one.expect(one.get("#alert")).to_be_visible()
    faults += check(one)
    assert faults == []


def check(one) -> list[str]:
  """The serious and critical faults that axe-core finds now."""
  found = one.page.evaluate("axe.run()")["violations"]
  return [
    f"{fault['id']}: {node['html']} {node['failureSummary']}"
    for fault in found
    if fault["impact"] in ("serious", "critical")
    for node in fault["nodes"]
  ]


def test_a_large_image_zooms_and_pans(server, browser):
  with user(browser, server) as one:
    pixels = np.zeros((4000, 6000, 3), np.uint8)
    pixels[1000:3000, 2000:4000] = (255, 60, 60)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    file = {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}
    one.get("#file-input").set_input_files(file)
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    one.size = (6000, 4000)
    one.tool("box")
    one.drag(1950, 950, 4050, 3050)
    assert one.instances() == ["box 1"]
    one.tool("phrase")
    one.page.mouse.move(*one.screen(3000, 2000))
    one.expect(one.get("#instances .hovered")).to_have_count(1)
    one.page.mouse.move(*one.screen(50, 50))
    before = one.color(2100, 1500)
    for _ in range(3):
      one.page.mouse.wheel(0, -400)
    for _ in range(20):
      one.page.mouse.move(*one.screen(3000, 2000))
      one.page.mouse.down()
      one.page.mouse.move(*one.screen(200, 2000), steps=2)
      one.page.mouse.up()
    assert one.color(2100, 1500) != before  # moved away
    one.get("#zoom-fit").click()
    one.page.mouse.move(*one.screen(50, 50))
    assert np.abs(np.subtract(one.color(2100, 1500), before)).max() < 8


def test_masks_agree_with_pycocotools(server, browser):
  rng = np.random.default_rng(5)
  masks = [rng.random((9, 7)) < p for p in (0, 0.3, 0.7, 1)]
  masks += [np.kron(rng.random((6, 5)) < 0.5, np.ones((11, 13))) > 0 for _ in range(4)]
  with user(browser, server) as one:
    got = one.page.evaluate(
      """async (masks) => {
        const rle = await import("/static/rle.js");
        return masks.map((mask) => {
          const runs = rle.decodeRuns(mask);
          const [h, w] = mask.size;
          const other = rle.decodeRuns(masks[masks.indexOf(mask) ^ 1]);
          const same = masks[masks.indexOf(mask) ^ 1].size.join() === mask.size.join();
          const ends = rle.runEnds(runs);
          const pixels = [];
          for (let y = 0; y < h; y++) for (let x = 0; x < w; x++)
            pixels.push(Number(rle.contains(ends, h, x, y)));
          return {
            counts: rle.encodeRuns(runs), area: rle.area(runs), bounds: rle.bounds(runs, h),
            grid: [...rle.rasterize(runs, h, [0, 0, w, h], w, h)], pixels,
            union: same ? rle.encodeRuns(rle.union(runs, other)) : null,
          };
        });
      }""",
      [rle.encode(mask) for mask in masks],
    )
    for i, (mask, one_got) in enumerate(zip(masks, got, strict=True)):
      encoded = rle.encode(mask)
      assert one_got["counts"] == encoded["counts"]
      assert one_got["area"] == mask.sum()
      x, y, w, h = rle.bounds(encoded)
      assert one_got["bounds"] == [x, y, x + w, y + h]
      np.testing.assert_array_equal(np.reshape(one_got["grid"], mask.shape), mask)
      np.testing.assert_array_equal(np.reshape(one_got["pixels"], mask.shape), mask)
      assert one_got["union"] == rle.encode(mask | masks[i ^ 1])["counts"]
    decode = """async (counts) => {
      const { decodeRuns } = await import("/static/rle.js");
      return [...decodeRuns({ size: [3, 3], counts })];
    }"""
    assert one.page.evaluate(decode, "9") == [9]
    for counts in ("0", "o", "PP", "\x7f", "O0O0"):
      with pytest.raises(Exception, match="the mask's runs"):
        one.page.evaluate(decode, counts)


def test_outlines_enclose_the_mask(server, browser):
  mask = np.zeros((12, 10), bool)
  mask[1:9, 1:8] = True
  mask[3:6, 3:5] = False  # a hole
  mask[10:12, 8:10] = True
  mask[9, 0] = True  # touches the first region at a corner
  with user(browser, server) as one:
    rings = one.page.evaluate(
      """async ([grid, w, h]) =>
        (await import("/static/contour.js")).trace(Uint8Array.from(grid), w, h)""",
      [mask.astype(int).ravel().tolist(), 10, 12],
    )
  assert len(rings) == 4  # two regions, the pixel between them, and the hole
  areas = []
  for ring in rings:
    x, y = np.reshape(ring, (-1, 2)).T
    areas.append(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2))
  assert sum(area < 0 for area in areas) == 1  # the hole runs the other way
  # Each corner of a ring is cut by, or gains, a triangle of 1/8 pixel: 4 more are cut.
  assert sum(areas) == pytest.approx(mask.sum() - 2 * 4 * (1 / 8) * 1.0, abs=1e-9)


def test_colors_are_those_of_the_library(server, browser):
  from sam3_jax.outputs.colors import color, ink

  with user(browser, server) as one:
    got = one.page.evaluate(
      """async () => {
        const { color, ink } = await import("/static/colors.js");
        return Array.from({ length: 64 }, (_, i) => [color(i), ink(color(i))]);
      }"""
    )
  names = {(0, 0, 0): "#000", (255, 255, 255): "#fff"}
  assert got == [[list(color(i)), names[ink(color(i))]] for i in range(64)]
