"""Part of the package `onnxcomp`: import it as `onnxcomp.passes`."""

if __name__ != "onnxcomp.passes":
    raise ImportError("import onnxcomp.passes; the folder passes/ is a part of onnxcomp")
