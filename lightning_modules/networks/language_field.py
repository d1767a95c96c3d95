"""The language-Gaussian codebook field (LangSplatV2, arXiv 2507.07136): sparse codes per Gaussian over a codebook."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.functional.language_field.sparse_codes import SparseCodes, group_channels, top_k_softmax

# Stands for a coefficient of zero in logits: its softmax is below float32's resolution beside any real coefficient, yet
# above underflow, so that exactly ``top_k`` coefficients stay different from zero as LangSplatV2's reader expects.
NO_COEFFICIENT_LOGIT = -30.0


class LanguageField(nn.Module):
    """Sparse coefficients of every Gaussian at every level, and the codebooks they mix.

    With ``support="fixed"`` a Gaussian stores its ``top_k`` entries per level and layer and their logits (what lifting
    finds); memory is ``top_k`` numbers per group. With ``support="free"`` it stores a logit for every entry and the
    largest ``top_k`` are in use (LangSplatV2's form); memory is ``codebook_size`` numbers per group.

    Args:
        num_gaussians: N, Gaussians of the scene.
        num_levels: Levels of granularity that are learned together.
        num_layers: Residual layers of a codebook.
        codebook_size: Entries of one layer.
        feature_dim: Channels of an entry, 512 for CLIP ViT-B/16.
        top_k: Coefficients per Gaussian, level and layer.
        support: Whether the entries a Gaussian uses are fixed or follow its logits.
        share_codebook: One codebook for all levels, or one for each as LangSplatV2 trains.
    """

    entries: Int[Tensor, "gaussians groups top_k"]
    covered: Bool[Tensor, "gaussians levels"]
    reliable: Bool[Tensor, " gaussians"]
    active_layers: Int[Tensor, ""]
    initialised: Bool[Tensor, ""]

    def __init__(
        self,
        num_gaussians: int,
        num_levels: int,
        *,
        num_layers: int = 1,
        codebook_size: int = 64,
        feature_dim: int = 512,
        top_k: int = 4,
        support: Literal["fixed", "free"] = "fixed",
        share_codebook: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= codebook_size:
            raise ValueError(f"top_k must be between 1 and {codebook_size} (codebook_size), got {top_k}.")
        num_groups = num_levels * num_layers
        if num_groups * codebook_size > torch.iinfo(torch.int16).max:
            raise ValueError(
                f"levels x vq_layer_num x codebook_size = {num_groups * codebook_size} channels, but a channel id has "
                f"16 bits ({torch.iinfo(torch.int16).max}). Use a smaller codebook or fewer layers."
            )
        self.num_levels, self.num_layers, self.codebook_size, self.top_k = num_levels, num_layers, codebook_size, top_k
        self.feature_dim, self.support = feature_dim, support
        # A parameter per layer: a layer that waits, or is finished, can be left out of the optimizer's step.
        num_codebooks = 1 if share_codebook else num_levels
        self.codebook_layers = nn.ParameterList(
            torch.zeros(num_codebooks, codebook_size, feature_dim) for _ in range(num_layers)
        )
        stored = top_k if support == "fixed" else codebook_size
        self.logit_layers = nn.ParameterList(torch.zeros(num_gaussians, num_levels, stored) for _ in range(num_layers))
        if support == "fixed":
            # 32 bits, though 16 would do: gloo cannot send 16-bit integers between processes.
            self.register_buffer("entries", torch.zeros(num_gaussians, num_groups, top_k, dtype=torch.int32))
        self.register_buffer("covered", torch.ones(num_gaussians, num_levels, dtype=torch.bool))
        self.register_buffer("reliable", torch.ones(num_gaussians, dtype=torch.bool))
        self.register_buffer("active_layers", torch.tensor(num_layers))
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def num_gaussians(self) -> int:
        """N."""
        return self.covered.shape[0]

    @property
    def codebooks(self) -> Float[Tensor, "codebooks layers size channels"]:
        """The entries: one codebook if it is shared by the levels, else one per level."""
        return torch.stack(list(self.codebook_layers), dim=1)

    @property
    def logits(self) -> Float[Tensor, "gaussians groups stored"]:
        """The coefficients before the softmax, of all groups; a group is a layer of a level."""
        return torch.stack(list(self.logit_layers), dim=2).flatten(1, 2)

    @property
    def num_channels(self) -> int:
        """Channels of the weight map of all levels."""
        return self.num_levels * self.num_layers * self.codebook_size

    def codes(self, *, gated: bool = True) -> SparseCodes:
        """Returns the coefficients that are splatted.

        Args:
            gated: Leave out the Gaussians that the reliability gate dropped; they still blend colour and alpha.

        Returns:
            Codes whose values sum to one in each level and layer, or to zero where a Gaussian carries no language.
        """
        if self.support == "free":
            entries, values = top_k_softmax(self.logits, self.top_k)
        else:
            entries, values = self.entries, self.logits.softmax(dim=-1)
        carries = self.covered & self.reliable[:, None] if gated else self.covered
        values = values * carries.repeat_interleave(self.num_layers, dim=1)[..., None]
        return group_channels(entries, values, self.codebook_size)

    def level_codebook(self, level: int) -> Float[Tensor, "entries channels"]:
        """Returns the [layers * size, C] codebook of one level, its inactive layers set to zero.

        While layers are learned one after the other, a finished layer stays as it is: it gets no gradient.
        """
        codebook = torch.stack([entries[level if len(entries) > 1 else 0] for entries in self.codebook_layers])
        layer = torch.arange(self.num_layers, device=codebook.device)[:, None, None]
        if self.training:
            codebook = torch.where(layer < self.active_layers - 1, codebook.detach(), codebook)
        return (codebook * (layer < self.active_layers)).flatten(0, 1)

    def level_weights(
        self, weight_map: Float[Tensor, "pixels channels"], level: int
    ) -> Float[Tensor, "pixels level_channels"]:
        """Returns one level's part of a weight map of all levels, its finished layers detached while training."""
        size = self.num_layers * self.codebook_size
        weights = weight_map[:, level * size : (level + 1) * size]
        if not self.training or self.num_layers == 1:
            return weights
        layer = torch.arange(size, device=weights.device) // self.codebook_size
        return torch.where(layer < self.active_layers - 1, weights.detach(), weights)

    @torch.no_grad()
    def set_lifted(
        self,
        codebooks: Float[Tensor, "codebooks layers size channels"],
        entries: Int[Tensor, "gaussians groups top_k"],
        values: Float[Tensor, "gaussians groups top_k"],
        reliable: Bool[Tensor, " gaussians"],
    ) -> None:
        """Starts the field from lifted codes: values of each group sum to one, or to zero where nothing was seen."""
        seen = values.sum(-1) > 0
        logits = values.log().clamp_min(NO_COEFFICIENT_LOGIT)
        if self.support == "fixed":
            self.entries.copy_(entries)
        else:
            # Entries may repeat where coefficients are zero; adding up keeps the entry's own coefficient.
            dense = values.new_zeros(*values.shape[:2], self.codebook_size)
            logits = dense.scatter_add_(2, entries.long(), values).log().clamp_min(NO_COEFFICIENT_LOGIT)
        for layer, stored in enumerate(self.logit_layers):
            stored.copy_(logits.unflatten(1, (self.num_levels, self.num_layers))[:, :, layer])
        self.covered.copy_(seen.unflatten(1, (self.num_levels, self.num_layers)).any(-1))
        self._set_common(codebooks, reliable)

    @torch.no_grad()
    def set_zeros(
        self, codebooks: Float[Tensor, "codebooks layers size channels"], reliable: Bool[Tensor, " gaussians"]
    ) -> None:
        """Starts the field as LangSplatV2 does: logits of zero, every Gaussian on the same arbitrary entries."""
        if self.support == "fixed":
            raise ValueError('Zero logits have no entries to fix; set support="free" with initialisation="zeros".')
        for stored in self.logit_layers:
            stored.zero_()
        self.covered.fill_(True)
        self._set_common(codebooks, reliable)

    @torch.no_grad()
    def set_logits(
        self,
        codebooks: Float[Tensor, "codebooks layers size channels"],
        logits: Float[Tensor, "gaussians groups size"],
    ) -> None:
        """Starts the field from logits of every entry, such as LangSplatV2 trained; every Gaussian has language then.

        Raises:
            ValueError: If the field keeps ``top_k`` entries alone.
        """
        if self.support == "fixed":
            raise ValueError('A field of fixed entries has no place for logits of all entries; set support="free".')
        for layer, stored in enumerate(self.logit_layers):
            stored.copy_(logits.unflatten(1, (self.num_levels, self.num_layers))[:, :, layer])
        self.covered.fill_(True)
        self._set_common(codebooks, torch.ones_like(self.reliable))

    def _set_common(self, codebooks: Tensor, reliable: Tensor) -> None:
        for layer, entries in enumerate(self.codebook_layers):
            entries.copy_(codebooks[:, layer].expand_as(entries))
        self.reliable.copy_(reliable)
        self.initialised.fill_(True)
