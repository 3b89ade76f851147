"""Tests of the check that an ONNX file contains only what the export writes."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nemo_lfr import CheckpointError
from nemo_lfr.codec.onnx.graph import MAX_FIELDS, MAX_INTEGER, check_graph
from tests.packages import require

require("onnx", reason="pip install '.[onnx]'")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def build() -> Any:
    """Return a model with weights, integers, attributes and metadata, as the export writes them."""
    weights = numpy_helper.from_array(np.ones((4, 1, 3), np.float32), "weights")
    shape = numpy_helper.from_array(np.array([-1, 4], np.int64), "shape")
    start = numpy_helper.from_array(np.array(0, np.int32), "start")
    nodes = [
        helper.make_node("Conv", ["audio", "weights"], ["hidden"], pads=[1, 1], strides=[1], group=1),
        helper.make_node("LeakyRelu", ["hidden"], ["active"], alpha=0.01),
        helper.make_node("Reshape", ["active", "shape"], ["out"]),
    ]
    audio = helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", 1, "samples"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["frames", 4])
    graph = helper.make_graph(nodes, "graph", [audio], [out], [weights, shape, start])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="pytorch")
    model.metadata_props.add(key="nemo_lfr", value="{}")
    return model


def node(kind: str, **attributes: Any) -> Callable[[Any], None]:
    return lambda model: model.graph.node.append(helper.make_node(kind, ["out"], ["more"], **attributes))


def custom(model: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def located(model: Any) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def external_constant(model: Any) -> None:
    tensor = TensorProto(data_type=1, dims=[2])
    tensor.external_data.add(key="location", value="weights.bin")
    node("Constant", value=tensor)(model)


def body() -> Any:
    return helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "body", [], [])


def function(model: Any) -> None:
    model.functions.append(helper.make_function("f", "F", ["a"], ["b"], [], []))


def training(model: Any) -> None:
    model.training_info.add()


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def opset(model: Any) -> None:
    model.opset_import.add(domain="ai.onnx.ml", version=3)


def integer(value: int, dtype: type) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([1, value], dtype), "shape"))

    return change


def dims(*values: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[:] = values

    return change


def text(model: Any) -> None:
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], [b"x"]))


def doubles(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "t"))


def apart(model: Any) -> None:
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.INT64, [1], [2**40]))


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "weights in another file": (external, "weights in another file"),
    "the location of weights alone": (located, "weights in another file"),
    "a constant in another file": (external_constant, "weights in another file"),
    "Loop": (node("Loop", body=body()), "the operator 'Loop'"),
    "If": (node("If", then_branch=body(), else_branch=body()), "the operator 'If'"),
    "a graph in a permitted operator": (node("Identity", body=body()), "a graph inside an operator"),
    "graphs in a permitted operator": (node("Identity", bodies=[body()]), "graphs inside an operator"),
    "ConstantOfShape": (node("ConstantOfShape"), "the operator 'ConstantOfShape'"),
    "an operator of a long name": (node("x" * 1000), "the operator 'xxx"),
    "an operator of another domain": (custom, "the operator domain 'com.microsoft'"),
    "an opset of another domain": (opset, "the operator domain 'ai.onnx.ml'"),
    "a function": (function, "functions"),
    "a training graph": (training, "training graphs"),
    "sparse weights": (sparse, "sparse weights"),
    "a large integer": (integer(MAX_INTEGER + 1, np.int64), "the integer 16777217"),
    "a large negative integer": (integer(-(2**62), np.int64), "the integer -4611686018427387904"),
    "a large integer of 32 bits": (integer(2**30, np.int32), "the integer 1073741824"),
    "large attributes": (node("Pad", pads=[0, 2**40]), "the integer 1099511627776"),
    "a large attribute": (node("Concat", axis=-(2**40)), "the integer -1099511627776"),
    "a large constant": (
        node("Constant", value=numpy_helper.from_array(np.array([2**50]), "t")), "the integer 1125899906842624"
    ),
    "a shape larger than its values": (dims(2**31, 2**31), "values do not match its shape"),
    "a negative shape": (dims(-4, -1, 3), "values do not match its shape"),
    "a shape of many dimensions": (dims(*[1] * 9), "values do not match its shape"),
    "text": (text, "the field 6 of TensorProto"),
    "a tensor of another type": (doubles, "a tensor of the type 11"),
    "values outside raw_data": (apart, "the field 7 of TensorProto"),
}  # fmt: skip


def test_model_as_written_by_the_export_is_accepted():
    model = build()
    onnx.checker.check_model(model)
    check_graph(model.SerializeToString())
    integer(MAX_INTEGER, np.int64)(model)
    check_graph(model.SerializeToString())


@pytest.mark.parametrize("lie", [*REFUSED])
def test_model_that_the_export_never_writes_is_refused(lie):
    change, message = REFUSED[lie]
    model = build()
    change(model)
    with pytest.raises(CheckpointError) as caught:
        check_graph(model.SerializeToString())
    assert message in str(caught.value) and len(str(caught.value)) < 250


def tagged(number: int, wire: int, rest: bytes) -> bytes:
    return bytes([number << 3 | wire]) + rest


@pytest.mark.parametrize(
    "more",
    [
        b"\x80",  # a key without an end
        b"\x80" * 11 + b"\x01",
        tagged(0, 0, b"\x01"),  # field 0
        tagged(2, 2, b"\x05ab"),  # a value that ends after the file
        tagged(2, 2, b"\xff" * 9 + b"\x01"),
        tagged(1, 5, b"ab"),
        tagged(2, 3, b""),  # a group
        tagged(7, 0, b"\x01"),  # a graph that is a number
        tagged(7, 2, b"\x02" + tagged(1, 0, b"\x01")),
        tagged(7, 2, b"\x04" + tagged(1, 2, b"\x02") + tagged(4, 0, b"\x01")),
    ],
)
def test_bytes_that_are_no_message_are_refused(more):
    with pytest.raises(CheckpointError, match="is not a valid ONNX file"):
        check_graph(build().SerializeToString() + more)


def test_location_of_more_than_32_bits_is_refused():
    """Protobuf keeps the lowest 32 bits of this number, which mean EXTERNAL."""
    tensor = tagged(14, 0, b"\x81\x80\x80\x80\x10")
    graph = tagged(5, 2, bytes([len(tensor)])) + tensor
    with pytest.raises(CheckpointError, match="weights in another file"):
        check_graph(tagged(7, 2, bytes([len(graph)])) + graph)


@pytest.mark.slow
def test_file_of_millions_of_fields_is_refused():
    with pytest.raises(CheckpointError, match="the limit"):
        check_graph(tagged(1, 0, b"\x08") * (MAX_FIELDS + 1))


def test_format_of_onnx_runtime_is_refused():
    """ONNX Runtime recognizes its own format by these four bytes, which can be in the name of a producer."""
    data = tagged(2, 2, b"\x07ab") + b"ORTMx"
    onnx.load_model_from_string(data)
    with pytest.raises(CheckpointError, match="format of ONNX Runtime"):
        check_graph(data)


def test_damaged_bytes_raise_no_other_error():
    data, rng = build().SerializeToString(), random.Random(0)
    for end in range(len(data)):
        damaged = bytearray(data[: end or None])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        for attempt in (data[:end], bytes(damaged)):
            with contextlib.suppress(CheckpointError):
                check_graph(attempt)
