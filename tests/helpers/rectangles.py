"""Images of coloured rectangles with exact labels: the least that a detector can learn."""

import torch
from torch import Tensor

COLOURS = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0]])


def draw_rectangles(
    seed: int, height: int = 128, width: int = 160, count: int = 5, sides: tuple[int, int] = (12, 40)
) -> tuple[Tensor, dict[str, Tensor]]:
    """A grey image [3, height, width] with separate rectangles, whose colour is their class, and DETR's labels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    classes = torch.randint(0, len(COLOURS), (count,), generator=generator)
    boxes = torch.zeros(count, 4)
    for index in range(count):
        while not boxes[index].any():
            rows, columns = torch.randint(*sides, (2,), generator=generator).tolist()
            top = int(torch.randint(0, height - rows + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - columns + 1, (1,), generator=generator))
            if masks[:, top : top + rows, left : left + columns].any():
                continue
            masks[index, top : top + rows, left : left + columns] = True
            image[:, masks[index]] = COLOURS[classes[index]][:, None]
            centre = [(left + columns / 2) / width, (top + rows / 2) / height]
            boxes[index] = torch.tensor([*centre, columns / width, rows / height])
    return image, {"class_labels": classes, "boxes": boxes, "masks": masks}
