"""Reads a column of text from parquet, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigError, InvalidValue, one_line, require
from datamodules.preparation.bounds import Bounds
from datamodules.preparation.optional import import_optional

ROWS = 64  # decoded at a time
ROW_BYTES = 16  # that a row counts at least: a million rows of nothing take no room in a file, but time


def texts_of_table(path: Path, column: str, bounds: Bounds) -> Iterator[bytes | None]:
    """Yield the texts of a column, None where one is null; bytes that are no UTF-8 come as they are.

    A text that many rows share is stored once, and stays so in memory: what a small file can become is bounded here,
    before it is there; of a file whose footer understates that, once its first page is (docs/threat_model.md).

    Raises:
        ConfigError: it is no parquet, it has no such column, the column holds no text, or a bound is passed.
    """
    arrow, parquet = import_optional("pyarrow", "pyarrow"), import_optional("pyarrow.parquet", "pyarrow")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            require(column in names, "text_field", column, f"a column of {path}: one of {', '.join(names)}")
            require(names.count(column) == 1, "text_field", column, f"a name that one column of {path} has")
            kind = table.schema_arrow.field(column).type
            require(_is_text(arrow, kind), "text_field", column, f"a column of text; that of {path} is {kind}")
            shared = _check_sizes(table.metadata, column, path, bounds)
        # Other encodings than these two cannot be kept as a dictionary: their rows are decoded one by one.
        with parquet.ParquetFile(path, read_dictionary=[column] if shared else None) as table:
            produced, size = 0, path.stat().st_size
            for batch in table.iter_batches(batch_size=ROWS if shared else 1, columns=[column]):
                for value in _values(arrow, batch.column(0)):
                    length = 0 if value is None else value.size
                    bounds.check_record(length, str(path), "a text")
                    produced += max(length, ROW_BYTES)
                    bounds.check_expansion(produced, size, str(path))
                    yield None if value is None else value.to_pybytes()
    except (arrow.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, ConfigError):  # which is a ValueError
            raise
        raise InvalidValue("input", str(path), f"cannot be read as parquet ({one_line(error)})") from error


def _is_text(arrow: Any, kind: Any) -> bool:
    """Return whether a type holds text, or the bytes of one: what writes parquet does not always say which."""
    types = arrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (types.is_string, types.is_large_string, types.is_string_view)
    return any(is_kind(kind) for is_kind in (*kinds, types.is_binary, types.is_large_binary, types.is_binary_view))


def _check_sizes(metadata: Any, column: str, path: Path, bounds: Bounds) -> bool:
    """Hold the sizes that a table claims against the bounds; returns whether dictionaries can be kept."""
    shared = True
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            if chunk.path_in_schema == column:
                bounds.check_expansion(chunk.total_uncompressed_size, chunk.total_compressed_size, str(path))
                shared = shared and not any("DELTA" in encoding for encoding in chunk.encodings)
    return shared


def _values(arrow: Any, array: Any) -> Iterator[Any]:
    """Yield the buffer of each text; None: null."""
    if not arrow.types.is_dictionary(array.type):
        for scalar in _as_bytes(arrow, array):
            yield scalar.as_buffer()
        return
    texts = _as_bytes(arrow, array.dictionary)
    for index in array.indices.to_pylist():
        yield None if index is None else texts[index].as_buffer()


def _as_bytes(arrow: Any, array: Any) -> Any:
    """Return the same array of bytes, so that nothing has to be UTF-8."""
    kind = array.type
    if arrow.types.is_large_string(kind):
        return array.cast(arrow.large_binary())
    if arrow.types.is_string(kind):
        return array.cast(arrow.binary())
    if arrow.types.is_string_view(kind):
        return array.cast(arrow.binary_view())
    return array
