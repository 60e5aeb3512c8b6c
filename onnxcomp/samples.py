"""The data of one optimization: what to calibrate on, what to verify on, what to time with."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxcomp.calibration.data import Dataset, open_data, sample_hashes
from onnxcomp.calibration.pictures import IMAGE_SUFFIXES
from onnxcomp.calibration.split import hold_out, limited
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.options import Options
from onnxcomp.runtime import Session
from onnxcomp.serde import export_model
from onnxcomp.synthesis import usable_inputs

__all__ = ["Samples"]

_FEEDS = 4  # samples that models are timed with


class Samples:
    """Calibration and verification data, never the same sample in both.

    Without data for verification, one calibration sample in five is held out for it.
    """

    def __init__(self, options: Options, session: Session, model: Model) -> None:
        self._options = options
        self._session = session
        self._model = model
        self.notes: list[str] = []
        if options.preprocess is not None and not any(_for_pictures(s, True) for s in (options.calib, options.eval)):
            raise UsageError("preprocess is for folders of pictures, but no data are one; leave it out")
        calibration = _open(options.calib, session, options)
        self.verification = _open(options.eval, session, options)
        if calibration is not None and self.verification is None:
            calibration, held = hold_out(calibration)
            self.verification = held if held.length != 0 else None
            self.notes.append("one sample in five of the calibration data was held out for verification")
        self.calibration = None if calibration is None else limited(calibration, options.samples)

    @functools.cached_property
    def feeds(self) -> list[dict[str, Any]]:
        """A few inputs to time models with: single samples where batches can be cut; made up if there are no data."""
        data = self.verification or self.calibration
        if data is None:
            proto, _ = export_model(self._model)
            return list(usable_inputs(self._session, proto, seed=self._options.seed, count=2))
        batches = itertools.islice(limited(data, _FEEDS).batches(), _FEEDS)
        return [_first_sample(b.feeds, b.count, data) for b in batches]

    @functools.cached_property
    def calibration_hashes(self) -> frozenset[str]:
        """Hashes of the calibration samples: the verification data may hold some of them again, whether they are
        separate or held out.
        """
        if self.calibration is None:
            return frozenset()
        return frozenset(h for b in self.calibration.batches() for h in sample_hashes(b))


def _open(source: Any, session: Session, options: Options) -> Dataset | None:
    if source is None:
        return None
    return open_data(source, session.inputs, preprocess=_for_pictures(source, options.preprocess), seed=options.seed)


def _for_pictures(source: Any, preprocess: Any) -> Any:
    """The preprocessing, if `source` is a folder of pictures; the other data set may be in another form."""
    if preprocess is None or not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir():
        return None
    return preprocess if any(p.suffix.lower() in IMAGE_SUFFIXES for p in Path(source).rglob("*")) else None


def _first_sample(feeds: Mapping[str, Any], count: int, data: Dataset) -> dict[str, Any]:
    """A batch of one, if the batch can be cut: latency is measured as edge devices see it, sample by sample."""
    return {k: v[:1] for k, v in feeds.items()} if data.divisible and count > 1 else dict(feeds)
