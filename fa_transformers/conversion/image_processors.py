"""The image processor of an FAViT model, made of its checkpoint's: images in their own shape, or all in one."""

from typing import Any

from transformers import BaseImageProcessor, PretrainedConfig

from ..models import FAViTImageProcessor

COPIED_FIELDS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def fit_image_processor(
    processor: BaseImageProcessor,
    config: PretrainedConfig,
    image_size: int | tuple[int, int] | None = None,
    *,
    square: bool = False,
) -> BaseImageProcessor:
    """Make the image processor of an FAViT model of the one that its checkpoint has.

    Args:
        processor: the checkpoint's, stock or ours.
        config: the model's, which says the size of a patch.
        image_size: side in pixels of the square whose pixels an image is to have, at most; a (height, width) is the
            size of all images. None: the side that the processor says.
        square: resize all images to the square, whatever their shape; with `image_size` None a stock processor stays
            as it is. So it is with a model whose images don't have three channels, and with a processor of another
            shape than a square.

    Raises:
        ValueError: `image_size` is None and the processor says no square, or it is smaller than a patch.
    """
    if image_size is None and not square and not _is_square(processor):
        return processor
    fields = {name: value for name in COPIED_FIELDS if (value := getattr(processor, name, None)) is not None}
    if not square and not isinstance(image_size, tuple) and config.num_channels == 3:
        return FAViTImageProcessor(image_size or native_side(processor), config.patch_size, **fields)
    is_ours = isinstance(processor, FAViTImageProcessor)
    if image_size is None and not is_ours:
        return processor
    size = size_of(image_size or native_side(processor))
    if is_ours:
        from transformers import ViTImageProcessor  # only here, as it warns that torchvision is missing

        return ViTImageProcessor(size=size, **fields)
    return type(processor).from_dict(processor.to_dict(), size=size, do_center_crop=False)


def size_of(image_size: int | tuple[int, int]) -> dict[str, int]:
    """Return a side, or a (height, width), in pixels as transformers' image processors take it."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return {"height": height, "width": width}


def _is_square(processor: BaseImageProcessor) -> bool:
    """Return whether a processor says one side in pixels for its images."""
    try:
        return isinstance(processor, FAViTImageProcessor) or native_side(processor) > 0
    except ValueError:
        return False


def native_side(processor: BaseImageProcessor) -> int:
    """Return the side in pixels of the square images that an image processor makes, or of those with as many pixels.

    Raises:
        ValueError: they are not square.
    """
    size: Any
    if isinstance(processor, FAViTImageProcessor):
        size = processor.image_size
        sides = {size} if isinstance(size, int) else set(size)
    else:
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        sides = {side for name in ("height", "width", "shortest_edge") if (side := size.get(name))}
    if len(sides) != 1:
        raise ValueError(f"--image_size: the checkpoint's processor says {size}, no square; say which side to use.")
    return sides.pop()
