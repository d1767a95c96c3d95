"""Quantizers: latents to codes and back, all behind one interface."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.collectives import broadcast_from_first, gather_rows
from lightning_modules.functional.sdf_vqvae.code_statistics import code_statistics, summed_over_processes
from lightning_modules.functional.sdf_vqvae.nearest_code import nearest_code_ids

CANDIDATES = 1024
"""Latents of a batch, of each process, among which dead codes find their new place."""


class Quantized(NamedTuple):
    """What became of N latents.

    Attributes:
        latents: [N, C] what the decoder sees; the gradient goes straight through to the encoder's latents.
        code_ids: [N] int64 their codes.
        codebook_loss: [N] how far codes are from latents, mean over channels; its gradient moves codes.
        commitment_loss: [N] the same number; its gradient moves latents.
    """

    latents: Float[Tensor, "latents channels"]
    code_ids: Int[Tensor, " latents"]
    codebook_loss: Float[Tensor, " latents"]
    commitment_loss: Float[Tensor, " latents"]


@dataclass(frozen=True)
class QuantizerSettings:
    """How latents become codes."""

    kind: Literal["ema", "plain", "l2", "projection", "sim", "fsq"] = "ema"
    """ema: codes follow the mean of their latents. plain: codes learn by gradient. l2: as ema, codes and latents on a
    sphere. projection: as ema, in few channels. sim: SimVQ, fixed codes times a trained matrix. fsq: finite scalars, no
    codebook. l2, projection and fsq want a VAE pretrained with the same kind, for they change what the decoder sees."""
    start: Literal["kmeans", "data", "none"] = "kmeans"
    """Where codes of ema, plain, l2 and projection begin: at means of training latents, at training latents, or close
    to zero, from where most never come into use."""
    decay: float = 0.97
    """Share of the running counts and sums that is kept from step to step."""
    revive_below: float = 0.05
    """A code whose running count falls below this share of the mean one moves to a latent of the batch; 0 = never."""
    revive_every: int = 10
    """Steps between two looks for such codes."""
    code_channels: int = 8
    """Of the codes of ``projection``."""
    levels: tuple[int, ...] = (8, 8, 8, 16)
    """Values a channel of ``fsq`` can take; their product is the number of codes."""
    seed: int = 0
    """Of where codes begin and where they move to."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("decay", 0 <= self.decay < 1),
            ("revive_below", 0 <= self.revive_below < 1),
            ("revive_every", self.revive_every >= 1),
            ("code_channels", self.code_channels >= 1),
            ("levels", bool(self.levels) and min(self.levels) >= 2),
        ):
            if not allowed:
                raise ValueError(
                    f"{name} of the quantizer is {getattr(self, name)}; allowed: decay and revive_below from 0 to "
                    "below 1, revive_every and code_channels from 1, levels from 2."
                )


class Quantizer(nn.Module, ABC):
    """Replaces each latent by one of ``num_codes`` vectors.

    Computes in float32 whatever the surroundings. ``learn`` is called once after each backward pass, by all processes
    at once; what it keeps is in buffers and parameters, is equal on all processes, and follows from the step.

    Args:
        num_codes: K.
        channels: Of latents as encoder and decoder know them.
    """

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.num_codes, self.channels = num_codes, channels

    @abstractmethod
    def quantize(self, latents: Float[Tensor, "latents channels"]) -> Quantized:
        """Finds the code of each latent."""

    @abstractmethod
    def look_up(self, code_ids: Int[Tensor, " latents"]) -> Float[Tensor, "latents channels"]:
        """Returns what the decoder sees for codes."""

    def codebook(self) -> Float[Tensor, "codes channels"]:
        """Returns what the decoder sees for each code."""
        return self.look_up(torch.arange(self.num_codes, device=next(self.parameters()).device))

    def continuous(self, latents: Float[Tensor, "latents channels"]) -> Float[Tensor, "latents channels"]:
        """Returns what the decoder sees where nothing is quantized, as in a VAE: what codes can come close to."""
        return latents

    @property
    def needs_start(self) -> bool:
        """Whether codes wait for training latents to begin at; waits for the device."""
        return False

    @property
    def learns_by_distance(self) -> bool:
        """Whether the codebook loss is all that trains it, so that frozen latents teach it without a decoder."""
        return False

    def start(self, latents: Float[Tensor, "latents channels"]) -> None:
        """Moves the codes to where the training latents are; each process gives its own."""

    def learn(
        self, latents: Float[Tensor, "latents channels"], code_ids: Int[Tensor, " latents"], step: int
    ) -> Int[Tensor, ""]:
        """Learns from a batch what gradients do not teach; returns how many dead codes were revived."""
        return code_ids.new_zeros(())


class CodebookQuantizer(Quantizer):
    """The nearest of ``num_codes`` trained vectors (van den Oord et al., 2017).

    ``ema`` codes are running sums over running counts; a code that is not used stays where it is, so that no term for
    empty codes is needed (the paper's Laplace smoothing pulls them to the origin). Otherwise the codebook loss trains
    them. Either way the codes are a parameter: with encoder and decoder frozen, a loss still has something to be
    differentiated by; ``learn`` drops the gradient of ``ema`` codes.

    Args:
        num_codes: K.
        channels: Of latents.
        settings: See there.
        ema: Whether codes follow the means of their latents.
        code_channels: Of codes, where they differ from the latents'.
    """

    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self,
        num_codes: int,
        channels: int,
        settings: QuantizerSettings,
        *,
        ema: bool,
        code_channels: int | None = None,
    ) -> None:
        super().__init__(num_codes, channels)
        self.settings, self.ema = settings, ema
        codes = (torch.rand(num_codes, code_channels or channels) * 2 - 1) / num_codes
        self.codes = nn.Parameter(codes)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", codes.clone())
        self.register_buffer("started", torch.tensor(settings.start == "none"))

    @override
    def quantize(self, latents: Float[Tensor, "latents channels"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            points = self._points(latents.float())
            codes = self._placed(self.codes)
            code_ids = nearest_code_ids(points.detach(), codes.detach())
            nearest = codes[code_ids]
            through = points + (nearest - points).detach()
            return Quantized(
                self._latents(through),
                code_ids,
                (nearest - points.detach()).square().mean(1),
                (points - nearest.detach()).square().mean(1),
            )

    @override
    def look_up(self, code_ids: Int[Tensor, " latents"]) -> Float[Tensor, "latents channels"]:
        with torch.autocast(code_ids.device.type, enabled=False):
            return self._latents(self._placed(self.codes)[code_ids])

    def _points(self, latents: Tensor) -> Tensor:
        """Returns latents in the space of the codes."""
        return latents

    def _latents(self, points: Tensor) -> Tensor:
        """Returns points of the space of the codes as the decoder sees them."""
        return points

    def _placed(self, codes: Tensor) -> Tensor:
        """Returns codes where they may lie."""
        return codes

    @override
    @property
    def needs_start(self) -> bool:
        return not bool(self.started)

    @override
    @property
    def learns_by_distance(self) -> bool:
        return True

    @override
    @torch.no_grad()
    def start(self, latents: Float[Tensor, "latents channels"]) -> None:
        """Begins at drawn latents, with ``kmeans`` at the means after ten of Lloyd's iterations from there.

        Raises:
            ValueError: If there are no latents at all, or some are not finite.
        """
        points = self._points(latents.float())
        seeds = torch.cat(gather_rows(points[_drawn(len(points), self.num_codes, self.settings.seed, _rank())]))
        if len(seeds) == 0 or not bool(seeds.isfinite().all()):
            raise ValueError(
                f"The codebook is to begin at {len(seeds)} latents, or at some that are not finite. Check that the "
                "training shapes are not empty and that the network's weights are finite."
            )
        places = _drawn(len(seeds), self.num_codes, self.settings.seed, 0).to(seeds.device)
        codes = seeds[places]
        if len(codes) < self.num_codes:  # fewer latents than codes: the rest lies close to some, and is revived in time
            generator = torch.Generator().manual_seed(self.settings.seed)
            more = torch.randint(len(seeds), (self.num_codes - len(codes),), generator=generator).to(seeds.device)
            noise = torch.randn(len(more), seeds.shape[1], generator=generator).to(seeds)
            spread = seeds.std(0, correction=0)
            codes = torch.cat([codes, seeds[more] + 0.01 * spread * noise])
        codes = self._placed(broadcast_from_first(codes))
        for _ in range(10 if self.settings.start == "kmeans" else 0):
            found = summed_over_processes(code_statistics(points, nearest_code_ids(points, codes), self.num_codes))
            means = found.sums / found.counts.clamp_min(1)[:, None]
            codes = self._placed(torch.where(found.counts[:, None] > 0, means, codes))
        codes = broadcast_from_first(codes)
        self.codes.copy_(codes)
        self.counts.fill_(1.0)
        self.sums.copy_(codes)
        self.started.fill_(True)

    @override
    @torch.no_grad()
    def learn(
        self, latents: Float[Tensor, "latents channels"], code_ids: Int[Tensor, " latents"], step: int
    ) -> Int[Tensor, ""]:
        points = self._points(latents.float())
        found = summed_over_processes(code_statistics(points, code_ids, self.num_codes))
        self.counts.lerp_(found.counts, 1 - self.settings.decay)
        if self.ema:
            self.sums.lerp_(found.sums, 1 - self.settings.decay)
            # Counts of codes long out of use fade below what can be divided by; these stay where they are.
            means = self.sums / self.counts.clamp_min(1e-12)[:, None]
            self.codes.copy_(self._placed(torch.where(self.counts[:, None] > 1e-6, means, self.codes)))
            self.codes.grad = None
        if self.settings.revive_below == 0 or step % self.settings.revive_every:
            return code_ids.new_zeros(())
        return self._revive(points, step)

    def _revive(self, points: Tensor, step: int) -> Tensor:
        """Moves codes that are hardly used to latents of the batch, each to another, and forgets what they were.

        Their running count becomes the mean one and their sum follows: with the old ones, the next update would take
        them back.
        """
        mean = self.counts.mean()
        dead = (self.counts < self.settings.revive_below * mean).nonzero()[:, 0]
        own = points[_drawn(len(points), CANDIDATES, self.settings.seed, step, _rank()).to(points.device)]
        candidates = torch.cat(gather_rows(own))
        fresh = candidates[_drawn(len(candidates), len(dead), self.settings.seed, step).to(points.device)]
        dead = dead[: len(fresh)]
        fresh = self._placed(fresh)
        self.codes[dead] = fresh
        self.counts[dead] = mean
        self.sums[dead] = fresh * mean
        return torch.tensor(len(dead), device=points.device)


class NormalisedQuantizer(CodebookQuantizer):
    """Codes and latents on a sphere of radius sqrt(channels), on which channels have a variance of 1 (ViT-VQGAN)."""

    @override
    def _points(self, latents: Tensor) -> Tensor:
        return self._placed(latents)

    @override
    def _placed(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=1) * math.sqrt(self.channels)

    @override
    def continuous(self, latents: Float[Tensor, "latents channels"]) -> Float[Tensor, "latents channels"]:
        return self._placed(latents)


class ProjectedQuantizer(CodebookQuantizer):
    """Codes of few channels, between two trained linear maps (ViT-VQGAN's factorised codes)."""

    def __init__(self, num_codes: int, channels: int, settings: QuantizerSettings) -> None:
        super().__init__(num_codes, channels, settings, ema=True, code_channels=settings.code_channels)
        self.into = nn.Linear(channels, settings.code_channels)
        self.out_of = nn.Linear(settings.code_channels, channels)

    @override
    @property
    def learns_by_distance(self) -> bool:
        return False

    @override
    def _points(self, latents: Tensor) -> Tensor:
        return self.into(latents)

    @override
    def _latents(self, points: Tensor) -> Tensor:
        return self.out_of(points)

    @override
    def continuous(self, latents: Float[Tensor, "latents channels"]) -> Float[Tensor, "latents channels"]:
        with torch.autocast(latents.device.type, enabled=False):
            return self.out_of(self.into(latents.float()))


class SimQuantizer(Quantizer):
    """Fixed random codes times a trained matrix: no code can die alone (SimVQ, arXiv 2411.02038)."""

    codes: Tensor

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__(num_codes, channels)
        self.register_buffer("codes", torch.randn(num_codes, channels) * channels**-0.5)
        self.matrix = nn.Linear(channels, channels, bias=False)

    @override
    @property
    def learns_by_distance(self) -> bool:
        return True

    @override
    def quantize(self, latents: Float[Tensor, "latents channels"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            codes = self.matrix(self.codes)
            code_ids = nearest_code_ids(latents.detach(), codes.detach())
            nearest = codes[code_ids]
            return Quantized(
                latents + (nearest - latents).detach(),
                code_ids,
                (nearest - latents.detach()).square().mean(1),
                (latents - nearest.detach()).square().mean(1),
            )

    @override
    def look_up(self, code_ids: Int[Tensor, " latents"]) -> Float[Tensor, "latents channels"]:
        with torch.autocast(code_ids.device.type, enabled=False):
            return self.matrix(self.codes[code_ids])


class FiniteScalarQuantizer(Quantizer):
    """Rounds few bounded channels to few values each; a code is the combination (FSQ, arXiv 2309.15505).

    There is no codebook to train, to start or to revive, and no loss but the decoder's.
    """

    def __init__(self, num_codes: int, channels: int, levels: tuple[int, ...]) -> None:
        if math.prod(levels) != num_codes:
            raise ValueError(
                f"fsq has levels {list(levels)}, whose product is {math.prod(levels)}, but num_embeddings is "
                f"{num_codes}. Make them equal: [8, 8, 8, 16] for 8192, [8, 8, 8, 4] for 2048."
            )
        super().__init__(num_codes, channels)
        self.into = nn.Linear(channels, len(levels))
        self.out_of = nn.Linear(len(levels), channels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), False)

    levels: Tensor
    strides: Tensor

    @override
    def quantize(self, latents: Float[Tensor, "latents channels"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bounded(latents.float())
            rounded = bounded + (bounded.round() - bounded).detach()
            digits = bounded.detach().round().long() + self.levels // 2
            none = bounded.new_zeros(len(bounded))
            return Quantized(self._decoded(rounded), (digits * self.strides).sum(1), none, none)

    @override
    def look_up(self, code_ids: Int[Tensor, " latents"]) -> Float[Tensor, "latents channels"]:
        with torch.autocast(code_ids.device.type, enabled=False):
            digits = code_ids[:, None] // self.strides % self.levels - self.levels // 2
            return self._decoded(digits.to(self.out_of.weight.dtype))

    @override
    def continuous(self, latents: Float[Tensor, "latents channels"]) -> Float[Tensor, "latents channels"]:
        with torch.autocast(latents.device.type, enabled=False):
            return self._decoded(self._bounded(latents.float()))

    def _bounded(self, latents: Tensor) -> Tensor:
        """Returns channels between the lowest and the highest digit, -(L // 2) and (L - 1) // 2, as the paper does."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(self.into(latents) + torch.atanh(offset / half)) * half - offset

    def _decoded(self, digits: Tensor) -> Tensor:
        return self.out_of(digits / (self.levels // 2))


def build_quantizer(num_codes: int, channels: int, settings: QuantizerSettings) -> Quantizer:
    """Returns the quantizer of the settings' kind."""
    if settings.kind == "sim":
        return SimQuantizer(num_codes, channels)
    if settings.kind == "fsq":
        return FiniteScalarQuantizer(num_codes, channels, settings.levels)
    if settings.kind == "l2":
        return NormalisedQuantizer(num_codes, channels, settings, ema=True)
    if settings.kind == "projection":
        return ProjectedQuantizer(num_codes, channels, settings)
    return CodebookQuantizer(num_codes, channels, settings, ema=settings.kind == "ema")


def _drawn(count: int, most: int, *seeds: int) -> Int[Tensor, " drawn"]:
    """Draws rows without replacement, on the CPU whatever the device."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))[:most]


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
