"""Tar archives (POSIX.1-2001 pax, GNU) read as a stream, and unpacked without leaving the root.

Images and volumes come from strangers: names are resolved by openat2 with the target as root, a name with ".." is
refused, nothing is written through a link that leads outside, and damage is reported with its offset.
"""

from netstore.archive.reader import Entry, Reader
from netstore.archive.streams import Source, compressed, decompressed
from netstore.archive.writer import Unpacked, unpack

__all__ = ["Entry", "Reader", "Source", "Unpacked", "compressed", "decompressed", "unpack"]
