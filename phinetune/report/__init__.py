"""A run as a page: report.html of one, a comparison of several; and the model card."""

from phinetune.report.card import model_card
from phinetune.report.page import REPORT, write_comparison, write_report
from phinetune.report.run import ABOUT, Run, read_run

__all__ = ["ABOUT", "REPORT", "Run", "model_card", "read_run", "write_comparison", "write_report"]
