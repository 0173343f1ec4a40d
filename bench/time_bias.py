"""What a bias of the outputs for each time group would be worth, for weights that were rounded by themselves.

    python bench/time_bias.py terrain antiberty [--samples N] [--bits 2] [--methods clip r2q]

Stats of the unquantized model give the mean input of each layer in each time group; the bias is (W - Q) times that
mean, of each group or of all ("one"), and kept where it lowers the error of the rows that were seen in the
group. It is added to the outputs while the model is measured, by the time that the model is called with. Beside it
stands what the same samples are worth where layers are fitted to them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from calibrated import SUBJECTS, Subject, Variant, module_of, quantized_module, row
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from real_models import MASK

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.calibration.stored_stats import KeptStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from arrow_quant_v2.time_groups import TimeGroups

CLOCKS = {
    "antiberty": lambda given: float((given["input_ids"] == MASK).float().mean()),
    "terrain": lambda given: float(given["sigma"][0]),
}


def kept_stats(subject: Subject, folder: Path, groups: int) -> KeptStats:
    config = DiffusionQuantConfig(**subject.settings, num_time_groups=groups)
    ArrowQuantV2().calibrate(subject.model, folder, config, calibration=subject.calibration, compact=True)
    return KeptStats(folder)


def biases(stats: KeptStats, subject: Subject, quantized: nn.Module, *, per_group: bool) -> dict[str, Tensor]:
    """Parameter -> (groups, out)."""
    opened = subject.opened()
    names: Mapping[str, str] = getattr(opened, "names", {})
    original = dict(module_of(subject).named_parameters(remove_duplicate=False))
    changed = dict(quantized.named_parameters(remove_duplicate=False))
    found = {}
    for number, entry in enumerate(stats.summary.inputs):
        seen = stats.read(number)
        means = seen.means if per_group else seen.sums.sum(0).div(seen.rows.sum()).float().expand_as(seen.means)
        for layer in entry.layers:
            place = names.get(layer, layer)
            left = (original[place] - changed[place]).detach().flatten(1)
            bias = means @ left.mT
            for group, rows in enumerate(seen.probes):
                missed = rows @ left.mT
                if float((missed - bias[group]).square().sum()) >= float(missed.square().sum()):
                    bias[group] = 0.0
            found[place] = bias
    return found


def corrected(module: nn.Module, found: Mapping[str, Tensor], groups: TimeGroups, name: str) -> nn.Module:
    """The module, which adds the biases of the time that it is called with."""
    now = [0]

    def starts(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        named = given or dict(zip(("noisy", "sigma", "difficulty"), args, strict=False))
        now[0] = groups.group_of(CLOCKS[name](named))

    def add(bias: Tensor) -> Any:
        def hook(_: nn.Module, __: object, outputs: Tensor) -> Tensor:
            own = bias[now[0]]
            return outputs + (own if outputs.shape[-1] == len(own) and outputs.ndim < 4 else own[:, None, None])

        return hook

    module.register_forward_pre_hook(starts, with_kwargs=True)
    for place, bias in found.items():
        module.get_submodule(place.rpartition(".")[0]).register_forward_hook(add(bias))
    return module


def main() -> None:
    """Measure and print, model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*CLOCKS, []], default=[])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=["clip", "r2q"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    for name in given.models or CLOCKS:
        make, samples = SUBJECTS[name]
        with tempfile.TemporaryDirectory() as work:
            subject = make(Path(work), given.samples or samples)
            stats = kept_stats(subject, Path(work) / "stats", given.groups)
            asked = {"bit_width": given.bits, "group_size": 64}
            for method in given.methods:
                alone = Variant(
                    f"{name} {method}, weights alone", asked | {"method": method, "enable_calibration": False}
                )
                Console(width=160).print(row(subject, alone, Path(work)))
                for words, per_group in (("one bias", False), ("a bias per time group", True)):
                    module = quantized_module(subject, Path(work) / "out")
                    found = biases(stats, subject, module, per_group=per_group)
                    measured = subject.measure(corrected(module, found, stats.groups, name))
                    Console(width=160).print({"variant": f"{alone.name}, {words}", **measured})
            fitted = Variant(f"{name}, fitted to the same samples", asked | {"num_time_groups": given.groups})
            Console(width=160).print(row(subject, fitted, Path(work)))


if __name__ == "__main__":
    main()
