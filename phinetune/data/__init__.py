"""Rows of any format -> conversations -> (ids, mask) -> flat batches, with a ledger of every row."""

from phinetune.data.batches import FlatBatch, flatten, lay_out, supervised_tokens
from phinetune.data.example import Example
from phinetune.data.findings import Finding
from phinetune.data.fingerprint import chat_fingerprint
from phinetune.data.formats import Rejected, Row, to_row
from phinetune.data.ledger import Ledger, write_ledgers
from phinetune.data.plan import Plan, deal
from phinetune.data.prepare import Prepared, prepare
from phinetune.data.readers import read_rows
from phinetune.data.render import Rendered, Renderer
from phinetune.data.sources import is_table
from phinetune.data.store import Examples, Rows, row_to_json
from phinetune.data.template import CannotRender, ChatTemplate, writes_date

__all__ = [
    "CannotRender",
    "ChatTemplate",
    "Example",
    "Examples",
    "Finding",
    "FlatBatch",
    "Ledger",
    "Plan",
    "Prepared",
    "Rejected",
    "Rendered",
    "Renderer",
    "Row",
    "Rows",
    "chat_fingerprint",
    "deal",
    "flatten",
    "is_table",
    "lay_out",
    "prepare",
    "read_rows",
    "row_to_json",
    "supervised_tokens",
    "to_row",
    "write_ledgers",
    "writes_date",
]
