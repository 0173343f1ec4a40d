"""Settings of a small run that keeps to a size, and a program that is killed at one of its messages; runs nothing.

Apart from the tests that share it: a test module that another one imports is there twice, and an operator of torch that
it defines destroys the one that calls still go to.
"""

from __future__ import annotations

from typing import Any

CALIBRATED = {"ARROW_QUANT_ENABLE_CALIBRATION": "true"}
SMALL: dict[str, Any] = {
    "target_bits": 4.0, "group_size": 16, "calibration_samples": 6, "calibration_tokens": 0, "threads": 2,
    "enable_calibration": True, "min_accuracy": 0.0,
}  # fmt: skip
KILLED = """
import json, os, re, signal, sys
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
def report(message, _):
    if re.match(sys.argv[4], message):
        os.kill(os.getpid(), signal.SIGKILL)
config = DiffusionQuantConfig(**json.loads(sys.argv[3]))
ArrowQuantV2().quantize_diffusion_model(sys.argv[1], sys.argv[2], config, report)
"""
