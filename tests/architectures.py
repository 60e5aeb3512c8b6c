"""Small networks of the kinds that people deploy, with random weights, exported with a dynamic batch.

`build(name)` gives a ModelProto; most come from torch through torch.onnx.export, the rest from onnx.helper. Depth and
width are those of toys, the couplings those of the originals.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["NAMES", "TORCH", "build"]


def _nets() -> dict[str, Callable[[], tuple[Any, tuple[int, ...]]]]:
    """Builders of (module, shape of one sample); torch is imported here only."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: Any = nn.ReLU) -> Any:
        layers = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
        return nn.Sequential(*layers, *([act()] if act is not None else []))

    class Residual(nn.Module):
        def __init__(self, body: Any, shortcut: Any = None, act: Any = None) -> None:
            super().__init__()
            self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act or nn.Identity()

        def forward(self, x: Any) -> Any:
            return self.act(self.body(x) + self.shortcut(x))

    class Gate(nn.Module):
        """Squeeze and excite."""

        def __init__(self, c: int, r: int, act: Any = nn.Sigmoid) -> None:
            super().__init__()
            self.down, self.up, self.act = nn.Conv2d(c, r, 1), nn.Conv2d(r, c, 1), act()

        def forward(self, x: Any) -> Any:
            return x * self.act(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))

    def head(c: int, classes: int = 10) -> list[Any]:
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes)]

    def resnet18() -> Any:
        def block(i: int, o: int, s: int) -> Any:
            short = None if s == 1 and i == o else conv(i, o, 1, s, act=None)
            return Residual(nn.Sequential(conv(i, o, 3, s), conv(o, o, act=None)), short, nn.ReLU())

        return nn.Sequential(
            conv(3, 16), nn.MaxPool2d(2), block(16, 16, 1), block(16, 32, 2), block(32, 32, 1), *head(32)
        )

    def bottleneck(groups: int, width: int, gate: bool = False) -> Any:
        def block(i: int, o: int, s: int) -> Any:
            middle = [Gate(width, 8)] if gate else []
            body = nn.Sequential(
                conv(i, width, 1), conv(width, width, 3, s, groups), *middle, conv(width, o, 1, act=None)
            )
            return Residual(body, None if s == 1 and i == o else conv(i, o, 1, s, act=None), nn.ReLU())

        return nn.Sequential(conv(3, 16), block(16, 32, 1), block(32, 32, 1), block(32, 64, 2), *head(64))

    def inverted(act: Any, gate: bool) -> Any:
        def block(i: int, e: int, o: int, s: int) -> Any:
            middle = [Gate(e, 8, nn.Hardsigmoid)] if gate else []
            body = nn.Sequential(conv(i, e, 1, act=act), conv(e, e, 3, s, e, act), *middle, conv(e, o, 1, act=None))
            return Residual(body) if s == 1 and i == o else body

        return nn.Sequential(
            conv(3, 16, 3, 2, act=act), block(16, 48, 24, 2), block(24, 72, 24, 1), conv(24, 64, 1, act=act), *head(64)
        )

    class Dense(nn.Module):
        def __init__(self, i: int, growth: int) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, growth, 3, 1, 1, bias=False))

        def forward(self, x: Any) -> Any:
            return torch.cat([x, self.body(x)], 1)

    def densenet() -> Any:
        transition = [nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2)]
        return nn.Sequential(
            conv(3, 16),
            Dense(16, 8),
            Dense(24, 8),
            Dense(32, 8),
            *transition,
            Dense(20, 8),
            nn.BatchNorm2d(28),
            nn.ReLU(),
            *head(28),
        )

    class Branches(nn.Module):
        def __init__(self, *branches: Any) -> None:
            super().__init__()
            self.branches = nn.ModuleList(branches)

        def forward(self, x: Any) -> Any:
            return torch.cat([branch(x) for branch in self.branches], 1)

    def googlenet() -> Any:
        def inception(i: int) -> Any:
            return Branches(
                conv(i, 8, 1),
                nn.Sequential(conv(i, 8, 1), conv(8, 16)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(i, 8, 1)),
            )

        return nn.Sequential(conv(3, 16, 3, 2), inception(16), nn.MaxPool2d(2), inception(32), *head(32))

    def squeezenet() -> Any:
        def fire(i: int) -> Any:
            return nn.Sequential(
                nn.Conv2d(i, 8, 1), nn.ReLU(),
                Branches(*(nn.Sequential(nn.Conv2d(8, 16, k, 1, k // 2), nn.ReLU()) for k in (1, 3))),
            )  # fmt: skip

        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), fire(16), nn.MaxPool2d(3, 2, ceil_mode=True), fire(32),
            nn.Conv2d(32, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    class Shuffle(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            h = c // 2
            self.body = nn.Sequential(conv(h, h, 1), conv(h, h, 3, 1, h, None), conv(h, h, 1))

        def forward(self, x: Any) -> Any:
            kept, changed = x.chunk(2, 1)
            y = torch.cat([kept, self.body(changed)], 1)
            n, c, height, width = y.shape
            return y.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)

    def shufflenet() -> Any:
        return nn.Sequential(conv(3, 24, 3, 2), Shuffle(24), Shuffle(24), conv(24, 48, 1), *head(48))

    def vgg() -> Any:
        return nn.Sequential(
            conv(3, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(7), nn.Flatten(),
            nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10),
        )  # fmt: skip

    class ChannelsLastNorm(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(c)

        def forward(self, x: Any) -> Any:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class NextBlock(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(c, c, 7, 1, 3, groups=c), nn.LayerNorm(c)
            self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
            self.scale = nn.Parameter(torch.rand(c))

        def forward(self, x: Any) -> Any:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)

    def convnext() -> Any:
        return nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelsLastNorm(16), NextBlock(16), NextBlock(16), *head(16))

    class Attention(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads, self.size = heads, width // heads
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Any) -> Any:
            n, s, e = x.shape
            q, k, v = self.qkv(x).reshape(n, s, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).reshape(n, s, e))

    def encoder(width: int, heads: int) -> Any:
        def normed(inner: Any) -> Any:
            return Residual(nn.Sequential(nn.LayerNorm(width), inner))

        ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        return nn.Sequential(normed(Attention(width, heads)), normed(ffn))

    class Window(nn.Module):
        """Attention inside windows of 4 x 4, shifted."""

        def __init__(self, c: int) -> None:
            super().__init__()
            self.inner = encoder(c, 2)

        def forward(self, x: Any) -> Any:
            n, h, w, c = x.shape
            x = torch.roll(x, (-2, -2), (1, 2))
            windows = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
            y = self.inner(windows).view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
            return torch.roll(y, (2, 2), (1, 2))

    class Merge(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.reduce = nn.Linear(4 * c, 2 * c, bias=False)

        def forward(self, x: Any) -> Any:
            parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            return self.reduce(torch.cat(parts, -1))

    class Last(nn.Module):
        def __init__(self, *axes: int) -> None:
            super().__init__()
            self.axes = axes

        def forward(self, x: Any) -> Any:
            return x.permute(*self.axes)

    def swin() -> Any:
        return nn.Sequential(
            nn.Conv2d(3, 16, 4, 4),
            Last(0, 2, 3, 1),
            Window(16),
            Merge(16),
            Window(32),
            nn.LayerNorm(32),
            Last(0, 3, 1, 2),
            *head(32),
        )

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 32, 8, 8)
            self.token = nn.Parameter(torch.randn(1, 1, 32))
            self.position = nn.Parameter(torch.randn(1, 17, 32))
            self.layers = nn.Sequential(encoder(32, 4), encoder(32, 4), nn.LayerNorm(32))
            self.head = nn.Linear(32, 10)

        def forward(self, x: Any) -> Any:
            y = self.patch(x).flatten(2).transpose(1, 2)
            y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
            return self.head(self.layers(y)[:, 0])

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions = nn.Embedding(50, 32), nn.Embedding(16, 32)
            self.norm = nn.LayerNorm(32)
            self.layers = nn.Sequential(encoder(32, 4), encoder(32, 4))
            self.pool, self.head = nn.Linear(32, 32), nn.Linear(32, 3)

        def forward(self, tokens: Any) -> Any:
            y = self.norm(self.words(tokens) + self.positions(torch.arange(16)))
            return self.head(torch.tanh(self.pool(self.layers(y)[:, 0])))

    class Tied(nn.Module):
        """One layer of torch's own encoder, used three times."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(12, 32)
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Any) -> Any:
            y = self.embed(x)
            for _ in range(3):
                y = self.layer(y)
            return self.head(y.mean(1))

    class Recurrent(nn.Module):
        def __init__(self, kind: Any, both: bool) -> None:
            super().__init__()
            self.first = kind(12, 16, 2, batch_first=True, bidirectional=both)
            self.head = nn.Linear(32 if both else 16, 5)

        def forward(self, x: Any) -> Any:
            return self.head(self.first(x)[0][:, -1])

    def groupnorm_resnet() -> Any:
        def conv_gn(i: int, o: int, s: int = 1) -> Any:
            return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.GroupNorm(8, o))

        block = Residual(nn.Sequential(conv_gn(32, 32), nn.ReLU(), conv_gn(32, 32)), None, nn.ReLU())
        return nn.Sequential(conv_gn(3, 32, 2), nn.ReLU(), block, conv_gn(32, 64, 2), nn.ReLU(), *head(64))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.middle = conv(3, 16), conv(16, 32), conv(32, 64)
            self.up2, self.join2 = nn.ConvTranspose2d(64, 32, 2, 2), conv(64, 32)
            self.up1, self.join1 = nn.ConvTranspose2d(32, 16, 2, 2), conv(32, 16)
            self.out = nn.Conv2d(16, 2, 1)

        def forward(self, x: Any) -> Any:
            a = self.down1(x)
            b = self.down2(F.max_pool2d(a, 2))
            y = self.up2(self.middle(F.max_pool2d(b, 2)))
            y = self.up1(self.join2(torch.cat([b, y], 1)))
            return self.out(self.join1(torch.cat([a, y], 1)))

    class C2f(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.enter, self.leave = conv(c, c, 1, act=nn.SiLU), conv(2 * c, c, 1, act=nn.SiLU)
            h = c // 2
            self.inner = nn.ModuleList(
                Residual(nn.Sequential(conv(h, h, act=nn.SiLU), conv(h, h, act=nn.SiLU))) for _ in range(2)
            )

        def forward(self, x: Any) -> Any:
            parts = list(self.enter(x).chunk(2, 1))
            for inner in self.inner:
                parts.append(inner(parts[-1]))
            return self.leave(torch.cat(parts, 1))

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.deep, self.join = conv(3, 16, 3, 2), nn.Sequential(conv(16, 32, 3, 2), C2f(32)), C2f(48)
            self.boxes = nn.Conv2d(48, 12, 1)

        def forward(self, x: Any) -> Any:
            a = self.stem(x)
            b = F.interpolate(self.deep(a), scale_factor=2.0)
            y = self.boxes(self.join(torch.cat([a, b], 1)))
            return y.view(y.shape[0], 12, -1).permute(0, 2, 1)

    def espcn() -> Any:
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, 1, 2),
            nn.Tanh(),
            nn.Conv2d(32, 16, 3, 1, 1),
            nn.Tanh(),
            nn.Conv2d(16, 32, 3, 1, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(8, 9, 3, 1, 1),
            nn.PixelShuffle(3),
        )

    def efficientnet() -> Any:
        return inverted(nn.SiLU, gate=True)

    image = (3, 32, 32)
    return {
        "resnet": lambda: (resnet18(), image),
        "resnext": lambda: (bottleneck(8, 32), image),
        "regnet": lambda: (bottleneck(2, 48, gate=True), image),
        "mobilenet_v2": lambda: (inverted(nn.ReLU6, gate=False), image),
        "mobilenet_v3": lambda: (inverted(nn.Hardswish, gate=True), image),
        "efficientnet": lambda: (efficientnet(), image),
        "densenet": lambda: (densenet(), image),
        "googlenet": lambda: (googlenet(), image),
        "squeezenet": lambda: (squeezenet(), image),
        "shufflenet_v2": lambda: (shufflenet(), image),
        "vgg": lambda: (vgg(), (3, 28, 28)),
        "convnext": lambda: (convnext(), image),
        "swin": lambda: (swin(), image),
        "vit": lambda: (Vit(), image),
        "bert": lambda: (Bert(), (16,)),
        "tied_encoder": lambda: (Tied(), (7, 12)),
        "lstm": lambda: (Recurrent(nn.LSTM, False), (7, 12)),
        "bidirectional_gru": lambda: (Recurrent(nn.GRU, True), (7, 12)),
        "groupnorm_resnet": lambda: (groupnorm_resnet(), image),
        "unet": lambda: (UNet(), image),
        "yolo_c2f": lambda: (Pyramid(), image),
        "espcn": lambda: (espcn(), (1, 16, 16)),
    }


TORCH = [
    "resnet",
    "resnext",
    "regnet",
    "mobilenet_v2",
    "mobilenet_v3",
    "efficientnet",
    "densenet",
    "googlenet",
    "squeezenet",
    "shufflenet_v2",
    "vgg",
    "convnext",
    "swin",
    "vit",
    "bert",
    "tied_encoder",
    "lstm",
    "bidirectional_gru",
    "groupnorm_resnet",
    "unet",
    "yolo_c2f",
    "espcn",
]
NAMES = [*TORCH, "keras_nhwc", "option_a_resnet"]


def build(name: str, *, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """The network as a ModelProto with a dynamic batch. Raises ImportError where torch is needed and missing."""
    if name == "keras_nhwc":
        return _keras(seed)
    if name == "option_a_resnet":
        return _option_a(seed)
    import torch

    torch.manual_seed(seed)
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator has no ONNX form
    module, shape = _nets()[name]()
    _randomize(module)
    sample = torch.randint(0, 50, (2, *shape)) if name == "bert" else torch.randn(2, *shape)
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (sample,), file, opset_version=opset, dynamo=False,
            input_names=["input"], output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def _randomize(module: Any) -> None:
    """Biases and statistics that differ: exporters merge equal ones, which is another test."""
    import torch

    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dtype.is_floating_point and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(0, 0.3)


class _Writer:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def random(self, *shape: int) -> str:
        return self.constant((self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def constant(self, values: Any) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def model(self, shape: list[int | str], output: str, out: list[int | str]) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "net",
            [info("input", TensorProto.FLOAT, shape)],
            [info(output, TensorProto.FLOAT, out)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def _keras(seed: int) -> onnx.ModelProto:
    """As tf2onnx writes Keras: channels last outside, Transpose around each Conv, MatMul and Add for Dense."""
    w = _Writer(seed)

    def conv(x: str, i: int, o: int) -> str:
        y = w.node("Transpose", x, perm=[0, 3, 1, 2])
        y = w.node("Conv", y, w.random(o, i, 3, 3), pads=[1, 1, 1, 1])
        y = w.node("Transpose", y, perm=[0, 2, 3, 1])
        return w.node("Add", y, w.constant(w.rng.normal(size=o).astype(np.float32)))

    x = w.node("Relu", conv("input", 3, 16))
    y = conv(w.node("Relu", conv(x, 16, 24)), 24, 16)
    x = w.node("Relu", w.node("Add", x, y))
    x = w.node("ReduceMean", x, axes=[1, 2], keepdims=0)
    x = w.node("Relu", w.node("Add", w.node("MatMul", x, w.random(16, 24)), w.constant(np.ones(24, np.float32))))
    x = w.node("Softmax", w.node("MatMul", x, w.random(24, 10)))
    return w.model(["batch", 16, 16, 3], x, ["batch", 10])


def _option_a(seed: int) -> onnx.ModelProto:
    """CIFAR ResNet whose shortcut takes every second pixel and pads the channels with zeros on both sides."""
    w = _Writer(seed)
    x = w.node("Relu", w.node("Conv", "input", w.random(16, 3, 3, 3), w.random(16), pads=[1, 1, 1, 1]))
    y = w.node("Relu", w.node("Conv", x, w.random(32, 16, 3, 3), w.random(32), pads=[1, 1, 1, 1], strides=[2, 2]))
    y = w.node("Conv", y, w.random(32, 32, 3, 3), w.random(32), pads=[1, 1, 1, 1])
    bounds = [w.constant(np.asarray(v, np.int64)) for v in ([0, 0], [1 << 62, 1 << 62], [2, 3], [2, 2])]
    short = w.node("Pad", w.node("Slice", x, *bounds), w.constant(np.asarray([0, 8, 0, 0, 0, 8, 0, 0], np.int64)))
    x = w.node("Relu", w.node("Add", y, short))
    x = w.node("Flatten", w.node("GlobalAveragePool", x))
    return w.model(["batch", 3, 16, 16], w.node("Gemm", x, w.random(32, 10), w.random(10)), ["batch", 10])
