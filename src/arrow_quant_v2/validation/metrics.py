"""How far one model's tensors are from another's: formulas alone. Knows neither models nor files.

`a` is always the original's, `b` the other's, of one shape. Sums are float64, so that they do not depend on length.
Where `b` holds NaN or infinity it is as far as can be: cosine 0, error infinite.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

WINDOW, SPREAD = 11, 1.5  # of SSIM, pixels: as its authors have them
K1, K2 = 0.01, 0.03  # of SSIM likewise
MELS, FRAME, HOP = 64, 1024, 256  # bands; samples
QUIETEST = 1e-10  # power below which a band is silence: -100 dB


def row_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(rows,) of sum(a b) / (|a| |b|) for a and b (rows, width); 1 where both are zero, 0 where one is."""
    a, b = a.double(), b.double()
    bad = ~b.isfinite().all(dim=1)
    b = b.masked_fill(bad[:, None], 0.0)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    both_zero = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0) & ~bad
    products: torch.Tensor = (a * b).sum(dim=1)
    cosines = (products / lengths.clamp(min=torch.finfo(torch.float64).tiny)).clamp(-1.0, 1.0)
    return torch.where(both_zero, 1.0, cosines)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """sum(a b) / (|a| |b|) over all elements, from -1 to 1."""
    return float(row_cosines(a.reshape(1, -1), b.reshape(1, -1)))


def squares(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """|a - b|^2 and |a|^2, to be added up before `ratio`."""
    difference = (a.double() - b.double()).square().sum()
    return (float(difference) if difference.isfinite() else math.inf), float(a.double().square().sum())


def ratio(difference: float, original: float) -> float:
    """|a - b|^2 / |a|^2, no unit; 0 where nothing differs."""
    if difference == 0.0:
        return 0.0
    return difference / original if original else math.inf


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b|^2 / |a|^2 over all elements, no unit; 0: equal, 1: as large as the original itself."""
    return ratio(*squares(a, b))


def decibels(error: float) -> float:
    """-10 log10(error) in dB: what a relative error is as SQNR; infinite for 0."""
    if error == 0.0:
        return math.inf
    return -10.0 * math.log10(error) if math.isfinite(error) else -math.inf


def sqnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Signal to quantization noise, 10 log10(|a|^2 / |a - b|^2) in dB; of sounds this is their SNR."""
    return decibels(relative_error(a, b))


# Text


def row_divergences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(rows,) of KL(p || q) = sum p (log p - log q) in nats, p and q the softmax of logits a and b (rows, tokens)."""
    p, q = a.double().log_softmax(dim=-1), b.double().log_softmax(dim=-1)
    found = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(dim=-1)
    return found.nan_to_num(nan=math.inf, posinf=math.inf).clamp(min=0.0)


def kl_divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over the rows of KL(p || q), in nats a token."""
    return float(row_divergences(a, b).mean())


def row_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(rows,) of -log p(token) in nats, p the softmax of logits (rows, vocabulary)."""
    chosen = logits.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    return (-chosen).nan_to_num(nan=math.inf, posinf=math.inf)


def nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean of -log p(token), in nats a token."""
    return float(row_losses(logits, tokens).mean())


def perplexity(loss: float) -> float:
    """E to the power of a mean loss in nats a token: among how many tokens the model hesitates."""
    return math.exp(loss) if loss < 700.0 else math.inf  # noqa: PLR2004 - beyond, exp is larger than any float


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of places, from 0 to 1, where both hold the same token."""
    return float((a == b).double().mean()) if a.numel() else 1.0


# Embeddings


def retrieval_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of rows of (n, width) whose nearest other row by cosine is the same one in both, from 0 to 1."""
    return agreement(_nearest(a), _nearest(b))


def _nearest(rows: torch.Tensor) -> torch.Tensor:
    units = F.normalize(rows.double().nan_to_num(), dim=1)
    return (units @ units.T).fill_diagonal_(-math.inf).argmax(dim=1)


# Pictures


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float = 1.0) -> float:
    """10 log10(peak^2 / mean (a - b)^2) in dB, `peak` the width of the range of values; infinite for equal ones."""
    return decibels(float((a.double() - b.double()).square().mean()) / peak**2)


def ssim(a: torch.Tensor, b: torch.Tensor, peak: float = 1.0) -> float:
    """Structural similarity of pictures (channels, height, width), up to 1 (Wang et al., 2004).

    The mean over all windows, Gaussian of 11 pixels and sigma 1.5, of
    (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2)), C1 = (.01 peak)^2, C2 = (.03 peak)^2.
    """
    a, b = a.double()[:, None], b.double()[:, None]
    window = _gaussian(min(WINDOW, *a.shape[-2:]))
    mean_a, mean_b = _blurred(a, window), _blurred(b, window)
    spread_a, spread_b = _blurred(a * a, window) - mean_a**2, _blurred(b * b, window) - mean_b**2
    shared = _blurred(a * b, window) - mean_a * mean_b
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2))).mean())


def _gaussian(size: int) -> torch.Tensor:
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(places**2) / (2 * SPREAD**2))
    return (line / line.sum()).outer(line / line.sum())[None, None]


def _blurred(pictures: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    return F.conv2d(pictures, window)


# Sounds


def log_mel_distance(a: torch.Tensor, b: torch.Tensor, rate: int) -> float:
    """Mean |10 log10 M(a) - 10 log10 M(b)| in dB over frames and bands, M the power in 64 mel bands.

    Sounds are (samples,) or (channels, samples) of `rate` samples a second; frames have 1024 samples, every 256.
    """
    bands = mel_bands(rate)
    return float((_log_mel(a, bands) - _log_mel(b, bands)).abs().mean())


def _log_mel(sound: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    sound = sound.double().reshape(-1, sound.shape[-1])
    sound = F.pad(sound, (0, max(0, FRAME - sound.shape[-1])))
    window = torch.hann_window(FRAME, dtype=torch.float64)
    spectrum = torch.stft(sound, FRAME, HOP, window=window, center=False, return_complex=True)
    power = spectrum.abs().square() / window.square().sum()
    return 10.0 * torch.log10((bands @ power).clamp(min=QUIETEST))


def mel_bands(rate: int) -> torch.Tensor:
    """(64, 513): the weight of each frequency in triangles, evenly wide on the scale 2595 log10(1 + f / 700)."""
    top = 2595.0 * math.log10(1.0 + rate / 2.0 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, MELS + 2, dtype=torch.float64) / 2595.0) - 1.0)
    frequencies = torch.linspace(0.0, rate / 2.0, FRAME // 2 + 1, dtype=torch.float64)
    low, middle, high = (edges[i : i + MELS, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0.0)
