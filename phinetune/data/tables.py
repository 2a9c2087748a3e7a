"""Arrow's batches as records: what a table's columns make of rows is taken back.

A table gives every row all fields that any row has, as nulls; it may keep JSON as text of a type of its own, which is
what `datasets` does with fields of mixed types; and its dates may lie beyond those that Python knows.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from phinetune.data.sources import DataFile
from phinetune.errors import DataError

MOST_ROWS, MOST_BYTES = 500, 8 << 20  # made into Python's objects at once

Convert = Callable[[Any], Any]


def table_records(batches: Iterable[Any], file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a table's parts, numbered from 1.

    Raises:
        DataError: for a column that stands twice.
    """
    before = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file may end the process where it is read unchecked
        names = batch.schema.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(file.name, f"has the column {twice!r} twice", "give each column a name of its own")
        converts = {field.name: _convert(field.type) for field in batch.schema}
        at_once = min(MOST_ROWS, max(1, MOST_BYTES * len(batch) // max(batch.nbytes, 1)))
        for start in range(0, len(batch), at_once):
            part = batch.slice(start, at_once)
            columns = [
                map(converts[name] or _as_it_is, _written(column).to_pylist())
                for name, column in zip(names, part.columns, strict=True)
            ]
            for number, values in enumerate(zip(*columns, strict=True), before + start + 1):
                yield number, dict(zip(names, values, strict=True))
        before += len(batch)


def _written(column: Any) -> Any:
    """A column of dates as text: Python knows the years 1 to 9999."""
    import pyarrow as pa
    from pyarrow import compute, types

    if types.is_timestamp(column.type):
        column = compute.cast(column, pa.timestamp(column.type.unit))  # whatever the zone is called
    is_date = types.is_timestamp(column.type) or types.is_date(column.type)
    return compute.cast(column, pa.string()) if is_date else column


def _as_it_is(value: Any) -> Any:
    return value


def _convert(kind: Any) -> Convert | None:
    """What makes a row's own value of a column's, by its type; None where they are the same."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if types.is_map(kind):
        of_item = _convert(kind.item_type) or _as_it_is
        return lambda pairs: None if pairs is None else {key: of_item(item) for key, item in pairs}
    if types.is_struct(kind):
        of_field = {field.name: _convert(field.type) or _as_it_is for field in kind}
        return lambda held: (
            None if held is None else {n: of_field[n](value) for n, value in held.items() if value is not None}
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_value = _convert(kind.value_type)
        if of_value is None:
            return None
        return lambda items: None if items is None else [of_value(item) for item in items]
    return None
