"""Folders of pictures: which files and labels they give, and how pixels become samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcomp.calibration.data import open_data
from onnxcomp.calibration.images import Preprocess
from onnxcomp.calibration.pictures import find_pictures
from onnxcomp.errors import DataError, UsageError
from onnxcomp.runtime import TensorSpec


def spec(*shape: int | str | None, kind: str = "float") -> TensorSpec:
    return TensorSpec("pixels", f"tensor({kind})", shape)


NCHW = spec("N", 3, 8, 8)
ANY_SIZE = spec("N", 3, "H", "W")
GRAY = spec("N", 8, 8, 1)


def picture(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> Path:
    """Write a picture of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def one(folder: Path, model_input: TensorSpec, preprocess: Any = None) -> np.ndarray[Any, Any]:
    return next(open_data(folder, [model_input], preprocess=preprocess).batches()).feeds["pixels"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp", "PNG"])
def test_pictures_of_every_kind_are_read(suffix: str, tmp_path: Path) -> None:
    picture(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(one(tmp_path, NCHW)[0, :, 4, 4], np.array([10, 20, 30]) / 255, atol=2.5 / 255)


def test_without_a_spec_pictures_are_resized_to_the_model_and_scaled_to_one(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(30, 20))
    sample = one(tmp_path, NCHW)
    assert (sample.shape, sample.dtype) == ((1, 3, 8, 8), np.float32)
    np.testing.assert_allclose(sample[0, :, 0, 0], np.array([10, 20, 30], np.float32) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("model_input", "shape"),
    [
        (NCHW, (1, 3, 8, 8)),
        (spec(1, 8, 6, 3), (1, 8, 6, 3)),
        (GRAY, (1, 8, 8, 1)),
        (spec(None, 1, 5, 7), (1, 1, 5, 7)),
    ],
)
def test_layout_and_channels_follow_the_models_shape(
    model_input: TensorSpec, shape: tuple[int, ...], tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    assert one(tmp_path, model_input).shape == shape


def test_gray_models_get_luminance(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (255, 0, 0))
    assert one(tmp_path, GRAY)[0, 0, 0, 0] == pytest.approx(76 / 255)  # ITU-R 601: 0.299 R


def test_uint8_models_get_the_pixels_as_they_are(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for preprocess in (None, "imagenet", {"color": "rgb"}):
        sample = one(tmp_path, spec(1, 3, 8, 8, kind="uint8"), preprocess)
        assert sample.dtype == np.uint8
        assert sample[0, :, 0, 0].tolist() == [10, 20, 30]


def test_float16_models_get_float16(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert one(tmp_path, spec(1, 3, 8, 8, kind="float16")).dtype == np.float16


def test_imagenet_normalizes_as_its_training_did(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(300, 400))
    sample = one(tmp_path, ANY_SIZE, "imagenet")
    expected = (np.array([10, 20, 30]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert sample.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(sample[0, :, 100, 100], expected, rtol=1e-5)


def test_imagenet_keeps_its_proportion_at_other_sizes() -> None:
    steps = Preprocess.from_spec("imagenet", spec("N", 3, 448, 448))
    assert (steps.size, steps.crop) == (512, (448, 448))


def test_bgr_reverses_the_channels_and_mean_follows_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    sample = one(tmp_path, NCHW, {"color": "bgr", "mean": [30, 20, 5], "std": 5})
    assert sample[0, :, 0, 0].tolist() == [0, 0, 1]


def test_scale_comes_before_mean_and_std(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (100, 100, 100))
    assert one(tmp_path, NCHW, {"scale": 0.5, "mean": 10, "std": 4})[0, 0, 0, 0] == 10.0


def test_an_int_size_is_the_short_side_and_crop_is_central(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (16, 0, 24, 20))
    image.save(tmp_path / "a.png")
    sample = one(tmp_path, ANY_SIZE, {"size": 20, "crop": [20, 8]})
    assert sample.shape == (1, 3, 20, 8)
    assert (sample == 255).all()
    assert one(tmp_path, ANY_SIZE, {"size": 10}).shape == (1, 3, 10, 20)
    assert one(tmp_path, ANY_SIZE, {"size": [5, 6]}).shape == (1, 3, 5, 6)


def test_a_toml_file_says_the_same_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'size = [8, 8]\nscale = 0.5\ninterpolation = "nearest"\nmean = [1, 2.5, 3]\n'
    )
    table = {"size": [8, 8], "scale": 0.5, "interpolation": "nearest", "mean": [1, 2.5, 3]}
    assert Preprocess.from_spec(tmp_path / "p.toml", NCHW) == Preprocess.from_spec(table, NCHW)


def test_pictures_of_other_sizes_make_batches_of_their_own(tmp_path: Path) -> None:
    for number, width in enumerate([8, 8, 9]):
        picture(tmp_path / f"{number}.png", size=(width, 8))
    counts = [batch.count for batch in open_data(tmp_path, [ANY_SIZE]).batches()]
    assert sum(counts) == 3
    assert len(counts) > 1


# --- labels ---


def labels(folder: Path) -> dict[str, int | None]:
    return {p.path.relative_to(folder).as_posix(): p.label for p in find_pictures(folder)}


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    for name in ("dog/a.png", "cat/deep/b.png", "cat/.hidden.png", ".cache/c.png"):
        picture(tmp_path / name)
    assert labels(tmp_path) == {"cat/deep/b.png": 0, "dog/a.png": 1}


def test_whole_numbers_as_folder_names_are_the_labels(tmp_path: Path) -> None:
    for name in ("10/a.png", "9/a.png"):
        picture(tmp_path / name)
    assert labels(tmp_path) == {"10/a.png": 10, "9/a.png": 9}


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["images/a.png"], ["a.png", "x/b.png", "y/c.png"]])
def test_pictures_that_do_not_all_lie_in_classes_have_no_labels(names: list[str], tmp_path: Path) -> None:
    for name in names:
        picture(tmp_path / name)
    assert labels(tmp_path) == dict.fromkeys(names)
    assert not open_data(tmp_path, [NCHW]).labelled


@pytest.mark.parametrize("header", ["", "file,label\n", "\ufeffFile, Label\n"])
def test_a_table_of_labels_wins_over_folders_and_says_which_pictures_belong(
    header: str, tmp_path: Path
) -> None:
    for name in ("u/a.png", "v/b.png", "v/unlisted.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text(f"{header}v/b.png,7\n\nu/a.png,3\n", encoding="utf-8")
    assert labels(tmp_path) == {"v/b.png": 7, "u/a.png": 3}


def test_columns_are_found_by_the_header_and_class_names_are_numbered(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text("split,label,file\ntest,zebra,a.png\ntest,ant,b.png\n")
    assert labels(tmp_path) == {"a.png": 1, "b.png": 0}


def test_labels_stay_with_their_pictures_in_a_shuffled_order(tmp_path: Path) -> None:
    for number in range(20):
        picture(tmp_path / str(number % 4) / f"{number}.png", (10 * (number % 4), 0, 0))
    orders = []
    for seed in (0, 0, 1):
        dataset = open_data(tmp_path, [NCHW], batch=8, seed=seed)
        assert (dataset.labelled, dataset.length) == (True, 20)
        order = []
        for batch in dataset.batches():
            assert batch.labels is not None
            np.testing.assert_allclose(batch.feeds["pixels"][:, 0, 0, 0] * 255, 10 * batch.labels, atol=0.01)
            order += batch.labels.tolist()
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0][:8])) > 2  # the first few are no single class


# --- refusals ---


def broken(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"not a picture")


def cut_short(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:3000])


def deep(folder: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "a.png")


def table(text: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        picture(folder / "a.png")
        (folder / "labels.csv").write_text(text)

    return write


def with_arrays(folder: Path) -> None:
    picture(folder / "a.png")
    np.save(folder / "a.npy", np.zeros(3))


def empty_class(folder: Path) -> None:
    picture(folder / "cat" / "a.png")
    picture(folder / "dog" / "a.png")
    (folder / "cow").mkdir()


def plain(folder: Path) -> None:
    picture(folder / "a.png")


@pytest.mark.parametrize(
    ("make", "inputs", "preprocess", "message"),
    [
        (broken, [NCHW], None, "a.png cannot be read: UnidentifiedImageError"),
        (cut_short, [NCHW], None, "a.png cannot be read: OSError"),
        (deep, [NCHW], None, "a.png has pixels of more than 8 bits (mode I;16)"),
        (table("b.png,1\n"), [NCHW], None, "labels.csv line 1: there is no picture"),
        (table("a.png\n"), [NCHW], None, "labels.csv line 1: expected the columns file,label, found 'a.png'"),
        (with_arrays, [NCHW], None, "holds both arrays (such as a.npy) and pictures"),
        (empty_class, [NCHW], None, "cow holds no pictures"),
        (plain, [NCHW, spec("N", 3)], None, "holds pictures, but the model has 2 inputs"),
        (plain, [spec("N", 3)], None, "has rank 2, but pictures need [N, C, H, W]"),
        (
            plain,
            [spec("N", 3, 8, 8, kind="int64")],
            None,
            "is tensor(int64), but pictures give floats or uint8",
        ),
        (plain, [spec(2, 3, 8, 8)], None, "has 1 picture(s), but the model takes batches of exactly 2"),
        (plain, [NCHW], {"size": 9}, "has shape [1, 3, 9, 9], but the model takes [N, 3, 8, 8]"),
        (plain, [NCHW], {"layout": "NHWC"}, "look NHWC and the model takes NCHW"),
        (plain, [ANY_SIZE], {"crop": 9}, "a.png is 8 x 8 after resizing, smaller than the crop 9 x 9"),
    ],
)
def test_unfit_pictures_are_refused_with_exit_code_3(
    make: Callable[[Path], Any], inputs: list[TensorSpec], preprocess: Any, message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        open_data(tmp_path, inputs, preprocess=preprocess)
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (
            {"sise": 8},
            "unknown preprocessing entry 'sise' (did you mean 'size'?); known are size, crop, layout",
        ),
        ({"raw": True}, "unknown preprocessing entry 'raw'"),
        ({"size": 0}, "size = 0 must be a positive whole number or [height, width]"),
        ({"crop": [1, 2, 3]}, "crop = [1, 2, 3] must be"),
        ({"size": [4, 4], "crop": 5}, "crop = [5, 5] is larger than size = [4, 4]"),
        ({"layout": "NWHC"}, "layout = 'NWHC' must be one of NCHW, NHWC"),
        ({"color": ["rgb"]}, "color = ['rgb'] must be one of rgb, bgr, gray"),
        ({"color": "gray"}, "color = 'gray' makes 1 channel(s), but the model's input 'pixels' takes 3"),
        ({"scale": "1/255"}, "scale = '1/255' must be a number, not zero"),
        ({"mean": [1, 2]}, "mean has 2 entries for 3 channel(s)"),
        ({"std": [1, 0, 1]}, "std = [1, 0, 1] must be a number or one per channel, not zero"),
        ("imagnet", "'imagnet' is neither 'imagenet' nor a TOML file"),
        (5, "preprocessing must be 'imagenet', a table or the path of a TOML file, not 5"),
    ],
)
def test_senseless_preprocessing_is_refused_with_exit_code_2(preprocess: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Preprocess.from_spec(preprocess, NCHW)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_toml_file_with_an_error_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("size = ")
    with pytest.raises(UsageError, match="is not valid TOML"):
        Preprocess.from_spec(tmp_path / "p.toml", NCHW)


def test_an_unknown_layout_is_asked_for() -> None:
    with pytest.raises(UsageError, match="does not tell NCHW from NHWC"):
        Preprocess.from_spec(None, spec("N", None, None, None))
    assert Preprocess.from_spec({"layout": "NHWC"}, spec("N", None, None, None)).layout == "NHWC"


def test_normalizing_raw_uint8_is_refused() -> None:
    with pytest.raises(UsageError, match="takes raw uint8 pixels"):
        Preprocess.from_spec({"mean": 128}, spec("N", 3, 8, 8, kind="uint8"))


def test_a_broken_picture_in_the_middle_is_named_when_it_is_reached(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    last = int(np.random.default_rng(0).permutation(3)[-1])
    (tmp_path / f"{last}.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{last}\.png cannot be read"):
        list(open_data(tmp_path, [NCHW]).batches())


def test_palettes_with_alpha_are_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "a.png", transparency=b"\x80")
    assert one(tmp_path, NCHW, {})[0, :, 0, 0].tolist() == [10, 20, 30]
