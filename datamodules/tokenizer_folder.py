"""The tokenizer in a folder of transformers: its tokenizer.json, and the token that ends a text there."""

from pathlib import Path
from typing import Any

from core.errors import ConfigError, InvalidValue
from core.untrusted import Untrusted, read_bytes, read_json
from datamodules.tokenizer_file import LARGEST_FILE, BadTokenizer, load_library, vocabulary_size
from datamodules.tokenizers import Tokenizer

FILE = "tokenizer.json"
PROBE = """The quick brown fox, 1234.5678 times: <tag attr='x'> naïve café Ωmega 漢字 かな кириллица \
def function(self, value=None):\n\treturn [value ** 2 for _ in range(10)]  # don't\n"""
"""A text that two tokenizers cut in two ways unless they are the same."""


def read_tokenizer_file(folder: Path, field: str) -> bytes | None:
    """Return the content of a folder's tokenizer.json; None: it has none.

    Raises:
        ConfigError: it cannot be read; names the field.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return read_bytes(path, LARGEST_FILE)
    except Untrusted as error:
        raise InvalidValue(field, str(folder), str(error)) from error


def usual_end(folder: Path, library: Any, field: str) -> str | None:
    """Return the token that ends a text: eos_token of tokenizer_config.json, or the first eos_token_id of config.json.

    Args:
        folder: with these files, if any.
        library: its tokenizer, as tokenizer_file.py opens it.
        field: of the folder, for the message.

    Returns:
        The token; None: no file says it.

    Raises:
        ConfigError: a file cannot be read, or names a token that the tokenizer has not.
    """
    token = _content(folder / "tokenizer_config.json", field).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
        if not isinstance(token, str) or library.token_to_id(token) is None:
            reason = f"eos_token={str(token)[:80]!r} of its tokenizer_config.json is no token of its {FILE}"
            raise InvalidValue(field, str(folder), reason)
        return token
    identity = _content(folder / "config.json", field).get("eos_token_id")
    identity = identity[0] if isinstance(identity, list) and identity else identity
    if identity is None:
        return None
    known = type(identity) is int and 0 <= identity < vocabulary_size(library)
    found: str | None = library.id_to_token(identity) if known else None
    if found is None:
        reason = f"eos_token_id={str(identity)[:80]} of its config.json is no token of its {FILE}"
        raise InvalidValue(field, str(folder), reason)
    return found


def check_tokenizer(source: str, tokenizer: Tokenizer) -> None:
    """Refuse weights whose folder says that their tokens are others than the data's.

    Args:
        source: what init_from names; where it is no folder with a tokenizer.json, nothing is known.
        tokenizer: of the data.

    Raises:
        ConfigError: it makes other tokens.
    """
    content = read_tokenizer_file(Path(source), "init_from")
    if content is None or getattr(tokenizer, "content", None) == content:
        return
    try:
        library = load_library(content)
    except ModuleNotFoundError as error:
        reason = "tokenizers is not installed: pip install -r requirements-data.txt"
        raise InvalidValue("init_from", source, reason) from error
    except BadTokenizer as error:
        raise InvalidValue("init_from", source, f"its {FILE}: {error}") from error
    theirs = (vocabulary_size(library), library.encode(PROBE, add_special_tokens=False).ids)
    if theirs != (tokenizer.vocab_size, tokenizer.encode(PROBE.encode()).tolist()):
        valid = f"weights for the data's tokens, {tokenizer.name}: its {FILE} makes others"
        raise ConfigError("init_from", source, f"{valid} (python -m tools.prepare tokenizer={source} makes such data)")


def _content(path: Path, field: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except Untrusted as error:
        raise InvalidValue(field, str(path.parent), str(error)) from error
    return content if isinstance(content, dict) else {}
