"""The page of a store: read as text, and opened in a browser, where its numbers, pictures and switches are tried."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from PIL import Image
from pyproj import CRS
from rasterio.transform import Affine
from rasters import noise, write
from stores import CLASSES, block_maps, expected, make_spec, make_store, value_spec

from tilepipe.pictures.colors import confidence_palette
from tilepipe.store.output import create_or_resume
from tilepipe.store.spec import LabelClass

NASTY = "<script>document.title='x'</script>\" onerror=\"alert(1)' & \u6c34"


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(source: str | None) -> Image.Image:
    kind, data = str(source).split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(the page, the store's arrays) of a map in Mercator's projection with raster, confidence and nasty names."""
    folder = tmp_path_factory.mktemp("page")
    place = Affine(10.0, 0.0, 1_000_000.0, 0.0, -10.0, 6_000_000.0)
    raster = write(folder / "<i>a&b.tif", noise((3, 50, 70)), photometric="rgb", crs="EPSG:3857", transform=place)
    spec = make_spec(
        confidence=True,
        classes=(*CLASSES, LabelClass(NASTY, (9, 9, 9))),
        crs_wkt=CRS.from_epsg(3857).to_wkt(),
        transform=tuple(place)[:6],
        settings={
            "raster": raster.name,
            "models": [{"source": "/secret/net<b>.safetensors", "card": {"licence": "MIT"}}],
        },
        fingerprint={"raster": [{"path": str(raster)}]},
    )
    whole = make_store(folder / "south <x>.zarr", spec)
    result = run("preview", folder / "south <x>.zarr", folder / "page.html", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == ["image", "labels", "confidence"]
    return folder / "page.html", whole


def test_the_page_needs_nothing_and_keeps_names_as_text(made: tuple[Path, dict[str, Any]]) -> None:
    text = made[0].read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "form", "base", "i", "b"} <= {"link"}
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|/secret", re.sub(r";base64,[^\"]*", "", text))
    assert str(made[0].parent) not in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; img-src data:")
    assert NASTY in "".join(page.texts)
    assert "south <x>" in page.texts
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
    for image in page.all("img"):
        assert image["alt"]
        assert "onerror" not in image


def test_the_pictures_are_the_map(made: tuple[Path, dict[str, Any]]) -> None:
    page, whole = Page(made[0].read_text(encoding="utf-8")), made[1]
    images = page.all("img")
    masks = {int(str(each["data-class"])): picture(each["src"]) for each in images if "data-class" in each}
    assert masks.keys() == set(range(4))
    colors = [*(item.color for item in CLASSES), (9, 9, 9)]
    for number, mask in masks.items():
        pixels = np.asarray(mask.convert("RGBA"))
        np.testing.assert_array_equal(pixels[..., 3] == 255, whole["labels"] == number)
        assert (pixels[whole["labels"] == number][:, :3] == colors[number]).all()
    raster, confidence = picture(images[0]["src"]), picture(images[-1]["src"])
    assert (raster.format, raster.size) == ("JPEG", (70, 50))
    shown = np.asarray(confidence.convert("RGBA"))
    np.testing.assert_array_equal(shown[..., 3] == 0, whole["confidence"] == 255)
    known = whole["confidence"] != 255
    np.testing.assert_array_equal(shown[known][:, :3], confidence_palette()[whole["confidence"][known]])


def test_pages_of_values_of_many_classes_and_of_parts(tmp_path: Path) -> None:
    many = make_spec(classes=[LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)])
    make_store(tmp_path / "many.zarr", many)
    values = value_spec(outputs=(NASTY, "slope"))
    whole = expected(values)
    with create_or_resume(tmp_path / "values.zarr", values) as store:
        store.write_block((0, 0), block_maps(values, whole, (0, 0)), {})
    found = {}
    for name, words in (("many", ["--window", "0:20,0:30"]), ("values", [])):
        result = run("preview", tmp_path / f"{name}.zarr", tmp_path / f"{name}.html", *words)
        assert result.exit_code == 0, result.output
        found[name] = Page((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
    (image,) = found["many"].all("img")
    assert picture(image["src"]).size == (30, 20)
    assert "rows 0:20, columns 0:30" in "".join(found["many"].texts)
    assert not [box for box in found["many"].all("input") if box["type"] == "checkbox"]
    assert "1 of 6 blocks are done; the others are shown as no data." in found["values"].texts
    assert NASTY in found["values"].texts
    part = whole["values"][0, :32, :32]
    exact = [float(str(each["value"])) for each in found["values"].all("data")]
    assert exact[0] == np.isfinite(part).sum()
    np.testing.assert_allclose(exact[1:4], [np.nanmin(part), np.nanmean(part), np.nanmax(part)], rtol=1e-6)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("install Chromium (apt-get install chromium) to open pages in a browser")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser: Any, path: Path, **context: Any) -> tuple[Any, list[str]]:
    """The page in a browser, and all that its console says and that it asks the network for."""
    page, said = browser.new_context(viewport={"width": 900, "height": 1000}, **context).new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    return page, said


def visible(page: Any) -> dict[str, bool]:
    return {name: page.locator(f".overlay.{name}").is_visible() for name in ("labels", "confidence")}


def test_a_browser_shows_what_stats_says(browser: Any, made: tuple[Path, dict[str, Any]]) -> None:
    path, _ = made
    page, said = opened(browser, path)
    wanted = json.loads(run("stats", path.parent / "south <x>.zarr", "--json").stdout)
    rows = page.locator("tbody tr")
    assert rows.count() == len(wanted["classes"]) == 4
    for number, each in enumerate(wanted["classes"]):
        row = rows.nth(number)
        assert row.locator("th").inner_text() == each["name"]
        exact = [float(value) for value in row.locator("data").evaluate_all("all => all.map(each => each.value)")]
        assert exact == [each["pixels"], each["share"], each["area_m2"], each["area_m2"] / 1e4, each["confidence"]]
        shown = row.locator("data").all_inner_texts()
        assert shown[0] == f"{each['pixels']:,}"
        assert float(shown[3].replace(",", "")) == pytest.approx(each["area_m2"] / 1e4, abs=0.005)
    foot = page.locator("tfoot tr").first.locator("data").evaluate_all("all => all.map(each => each.value)")
    assert [float(value) for value in foot[:2]] == [wanted["pixels"], wanted["area_m2"]]
    sizes = page.locator("img").evaluate_all("all => all.map(each => [each.naturalWidth, each.naturalHeight])")
    assert sizes == [[70, 50]] * 6
    assert page.title() == "south <x>"
    assert said == [path.as_uri()]


def test_layers_classes_and_opacity_can_be_switched(browser: Any, made: tuple[Path, dict[str, Any]]) -> None:
    page, said = opened(browser, made[0], color_scheme="dark")
    assert visible(page) == {"labels": True, "confidence": False}
    page.get_by_label("Confidence", exact=True).focus()
    page.keyboard.press("Space")
    assert visible(page) == {"labels": False, "confidence": True}
    assert page.locator(".keys.confidence").is_visible()
    page.locator("label", has_text="Image").click()
    assert visible(page) == {"labels": False, "confidence": False}
    page.locator("label", has_text="Labels").click()
    page.locator("#opacity").fill("25")
    assert page.locator(".overlay.labels").evaluate("each => getComputedStyle(each).opacity") == "0.25"
    water = page.locator('img[data-class="1"]')
    page.get_by_label("water").uncheck()
    assert not water.is_visible()
    page.get_by_label("water").check()
    assert water.is_visible()
    assert len(said) == 1


def scale_of(page: Any) -> float:
    """Metres that the bar says, over those that it covers."""
    bar = page.locator(".scale")
    number, unit = bar.inner_text().split()
    said = float(number) * {"km": 1000, "m": 1}[unit]
    zoom = page.locator(".layers").evaluate("each => each.getBoundingClientRect().width")
    return said / (
        bar.locator("span").evaluate("each => each.clientWidth + 4") / zoom * float(bar.get_attribute("data-across"))
    )


def test_the_map_zooms_and_moves(browser: Any, made: tuple[Path, dict[str, Any]]) -> None:
    page, said = opened(browser, made[0])
    box = page.locator(".map").bounding_box()

    def layers() -> dict[str, float]:
        return page.locator(".layers").bounding_box()

    assert scale_of(page) == pytest.approx(1, rel=0.05)
    whole = layers()
    x, y = box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5
    page.mouse.dblclick(x, y)
    assert layers()["width"] == pytest.approx(2 * whole["width"])
    # The point that was clicked stays where it is.
    assert (x - layers()["x"]) / layers()["width"] == pytest.approx((x - whole["x"]) / whole["width"], abs=0.01)
    assert scale_of(page) == pytest.approx(1, rel=0.05)
    before = layers()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 40, y - 30)
    page.mouse.up()
    assert (layers()["x"] - before["x"], layers()["y"] - before["y"]) == pytest.approx((-40, -30), abs=0.5)
    for key in ("ArrowLeft", "+", "-", "ArrowUp"):
        page.locator(".map").press(key)
    assert layers()["x"] <= box["x"] + 2
    page.get_by_role("button", name="Zoom out").click()
    page.get_by_role("button", name="All").click()
    assert layers() == whole
    # The wheel alone moves the page.
    page.mouse.wheel(0, 100)
    for _ in range(250):
        if page.evaluate("scrollY"):
            break
        page.wait_for_timeout(20)
    assert page.evaluate("scrollY") > 0
    assert layers()["width"] == whole["width"]
    assert len(said) == 1


def test_without_scripts_layers_switch_and_the_table_is_there(browser: Any, made: tuple[Path, dict[str, Any]]) -> None:
    page, _ = opened(browser, made[0], java_script_enabled=False)
    page.locator("label", has_text="Confidence").click()
    assert visible(page) == {"labels": False, "confidence": True}
    assert page.locator("tbody tr").count() == 4
    assert not page.locator(".zoom, .slider, .hint, .keys input").filter(visible=True).count()
    tree = page.locator("body").aria_snapshot()
    assert 'columnheader "Pixels"' in tree
    assert 'rowheader "water"' in tree
    assert 'img "Where water is"' in tree or 'radio "Labels"' in tree
