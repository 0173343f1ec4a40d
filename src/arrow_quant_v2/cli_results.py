"""What `arrow-quant` says of a run, a diagnosis, layers, stats and what was generated; computes nothing."""

from __future__ import annotations

from typing import Any

import typer

from arrow_quant_v2.cli_tables import print_table


def print_result(result: dict[str, Any]) -> None:
    """What quantize did: sizes, widths, how close it came, what was kept."""
    cosine, bits = result["cosine_similarity"], result["bits_per_weight"]
    typer.echo(
        f"{result['quantized_path']}: {result['model_size_mb']:.2f} MB, {result['compression_ratio']:.2f} times smaller"
    )
    typer.echo(f"  {result['modality']}, {result['quantization_time_s']:.1f} s, {_calibration(result)}")
    if cosine is None:
        typer.echo("  nothing was quantized: every tensor is kept as it is")
    else:
        typer.echo(f"  {_widths(result)} at {bits:.3f} bits per weight, everything stored counted")
        typer.echo(
            f"  weight cosine {cosine:.5f} on average, {result['worst_cosine_similarity']:.5f} for the worst layer"
        )
        typer.echo(f"  {_verdict(result)}")
    for reason, count in _kept(result["decisions"]).items():
        typer.echo(f"  {count} kept: {reason}")
    typer.echo(f"  report: {result['report']}")


def _widths(result: dict[str, Any]) -> str:
    """Like "39 layers", or "36 layers int2, 3 int4" where some have other widths."""
    if len(result["bit_widths"]) == 1:
        return f"{result['quantized_layers']} layers"
    counts = [f"{count} int{bits}" for bits, count in result["bit_widths"].items()]
    return f"{result['quantized_layers']} layers ({', '.join(counts)})"


def _verdict(result: dict[str, Any]) -> str:
    """What the bar was held against, and how that ended."""
    reached = "" if result["accuracy"] is None else f" {result['accuracy']:.5f}"
    fallen = sum(result["fallbacks_per_method"].values())
    layers = f", {fallen} layers fell back" if fallen else ""
    return f"{result['judged_by']}{reached}: bar {result['min_accuracy']} {_passed(result)}{layers}"


def _passed(result: dict[str, Any]) -> str:
    return "passed" if result["passed"] else "MISSED"


def print_generation(made: dict[str, Any]) -> None:
    """The result on stdout, and how it was made on stderr."""
    typer.echo(made["path"] if made["text"] is None else made["text"])
    speed = f"{made['seconds_per_step']:.3g} s/step"
    if made["tokens_per_second"] is not None:
        speed = f"{made['tokens']} tokens, {made['tokens_per_second']:.1f} tokens/s, {speed}"
    memory = "" if made["peak_memory_mb"] is None else f", peak memory {made['peak_memory_mb']:.0f} MB"
    typer.echo(f"{made['steps']} steps in {made['seconds']:.1f} s, {speed}{memory}", err=True)


def print_stats(found: dict[str, Any]) -> None:
    """What calibrate kept."""
    done = "were there already" if found["reused"] else f"{found['seconds']:.1f} s"
    groups, layers = len(found["time_groups"]), found["layers"]
    typer.echo(f"{found['path']}: stats of {layers} layers, {found['size_mb']:.2f} MB, {done}")
    typer.echo(f"  {found['origin']}, {groups} time group" + "s" * (groups != 1))


def _calibration(result: dict[str, Any]) -> str:
    shown = result["calibration"]
    if not shown:
        return "from the weights alone"
    if "stats" in shown:
        return f"calibrated on {shown['origin']}"
    return f"calibrated on {shown['samples']} samples: {shown['origin']}"


def _kept(decisions: list[dict[str, Any]]) -> dict[str, int]:
    reasons = [decision["because"] for decision in decisions if decision["kind"] == "kept"]
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def print_diagnosis(found: dict[str, Any]) -> None:
    """What quantize would do: every layer, sizes, what is possible, memory, disk, the device."""
    rows = [
        (x["layer_name"], _shape(x), x["dtype"], x["got"], f"{x['bits_per_weight']:.3f}", x["because"])
        for x in found["layers"]
    ]
    print_table(("layer", "shape", "dtype", "becomes", "bits/weight", "because"), rows)
    size, ratio = found["predicted_size_mb"], found["predicted_compression_ratio"]
    typer.echo(f"{found['modality']}: {found['source_mb']:.2f} MB become {size:.2f} MB, {ratio:.2f} times smaller")
    if found["reach"] is not None:
        low, high = (f"{found['reach'][key]:.2f} MB" for key in ("smallest_mb", "largest_mb"))
        few, many = (f"{found['reach'][f'{key}_bits_per_weight']:.2f}" for key in ("smallest", "largest"))
        typer.echo(
            f"possible: {low} to {high}, {few} to {many} bits per weight; the run measures which layers get them"
        )
    count = found["calibrated_layers"]
    typer.echo(f"calibration: {found['calibration']}" + (f", about {count} layers" if count else ""))
    for what, needed, given, verdict in (
        ("memory", found["predicted_peak_memory_mb"], found["available_memory_mb"], found["memory_verdict"]),
        ("disk", found["needed_disk_mb"], found["free_disk_mb"], found["disk_verdict"]),
    ):
        typer.echo(f"{what}: {needed:.0f} MB needed, {given:.0f} MB there: {verdict}")
    typer.echo(_device_line(found))


def _device_line(found: dict[str, Any]) -> str:
    """On what the model would run, and what else there is."""
    one = found["accelerator"]
    if one is None:
        others = ", ".join(name for name in found["devices"] if name != "cpu")
        return f"device: cpu; --device can be {others}" if others else "device: cpu, there is no other"
    free = "unknown" if one["free_memory_mb"] is None else f"{one['free_memory_mb']:.0f} MB"
    named = f"{one['device']}{one['name'] and ' '}{one['name']}"
    told = one["verdict"] if one["verdict"] == "fits" else "weights are read from the disk block by block"
    return f"device: {named}: {one['needed_memory_mb']:.0f} MB needed, {free} free: {told}"


def print_layers(found: dict[str, Any]) -> None:
    """Every layer of a quantized model, and its files."""
    rows = [
        (
            x["layer_name"],
            _shape(x),
            x["quant_type"],
            f"{x['bits_per_weight']:.3f}",
            _cosine(x["cosine_similarity"]),
            x["decision"],
        )
        for x in found["layers"]
    ]
    print_table(("layer", "shape", "bits", "bits/weight", "weight cosine", "decision"), rows)
    total, bits = sum(found["files"].values()), found["quantized_bits_per_weight"]
    quantized = f", quantized layers {bits:.3f}" if bits is not None else ""
    typer.echo(f"{len(rows)} layers, {found['parameters']:,} parameters, {total / 1e6:.2f} MB in {files_told(found)}:")
    typer.echo(f"  {found['file_bits_per_weight']:.3f} bits per parameter{quantized}")


def files_told(found: dict[str, Any]) -> str:
    """How many files, in words."""
    count = len(found["files"])
    return f"{count} file" + "s" * (count != 1)


def _shape(layer: dict[str, Any]) -> str:
    return "x".join(map(str, layer["shape"])) or "scalar"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
