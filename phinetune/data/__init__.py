"""Rows of any format -> conversations -> (ids, mask) -> flat batches, with a ledger of every row."""

from phinetune.data.batches import FlatBatch, flatten, lay_out, plan_run, supervised_tokens
from phinetune.data.ledger import Ledger, write_ledgers
from phinetune.data.prepare import Prepared, prepare
from phinetune.data.render import CannotRender, Example, Renderer
from phinetune.data.sources import Rejected, Row, check_row, read_rows

__all__ = [
    "CannotRender",
    "Example",
    "FlatBatch",
    "Ledger",
    "Prepared",
    "Rejected",
    "Renderer",
    "Row",
    "check_row",
    "flatten",
    "lay_out",
    "plan_run",
    "prepare",
    "read_rows",
    "supervised_tokens",
    "write_ledgers",
]
