"""Images: archives read, layers on disk, and the rows that name them."""

from netstore.launcher.images.catalogue import Images
from netstore.launcher.images.formats import Format

__all__ = ["Format", "Images"]
