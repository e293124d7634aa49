"""The page of `sam3-jax serve`, used by mouse: from an example image to a saved annotation."""

import io
import json
import zipfile

import browser_page
import numpy as np
import pytest
from browser_page import SECONDS, user
from PIL import Image

from sam3_jax.outputs import rle

pytestmark = pytest.mark.browser
server, browser = browser_page.server, browser_page.browser

LION = (365, 320)  # a pixel inside the lion of the first example
GROUND = (60, 60)  # a pixel of its background


def test_a_phrase_is_segmented_while_it_is_typed(server, browser):
  with user(browser, server) as one:
    one.example()
    before = one.color(*LION)
    one.get("#phrase").press_sequentially("lion")
    one.expect(one.get("#count")).to_have_text("1")  # without Enter
    one.idle()
    asked = one.asked()
    one.get("#phrase").press("Enter")
    one.expect(one.get("#status")).to_contain_text("lion: 1 instance")
    assert one.asked() == asked  # the answer is kept
    one.expect(one.get("#prompts .count")).to_have_text("1")
    one.expect(one.get("#times")).to_contain_text("ms")
    ground = one.color(*GROUND)
    blended = [0.55 * a + 0.45 * b for a, b in zip(before, (0, 157, 252), strict=True)]
    assert np.abs(np.subtract(one.color(*LION), blended)).max() < 25
    one.get("label:has(#show-masks)").click()
    assert one.color(*LION) == before
    assert one.color(*GROUND) == ground


def test_several_phrases_have_their_own_colors_and_counts(server, browser):
  with user(browser, server) as one:
    one.example()
    one.ask("lion, cat, pizza")
    assert one.prompts() == ["lion", "cat", "pizza"]
    assert one.get("#prompts .count").all_inner_texts() == ["1", "1", "0"]
    assert one.instances() == ["lion", "cat"]
    colors = one.get("#prompts .swatch").evaluate_all(
      "all => all.map((e) => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colors)) == 3
    one.ask("lion")  # chooses the prompt that is there
    assert one.prompts() == ["lion", "cat", "pizza"]


def test_hover_links_the_list_and_the_image(server, browser):
  with user(browser, server) as one:
    one.example()
    one.ask("lion, cat")
    one.page.mouse.move(*one.screen(*LION))
    one.expect(one.get("#instances .hovered")).to_have_text("lion0.89")
    one.page.mouse.move(*one.screen(*GROUND))
    one.expect(one.get("#instances .hovered")).to_have_count(0)
    before = one.color(*LION)
    one.get("#instances .text").first.hover()
    one.expect(one.get("#instances .hovered")).to_have_count(1)
    assert one.color(*LION) != before


def test_the_threshold_filters_without_a_request(server, browser):
  with user(browser, server) as one:
    one.example(1)
    one.ask("rabbit")
    asked, few = one.asked(), len(one.instances())
    assert few == 2
    slider = one.get("#prompts input[type=range]")
    slider.fill("0")
    one.expect(one.get("#prompts output")).to_have_text("0.00")
    assert len(one.instances()) > few
    slider.fill("1")
    one.expect(one.get("#count")).to_have_text("0")
    slider.fill("0.5")
    one.expect(one.get("#count")).to_have_text(str(few))
    assert one.asked() == asked
    one.get("#undo").click()  # the drags are one step
    assert one.prompts() == ["rabbit"]
    one.expect(one.get("#prompts output")).to_have_text("0.50")


def test_exemplar_boxes_find_and_exclude(server, browser):
  with user(browser, server) as one:
    one.example(1)
    one.tool("exemplar")
    one.size = (720, 480)
    one.drag(125, 285, 270, 440)
    assert one.prompts() == ["exemplar boxes (1 +)"]
    assert len(one.instances()) >= 1
    one.negative()
    one.drag(5, 50, 250, 150)
    assert one.prompts() == ["exemplar boxes (1 +, 1 −)"]
    one.get("#undo").click()
    assert one.prompts() == ["exemplar boxes (1 +)"]


def test_clicks_and_boxes_segment_one_object(server, browser):
  with user(browser, server) as one:
    one.example()
    one.tool("click")
    one.click(480, 400)  # the book
    assert one.prompts() == ["click 1 (1 +)"]
    one.expect(one.get("#prompts .choice")).to_contain_text("of 3")
    one.click(*GROUND, button="right")  # negative
    assert one.prompts() == ["click 1 (1 +, 1 −)"]
    one.get("#new-object").click()
    one.click(*LION)
    assert one.instances() == ["click 1", "click 2"]
    one.tool("box")
    one.drag(262, 80, 420, 220)  # the hot dog
    assert one.instances() == ["click 1", "click 2", "box 1"]
    before = one.get("#instances .score").all_inner_texts()
    assert all(0 < float(score) <= 1 for score in before)


def test_an_instance_of_a_phrase_is_refined_and_undone(server, browser, tmp_path):
  with user(browser, server) as one:
    one.example()
    one.ask("lion")
    first = json.loads(one.download("#save-coco", tmp_path).read_text())["annotations"][0]
    one.get("#instances .instance").hover()
    one.get("#instances [data-action=Refine]").click()
    one.click(320, 310)  # the mane, which the mask lacks
    second = json.loads(one.download("#save-coco", tmp_path).read_text())["annotations"][0]
    assert second["segmentation"] != first["segmentation"]
    assert rle.decode(second["segmentation"])[310, 320] == 1
    one.get("#undo").click()
    asked = one.asked()
    third = json.loads(one.download("#save-coco", tmp_path).read_text())["annotations"][0]
    assert third == first
    one.get("#redo").click()
    fourth = json.loads(one.download("#save-coco", tmp_path).read_text())["annotations"][0]
    assert fourth == second
    assert one.asked() == asked


def test_everything(server, browser):
  with user(browser, server) as one:
    one.example()
    one.tool("everything")
    one.get("#side").select_option("8")
    one.get("#segment-everything").click()
    one.idle()
    assert len(one.instances()) >= 3
    assert one.prompts() == ["everything"]
    one.get("#clear").click()
    assert one.instances() == []
    one.page.keyboard.press("Control+z")
    assert len(one.instances()) >= 3


def test_undo_returns_step_by_step(server, browser):
  with user(browser, server) as one:
    one.example()
    one.ask("lion")
    one.ask("cat")
    asked = one.asked()
    one.get("#undo").click()
    assert one.prompts() == ["lion"]
    one.get("#undo").click()
    assert one.prompts() == []
    one.expect(one.get("#undo")).to_be_disabled()
    one.get("#redo").click()
    one.get("#redo").click()
    assert one.instances() == ["lion", "cat"]
    one.expect(one.get("#redo")).to_be_disabled()
    assert one.asked() == asked  # the answers are part of the history


def test_instances_are_renamed_merged_and_deleted(server, browser):
  with user(browser, server) as one:
    one.example(1)
    one.ask("rabbit")
    one.get("#instances .instance").first.hover()
    one.get("#instances [data-action=Rename]").first.click()
    one.page.keyboard.type("hare")
    one.page.keyboard.press("Enter")
    assert one.instances() == ["hare", "rabbit"]
    for box in one.get("#instances input").all():
      box.check()
    one.get("#merge").click()
    assert one.instances() == ["hare"]
    one.get("#delete").click()
    assert one.instances() == []
    one.get("#undo").click()
    assert one.instances() == ["hare"]
    one.get("#undo").click()
    one.get("#undo").click()
    assert one.instances() == ["rabbit", "rabbit"]


def test_saved_files_and_import(server, browser, tmp_path):
  with user(browser, server) as one:
    one.example()
    one.ask("lion, cat, pizza")
    path = one.download("#save-coco", tmp_path)
    assert path.name == "lion.sam3.json"
    data = json.loads(path.read_text())
    assert [one["name"] for one in data["categories"]] == ["lion", "cat", "pizza"]
    assert data["images"] == [{"id": 1, "file_name": "lion.jpg", "width": 640, "height": 480}]
    assert [entry["text"] for entry in data["info"]["prompts"]] == ["lion", "cat", "pizza"]
    masks = []
    for entry in data["annotations"]:
      keys = "id score bbox area segmentation image_id category_id iscrowd"
      assert set(entry) == set(keys.split())
      masks.append(rle.decode(entry["segmentation"]))
      assert masks[-1].sum() == entry["area"]

    with zipfile.ZipFile(one.download("#save-masks", tmp_path)) as archive:
      assert archive.testzip() is None
      assert archive.namelist() == ["1-lion.png", "2-cat.png"]
      for name, mask in zip(archive.namelist(), masks, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("L"))
        np.testing.assert_array_equal(pixels, 255 * mask)
    with Image.open(one.download("#save-overlay", tmp_path)) as overlay:
      assert overlay.size == (640, 480)

    one.get("#clear").click()
    asked = one.asked()
    one.get("#coco-input").set_input_files(path)
    one.expect(one.get("#status")).to_have_text("Imported lion.sam3.json.")
    assert one.prompts() == ["lion", "cat", "pizza"]
    assert one.asked() == asked
    again = json.loads(one.download("#save-coco", tmp_path).read_text())
    assert again == data
    one.get("#prompts .name").first.click()  # the next exemplar box is for the lion
    one.tool("exemplar")
    one.drag(315, 255, 410, 375)
    assert one.prompts()[0] == "lion (1 +)"


def test_imported_clicks_are_continued(server, browser, tmp_path):
  with user(browser, server) as one:
    one.example()
    one.tool("click")
    one.click(360, 310)
    path = one.download("#save-coco", tmp_path)
    one.get("#clear").click()
    one.expect(one.get("#status")).to_have_text("All prompts were cleared.")
    one.expect(one.get("#delete")).to_be_disabled()
    one.get("#coco-input").set_input_files(path)
    one.expect(one.get("#status")).to_have_text("Imported lion.sam3.json.")
    assert one.prompts() == ["click 1 (1 +)"]
    one.get("#prompts .name").first.click()
    one.click(350, 330)
    assert one.prompts() == ["click 1 (2 +)"]
    assert one.instances() == ["click 1"]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("notes.txt", b"not an image at all", "notes.txt is not an image."),
    ("fake.png", b"\x89PNG\r\n\x1a\nand nothing more", "The browser cannot show fake.png:"),
    ("other.json", b"{}", "Open the image of the COCO file first."),
  ],
)
def test_other_files_are_refused(server, browser, name, content, message):
  with user(browser, server) as one:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    if name.endswith("json"):
      file["mimeType"] = "application/json"
    one.get("#file-input").set_input_files(file)
    one.expect(one.get("#alert")).to_contain_text(message)
    one.example()
    one.expect(one.get("#alert")).to_be_hidden()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("nothing", "not JSON"),
    ('{"images": [null], "categories": [], "annotations": []}', "not those of a COCO dataset"),
    ('{"images": []}', "has no list “categories”"),
    (
      '{"images": [{"id": 1, "width": 3, "height": 2}], "categories": [], "annotations": []}',
      "for an image of 3 x 2 pixels, but the open one has 640 x 480",
    ),
  ],
)
def test_other_annotations_are_refused(server, browser, text, message):
  with user(browser, server) as one:
    one.example()
    file = {"name": "a.json", "mimeType": "application/json", "buffer": text.encode()}
    one.get("#coco-input").set_input_files(file)
    one.expect(one.get("#alert")).to_contain_text(message)


def test_the_page_goes_on_after_the_server_was_killed(server, browser):
  with user(browser, server) as one:
    one.example()
    one.ask("lion")
    server.kill()
    one.get("#phrase").fill("cat")
    one.get("#phrase").press("Enter")
    one.expect(one.get("#status")).to_contain_text("The connection to the server was lost.")
    assert one.instances() == ["lion"]
    server.start()
    server.wait()
    one.expect(one.get("#instances .text")).to_have_text(["lion", "cat"], timeout=2 * SECONDS)
    assert sum(url.endswith("/v1/images") for url in one.requests) >= 2
    one.ask("hot dog")
    assert one.instances() == ["lion", "cat", "hot dog"]


def test_an_image_that_the_server_forgot_is_uploaded_again(server, browser):
  with user(browser, server) as one:
    one.example()
    one.ask("lion")
    first = next(url for url in one.requests if url.endswith("/prompts"))
    one.page.evaluate("(url) => fetch(url, {method: 'DELETE'})", first.removesuffix("/prompts"))
    one.ask("cat")
    one.expect(one.get("#instances .text")).to_have_text(["lion", "cat"])
