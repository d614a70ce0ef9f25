"""What a person reads: a run's summary, its pictures, the table of many runs, and the cards of methods.

Numbers from a mini or a nano say so wherever they are shown.
"""

from core.report.cards import arguments, card, card_json, methods_json, methods_table, sections
from core.report.plots import MOST, confusion, curves, gallery
from core.report.summary import caution, reasons, summary
from core.report.table import table
from core.report.text import (
    aligned,
    bytes_text,
    data_named,
    duration_text,
    is_repetition,
    methods_named,
    origin_of,
    scalars,
    trained,
    value_text,
)

__all__ = ["MOST", "aligned", "arguments", "bytes_text", "card", "card_json", "caution", "confusion", "curves",
           "data_named", "duration_text", "gallery", "is_repetition", "methods_json", "methods_named", "methods_table",
           "origin_of", "reasons", "scalars", "sections", "summary", "table", "trained", "value_text"]
