"""Text to CLIP features: from a table on disk, or by OpenCLIP's text tower. One interface."""

import abc
import difflib
import hashlib
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from datamodules.readers.atomic_files import replacing
from lightning_modules.functional.open_clip_loading import load_open_clip


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
    """OpenCLIP's text tower, loaded at the first phrase that was never encoded before.

    The defaults are those of LangSplat's preprocessing, so features made by it match.

    Args:
        model_name: Architecture, one of ``open_clip.list_models()``.
        pretrained: Tag of the weights (downloaded once from the Hugging Face hub), or the path of a local file.
        device: Where the tower runs; results come back on the CPU.
        cache: Folder that keeps what was encoded, a file per model and weights (a tag, or the content of the file), so
            that the next run need not load the tower. Null keeps nothing.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-16",
        pretrained: str = "laion2b_s34b_b88k",
        device: str = "cpu",
        cache: str | Path | None = "data/text_embeddings",
    ) -> None:
        self.model_name = model_name
        self.pretrained = pretrained
        self.device = device
        self.cache = None if cache is None else Path(cache)
        self._model: torch.nn.Module | None = None

    @override
    def encode(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        """Looks phrases up in the cache, and tokenizes and encodes the others with the model's own tokenizer.

        Raises:
            ValueError: If the architecture or the tag is unknown, or the file does not fit the architecture.
            FileNotFoundError: If the weights are neither a local file nor in reach.
        """
        if self.cache is None:
            return self._encode(phrases)
        file = self.cache / f"{_as_file_name(self.model_name)}_{weights_identity(self.pretrained)}.npz"
        kept = read_kept_embeddings(file)
        missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in kept]
        if missing:
            kept |= zip(missing, self._encode(missing), strict=True)
            kept = {**read_kept_embeddings(file), **kept}  # another process may have added some
            write_text_embeddings(file, list(kept), torch.stack(list(kept.values())))
        return torch.stack([kept[phrase] for phrase in phrases])

    def _encode(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        import open_clip

        if self._model is None:
            self._model = load_open_clip(self.model_name, self.pretrained, self.device)
        tokens = open_clip.get_tokenizer(self.model_name)(list(phrases)).to(self.device)
        with torch.inference_mode():
            embeddings = [self._model.encode_text(block) for block in tokens.split(256)]  # type: ignore[operator]
        return F.normalize(torch.cat(embeddings).float(), dim=-1).cpu().clone()


def weights_identity(pretrained: str) -> str:
    """Returns what tells weights from others in the name of a file: a tag, or the digest of a file's content."""
    if not Path(pretrained).is_file():
        return _as_file_name(pretrained)
    with Path(pretrained).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_kept_embeddings(path: Path) -> dict[str, Float[Tensor, " channels"]]:
    """Returns the embeddings of a cache by phrase, each letter as it was encoded; none from an unusable file."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as content:
            phrases, embeddings = content["phrases"], torch.from_numpy(content["embeddings"])
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        rank_zero_warn(f"{path} cannot be read ({error}); its phrases are encoded again.")
        return {}
    return dict(zip(map(str, phrases), embeddings, strict=True))


def _as_file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
