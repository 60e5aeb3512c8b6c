"""Part of the package `onnxcomp`: import it as `onnxcomp.calibration`."""

if __name__ != "onnxcomp.calibration":
    raise ImportError("import onnxcomp.calibration; the folder calibration/ is a part of onnxcomp")
