"""Text to token ids and back."""

import numpy as np
import numpy.typing as npt


class ByteTokenizer:
    """One token a byte (ids 0 to 255), and an end-of-document token (256). Needs no vocabulary file."""

    name = "byte"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: bytes) -> npt.NDArray[np.uint16]:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: list[int]) -> str:
        """Invalid UTF-8 becomes the replacement character; a document's end becomes a form feed."""
        return b"".join(b"\f" if token >= 256 else bytes([token]) for token in tokens).decode("utf-8", "replace")
