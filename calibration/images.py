"""How a picture becomes a sample of a model's input.

pixel -> resize -> centre crop -> (pixel * scale - mean) / std -> NCHW or NHWC
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.calibration.fit import describe
from onnxcomp.calibration.sources import Array, reading, suggest
from onnxcomp.errors import DataError, UsageError
from onnxcomp.runtime import TensorSpec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocess"]

_CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}
_CHOICES = {
    "layout": ("NCHW", "NHWC"),
    "color": ("rgb", "bgr", "gray"),
    "interpolation": ("bilinear", "bicubic", "nearest"),
}
# Training pipelines for ImageNet cut 224 pixels out of a picture whose short side is 256.
_IMAGENET_SIZE, _IMAGENET_CROP = 256, 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes one sample: output = (pixel * scale - mean) / std with pixels from 0 to 255.

    `size`: resize the short side to an int and keep the aspect, or resize to (height, width); None keeps the
    size. `crop`: cut (height, width) out of the centre. `mean` and `std` have one entry, or one per channel
    in the order of `color`. `raw` keeps the uint8 pixels, for models that take uint8.
    """

    size: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    layout: str = "NCHW"
    color: str = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bilinear"
    raw: bool = False

    @classmethod
    def from_spec(cls, spec: Any, model_input: TensorSpec) -> Preprocess:
        """Build from None, "imagenet", a table, the path of a TOML file, or a Preprocess (returned as it is).

        None resizes to the model's height and width and scales pixels to 0..1 (scale = 1/255, no mean, no
        std), which is right for many models and wrong for many others. "imagenet" resizes the short side to
        256, cuts out the central 224 x 224 (or the model's fixed size, the short side in proportion) and
        normalizes with the mean and std of ImageNet. A table has the names of the fields above but `raw`;
        layout and colour default to what the model's shape says, everything else to the identity.

        Raises UsageError for an unknown or senseless entry, DataError if the model does not take pictures.
        """
        if isinstance(spec, Preprocess):
            return spec
        layout, channels, fixed = _model_layout(model_input)
        raw = model_input.dtype == np.uint8
        table: Mapping[str, Any] = {}
        if spec is not None and spec != "imagenet":
            table = spec if isinstance(spec, Mapping) else _toml(spec)
        if channels is None and "layout" not in table:
            raise UsageError(
                f"the shape of the model's input {describe(model_input)} does not tell NCHW from NHWC; "
                'say it in the preprocessing: layout = "NCHW"'
            )
        base = cls(layout=layout, color="gray" if channels == 1 else "rgb", raw=raw)
        if spec is None:
            result = replace(base, size=_fixed_size(fixed), scale=1.0 if raw else 1 / 255)
        elif spec == "imagenet":
            crop = _fixed_size(fixed) or (_IMAGENET_CROP, _IMAGENET_CROP)
            short = round(max(crop) * _IMAGENET_SIZE / _IMAGENET_CROP)
            result = replace(base, size=short, crop=crop)
            if not raw:
                result = replace(result, scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
        else:
            result = replace(base, **_entries(table))
            if raw and (result.scale, result.mean, result.std) != (1.0, (0.0,), (1.0,)):
                raise UsageError(
                    f"the model's input {model_input.name!r} takes raw uint8 pixels: "
                    "leave scale, mean and std out of the preprocessing"
                )
        return result._checked(channels, model_input)

    def load(self, path: Path) -> Array:
        """Read and preprocess one picture: [C, H, W] or [H, W, C], float32, or uint8 if `raw`.

        Raises DataError naming the file if it is not a picture of 8 bits per channel, or smaller than the
        crop.
        """
        from PIL import Image

        with reading(str(path)), Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has pixels of more than 8 bits (mode {image.mode}); convert it to 8 bits"
                )
            # Pillow asks to convert palettes with an alpha channel to RGBA first.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            pixels = self._resized(opaque.convert("L" if self.color == "gray" else "RGB"))
            if self.crop is not None:
                pixels = _centre(pixels, self.crop, path)
            array: Array = np.asarray(pixels, dtype=np.uint8)
        array = array[:, :, None] if self.color == "gray" else array
        array = array[:, :, ::-1] if self.color == "bgr" else array
        if not self.raw:
            mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
            array = (array.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(array.transpose(2, 0, 1) if self.layout == "NCHW" else array)

    def _resized(self, image: Image) -> Image:
        from PIL.Image import Resampling

        if self.size is None:
            return image
        if isinstance(self.size, int):
            short = min(image.size)
            width, height = (max(1, round(side * self.size / short)) for side in image.size)
        else:
            height, width = self.size
        return image.resize((width, height), Resampling[self.interpolation.upper()])

    def _checked(self, channels: int | None, model_input: TensorSpec) -> Preprocess:
        made = _CHANNELS[self.color]
        if channels not in (None, made):
            raise UsageError(
                f"color = {self.color!r} makes {made} channel(s), but the model's input {model_input.name!r} "
                f"takes {channels}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, made):
                raise UsageError(
                    f"{name} has {len(values)} entries for {made} channel(s); give one, or one per channel"
                )
        if isinstance(self.size, tuple) and self.crop is not None and any(np.greater(self.crop, self.size)):
            raise UsageError(f"crop = {list(self.crop)} is larger than size = {list(self.size)}")
        return self


def _model_layout(spec: TensorSpec) -> tuple[str, int | None, tuple[int | None, int | None]]:
    """Layout, number of channels, and (height, width) as far as the model fixes them."""
    if spec.shape is None or len(spec.shape) != 4:
        rank = "an unknown rank" if spec.shape is None else f"rank {len(spec.shape)}"
        raise DataError(
            f"the model's input {spec.name!r} has {rank}, but pictures need [N, C, H, W] or [N, H, W, C]; "
            "prepare the data as .npz"
        )
    if spec.dtype is None or not (spec.dtype.kind == "f" or spec.dtype == np.uint8):
        raise DataError(f"the model's input {spec.name!r} is {spec.kind}, but pictures give floats or uint8")
    dims = [dim if isinstance(dim, int) and dim > 0 else None for dim in spec.shape]
    last = dims[1] not in (1, 3) and dims[3] in (1, 3)
    channels, height, width = (dims[3], dims[1], dims[2]) if last else (dims[1], dims[2], dims[3])
    return "NHWC" if last else "NCHW", channels, (height, width)


def _fixed_size(fixed: tuple[int | None, int | None]) -> tuple[int, int] | None:
    height, width = fixed
    return None if height is None or width is None else (height, width)


def _centre(image: Image, crop: tuple[int, int], path: Path) -> Image:
    height, width = crop
    if image.width < width or image.height < height:
        raise DataError(
            f"{path} is {image.height} x {image.width} after resizing, smaller than the crop {height} x "
            f"{width}"
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _toml(path: Any) -> Mapping[str, Any]:
    import tomllib

    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            f"preprocessing must be 'imagenet', a table or the path of a TOML file, not {path!r}"
        )
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"preprocessing {os.fspath(path)!r} is neither 'imagenet' nor a TOML file that can be read: "
            f"{error.strerror}"
        ) from error
    except ValueError as error:
        raise UsageError(f"the preprocessing file {path} is not valid TOML: {error}") from error


def _entries(table: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(Preprocess) if field.name != "raw"]
    entries: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(
                f"unknown preprocessing entry {key!r}{suggest(str(key), known)}; known are {', '.join(known)}"
            )
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise UsageError(f"preprocessing {key} = {value!r} must be one of {', '.join(_CHOICES[key])}")
            entries[key] = value
        elif key in ("size", "crop"):
            entries[key] = _size(key, value)
        else:
            entries[key] = _numbers(key, value)
    return entries


def _size(key: str, value: Any) -> int | tuple[int, int]:
    sides = list(value) if isinstance(value, Sequence) and len(value) == 2 else [value]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise UsageError(
            f"preprocessing {key} = {value!r} must be a positive whole number or [height, width]"
        )
    if len(sides) == 2:
        return sides[0], sides[1]
    return sides[0] if key == "size" else (sides[0], sides[0])


def _numbers(key: str, value: Any) -> float | tuple[float, ...]:
    many = isinstance(value, Sequence) and not isinstance(value, str) and key != "scale"
    values = list(value) if many else [value]
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) and np.isfinite(v) for v in values)
    if not numeric or (key != "mean" and 0 in values):
        kind = "a number" if key == "scale" else "a number or one per channel"
        raise UsageError(
            f"preprocessing {key} = {value!r} must be {kind}{'' if key == 'mean' else ', not zero'}"
        )
    return float(value) if key == "scale" else tuple(map(float, values))
