"""report.html: one file without scripts or further files, for readers who do not train models."""

from engine.report.data import GalleryItem, ReportData
from engine.report.gallery import build_gallery
from engine.report.html import write_report

__all__ = ["GalleryItem", "ReportData", "build_gallery", "write_report"]
