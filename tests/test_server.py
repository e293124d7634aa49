"""The server's API: results equal `Sam3`'s, formats of masks, sessions, the model's card."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from server_app import BASE, error_of, pixels, png, served, small_model, upload
from starlette.testclient import TestClient

from sam3_jax import Prompt, VisualPrompt
from sam3_jax.batch.polygons import mask_to_polygons
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.outputs.rle import decode, encode
from sam3_jax.server import settings, warm_up
from sam3_jax.server.app import create_app
from sam3_jax.server.results import mask_logits
from sam3_jax.server.settings import Settings

THRESHOLD = 0.001  # the random model is not sure of anything


@pytest.fixture(scope="module")
def model():
  return small_model()


@pytest.fixture(scope="module")
def client(model):
  with served(model) as client:
    yield client


def prompt(client, image: str, **asked):
  response = client.post(f"/v1/images/{image}/prompts", json={"threshold": THRESHOLD} | asked)
  assert response.status_code == 200, response.text
  return response.json()


def test_health_and_model(client):
  assert client.get("/healthz").json() == {"status": "ok"}
  assert client.get("/readyz").json() == {"status": "ok"}
  card = client.get("/v1/model").json()
  assert (card["name"], card["licence"], card["trained"]) == ("toy", "CC0-1.0", False)
  assert (card["visual"], card["image_size"], card["concepts"]) == (True, 32, None)
  assert card["limits"]["prompts"] == 128


def test_concepts_equal_decode(model, client):
  image = upload(client, 1)
  boxes = [[5, 5, 30, 30], [10, 0, 60, 40]]
  asked = [
    {"phrase": "cat"},
    {"phrase": None, "boxes": boxes, "box_labels": [1, 0]},
    {"phrase": "dog", "boxes": boxes[:1]},
  ]
  found = prompt(client, image, concepts=asked)["concepts"]
  embedding = model.encode(pixels(1), visual=True)
  prompts = [Prompt("cat"), Prompt(None, boxes, [1, 0]), Prompt("dog", boxes[:1])]
  wanted = model.decode(embedding, prompts).instances(THRESHOLD)
  assert sum(map(len, wanted)) > 3
  for got, want, one in zip(found, wanted, asked, strict=True):
    assert got["phrase"] == one["phrase"]
    assert [row["score"] for row in got["instances"]] == want.scores.tolist()
    assert [row["mask"] for row in got["instances"]] == [
      want.masks.rle(i) for i in range(len(want))
    ]
    assert [row["box"] for row in got["instances"]] == want.boxes.tolist()
    areas = [int(want.masks[i].sum()) for i in range(len(want))]
    assert [row["area"] for row in got["instances"]] == areas


@pytest.mark.slow
def test_visual_prompts_equal_decode_visual(model, client):
  image = upload(client, 2)
  embedding = model.encode(pixels(2), visual=True)
  mask = np.zeros((40, 60), bool)
  mask[10:30, 20:50] = True
  asked = [
    {"points": [[30, 20]]},
    {"points": [[30, 20], [5, 5]], "point_labels": [1, 0], "multimask": False},
    {"box": [10, 10, 40, 30], "multimask": False},
    {"points": [[30, 20]], "mask": encode(mask), "multimask": False},
  ]
  found = prompt(client, image, visual=asked)["visual"]
  logits = mask_logits(encode(mask), (40, 60), model.config.mask_size)
  prompts = [
    VisualPrompt([[30, 20]]),
    VisualPrompt([[30, 20], [5, 5]], [1, 0]),
    VisualPrompt(box=[10, 10, 40, 30]),
    VisualPrompt([[30, 20]], mask=logits),
  ]
  for one, visual, got in zip(asked, prompts, found, strict=True):
    alone = prompt(client, image, visual=[one])["visual"][0]
    want = model.decode_visual(embedding, visual, multimask=one.get("multimask", True))
    [masks] = want.masks()
    assert [row["score"] for row in alone["masks"]] == np.asarray(want.iou[0]).tolist()
    assert [row["mask"] for row in alone["masks"]] == [masks.rle(k) for k in range(len(masks))]
    scores = [row["score"] for row in got["masks"]]  # of a batch of another shape
    np.testing.assert_allclose(scores, np.asarray(want.iou[0]), atol=1e-5)


def test_concurrent_requests_equal_decode(model):
  """Clients with images of their own; prompts of several images are in one batch."""
  phrases = ["cat", "dog", "a red car", "tree"]
  with served(model, max_batch=4) as client, ThreadPoolExecutor(8) as pool:
    images = list(pool.map(lambda seed: upload(client, seed), range(4)))
    jobs = [(seed, phrase) for seed in range(4) for phrase in phrases]
    found = list(
      pool.map(lambda job: prompt(client, images[job[0]], concepts=[{"phrase": job[1]}]), jobs)
    )
  for (seed, phrase), got in zip(jobs, found, strict=True):
    [want] = model.decode(model.encode(pixels(seed), visual=True), phrase).instances(THRESHOLD)
    rows = got["concepts"][0]["instances"]
    assert [row["score"] for row in rows] == want.scores.tolist()
    assert [row["mask"] for row in rows] == [want.masks.rle(i) for i in range(len(want))]


@pytest.mark.slow
def test_everything_equals_generate_masks(model, client):
  image = upload(client, 3)
  options = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
  response = client.post(f"/v1/images/{image}/everything", json=options)
  assert response.status_code == 200, response.text
  want = model.generate_masks(pixels(3), MaskGeneration(**options))
  rows = response.json()["instances"]
  assert [row["score"] for row in rows] == want.scores.tolist()
  assert [row["mask"] for row in rows] == [want.masks.rle(i) for i in range(len(want))]
  assert len(want)


def test_formats(client):
  image = upload(client, 4)
  asked = {"concepts": [{"phrase": "cat"}], "visual": [{"points": [[20, 20]]}]}
  by_format = {form: prompt(client, image, format=form, **asked) for form in ("rle", "none")}
  by_format["png"] = prompt(client, image, format="png", **asked)
  by_format["polygons"] = prompt(client, image, format="polygons", **asked)

  def rows(form):
    value = by_format[form]
    return value["concepts"][0]["instances"] + value["visual"][0]["masks"]

  for rle, coded, polygons, none in zip(
    *map(rows, ("rle", "png", "polygons", "none")), strict=True
  ):
    mask = decode(rle["mask"]).astype(bool)
    drawn = Image.open(io.BytesIO(base64.b64decode(coded["mask"])))
    assert drawn.mode == "1"
    np.testing.assert_array_equal(np.asarray(drawn), mask)
    want = [polygon.reshape(-1).tolist() for polygon in mask_to_polygons(mask)]
    assert polygons["mask"] == want
    assert rle["area"] == coded["area"] == polygons["area"] == mask.sum()
    assert rle["box"] == coded["box"] == polygons["box"]
    assert (none["area"], none["mask"]) == (-1, None)


@pytest.mark.parametrize("form", ["rle", "png", "polygons"])
def test_masks_with_too_many_pixels(client, monkeypatch, form):
  """Masks of large images would take minutes to write."""
  image = upload(client, 4)
  monkeypatch.setitem(settings.MAX_MASK_PIXELS, form, 5 * 40 * 60)
  asked = {"visual": [{"points": [[20, 20]]}] * 2, "format": form}
  response = client.post(f"/v1/images/{image}/prompts", json=asked)
  assert error_of(response) == (413, "too_many_pixels")
  message = response.json()["error"]["message"]
  assert message.startswith("6 masks of 60 x 40 pixels have 14,400 pixels")
  assert client.post(f"/v1/images/{image}/prompts", json=asked | {"format": "none"}).is_success
  grid = {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0, "format": form}
  monkeypatch.setitem(settings.MAX_MASK_PIXELS, form, 0)
  response = client.post(f"/v1/images/{image}/everything", json=grid)
  assert error_of(response) == (413, "too_many_pixels")


def test_limits_detections(client):
  image = upload(client, 4)
  every = prompt(client, image, concepts=[{"phrase": "cat"}])["concepts"][0]["instances"]
  two = prompt(client, image, concepts=[{"phrase": "cat"}], max_detections=2)
  assert two["concepts"][0]["instances"] == every[:2]


def test_image_of_another_orientation(client):
  image = Image.fromarray(pixels(0))
  exif = image.getexif()
  exif[0x0112] = 6  # rotate by 90 degrees
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", exif=exif)
  found = client.post("/v1/images", content=buffer.getvalue()).json()
  assert (found["width"], found["height"]) == (40, 60)
  got = client.get(f"/v1/images/{found['id']}").json()
  assert got == {"id": found["id"], "width": 40, "height": 60}


def test_delete(client):
  image = upload(client)
  assert client.delete(f"/v1/images/{image}").status_code == 204
  assert error_of(client.get(f"/v1/images/{image}")) == (404, "unknown_image")
  assert error_of(client.delete(f"/v1/images/{image}")) == (404, "unknown_image")


def test_sessions_do_not_share_images(client):
  first, second = ({"Cookie": f"sam3_session={letter * 43}"} for letter in "ab")
  image = upload(client, headers=first)
  assert client.get(f"/v1/images/{image}", headers=first).status_code == 200
  for headers in (second, {}, {"Cookie": "sam3_session=short"}):
    assert error_of(client.get(f"/v1/images/{image}", headers=headers)) == (404, "unknown_image")
    assert error_of(client.delete(f"/v1/images/{image}", headers=headers))[0] == 404
  shared = upload(client)  # without a session the id is the key
  assert client.get(f"/v1/images/{shared}", headers=second).status_code == 200


def test_ids_are_random(client):
  ids = {upload(client) for _ in range(3)}
  assert len(ids) == 3
  assert all(len(one) == 43 for one in ids)


def test_uploads_leave_no_files(client):
  client.post("/v1/images", content=b"not an image")
  assert list(client.app.state.service.store.uploads.iterdir()) == []


def test_metrics(client):
  image = upload(client)
  prompt(client, image, concepts=[{"phrase": "cat"}])
  text = client.get("/metrics").text
  assert 'sam3_requests_total{method="POST",route="/v1/images/{id}/prompts",status="200"}' in text
  for name in ("sam3_batch_size_bucket", "sam3_store_memory_bytes", "sam3_prompts_waiting 0.0"):
    assert name in text
  assert image not in text


def test_refuses_work_until_ready(model):
  with served(model) as client:
    client.app.state.service.engine._ready.clear()
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    response = client.post("/v1/images", content=png())
    assert error_of(response) == (503, "not_ready")
    assert response.headers["retry-after"]


def _compiled(model) -> tuple[int, ...]:
  encoders = (model.programs.encode, model.programs.encode_text, model.programs.encode_visual)
  sizes = [program._cache_size() for program in encoders]
  return model.compilations, model.visual_compilations, *sizes


@pytest.mark.slow
def test_common_requests_compile_nothing(monkeypatch):
  """Others do not either, once the server was idle for a while."""
  monkeypatch.setattr(warm_up, "IDLE", 0.05)
  model, steps = small_model.__wrapped__(), []
  app = create_app(model, Settings(readers=0), step=lambda *step: steps.append(step))
  with TestClient(app, base_url=BASE) as client:
    assert client.app.state.service.engine.wait_ready(300)
    assert [fraction for _, fraction in steps] == [0.0, 0.6, 1.0]
    client.app.state.service._compiler._thread.join(300)
    before = _compiled(model)
    image = upload(client)
    clicks = [[30, 20]] * 5
    mask = encode(np.ones((40, 60), bool))
    visual = [{"points": clicks[:1], "multimask": many} for many in (True, False)]
    visual += [{"points": clicks, "multimask": many} for many in (True, False)]
    visual += [{"points": clicks[:1], "mask": mask, "multimask": many} for many in (True, False)]
    visual += [{"points": clicks, "mask": mask, "multimask": False}]
    for one in visual:
      prompt(client, image, visual=[one])
    for concept in ({"phrase": "cat"}, {"phrase": "a", "boxes": [[1, 1, 9, 9]] * 9}):
      prompt(client, image, concepts=[concept])
    response = client.post(f"/v1/images/{image}/everything", json={"points_per_side": 4})
    assert response.status_code == 200
    assert _compiled(model) == before


def test_mask_logits_cover_the_mask():
  mask = np.zeros((300, 200), bool)
  mask[100:200, 50:100] = True
  logits = mask_logits(encode(mask), (300, 200), 24)
  assert (logits > 0).nonzero()[0].min() == 8
  np.testing.assert_array_equal(np.argwhere(logits > 0).max(axis=0), [15, 11])
  assert logits.min() == -10
  assert logits.max() == 10
