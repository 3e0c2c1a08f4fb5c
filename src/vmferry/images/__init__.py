"""Disk images: opened, activated, inactivated; one owner at a time, by locks that QEMU respects."""

from .image import Extent, Image
from .opening import open_image
from .together import activate_all, inactivate_all

__all__ = ["Extent", "Image", "activate_all", "inactivate_all", "open_image"]
