"""Text to CLIP features: from a table on disk, or by OpenCLIP's text tower. One interface."""

import abc
import difflib
import os
import pickle
import socket
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from datamodules.readers.atomic_files import replacing


class TextEncoder(abc.ABC):
    """Turns phrases into unit features in the space of the masks' features."""

    @abc.abstractmethod
    def encode(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        """Returns [Q, C] float32 unit embeddings on the CPU, in the order of the phrases."""


class TextEmbeddingTable(TextEncoder):
    """Embeddings computed once and kept in an ``.npz`` with ``phrases`` [Q] and ``embeddings`` [Q, C].

    No model is needed to look a phrase up; one that is not in the table is an error. Phrases are compared without
    regard to case and outer blanks.

    Args:
        path: The ``.npz`` file, such as ``<root>/text_embeddings.npz``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold the two arrays, or an embedding is NaN or zero.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} does not exist. Write it with write_text_embeddings, or encode prompts with "
                "OpenClipTextEncoder."
            )
        try:
            with np.load(self.path, allow_pickle=False) as content:
                phrases, embeddings = content["phrases"], content["embeddings"]
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path} cannot be read as a text table ({error}); needed: an .npz with 'phrases' (strings) and "
                "'embeddings' [phrases, channels]. Write it again."
            ) from error
        embeddings = embeddings.astype(np.float32)
        lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
        if embeddings.ndim != 2 or len(phrases) != len(embeddings) or not (np.isfinite(lengths) & (lengths > 0)).all():
            raise ValueError(
                f"{self.path}: {len(phrases)} phrases with embeddings {list(embeddings.shape)}; allowed: one finite "
                "embedding above zero for each phrase. Write it again."
            )
        self._embeddings = torch.from_numpy(embeddings / lengths)
        self._row_of = {_normal_form(str(phrase)): row for row, phrase in enumerate(phrases)}

    @property
    def phrases(self) -> tuple[str, ...]:
        """The phrases of the table, in lower case."""
        return tuple(self._row_of)

    @override
    def encode(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        """Looks phrases up.

        Raises:
            ValueError: If one is not in the table; names close ones and says how to add it.
        """
        missing = [phrase for phrase in phrases if _normal_form(phrase) not in self._row_of]
        if missing:
            close = {phrase: difflib.get_close_matches(_normal_form(phrase), self._row_of, n=3) for phrase in missing}
            listing = "; ".join(
                f"{phrase!r}" + (f" (close: {', '.join(map(repr, matches))})" if matches else "")
                for phrase, matches in close.items()
            )
            raise ValueError(
                f"{self.path} has no embedding of {listing}. Use one of its {len(self._row_of)} phrases, add the "
                "phrase to the table with write_text_embeddings, or encode prompts with OpenClipTextEncoder."
            )
        rows = [self._row_of[_normal_form(phrase)] for phrase in phrases]
        return self._embeddings[torch.tensor(rows, dtype=torch.long)]


def write_text_embeddings(
    path: str | Path, phrases: Sequence[str], embeddings: Float[Tensor, "phrases channels"]
) -> None:
    """Writes a table that :class:`TextEmbeddingTable` reads."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, phrases=np.array(list(phrases), dtype=np.str_), embeddings=embeddings.cpu().float().numpy())


def _normal_form(phrase: str) -> str:
    return phrase.strip().lower()


class OpenClipTextEncoder(TextEncoder):
    """OpenCLIP's text tower, loaded at the first phrase.

    The defaults are those of LangSplat's preprocessing, so features made by it match.

    Args:
        model_name: Architecture, one of ``open_clip.list_models()``.
        pretrained: Tag of the weights (downloaded once from the Hugging Face hub), or the path of a local file.
        device: Where the tower runs; results come back on the CPU.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-16",
        pretrained: str = "laion2b_s34b_b88k",
        device: str = "cpu",
    ) -> None:
        self.model_name = model_name
        self.pretrained = pretrained
        self.device = device
        self._model: torch.nn.Module | None = None

    @override
    def encode(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        """Tokenizes and encodes phrases with the model's own tokenizer.

        Raises:
            ValueError: If the architecture or the tag is unknown, or the file does not fit the architecture.
            FileNotFoundError: If the weights are neither a local file nor in reach.
        """
        import open_clip

        if self._model is None:
            self._model = load_open_clip(self.model_name, self.pretrained, self.device)
        tokens = open_clip.get_tokenizer(self.model_name)(list(phrases)).to(self.device)
        with torch.inference_mode():
            embeddings = self._model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(embeddings.float(), dim=-1).cpu().clone()


def load_open_clip(model_name: str, pretrained: str, device: str = "cpu") -> torch.nn.Module:
    """Loads an OpenCLIP model by tag or local file, in evaluation mode; checks first what can be checked offline.

    Raises:
        ValueError: If the architecture or the tag is unknown, or the file does not fit the architecture.
        FileNotFoundError: If the weights are neither a local file nor in reach.
    """
    import open_clip

    if model_name not in open_clip.list_models():
        close = difflib.get_close_matches(model_name, open_clip.list_models(), n=3)
        raise ValueError(f"model_name {model_name!r} is unknown to open_clip; close: {', '.join(close) or 'none'}.")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    is_file = Path(pretrained).is_file()
    if not is_file and pretrained not in tags:
        raise (FileNotFoundError if os.sep in pretrained or "." in pretrained else ValueError)(
            f"pretrained {pretrained!r} is neither a file nor a tag of {model_name}; allowed tags: "
            f"{', '.join(tags) or 'none'}. Give one, or the path of the downloaded weights."
        )
    config = {} if is_file else open_clip.get_pretrained_cfg(model_name, pretrained)
    weights = pretrained if is_file else _weights_of_tag(model_name, pretrained, config)
    try:
        model = open_clip.create_model(
            model_name, pretrained=weights, device=device, force_quick_gelu=config.get("quick_gelu", False)
        )
    except (RuntimeError, AssertionError, pickle.UnpicklingError, EOFError, KeyError) as error:  # all by open_clip
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{weights}: the weights do not fit {model_name}, or are damaged ({reason}). Give the model_name they were "
            "trained with, or download them again."
        ) from error
    return model.eval()


def _weights_of_tag(model_name: str, tag: str, config: dict) -> str:
    """Returns the file of a tag's weights from the hub's cache, or downloads it."""
    import huggingface_hub
    import open_clip

    repository, file = os.path.split(config.get("hf_hub", ""))
    for name in [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        cached = huggingface_hub.try_to_load_from_cache(repository, name) if repository else None
        if isinstance(cached, str):
            return cached
    reason = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else _unreachable(config)
    if reason is None:
        try:
            return open_clip.download_pretrained(config)
        except OSError as error:
            reason = f"the download failed: {error}"
    raise FileNotFoundError(
        f"The weights {tag!r} of {model_name} are not on this machine ({reason}). Connect once (without "
        "HF_HUB_OFFLINE=1), give the path of a local file as pretrained, or use a TextEmbeddingTable."
    )


def _unreachable(config: dict) -> str | None:
    """Says within seconds why the weights' server is out of reach, or None (the hub's own retries take a minute)."""
    if urllib.request.getproxies():
        return None
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if config.get("hf_hub") else config["url"]
    host = urllib.parse.urlsplit(address)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=3).close()
    except OSError as error:
        return f"{host.hostname} is out of reach: {error}"
    return None
