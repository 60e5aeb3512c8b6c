"""Which passes run: those that were asked for, or the default ones of a target and a goal."""

from __future__ import annotations

from onnxcomp.errors import UsageError
from onnxcomp.manager import Pass, Pipeline
from onnxcomp.options import DEFAULT_PASSES, SIZE_PASSES, Options
from onnxcomp.registry import load_pass

__all__ = ["asked_pipeline", "chosen_pipeline", "planning"]


def chosen_pipeline(options: Options, *, packed: bool = False) -> Pipeline:
    """The passes asked for, or the default ones as far as there are data for them. Raises UsageError.

    A packed model is unpacked first; see `Job.pack_again`.
    """
    pipeline = asked_pipeline(options)
    names = [p.name for p in pipeline.passes]
    if not packed or names[:1] == ["unpack"]:
        return pipeline
    return Pipeline((load_pass("unpack")(), *pipeline.passes))


def asked_pipeline(options: Options) -> Pipeline:
    """`chosen_pipeline` for a model that is not packed."""
    if options.passes is not None:
        pipeline = Pipeline.parse(options.passes)
        need = [p.name for p in pipeline.passes if p.needs_data]
        if options.calib is None and need:
            raise UsageError(f"pass {need[0]!r} needs calibration data; give them with --calib")
        return pipeline
    smallest = options.goal == "size" and options.target == "cpu"
    passes = Pipeline.parse(SIZE_PASSES if smallest else DEFAULT_PASSES[options.target]).passes
    return Pipeline(tuple(p for p in passes if not p.needs_data or options.calib is not None))


def planning(pipeline: Pipeline) -> tuple[Pipeline, list[str]]:
    """The pipeline for a dry run: lossless passes, and lossy ones that can plan; names of those that cannot."""
    kept: list[Pass] = []
    left_out = []
    for one in pipeline.passes:
        if one.effect != "lossy":
            kept.append(one)
        elif "dry_run" in one.options():
            kept.append(one.parse({**one.options(), "dry_run": True}))
        else:
            left_out.append(one.name)
    return Pipeline(tuple(kept)), left_out
