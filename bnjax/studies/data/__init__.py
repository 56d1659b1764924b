"""Data sets as arrays, and random variations of images."""

from bnjax.studies.data.sets import DataError, Dataset, Split, atomic_file, blank, blobs, circles, images, pixels

__all__ = ["DataError", "Dataset", "Split", "atomic_file", "blank", "blobs", "circles", "images", "pixels"]
