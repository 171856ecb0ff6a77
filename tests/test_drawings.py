"""Protects drawn objects: lines and colours lie on the objects and nowhere else, and the image stays as it was."""

import numpy as np
import pytest
from PIL import Image

from fa_transformers.drawings import class_colour, draw_objects, draw_sheet

IMAGE = Image.new("RGB", (80, 60), (10, 20, 30))
BOXES = np.array([[20, 25, 40, 45], [50, 30, 70, 55]])
MASKS = np.zeros((2, 60, 80), dtype=bool)
MASKS[0, 25:45, 20:40], MASKS[1, 30:55, 50:70] = True, True


def test_masks_tint_and_boxes_outline_their_own_pixels(tmp_path):
    before = IMAGE.tobytes()
    drawn = draw_objects(IMAGE, BOXES, [0, 1], ["", ""], tmp_path / "new" / "objects.png", masks=MASKS)
    assert IMAGE.tobytes() == before
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "objects.png")), np.asarray(drawn))
    pixels = np.asarray(drawn)
    for label, (left, top, right, bottom) in enumerate(BOXES):
        colour = np.array(class_colour(label))
        for corner in ((top, left), (top, right - 1), (bottom - 1, left), (bottom - 1, right - 1)):
            assert (pixels[corner] == colour).all()
        inside = pixels[top + 1 : bottom - 1, left + 1 : right - 1]
        assert np.abs(inside - (0.45 * colour + 0.55 * np.array((10, 20, 30)))).max() <= 1
    below = pixels[25:]
    assert (below[~MASKS[:, 25:].any(axis=0)] == (10, 20, 30)).all(), "nothing lies beside the objects"


def test_names_and_scores_are_written_and_colours_differ():
    without = draw_objects(IMAGE, BOXES, [0, 1], ["", ""])
    named = draw_objects(IMAGE, BOXES, [0, 1], ["cat", "dog"])
    scored = draw_objects(IMAGE, BOXES, [0, 1], ["cat", "dog"], scores=[0.25, 1.0])
    assert len({without.tobytes(), named.tobytes(), scored.tobytes()}) == 3
    colours = [class_colour(label) for label in range(12)]
    assert min(np.abs(np.subtract(a, b)).max() for i, a in enumerate(colours) for b in colours[:i]) > 20


def test_no_objects_leave_the_image_as_it_is():
    assert draw_objects(IMAGE, np.zeros((0, 4)), [], [], masks=np.zeros((0, 60, 80), bool)).tobytes() == IMAGE.tobytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"labels": [0]}, "of one length"),
        ({"scores": [0.5]}, "of one length"),
        ({"masks": MASKS[:, :, :50]}, "pixels, and the image"),
    ],
)
def test_what_does_not_belong_together_is_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        draw_objects(IMAGE, **({"boxes": BOXES, "labels": [0, 1], "names": ["a", "b"]} | arguments))


def test_a_sheet_has_its_images_in_rows(tmp_path):
    images = [Image.new("RGB", (10 + index, 8), (index, 0, 0)) for index in range(5)]
    draw_sheet(images, 3, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16, 3 * 14, 3)
    assert [int(sheet[8 * (i // 3), 14 * (i % 3), 0]) for i in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="images is empty"):
        draw_sheet([], 3, tmp_path / "sheet.png")
