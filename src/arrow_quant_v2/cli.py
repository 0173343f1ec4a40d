"""The `arrow-quant` command: parse, call one method of the API, print; holds no work of its own.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 quality bar missed, 130 interrupted. Torch is loaded by the commands that
need it, so that `--help` is quick.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from arrow_quant_v2 import __version__
from arrow_quant_v2.cli_progress import told_progress, told_steps
from arrow_quant_v2.cli_quality import print_comparison, print_validation
from arrow_quant_v2.cli_results import (
    files_told,
    print_diagnosis,
    print_generation,
    print_layers,
    print_result,
    print_stats,
)
from arrow_quant_v2.config import DiffusionQuantConfig, widths_of
from arrow_quant_v2.errors import ArrowQuantError, ConfigurationError, InterruptedRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from arrow_quant_v2.api import ArrowQuantV2

FAILED, USAGE, BAR_MISSED, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="arrow-quant",
    help="Diffusion models in 2, 4 or 8 bits: quantize, inspect, validate, convert, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelPath = Annotated[
    Path, typer.Argument(help="a model folder (diffusers, transformers, .npy, ours) or a weight file")
]
Quantized = Annotated[Path, typer.Argument(help="a folder that quantize wrote")]
NewFolder = Annotated[Path, typer.Argument(help="a folder that does not exist yet")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
Profile = Annotated[str | None, typer.Option(help="edge (2 bits), local (4 bits, the default) or cloud (8 bits)")]
Config = Annotated[Path | None, typer.Option(help="a YAML file of settings; options given here are stronger")]
BitWidth = Annotated[int | None, typer.Option("--bits", help="2, 4 or 8")]
Modality = Annotated[str | None, typer.Option(help="text, code, image or audio; found out from the model by default")]
GroupSize = Annotated[str | None, typer.Option(help="columns that share a scale, a multiple of 8, or 'row'")]
Method = Annotated[
    str | None,
    typer.Option(help="r2q, gptq, clip or rtn; by default r2q for text and code, gptq for images and audio"),
]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="texts, token ids, prompts or inputs; the model's own otherwise")
]
NoCalibration = Annotated[bool, typer.Option("--no-calibration", help="from the weights alone, which is quick")]
Samples = Annotated[int | None, typer.Option("--samples", help="samples that calibration looks at")]
Stats = Annotated[Path | None, typer.Option("--stats", help="a folder that calibrate wrote; the model is not run")]
MaskToken = Annotated[int | None, typer.Option(help="id of the token that hides another; the tokenizer tells it too")]
Plans = Annotated[
    int | None, typer.Option(help="whole plans that are made and judged, where a size is asked for; 1: none is judged")
]
Tune = Annotated[int | None, typer.Option(help="steps of tuning codes and scales by the model's outputs")]
Seed = Annotated[int | None, typer.Option(help="of every random choice of calibration")]
Device = Annotated[str | None, typer.Option(help="where the model runs and layers are fitted: cpu or cuda")]
Symmetric = Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="without or with zero points")]
Smooth = Annotated[
    bool | None,
    typer.Option("--smooth", help="equalize channels for inputs in 8 bits, too: load(..., activations='static')"),
]
Component = Annotated[str | None, typer.Option(help="the part of a pipeline to quantize; its denoiser by default")]
MinAccuracy = Annotated[
    float | None,
    typer.Option(help="cosine that outputs must reach, beside the original's; weights where it cannot be run"),
]
MinOutput = Annotated[
    float | None, typer.Option("--min-accuracy", help="the bar: cosine of outputs, or of each layer's weight")
]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="run nothing; models of any size")]
HeldOut = Annotated[
    Path | None, typer.Option("--samples", help="held-out texts, prompts or inputs; the model's own otherwise")
]
Count = Annotated[int | None, typer.Option("--count", help="samples that both models are shown")]
HeldOutSeed = Annotated[int | None, typer.Option("--seed", help="of every choice; by default not calibration's")]
Pairs = Annotated[int, typer.Option("--pairs", help="texts, pictures or sounds that both make from one seed")]
Judge = Annotated[Path | None, typer.Option("--judge", help="a causal language model that reads the texts they make")]
MaxMemory = Annotated[str | None, typer.Option(help="memory that the whole process may take, such as 4GB")]
Threads = Annotated[int | None, typer.Option(help="cores to use; all by default")]
Keep = Annotated[list[str] | None, typer.Option(help="pattern of tensor names that stay as they are; may be repeated")]
LayerBits = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=BITS", help="2, 4, 8 or 16 (as it is) for layers of a name or pattern; may be repeated"),
]
Fallback = Annotated[
    str | None, typer.Option(help="what gets more bits below --min-accuracy: layer (those that hurt), model or none")
]
TargetSize = Annotated[
    str | None, typer.Option(help="bytes of the weight files, such as 3GB: each layer gets the width that serves best")
]
TargetBits = Annotated[
    float | None, typer.Option(help="the same by stored bits per weight on the average, such as 2.5")
]
FailFast = Annotated[bool | None, typer.Option("--fail-fast", help="stop at the first layer below --min-accuracy")]


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    warnings.showwarning = _show_warning
    try:
        app(standalone_mode=True)
    except InterruptedRunError as stopped:
        _leave(INTERRUPTED, str(stopped))
    except ConfigurationError as error:
        _leave(USAGE, f"error: {error}")
    except ArrowQuantError as error:
        _leave(FAILED, f"error: {error}")
    raise SystemExit(0)


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(f"arrow-quant {__version__}")
        raise typer.Exit


@app.command()
def quantize(
    model: ModelPath,
    out: NewFolder,
    *,
    bits: BitWidth = None,
    profile: Profile = None,
    config: Config = None,
    modality: Modality = None,
    group_size: GroupSize = None,
    method: Method = None,
    symmetric: Symmetric = None,
    component: Component = None,
    min_accuracy: MinAccuracy = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    keep: Keep = None,
    layer_bits: LayerBits = None,
    fallback: Fallback = None,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    fail_fast: FailFast = None,
    calibration: Calibration = None,
    no_calibration: NoCalibration = False,
    stats: Stats = None,
    samples: Samples = None,
    mask_token: MaskToken = None,
    plans: Plans = None,
    tune: Tune = None,
    smooth: Smooth = None,
    seed: Seed = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a quantized model that lies there")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model into a new folder of Parquet files; run it again to go on after an interruption."""
    asked = _config(
        config,
        deployment_profile=profile,
        bit_width=bits,
        modality=modality,
        group_size=_group(group_size),
        method=method,
        symmetric=symmetric,
        component=component,
        min_accuracy=min_accuracy,
        max_memory=max_memory,
        threads=threads,
        keep=keep or None,
        layer_bit_widths=widths_of(layer_bits) if layer_bits else None,
        fallback=fallback,
        target_size=_size(target_size),
        target_bits=target_bits,
        fail_fast=fail_fast,
        calibration_data=None if calibration is None else str(calibration),
        enable_calibration=False if no_calibration else None,
        stats=None if stats is None else str(stats),
        calibration_samples=samples,
        mask_token=mask_token,
        whole_plans=plans,
        tuning_steps=tune,
        activation_smoothing=smooth,
        seed=seed,
        device=device,
    )
    with _stopping_gently() as should_stop, told_progress(quiet=quiet) as report:
        result = _api().quantize_diffusion_model(
            model, out, asked, report, overwrite=overwrite, should_stop=should_stop
        )
    result["decisions"] = [asdict(decision) for decision in result["decisions"]]
    print_result(result) if not as_json else _print_json(result)
    if not result["passed"]:
        raise typer.Exit(BAR_MISSED)


@app.command()
def calibrate(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(help="a new folder for the stats, or one that holds these very stats")],
    *,
    profile: Profile = None,
    config: Config = None,
    modality: Modality = None,
    component: Component = None,
    threads: Threads = None,
    calibration: Calibration = None,
    samples: Samples = None,
    mask_token: MaskToken = None,
    seed: Seed = None,
    device: Device = None,
    like: Annotated[
        Path | None, typer.Option(help="stats whose time groups to use, so that both can be merged")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="sum time groups up: smaller, seldom mergeable")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace stats that lie there")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Keep what goes into the layers of a model, for quantize --stats; see merge-stats to add such folders up."""
    asked = _config(
        config,
        deployment_profile=profile,
        modality=modality,
        component=component,
        threads=threads,
        calibration_data=None if calibration is None else str(calibration),
        calibration_samples=samples,
        mask_token=mask_token,
        seed=seed,
        device=device,
    )
    with _interruptible(), told_progress(quiet=quiet) as report:
        found = _api().calibrate(model, out, asked, report, compact=compact, like=like, overwrite=overwrite)
    print_stats(found) if not as_json else _print_json(found)


@app.command("merge-stats")
def merge_stats(
    stats: Annotated[list[Path], typer.Argument(help="folders that calibrate wrote, and the new one as the last")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace stats that lie there")] = False,
    as_json: AsJson = False,
) -> None:
    """Add up stats of the same model and settings that were made from different samples: STATS STATS ... OUT."""
    with _interruptible():
        found = _api().merge_stats(stats[:-1], stats[-1], overwrite=overwrite)
    print_stats(found) if not as_json else _print_json(found)


@app.command()
def doctor(
    model: ModelPath,
    *,
    bits: BitWidth = None,
    profile: Profile = None,
    config: Config = None,
    modality: Modality = None,
    group_size: GroupSize = None,
    method: Method = None,
    symmetric: Symmetric = None,
    component: Component = None,
    min_accuracy: MinAccuracy = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    keep: Keep = None,
    layer_bits: LayerBits = None,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    calibration: Calibration = None,
    no_calibration: NoCalibration = False,
    stats: Stats = None,
    samples: Samples = None,
    plans: Plans = None,
    tune: Tune = None,
    smooth: Smooth = None,
    device: Device = None,
    disk: Annotated[Path, typer.Option(help="a folder on the disk that the output will go to")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Tell what quantize would do and need, before any work: size, memory, disk, skips."""
    asked = _config(
        config,
        deployment_profile=profile,
        bit_width=bits,
        modality=modality,
        group_size=_group(group_size),
        method=method,
        symmetric=symmetric,
        component=component,
        min_accuracy=min_accuracy,
        max_memory=max_memory,
        threads=threads,
        keep=keep or None,
        layer_bit_widths=widths_of(layer_bits) if layer_bits else None,
        target_size=_size(target_size),
        target_bits=target_bits,
        calibration_data=None if calibration is None else str(calibration),
        enable_calibration=False if no_calibration else None,
        stats=None if stats is None else str(stats),
        calibration_samples=samples,
        whole_plans=plans,
        tuning_steps=tune,
        activation_smoothing=smooth,
        device=device,
    )
    with _interruptible():
        found = _api().doctor(model, asked, disk=disk)
    print_diagnosis(found) if not as_json else _print_json(found)
    if found["verdict"] == "will not fit":
        raise typer.Exit(FAILED)


@app.command()
def inspect(model: Quantized, *, as_json: AsJson = False) -> None:
    """List the layers of a quantized model: shape, bits, bits per weight, cosine, decision."""
    with _interruptible():
        found = _api().inspect(model)
    print_layers(found) if not as_json else _print_json(found)


@app.command()
def validate(
    original: ModelPath,
    quantized: Annotated[Path, typer.Argument(help="a copy of it: quantized, converted, or another quantizer's")],
    *,
    min_accuracy: MinOutput = None,
    component: Component = None,
    weights_only: WeightsOnly = False,
    samples: HeldOut = None,
    count: Count = None,
    seed: HeldOutSeed = None,
    mask_token: MaskToken = None,
    modality: Modality = None,
    pairs: Pairs = 2,
    judge: Judge = None,
    layers: Annotated[int, typer.Option(help="how many of the worst layers are shown; --json has all")] = 10,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare two models by their outputs, or where they cannot be run by their weights; exit 3 below the bar."""
    with _interruptible(), told_progress(quiet=quiet) as report:
        found = _api().validate_quality(
            original, quantized, min_accuracy=min_accuracy, component=component, progress_callback=report,
            weights_only=weights_only, samples=samples, count=count, seed=seed, mask_token=mask_token,
            modality=modality, pairs=pairs, judge=judge,
        )  # fmt: skip
    print_validation(found, layers) if not as_json else _print_json(found)
    if not found["passed"]:
        raise typer.Exit(BAR_MISSED)


@app.command("report")
def write_report(
    model: Quantized,
    *,
    original: Annotated[Path | None, typer.Option(help="the model that it was made from, to compare with")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write report.html, report.json and the model card README.md into a folder that quantize wrote."""
    with _interruptible(), told_progress(quiet=quiet) as report:
        found = _api().report(model, original, progress_callback=report)
    if as_json:
        _print_json(found["figures"])
        return
    for line in (*found["files"], *found["notes"]):
        typer.echo(line)


@app.command()
def compare(
    quantized: Annotated[list[Path], typer.Argument(help="copies of one model: quantized, converted, or of others")],
    *,
    original: Annotated[Path, typer.Option(help="the model that they are copies of")],
    min_accuracy: MinOutput = None,
    component: Component = None,
    weights_only: WeightsOnly = False,
    samples: HeldOut = None,
    count: Count = None,
    seed: HeldOutSeed = None,
    mask_token: MaskToken = None,
    modality: Modality = None,
    pairs: Pairs = 2,
    judge: Judge = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show several quantized models side by side: bits per weight, size, accuracy, and every figure of validate."""
    with _interruptible(), told_progress(quiet=quiet) as report:
        asked = {} if seed is None else {"seed": seed}
        found = _api().compare(
            original, quantized, min_accuracy=min_accuracy, component=component, progress_callback=report,
            weights_only=weights_only, samples=samples, count=count, mask_token=mask_token, modality=modality,
            pairs=pairs, judge=judge, **asked,
        )  # fmt: skip
    print_comparison(found) if not as_json else _print_json(found)


@app.command()
def convert(model: Quantized, out: NewFolder, *, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Dequantize into safetensors that transformers and diffusers load."""
    with _interruptible(), told_progress(quiet=quiet) as report:
        found = _api().convert(model, out, progress_callback=report)
    if as_json:
        _print_json(found)
    else:
        typer.echo(f"{found['path']}: {found['size_mb']:.1f} MB in {files_told(found)}")


@app.command()
def generate(
    model: Quantized,
    *,
    prompt: Annotated[
        str | None, typer.Option(help="what a text begins with or a picture shows; or the number of a class")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same one gives the same result")] = 0,
    steps: Annotated[int | None, typer.Option(help="of denoising; for text one for each token by default")] = None,
    length: Annotated[int | None, typer.Option(help="new tokens of a text; 128 by default, or what fits")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="of text: 1 by default for masked text, 0 takes the likeliest tokens")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="tokens of a block of text; blocks are finished from left to right")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="the prompt is a message, in the tokenizer's chat template")
    ] = False,
    negative_prompt: Annotated[str | None, typer.Option(help="what a pipeline is led away from")] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="SCALE", help="how closely a pipeline follows its prompt")
    ] = None,
    height: Annotated[int | None, typer.Option(help="of a picture or video, in pixels")] = None,
    width: Annotated[int | None, typer.Option(help="of a picture or video, in pixels")] = None,
    frames: Annotated[int | None, typer.Option(help="pictures of a video")] = None,
    fps: Annotated[float | None, typer.Option(help="pictures of a video in a second")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="a file: *.txt, *.png, *.wav, or for videos *.webp, *.png, *.gif; generated.* by default"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that lies there")] = False,
    device: Annotated[str, typer.Option(help="where to run, such as cuda")] = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a quantized model: text behind a prompt on stdout, or a picture, a video or a sound in a file."""
    with _interruptible(), told_steps(quiet=quiet) as told:
        made = _api().generate(
            model, prompt, seed=seed, steps=steps, length=length, temperature=temperature, block_length=block_length,
            chat=chat, negative_prompt=negative_prompt, guidance=guidance, height=height, width=width, frames=frames,
            fps=fps, output_path=out, overwrite=overwrite, device=device, step_callback=told,
        )  # fmt: skip
    print_generation(made) if not as_json else _print_json(made)


def _api() -> ArrowQuantV2:
    from arrow_quant_v2.api import ArrowQuantV2  # noqa: PLC0415 - torch takes seconds, --help must not

    return ArrowQuantV2()


def _config(file: Path | None, **options: Any) -> DiffusionQuantConfig:
    """The settings of a YAML file, and those options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    if file is not None:
        return DiffusionQuantConfig.from_yaml(file, **given)
    return DiffusionQuantConfig(**given)


def _size(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _group(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


@contextmanager
def _stopping_gently() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks the run to stop after the layer in hand; the second one stops it at once."""
    asked: list[bool] = []

    def note(_signal: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        os.write(2, b"\nstopping after this layer; press Ctrl-C again to stop at once\n")  # echo is not reentrant

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    except (InterruptedRunError, KeyboardInterrupt) as stopped:
        said = str(stopped) or "stopped; finished layers are kept"
        raise InterruptedRunError(f"{said}\ngo on with: {_this_command()}") from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stops at once, by our own error: what Typer makes of it depends on its version."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; nothing was written") from None


def _this_command() -> str:
    return shlex.join(["arrow-quant", *sys.argv[1:]])


def _leave(code: int, message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise SystemExit(code)


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    typer.echo(f"warning: {message}", err=True)


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
