"""Rounding of one weight by ONNX Runtime's MatMulNBits quantizer, restored by its own kernel. Knows no files."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch import Tensor

OPSET = 21


@dataclass(frozen=True)
class Quantized:
    """A graph of one product, whose initializers are what is stored."""

    graph: ModelProto
    columns: int


def quantize(weight: Tensor, bits: int, block: int, algorithm: str = "default") -> Quantized:
    """Blocks along the inputs; with zero points, as it comes."""
    run = MatMulNBitsQuantizer(product(weight), bits=bits, block_size=block, algo_config=config(bits, block, algorithm))
    run.process()
    return Quantized(run.model.model, weight.shape[1])


def config(bits: int, block: int, algorithm: str) -> Any:
    if algorithm == "hqq":
        return HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    if algorithm == "k_quant":
        return KQuantWeightOnlyQuantConfig()
    return DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=bits)


def product(weight: Tensor) -> ModelProto:
    """y = x W^T."""
    rows, columns = weight.shape
    held = numpy_helper.from_array(np.ascontiguousarray(weight.numpy().T), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", s]) for n, s in (("x", columns), ("y", rows)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], "g", [x], [y], [held])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def stored(quantized: Quantized) -> list[Tensor]:
    return [torch.from_numpy(numpy_helper.to_array(held).copy()) for held in quantized.graph.graph.initializer]


def restore(quantized: Quantized) -> Tensor:
    """What the product is of each unit vector."""
    try:
        session = InferenceSession(quantized.graph.SerializeToString(), providers=["CPUExecutionProvider"])
    except Fail as error:
        raise RuntimeError(str(error).rpartition("was false. ")[2]) from error  # behind the place in its source
    units = np.eye(quantized.columns, dtype=np.float32)
    return torch.from_numpy(session.run(None, {"x": units})[0].T.copy())
