"""Drawn labels do not cover one another."""

import itertools

from PIL import ImageDraw

from gtsa.core.drawing import label_boxes, new_sheet


def test_labels_of_boxes_with_common_corners_lie_apart():
    boxes = [(10.0, 10.0, 390.0, 390.0)] * 6 + [(12.0, 12.0, 200.0, 200.0), (8.0, 300.0, 120.0, 392.0)]
    sheet = new_sheet(400, 400)
    areas = label_boxes(ImageDraw.Draw(sheet), [(f"L{n}", box, (255, 0, 0)) for n, box in enumerate(boxes)])
    assert len(areas) == len(boxes)
    for (x1, y1, x2, y2), (left, top, right, bottom) in zip(areas, boxes, strict=True):
        assert left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
        assert sheet.getpixel((round(x1), round(y1))) == (255, 0, 0)
    for one, other in itertools.combinations(areas, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_a_label_of_a_tiny_box_is_drawn():
    ((x1, y1, x2, y2),) = label_boxes(ImageDraw.Draw(new_sheet(50, 50)), [("G1", (5.0, 5.0, 7.0, 7.0), (0, 0, 0))])
    assert x2 - x1 > 5 and y2 - y1 > 5
