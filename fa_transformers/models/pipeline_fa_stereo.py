"""The pipeline of FAStereo: a stereo pair in, disparities and perhaps depths out.

Transformers' own "depth-estimation" takes one image, and scales what it returns.
"""

from __future__ import annotations

from transformers import Pipeline
from transformers.image_utils import load_image

try:
    from PIL import Image
except ImportError:  # told by transformers, which wants it for every image
    Image = None  # type: ignore[assignment]


class FAStereoPipeline(Pipeline):
    """Estimate disparities of stereo pairs, and depths where the cameras are known.

        pipe = pipeline("stereo-depth-estimation", model=folder, trust_remote_code=True)
        result = pipe(("left.png", "right.png"), focal_length=3979.9, baseline=0.193, doffs=124.3)

    An input is a pair (left, right), or {"left": ..., "right": ...}, or a list of such; an image is a path, an address
    or Pillow's. A result has "disparity" (float32 [H, W], pixels of the left image), "depth" (float32 [H, W], in the
    unit of `baseline`) if `focal_length` and `baseline` are given, and "picture", the disparities as a grey image in
    which white is the largest one that the model looks for.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self, focal_length=None, baseline=None, doffs=None, scale_factor=None, timeout=None, **kwargs
    ):
        cameras = {"focal_length": focal_length, "baseline": baseline, "doffs": doffs, "scale_factor": scale_factor}
        preparing = {"scale_factor": scale_factor, "timeout": timeout}
        return tuple(
            {name: value for name, value in given.items() if value is not None} for given in (preparing, {}, cameras)
        )

    def preprocess(self, pair, scale_factor=None, timeout=None):
        if isinstance(pair, dict):
            if set(pair) != {"left", "right"}:
                raise ValueError(f'A stereo pair as a dict has "left" and "right", got {sorted(pair)}.')
            pair = (pair["left"], pair["right"])
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(
                'A stereo pair is a tuple (left, right) or {"left": ..., "right": ...}; a list holds several of them. '
                f"Got {type(pair).__name__}."
            )
        images = tuple(load_image(image, timeout=timeout) for image in pair)
        inputs = self.image_processor(images, scale_factor=scale_factor, return_tensors="pt").to(self.dtype)
        inputs["target_size"] = images[0].size[::-1]
        return inputs

    def _forward(self, model_inputs):
        target_size = model_inputs.pop("target_size")
        return {**self.model(**model_inputs), "target_size": target_size}

    def postprocess(self, model_outputs, **cameras):
        sizes = [model_outputs["target_size"]]
        (result,) = self.image_processor.post_process_disparity(model_outputs, sizes, **cameras)
        scale = cameras.get("scale_factor") or self.image_processor.scale_factor
        shares = (result["disparity"] * scale / self.model.config.max_disparity).clamp(0, 1)
        picture = Image.fromarray((255 * shares).round().byte().cpu().numpy())
        return {name: value.float().cpu() for name, value in result.items()} | {"picture": picture}
