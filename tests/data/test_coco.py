"""Protects the reading of pictures with objects: usual layouts are found, masks are exact, every fault has a name."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fa_transformers.data.readers.coco import find_coco_files, load_coco_files, load_coco_folder
from fa_transformers.data.readers.object_rows import encode_objects
from fa_transformers.data.readers.objects import ObjectOptions
from fa_transformers.data.readers.tables import DataError
from fa_transformers.models.fa_rle import encode_mask, run_lengths

WIDTH, HEIGHT = 40, 30
BLOCK = np.zeros((HEIGHT, WIDTH), dtype=bool)
BLOCK[5:15, 4:24] = True
RLE = encode_mask(BLOCK)
POLYGON = [[4, 5, 24, 5, 24, 15, 4, 15]]
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": run_lengths(RLE).tolist()}


def annotation(number: int, image: int, **fields: Any) -> dict:
    segmentation = [RLE, POLYGON, UNCOMPRESSED][number % 3]
    row = {"id": number, "image_id": image, "category_id": [3, 90][number % 2], "iscrowd": 0}
    row |= {"bbox": [4, 5, 20, 10], "area": 200.0, "segmentation": segmentation}
    return {name: value for name, value in (row | fields).items() if value is not ...}


def content(num_images: int = 12) -> dict:
    """A COCO file: two objects on each picture, ids of objects from 0, ids of categories with gaps, out of order."""
    return {
        "images": [
            {"id": index + 100, "file_name": f"{index:03}.png", "width": WIDTH, "height": HEIGHT}
            for index in range(num_images)
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 17, "name": "bird"}],
        "annotations": [annotation(number, 100 + number // 2) for number in range(2 * num_images)],
    }


def write(file: Path, pictures: Path, coco: dict) -> Path:
    for path in (file.parent, pictures):
        path.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco))
    for image in coco["images"]:
        Image.new("RGB", (WIDTH, HEIGHT), "olive").save(pictures / image["file_name"])
    return file


def read(tmp_path: Path, coco: dict, **options: Any):
    write(tmp_path / "annotations.json", tmp_path / "images", coco)
    return load_coco_folder(tmp_path, ObjectOptions(**options))


def test_boxes_and_all_three_kinds_of_masks_are_read(tmp_path):
    data = read(tmp_path, content())
    assert data.class_names == ["cat", "bird", "dog"] and data.has_masks
    assert {split: len(images) for split, images in data.splits.items()} == {"train": 10, "validation": 1, "test": 1}
    assert not any(data.num_dropped.values())
    for image in data.splits["train"]:
        assert image.size == (HEIGHT, WIDTH) and image.open().mode == "RGB"
        assert sorted(image.labels) == [0, 2] and image.areas.tolist() == [200, 200] and not image.is_crowd.any()
        assert np.array_equal(image.masks(), np.stack([BLOCK, BLOCK]))
        assert image.boxes.tolist() == image.mask_boxes.tolist() == [[4, 5, 24, 15]] * 2
        assert all(rle == RLE for rle in image.rles), "every kind is kept compressed"
    ids = {image.image_id for images in data.splits.values() for image in images}
    assert ids == set(range(100, 112)), "no picture is in two splits or in none"


@pytest.mark.parametrize(
    ("file", "pictures"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}/annotations.json", "{}/images"),
        ("{}.json", "{}"),
    ],
)
@pytest.mark.parametrize("validation", ["val", "valid"])
def test_the_usual_layouts_are_found(tmp_path, file, pictures, validation):
    for count, name in ((3, "train"), (2, validation), (1, "test")):
        write(tmp_path / file.format(name), tmp_path / pictures.format(name), content(count))
    write(tmp_path / "annotations" / "captions_train2017.json", tmp_path / "x", {"images": []})
    data = load_coco_folder(tmp_path)
    assert {split: len(images) for split, images in data.splits.items()} == {"train": 3, "validation": 2, "test": 1}
    for split, name in (("train", "train"), ("validation", validation), ("test", "test")):
        parents = {str(image.picture.parent.relative_to(tmp_path)) for image in data.splits[split]}
        assert parents == {pictures.format(name)}


def test_folders_without_one_file_for_each_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_coco_folder(tmp_path / "missing")
    with pytest.raises(DataError, match="no COCO file of train"):
        load_coco_folder(tmp_path)
    for name in ("a_train.json", "b_train.json"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"a_train.json.*b_train.json.* are all for train"):
        find_coco_files(tmp_path)


def test_without_masks_there_are_boxes(tmp_path):
    coco = content()
    for row in coco["annotations"]:
        del row["segmentation"]
    data = read(tmp_path, coco)
    assert not data.has_masks
    image = data.splits["train"][0]
    assert image.rles is None and image.boxes.tolist() == image.mask_boxes.tolist() == [[4, 5, 24, 15]] * 2


@pytest.mark.parametrize(
    ("fields", "areas"),
    [
        ({"area": ...}, [200, 200]),
        ({"area": 0}, [200, 200]),
        ({"area": ..., "bbox": [4, 5, 20, 11]}, [200, 200]),
        ({"bbox": ...}, [200, 200]),
        ({"id": ...}, [200, 200]),
        ({"iscrowd": ...}, [200, 200]),
        ({"bbox": [4.4, 5.3, 19.1, 9.2], "area": 175.72}, [200, 175.72]),
    ],
)
def test_what_can_be_had_from_the_mask_may_be_missing(tmp_path, fields, areas):
    coco = content()
    coco["annotations"][1] = annotation(1, 100, **fields)
    image = next(i for part in read(tmp_path, coco).splits.values() for i in part if i.image_id == 100)
    assert image.areas.tolist() == areas
    assert np.array_equal(image.mask_boxes, [[4, 5, 24, 15]] * 2)


WIDE = {"size": [WIDTH, HEIGHT], "counts": RLE["counts"]}
FAULTS = {
    "outside": ({"bbox": [30, 5, 20, 10]}, "bbox .* is not inside the image of 40 x 30"),
    "negative": ({"bbox": [-3, 5, 20, 10]}, "is not inside the image"),
    "no width": ({"bbox": [4, 5, 0, 10]}, "bbox .* is empty"),
    "three": ({"bbox": [4, 5, 20]}, "four finite numbers"),
    "nan": ({"bbox": [4, 5, float("nan"), 10]}, "four finite numbers"),
    "text": ({"bbox": "4 5 20 10"}, "four finite numbers"),
    "corners": ({"bbox": [4, 5, 36, 25]}, "bbox .* and mask overlap by 0.22"),
    "no mask": ({"segmentation": ...}, "there is no mask"),
    "no polygons": ({"segmentation": []}, "there is no mask"),
    "flat": ({"segmentation": POLYGON[0]}, "put it into a list"),
    "four numbers": ({"segmentation": [[4, 5, 24, 15]]}, "got 4 numbers.*give it as 'bbox'"),
    "odd": ({"segmentation": [[4, 5, 24, 15, 3, 2, 1]]}, "got 7 numbers"),
    "not finite": ({"segmentation": [[4, 5, 24, 15, 3, float("inf")]]}, "finite numbers"),
    "polygon outside": ({"segmentation": [[50, 5, 60, 5, 60, 9]]}, "the mask is empty"),
    "empty mask": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}, "the mask is empty"),
    "another size": ({"segmentation": WIDE}, "the mask has 30 x 40 pixels, and the image 40 x 30"),
    "does not add up": ({"segmentation": UNCOMPRESSED | {"counts": [5, 9]}}, "sum to 14, and 30 x 40"),
    "does not decode": ({"segmentation": RLE | {"counts": "~~"}}, "character '~'"),
    "no size": ({"segmentation": {"counts": [5]}}, "needs a 'size'"),
    "crowd": ({"iscrowd": 2}, "iscrowd must be 0 or 1"),
    "area": ({"area": -3}, "area must be a number"),
    "category": ({"category_id": 4}, "category_id 4 is none of the categories, 3, 17, 90"),
    "no category": ({"category_id": ...}, "category_id None is none"),
    "image": ({"image_id": 7}, "its image_id 7 is none of the images"),
    "no image": ({"image_id": ...}, "entry 2 of annotations: it needs the image_id"),
}


@pytest.mark.parametrize(("fields", "complaint"), FAULTS.values(), ids=FAULTS)
def test_a_bad_object_is_named_or_left_out_and_counted(tmp_path, caplog, fields, complaint):
    coco = content(4)
    coco["annotations"][1] = annotation(1, 100, **fields)
    with pytest.raises(DataError, match=complaint) as error:
        read(tmp_path, coco)
    assert "annotations.json: 1 object or picture can't be used" in str(error.value)
    assert "annotation 1" in str(error.value) or "entry 2" in str(error.value)
    data = read(tmp_path, coco, drop_bad=True)
    assert data.num_dropped == {"train": 1}
    kept = {image.image_id: len(image.labels) for images in data.splits.values() for image in images}
    assert kept == {100: 1, 101: 2, 102: 2, 103: 2}
    assert "left out 1 bad object or picture:" in caplog.text


def test_ids_of_objects_may_repeat_but_no_object(tmp_path, caplog):
    coco = content(4)
    coco["annotations"][1]["id"] = 0
    read(tmp_path, coco)
    assert "1 annotation has the id of another one" in caplog.text
    coco["annotations"].append(copy.deepcopy(coco["annotations"][3]))
    with pytest.raises(DataError, match="image 101, annotation 3: it is there twice"):
        read(tmp_path, coco)


def test_all_faults_are_named_at_once_twenty_of_them(tmp_path):
    coco = content(15)
    for row in coco["annotations"]:
        row["bbox"] = [0, 0, 0, 0]
    with pytest.raises(DataError, match="30 objects or pictures can't be used") as error:
        read(tmp_path, coco)
    assert str(error.value).count("is empty") == 20 and "and 10 more" in str(error.value)


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:300])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_size(path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT + 1)).save(path)


def damage_float(path: Path) -> None:
    Image.new("F", (WIDTH, HEIGHT)).save(path, "TIFF")


def damage_upside_down(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)


PICTURES = {
    damage_missing: "no such file",
    damage_cut: "broken or truncated",
    damage_empty: "the file is empty",
    damage_size: "has 40 x 31 pixels, and the annotations say 40 x 30",
    damage_float: "floating-point pixels",
    damage_upside_down: "EXIF orientation 3.*save it upright",
}


@pytest.mark.parametrize(("damage", "complaint"), PICTURES.items(), ids=[each.__name__ for each in PICTURES])
def test_a_bad_picture_is_named_or_left_out_and_counted(tmp_path, damage, complaint):
    file = write(tmp_path / "a.json", tmp_path / "images", content(4))
    damage(tmp_path / "images" / "001.png")
    with pytest.raises(DataError, match=complaint) as error:
        load_coco_files({"train": file})
    assert "image 101 (001.png)" in str(error.value)
    data = load_coco_files({"train": file}, options=ObjectOptions(drop_bad=True))
    assert data.num_dropped == {"train": 1}
    assert {image.image_id for images in data.splits.values() for image in images} == {100, 102, 103}


@pytest.mark.parametrize("stored_is_meant", [True, False])
def test_a_turned_picture_lies_as_its_objects_do(tmp_path, stored_is_meant):
    """The annotations' width and height tell which pixels are meant: those that viewers show, or the stored ones."""
    coco = content(4)
    file = write(tmp_path / "a.json", tmp_path, coco)
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[BLOCK] = 255
    exif = Image.Exif()
    exif[274] = 6
    stored = pixels if stored_is_meant else np.rot90(pixels)  # 6 is shown turned by 90 degrees clockwise
    Image.fromarray(stored).save(tmp_path / "000.png", exif=exif)
    data = load_coco_files({"train": file})
    image = next(i for images in data.splits.values() for i in images if i.image_id == 100)
    assert np.array_equal(np.asarray(image.open())[..., 0] > 0, image.masks()[0])


def test_pictures_of_16_bits_are_scaled(tmp_path):
    file = write(tmp_path / "a.json", tmp_path, content(4))
    Image.fromarray(np.full((HEIGHT, WIDTH), 65535, dtype=np.uint16)).save(tmp_path / "000.png")
    data = load_coco_files({"train": file})
    image = next(i for images in data.splits.values() for i in images if i.image_id == 100)
    assert np.asarray(image.open()).min() == 255


def test_an_image_id_that_is_there_twice_is_named(tmp_path):
    coco = content(4)
    coco["images"][2]["id"] = 100
    coco["annotations"] = coco["annotations"][:4] + coco["annotations"][6:]
    with pytest.raises(DataError, match=r"image 100 \(002.png\): its id is there twice"):
        read(tmp_path, coco)


def test_a_later_split_has_ids_of_its_own_and_no_class_of_its_own(tmp_path):
    train = write(tmp_path / "train.json", tmp_path / "train", content(4))
    other = content(2)
    other["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "fish"}]
    for row in other["annotations"]:
        row["category_id"] = 1
    validation = write(tmp_path / "val.json", tmp_path / "val", other)
    data = load_coco_files({"train": train, "validation": validation})
    assert {int(label) for image in data.splits["validation"] for label in image.labels} == {2}
    other["annotations"][0]["category_id"] = 2
    write(validation, tmp_path / "val", other)
    with pytest.raises(DataError, match="the category 'fish' is not among those of train"):
        load_coco_files({"train": train, "validation": validation})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object with the lists 'images', 'annotations', 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "there are no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "there are no pictures"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "entry 1 of categories needs"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "has the id or name of another",
        ),
    ],
)
def test_what_is_no_coco_file_is_named(tmp_path, text, complaint):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=complaint) as error:
        load_coco_files({"train": tmp_path / "a.json"})
    assert "a.json" in str(error.value)


def test_the_options_on_masks(tmp_path):
    coco = content(4)
    coco["annotations"][0]["segmentation"] = "broken"
    assert not read(tmp_path, coco, masks=False).has_masks
    for row in coco["annotations"]:
        row["segmentation"] = []
    assert not read(tmp_path, coco).has_masks
    with pytest.raises(DataError, match="there is no mask"):
        read(tmp_path, coco, masks=True)


FIELDS = {
    "bbox": datasets.Sequence(datasets.Value("float32"), length=4),
    "category": datasets.ClassLabel(names=["cat", "dog"]),
}


@pytest.mark.parametrize("objects", [datasets.Sequence(FIELDS), datasets.List(FIELDS)], ids=["lists", "objects"])
def test_a_loaded_data_set_is_read_like_a_file(objects):
    rows = {"bbox": [[4, 5, 20, 10], [0, 0, 3, 3]], "category": [1, 0]}
    each = (
        rows if isinstance(objects, dict) else [{"bbox": b, "category": c} for b, c in zip(*rows.values(), strict=True)]
    )
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    picture = np.full((HEIGHT, WIDTH, 3), 7, dtype=np.uint8)
    part = datasets.Dataset.from_dict({"image": [picture] * 5, "objects": [each] * 5}, features=features)
    data = encode_objects(datasets.DatasetDict({"train": part}))
    assert data.class_names == ["cat", "dog"] and {split: len(x) for split, x in data.splits.items()} == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }
    image = data.splits["train"][0]
    assert image.labels.tolist() == [1, 0] and image.boxes.tolist() == [[4, 5, 24, 15], [0, 0, 3, 3]]
    assert image.areas.tolist() == [200, 9] and np.asarray(image.open()).mean() == 7


def test_faults_of_a_loaded_data_set_are_named():
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(picture)] * 3, "objects": [{"bbox": [[4, 5, 50, 10]], "category_id": [0]}] * 3}
    part = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    with pytest.raises(DataError, match="split 'train': 3 objects.*\n.*row 1, object 1: bbox"):
        encode_objects(datasets.DatasetDict({"train": part}))
    for column in ("image", "objects"):
        with pytest.raises(DataError, match=f"no column '{column}'"):
            encode_objects(datasets.DatasetDict({"train": part.remove_columns(column)}))
    with pytest.raises(DataError, match="no split 'train'"):
        encode_objects(datasets.DatasetDict({"all": part}))
