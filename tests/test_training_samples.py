"""Manifests and folders: which image goes with which labels, and every way to get that wrong."""

from __future__ import annotations

import numpy as np
import pytest
from rasters import real_data, write

from tilepipe.errors import InputError, UsageError
from tilepipe.training.samples import DataSet, Sample, pair_folders, read_manifest


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def folder(tmp_path):
    touch(tmp_path / "images", "a.tif", "b.tif", "c.tif")
    touch(tmp_path / "labels", "a.png", "b.png", "c.png")
    return tmp_path


def test_a_csv_manifest(folder):
    manifest = folder / "data.csv"
    manifest.write_text(
        "Image, label ,split,note\nimages/a.tif, labels/a.png,train,x\n\n"
        f"{folder}/images/b.tif,images/../labels/b.png,validation\nimages/c.tif,labels/c.png,\n",
        encoding="utf-8-sig",
    )
    found = read_manifest(manifest)
    assert found.samples == tuple(
        Sample(str(folder / "images" / f"{name}.tif"), str(folder / "labels" / f"{name}.png"), split)
        for name, split in (("a", "train"), ("b", "validation"), ("c", "train"))
    )
    assert (found.classes, found.void) == (None, ())
    assert [sample.image for sample in found.of("validation")] == [str(folder / "images" / "b.tif")]


def test_a_csv_without_split_is_all_for_training(folder):
    (folder / "data.csv").write_text("label,image\nlabels/a.png,images/a.tif\n")
    assert [sample.split for sample in read_manifest(folder / "data.csv").samples] == ["train"]


TOML = """
classes = ["background", "building"]
colors = ["#000000", "#ff8001"]
void = 255
[[sample]]
image = "images/a.tif"
label = "labels/a.png"
[[sample]]
image = "images/b.tif"
label = "labels/b.png"
split = "test"
"""


def test_a_toml_manifest(folder):
    (folder / "data.toml").write_text(TOML)
    found = read_manifest(str(folder / "data.toml"))
    assert [(each.name, each.color) for each in found.classes] == [
        ("background", (0, 0, 0)),
        ("building", (255, 128, 1)),
    ]
    assert found.void == (255,)
    assert [sample.split for sample in found.samples] == ["train", "test"]
    (folder / "data.toml").write_text(TOML.replace("255", "[11, 255]").replace("colors", "#"))
    found = read_manifest(folder / "data.toml")
    assert found.void == (11, 255)
    assert len({each.color for each in found.classes}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,label\na,b\n", r"data\.csv: lacks the column image; its first line is to name image, label"),
        ("", "lacks the column image and label"),
        ("image,label,split\nimages/a.tif,labels/a.png,val\n", "sample 1 has the split 'val'; legal are train, valid"),
        ("image,label\nimages/a.tif,\n", "sample 1 has no label"),
        ("image,label\n", "no training sample"),
        ("image,label,split\nimages/a.tif,labels/a.png,test\n", "no training sample; give one with the split train"),
        ("image,label\nimages/x.tif,labels/a.png\n", r"names \S*images/x\.tif, which is not there"),
        (
            "image,label,split\nimages/a.tif,labels/a.png,train\nimages/a.tif,labels/a.png,validation\n",
            r"images/a\.tif is for train and validation both",
        ),
    ],
)
def test_a_csv_that_is_wrong(folder, text, message):
    (folder / "data.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(folder / "data.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[sample]]", "[sample"), "is not legal TOML"),
        (("classes", "classses"), "the manifest does not know classses; legal are classes, colors, void, sample"),
        (("split", "role"), "a sample does not know role; legal are image, label, split"),
        (('"background", "building"', '"a", "a"'), "list each name once"),
        (('"background", "building"', '"a", "b", "c"'), "2 colors are given for 3 classes"),
        (("#ff8001", "red"), "give #rrggbb for each class"),
        (('["background", "building"]', "2"), "classes 2 are not legal"),
        (("void = 255", 'void = "sky"'), "void 'sky' is not legal; give a label value"),
        (('classes = ["background", "building"]', ""), "colors are given without classes"),
        (("[[sample]]", "[[other]]"), "does not know other"),
    ],
)
def test_a_toml_that_is_wrong(folder, change, message):
    (folder / "data.toml").write_text(TOML.replace(*change))
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(folder / "data.toml")
    assert str(caught.value).startswith(str(folder / "data.toml"))
    assert "\n" not in str(caught.value)


def test_a_manifest_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv cannot be read as a manifest"):
        read_manifest(tmp_path / "none.csv")


def test_many_missing_files_are_counted(folder):
    rows = "".join(f"images/x{number}.tif,labels/a.png\n" for number in range(7))
    (folder / "data.csv").write_text(f"image,label\n{rows}")
    with pytest.raises(InputError, match=r"x3\.tif and 3 more, which are not there"):
        read_manifest(folder / "data.csv")


def stems(found: DataSet):
    from pathlib import Path

    return {(Path(sample.image).name, Path(sample.label).name) for sample in found.samples}


def test_folders_pair_by_equal_names(folder):
    touch(folder / "images", "a.tif.aux.xml", ".hidden.tif", "readme.txt")
    found = pair_folders(folder / "images", folder / "labels", 0.3, 0, void=(255,))
    assert stems(found) == {(f"{name}.tif", f"{name}.png") for name in "abc"}
    assert found.void == (255,)
    assert len(found.of("validation")) == 1


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["area1_1_rgb", "area2_0_rgb"], ["area1_1_label", "area2_0_label"]),
        (["area1_1_rgb", "area2_1_rgb"], ["area1_1_label", "area2_1_label"]),
        (["tile-10.image", "tile-20.image"], ["tile-10", "tile-20"]),
        (["ax", "bx"], ["ay", "by"]),
    ],
)
def test_folders_pair_once_common_endings_are_cut(tmp_path, images, labels):
    touch(tmp_path / "i", *(f"{name}.tif" for name in images))
    touch(tmp_path / "l", *(f"{name}.png" for name in labels))
    found = pair_folders(tmp_path / "i", tmp_path / "l", 0.5, 0)
    assert stems(found) == {(f"{one}.tif", f"{other}.png") for one, other in zip(images, labels, strict=True)}


def test_patterns_tell_images_and_labels_of_one_folder_apart(tmp_path):
    touch(tmp_path, *(f"area{n}_{kind}.tif" for n in (1, 2, 3) for kind in ("rgb", "label")))
    found = pair_folders(tmp_path / "*_rgb.tif", f"{tmp_path}/*_label.tif", 0.5, 3)
    assert stems(found) == {(f"area{n}_rgb.tif", f"area{n}_label.tif") for n in (1, 2, 3)}
    with pytest.raises(UsageError, match=r"images and labels are both .*tell them apart by patterns"):
        pair_folders(tmp_path, tmp_path, 0.5, 3)


def test_files_without_a_partner_are_named(folder):
    touch(folder / "images", "d.tif")
    (folder / "labels" / "c.png").unlink()
    with pytest.raises(InputError, match=r"no partner is there for \S*c\.tif, \S*d\.tif; name those"):
        pair_folders(folder / "images", folder / "labels", 0.5, 0)
    touch(folder / "one", "a_1_label.png")
    touch(folder / "two", "a_1_rgb.tif", "b_2_rgb.tif")
    with pytest.raises(InputError, match=r"no partner is there for \S*/b_2_rgb\.tif;"):
        pair_folders(folder / "two", folder / "one", 0.5, 0)


def test_folders_that_cannot_be_paired(folder):
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(UsageError, match="validation share"):
            pair_folders(folder / "images", folder / "labels", share, 0)
    with pytest.raises(InputError, match=r"empty holds no image; known are \.tif"):
        pair_folders(touch(folder / "empty"), folder / "labels", 0.5, 0)
    with pytest.raises(InputError, match=r"nothing is no folder, and matches no file"):
        pair_folders(folder / "nothing", folder / "labels", 0.5, 0)
    with pytest.raises(InputError, match=r"a\.tif is the only sample .* or a manifest"):
        pair_folders(folder / "images" / "a.*", folder / "labels" / "a.*", 0.5, 0)
    with pytest.raises(InputError, match="files of equal name"):
        pair_folders(touch(folder / "images", "a.png"), folder / "labels", 0.5, 0)


@pytest.mark.parametrize(("count", "share", "expected"), [(2, 0.99, 1), (10, 0.01, 1), (10, 0.3, 3), (10, 0.96, 9)])
def test_the_seed_decides_what_validates(tmp_path, count, share, expected):
    names = [f"{number:02}.tif" for number in range(count)]
    places = touch(tmp_path / "i", *names), touch(tmp_path / "l", *names)
    drawn = [pair_folders(*places, share, seed) for seed in range(20)]
    assert {len(found.of("validation")) for found in drawn} == {expected}
    assert pair_folders(*places, share, 3) == drawn[3]
    assert {sample for found in drawn for sample in found.of("validation")} >= set(drawn[0].of("validation"))
    shown = {sample.image for found in drawn for sample in found.of("validation")}
    assert len(shown) > expected


def test_real_folders_pair():
    camvid = real_data("camvid")
    found = pair_folders(camvid / "train", camvid / "trainannot", 0.1, 0)
    assert len(found.samples) == 367
    buildings = real_data("buildings")
    found = pair_folders(buildings / "*_rgb.tif", buildings / "*_label.tif", 0.1, 0)
    assert len(found.samples) == 6
    assert all(sample.image.replace("_rgb", "_label") == sample.label for sample in found.samples)


def test_a_zarr_store_in_a_folder_is_an_image(tmp_path):
    import zarr

    for name in "ab":
        zarr.open_array(str(touch(tmp_path / "i") / f"{name}.zarr"), mode="w", shape=(3, 4, 5), dtype="u1")
        write(touch(tmp_path / "l") / f"{name}.tif", np.zeros((1, 4, 5), np.uint8))
    assert stems(pair_folders(tmp_path / "i", tmp_path / "l", 0.5, 0)) == {("a.zarr", "a.tif"), ("b.zarr", "b.tif")}
